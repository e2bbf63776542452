"""fp8-eval's tasks on the example's BF16 engine against transformers; their data, statistics and gates."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import evaluation_data
import numpy as np
import pytest
import rank_jobs
import torch
import transformers

from fp8.runtime.llm import LLM
from fp8.runtime.peers import share
from fp8.runtime.request import RequestError
from fp8.scripts import evaluate
from fp8.scripts.evaluation import statistics
from fp8.scripts.evaluation.models import Engine
from fp8.scripts.evaluation.tasks import multiple_choice, passkey, rouge

MODEL = evaluation_data.MODEL
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return evaluation_data.build_engine(tmp_path_factory.mktemp("engines") / "engine")


@pytest.fixture(scope="module")
def engine(engine_dir: Path) -> Engine:
    return Engine(LLM(engine_dir, "cpu"))


@pytest.fixture(scope="module")
def mmlu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two subjects in MMLU's directories."""
    directory = tmp_path_factory.mktemp("mmlu")
    for seed, (subject, count) in enumerate({"next_line": 14, "odd_one": 6}.items()):
        evaluation_data.write_csv(directory / "test" / f"{subject}_test.csv", count, seed=seed)
        evaluation_data.write_csv(directory / "dev" / f"{subject}_dev.csv", 3, seed=seed + 10)
    return directory


@pytest.fixture(scope="module")
def summaries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return evaluation_data.write_summaries(tmp_path_factory.mktemp("rouge") / "functions.jsonl", 10)


def run(engine: Path, task: str, *flags: object) -> int:
    return evaluate.main(["--engine_dir", str(engine), "--task", task, "--device", "cpu", *map(str, flags)])


# --- the tasks against transformers ---


def test_multiple_choice_agrees_with_transformers(
    engine_dir: Path, mmlu: Path, tmp_path: Path, capsys: Captured
) -> None:
    output = tmp_path / "result.json"
    flags = ("--data", mmlu, "--num_shots", 2, "--output", output, "--max_regression", 0.05)
    assert run(engine_dir, "mmlu", *flags, "--reference", MODEL) == 0, capsys.readouterr().err
    result = json.loads(output.read_text())
    assert result["task"] == "multiple_choice" and result["items"] == 20
    low, high = result["confidence_interval"]
    assert low <= result["accuracy"] == result["correct"] / 20 <= high
    subjects = result["subjects"]
    assert {n: s["items"] for n, s in subjects.items()} == {"next_line": 14, "odd_one": 6}
    assert result["macro_accuracy"] == pytest.approx(sum(s["accuracy"] for s in subjects.values()) / 2)
    assert abs(result["reference"]["difference"]) <= 1 / 20 and result["reference"]["same_choice"] >= 19 / 20
    assert [t["text"] for t in result["choice_tokens"].values()] == [" A", " B", " C", " D"]
    assert "accuracy" in capsys.readouterr().out


@torch.inference_mode()
def test_the_choice_is_the_likeliest_letter_after_the_prompt(engine: Engine, mmlu: Path) -> None:
    """Text to token by hand, through transformers alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    args = evaluate.parser().parse_args(["--engine_dir", "", "--data", str(mmlu), "--subjects", "odd_one"])
    task = multiple_choice.Task(args, engine)
    outcomes = task.run(engine, task.items, lambda _: None)
    letters = [tokenizer.encode(f" {letter}", add_special_tokens=False)[0] for letter in "ABCD"]
    for item, outcome in zip(task.items, outcomes, strict=True):
        text = tokenizer.decode(item.prompt)
        assert text.startswith("The following are multiple choice questions (with answers) about  odd one.\n\n")
        assert text.count("\nAnswer: ") == 3 and text.endswith("\nAnswer:")
        expected = model(torch.tensor([item.prompt])).logits[0, -1].log_softmax(0)[letters]
        assert outcome.logprobs == pytest.approx(expected.tolist(), abs=0.05)
        assert outcome.chosen == np.argmax(outcome.logprobs)


def test_rouge_agrees_with_transformers(engine_dir: Path, summaries: Path, tmp_path: Path, capsys: Captured) -> None:
    output = tmp_path / "result.json"
    keys = ("--document_key", "code", "--summary_key", "doc", "--prompt_template", '{document}\n    """')
    flags = ("--data", summaries, *keys, "--max_output_len", 16, "--output", output)
    assert run(engine_dir, "rouge", *flags, "--reference", MODEL) == 0, capsys.readouterr().err
    result = json.loads(output.read_text())
    reference = result["reference"]
    assert result["items"] == 10 and result["accuracy"] == result["rouge1"]["f1"] > 0
    assert reference["same_text"] >= 0.7  # bf16 may prefer the other of two tokens that are as likely
    assert abs(reference["difference"]) < 0.05 and 0 < reference["p_value"] <= 1
    low, high = result["confidence_interval"]
    assert low < result["accuracy"] < high and "chance" in result


def test_rouge_is_that_of_rouge_score(engine: Engine, summaries: Path) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    flags = ["--data", str(summaries), "--document_key", "code", "--summary_key", "doc"]
    args = evaluate.parser().parse_args(["--engine_dir", "", *flags])
    task = rouge.Task(args, engine)
    texts = [f"Return the {item.summary}" for item in task.items[:5]] + ["", "None", "a", "b", "c"]
    expected = [
        RougeScorer(["rougeL"], True).score(i.summary, t)["rougeL"][2] for i, t in zip(task.items, texts, strict=True)
    ]
    assert task.figures(texts)["rougeL"]["f1"] == pytest.approx(sum(expected) / 10)


def test_passkey_prompts_have_the_asked_length_and_depth(engine: Engine) -> None:
    flags = ["--lengths", "300", "700", "--depths", "0", "0.5", "1", "--repeats", "2", "--seed", "4"]
    args = evaluate.parser().parse_args(["--engine_dir", "", "--task", "passkey", *flags])
    task = passkey.Task(args, engine)
    assert len(task.items) == 12 and len({item.key for item in task.items}) == 2
    filler = len(engine.tokenizer.encode(passkey.FILLER))
    for item in task.items:
        assert item.length - filler - 8 <= len(item.prompt) <= item.length
        text = engine.tokenizer.decode(item.prompt)
        before, after = text.split(passkey.KEY.format(key=item.key))
        assert before.count(passkey.FILLER) == pytest.approx(item.depth * text.count(passkey.FILLER), abs=0.5)
        assert after.endswith(passkey.QUESTION)
    assert [i.key for i in passkey.Task(args, engine).items] == [i.key for i in task.items]


def test_passkey_agrees_with_transformers(engine_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    flags = ("--lengths", 200, "--depths", 0, 1, "--repeats", 2, "--output", output)
    assert run(engine_dir, "passkey", *flags, "--reference", MODEL) == 0
    result = json.loads(output.read_text())
    assert result["items"] == 4 and len(result["cells"]) == 2 and result["reference"]["same_text"] >= 0.5
    assert result["accuracy"] == result["reference"]["accuracy"]


@pytest.mark.parametrize(
    ("text", "number"),
    [(" 12345. Remember", "12345"), ("12345", "12345"), ("It is 1", ""), ("123456", "123456"), ("", "")],
)
def test_the_answer_is_the_number_that_it_begins_with(text: str, number: str) -> None:
    assert passkey._number(text) == number


# --- gates and statistics ---


def test_a_missed_accuracy_is_a_failure_and_the_result_is_written(
    engine_dir: Path, mmlu: Path, tmp_path: Path, capsys: Captured
) -> None:
    output = tmp_path / "result.json"
    assert run(engine_dir, "mmlu", "--data", mmlu, "--min_accuracy", 0.99, "--output", output) == 2
    assert "less than 0.99" in capsys.readouterr().err
    assert json.loads(output.read_text())["warnings"] == []


def test_a_gate_that_chance_passes_says_so(engine_dir: Path, mmlu: Path, tmp_path: Path, capsys: Captured) -> None:
    output = tmp_path / "result.json"
    flags = ("--data", mmlu, "--max_items", 3, "--min_accuracy", 0.3, "--output", output)
    assert run(engine_dir, "mmlu", *flags) in (0, 2)
    assert "--min_accuracy 0.3 is no gate" in capsys.readouterr().err
    result = json.loads(output.read_text())
    assert result["items"] == 6 and len(result["warnings"]) == 1


def test_a_regression_needs_more_than_one_unlucky_answer() -> None:
    scipy = pytest.importorskip("scipy.stats")
    for worse, better in ((1, 0), (5, 0), (9, 2), (40, 21), (3, 7), (0, 0)):
        expected = scipy.binomtest(worse, worse + better, 0.5, "greater").pvalue if worse + better else 1.0
        assert statistics.sign_test(worse, better) == pytest.approx(expected)


def test_intervals_are_those_of_scipy() -> None:
    scipy = pytest.importorskip("scipy.stats")
    for k, n in ((0, 7), (3, 10), (500, 1000), (14042, 14042)):
        interval = scipy.binomtest(k, n).proportion_ci(method="wilson")
        assert statistics.wilson(k, n) == pytest.approx([interval.low, interval.high], abs=1e-12)
    for n in (4, 100, 14042):
        assert statistics.chance_limit(n, 0.25) == scipy.binom.ppf(0.975, n, 0.25) / n


def test_the_bootstrap_agrees_with_a_normal_where_there_are_many() -> None:
    source = np.random.default_rng(3)
    losses = source.normal(0.03, 0.5, 400)
    z = losses.mean() / (losses.std() / 20)
    assert statistics.paired_bootstrap(losses) == pytest.approx(0.5 * math.erfc(z / math.sqrt(2)), abs=0.02)
    assert statistics.paired_bootstrap([0.0] * 9) == 1
    assert statistics.paired_bootstrap([1.0, 2.0, 1.0]) < 0.001 < 0.9 < statistics.paired_bootstrap([-1.0, -2.0])
    assert statistics.paired_bootstrap([1.0]) is None


# --- bad input ---

QUESTION = "Which?,a,b,c,d,"
CSV = [
    ("Which?,a,b,c,d\n", ":1 has 5 of the 6 columns question,A,B,C,D,answer; answer is missing"),
    (f'"two\nlines",a,b,c,d,A\n{QUESTION}A\nWhich?,a\n', ":4 has 2 of the 6 columns"),
    ("Which, then?,a,b,c,d,A\n", ":1 has 7 columns"),
    (QUESTION + "E\n", ":1: the answer is 'E'; it must be one of A, B, C, D"),
    (QUESTION + "\n", "the answer is ''"),
    (QUESTION + "AB\n", "the answer is 'AB'"),
    (f'{QUESTION}A\n"open,a,b,c,d,A\n', ":2 is not CSV"),
    ("", "holds no row"),
    ("\n\n", "holds no row"),
    (b"\xff\xfe\x00", "is not UTF-8 at byte 0"),
]
JSONL = [
    ('{"document": "x y", "summary": "z"}\n{"document": "x"}\n', ":2 has no key 'summary' (it has 'document')"),
    ('{"text": "x"}\n', "name it with --document_key"),
    ('{"document": "x", "summary": "y"}\n\n{"document": "x", \n', ":3 is not JSON"),
    ("[1]\n", ":1 is no JSON object"),
    ('{"document": 3, "summary": "y"}\n', ":1: 'document' is 3"),
    ('{"document": "x", "summary": " "}\n', "'summary' is ' '; it must be a text that is not empty"),
    ("", "holds no object"),
]


@pytest.mark.parametrize(("task", "content", "message"), [("mmlu", *c) for c in CSV] + [("rouge", *c) for c in JSONL])
def test_bad_data_is_named_with_its_line(
    engine_dir: Path, tmp_path: Path, capsys: Captured, task: str, content: str | bytes, message: str
) -> None:
    data, output = tmp_path / "data", tmp_path / "result.json"
    data.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert run(engine_dir, task, "--data", data, "--output", output) == 1
    error = capsys.readouterr().err
    assert str(data) in error and message in error and not output.exists()


def test_a_prompt_that_is_too_long_is_named_with_its_excess(
    engine_dir: Path, engine: Engine, tmp_path: Path, capsys: Captured
) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"document": text, "summary": "s"} for text in ("short", "x = 1\n" * 600)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokens = len(engine.tokenizer.encode(rows[1]["document"] + "\n\nTL;DR:"))
    assert run(engine_dir, "rouge", "--data", data, "--max_output_len", 4) == 1
    assert (
        f"{data}:2: {tokens} tokens of prompt and 4 of answer are {tokens + 4 - 1024} more" in capsys.readouterr().err
    )
    output = tmp_path / "result.json"
    assert run(engine_dir, "rouge", "--data", data, "--max_output_len", 4, "--skip_long", "--output", output) == 0
    assert json.loads(output.read_text())["skipped"] == 1


@pytest.mark.parametrize(
    ("task", "flags", "message"),
    [
        ("mmlu", [], "needs --data"),
        ("mmlu", ["--data", "{mmlu}", "--num_shots", "4"], "has 3 questions; --num_shots is 4"),
        ("mmlu", ["--data", "{mmlu}", "--num_shots", "-1"], "--num_shots is -1"),
        ("mmlu", ["--data", "{mmlu}", "--subjects", "nothing"], "nothing is not in"),
        ("mmlu", ["--data", "{mmlu}/test/odd_one_test.csv", "--num_shots", "1"], "from --few_shot_file"),
        ("mmlu", ["--data", "{mmlu}/dev"], "has no test/<subject>_test.csv"),
        ("mmlu", ["--data", "{mmlu}", "--max_ppl_increase", "0.1"], "--max_ppl_increase is not a flag of"),
        ("mmlu", ["--data", "{mmlu}", "--max_regression", "0.1"], "compares with --reference"),
        ("mmlu", ["--data", "{mmlu}", "--reference", "nowhere"], "nowhere has no config.json"),
        ("passkey", ["--data", "x"], "--data is not a flag of --task passkey"),
        ("passkey", ["--lengths", "1100"], "1100, 76 tokens more than the engine holds of a sequence (1024)"),
        ("passkey", ["--lengths", "20"], "without any filler"),
        ("passkey", ["--depths", "1.5"], "--depths holds 1.5"),
        ("rouge", ["--data", "x", "--prompt_template", "TL;DR:"], "has no {document}"),
        ("rouge", ["--data", "x", "--max_output_len", "0"], "--max_output_len is 0"),
    ],
)
def test_bad_flags_are_refused(
    engine_dir: Path, mmlu: Path, capsys: Captured, task: str, flags: list[str], message: str
) -> None:
    assert run(engine_dir, task, *(flag.replace("{mmlu}", str(mmlu)) for flag in flags)) == 1
    assert message in capsys.readouterr().err


def test_an_unknown_task_names_the_nearest(engine_dir: Path, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(engine_dir, "perplexty")
    assert stopped.value.code == 2
    assert "did you mean perplexity? known: multiple_choice, mmlu" in capsys.readouterr().err


def with_tokenizer(engine_dir: Path, directory: Path, change: Any) -> Path:
    shutil.copytree(engine_dir, directory)
    data = json.loads((directory / "tokenizer.json").read_text())
    change(data)
    (directory / "tokenizer.json").write_text(json.dumps(data))
    return directory


def test_a_tokenizer_of_another_model_is_refused(
    engine_dir: Path, summaries: Path, tmp_path: Path, capsys: Captured
) -> None:
    def shift(data: dict) -> None:
        for token in data["model"]["vocab"]:
            data["model"]["vocab"][token] += 2000

    other = with_tokenizer(engine_dir, tmp_path / "other", shift)
    assert run(other, "rouge", "--data", summaries, "--document_key", "code", "--summary_key", "doc") == 1
    assert "the model's vocabulary ends at 2047; the tokenizer does not belong to this model" in capsys.readouterr().err


class Letterless:
    """A tokenizer to which all letters are one."""

    def encode(self, text: str) -> list[int]:
        return [1 if c.isupper() else ord(c) % 90 + 2 for c in text]


class Characters:
    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]


def test_letters_that_no_token_tells_apart_are_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "tokenizer", Letterless())
    with pytest.raises(RequestError, match="no token tells all of them apart"):
        multiple_choice.choice_tokens(engine)
    monkeypatch.setattr(engine, "tokenizer", Characters())
    assert multiple_choice.choice_tokens(engine) == ([ord(" ")], [ord(c) for c in "ABCD"])


def test_help_has_an_example_of_every_task(capsys: Captured) -> None:
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    shown = capsys.readouterr().out
    assert all(
        f"fp8-eval --engine_dir engine --task {name}" in shown for name in ("mmlu", "perplexity", "rouge", "passkey")
    )


# --- all ranks of a launcher ---


def test_all_ranks_give_the_figures_of_one_process(engine_dir: Path, mmlu: Path, tmp_path: Path) -> None:
    results = []
    for name in ("one", "two"):
        output = tmp_path / f"{name}.json"
        flags = ["--engine_dir", str(engine_dir), "--task", "mmlu", "--data", str(mmlu), "--device", "cpu"]
        flags += ["--max_items", "3", "--output", str(output)]
        if name == "one":
            assert evaluate.main(flags) == 0
        else:
            done = rank_jobs.run(rank_jobs.mpirun((2, rank_jobs.module("evaluate", *flags))))
            assert done.status == 0, done.err
            assert done.out.count("compared by the tokens") == 1, "one rank prints"
        result = json.loads(output.read_text())
        results.append({k: v for k, v in result.items() if "second" not in k})
    assert results[1].pop("processes") == 2 and results[0].pop("processes") == 1
    assert results[0] == results[1]


def test_a_failing_rank_ends_the_job(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from fp8.scripts import evaluate\n"
        "def fail(args, peers):\n"
        "    if peers.rank == 1: raise OSError('disk on fire')\n"
        "    return peers.gather([1]) and None\n"
        "evaluate.evaluate = fail\n"
        "sys.exit(evaluate.main(['--engine_dir', 'x']))\n"
    )
    done = rank_jobs.run(rank_jobs.mpirun((2, [sys.executable, "-c", code])))
    assert done.status != 0
    assert "fp8-eval: rank 1: disk on fire" in done.err


@pytest.mark.parametrize(("items", "world"), [(7, 3), (2, 5), (0, 2), (6, 1)])
def test_every_item_is_in_one_share(items: int, world: int) -> None:
    shares = [list(share(range(items), rank, world)) for rank in range(world)]
    assert [item for share in shares for item in share] == list(range(items))
