"""The bundled example: what is in it, that it writes Python, and what each format costs it."""

from __future__ import annotations

import ast
import json
import math
import subprocess
import sys
from pathlib import Path

import hf_llama
import pytest
import torch
import transformers
from tokenizers import Tokenizer

from fp8.runtime.llm import LLM
from fp8.runtime.request import Request, SamplingParams
from fp8.runtime.scheduler import Row
from fp8.runtime.session import Session
from fp8.scripts import quickstart, train_example

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
MODEL = EXAMPLES / "tiny-python-llama"
MEGABYTE = 1_000_000


def read(name: str) -> str:
    return (EXAMPLES / name).read_text(encoding="utf-8")


def test_the_example_has_at_most_12_megabytes() -> None:
    assert sum(f.stat().st_size for f in EXAMPLES.rglob("*") if f.is_file()) <= 12 * MEGABYTE


def test_its_sizes_are_awkward() -> None:
    """Multiples of 16, as the kernels need, and not of 128; grouped queries; head_dim apart from hidden / heads."""
    config = json.loads((MODEL / "config.json").read_text())
    for key in ("hidden_size", "intermediate_size"):
        assert config[key] % 16 == 0
        assert config[key] % 128
    assert 1 < config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]


@pytest.mark.parametrize("name", ["heldout.txt", "calibration.txt"])
def test_the_tokenizer_gives_every_text_back(name: str) -> None:
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    ids = tokenizer.encode(read(name)).ids
    assert tokenizer.decode(ids) == read(name)
    assert max(ids) < json.loads((MODEL / "config.json").read_text())["vocab_size"]


def test_no_function_of_the_held_out_text_is_in_the_calibration_text() -> None:
    def functions(name: str) -> set[str]:
        tree = ast.parse(read(name))
        return {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and len(n.body) > 2}

    assert not functions("heldout.txt") & functions("calibration.txt")


# --- the whole way, by the command lines ---


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What scripts/quickstart.py leaves in its work directory, and prints."""
    work = tmp_path_factory.mktemp("quickstart")
    line = [sys.executable, "-m", "fp8.scripts.quickstart", "--work_dir", str(work), "--max_tokens", "6144"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return work, done.stdout


def perplexity(work: Path, variant: str) -> float:
    return json.loads((work / variant / "result.json").read_text())["perplexity"]


def test_the_example_predicts_python(table: tuple[Path, str]) -> None:
    """A uniform guess has 2048."""
    assert 1 < perplexity(table[0], "BF16") < 8


@pytest.mark.parametrize(("variant", "limit"), [("FP8", 0.01), ("FP8rowwise", 0.01), ("FP8+FP8KV", 0.015)])
def test_a_format_costs_little_perplexity(variant: str, limit: float, table: tuple[Path, str]) -> None:
    assert perplexity(table[0], variant) <= perplexity(table[0], "BF16") * (1 + limit)


def test_an_fp8_checkpoint_is_little_more_than_half_as_large(table: tuple[Path, str]) -> None:
    sizes = {name: quickstart.size(table[0] / name / "checkpoint") for name in ("BF16", "FP8")}
    assert sizes["FP8"] < 0.6 * sizes["BF16"]


def test_the_example_writes_python(table: tuple[Path, str]) -> None:
    _, printed = table
    assert printed.count("parser = argparse.ArgumentParser()") == len(quickstart.VARIANTS)
    assert all(variant.name in printed for variant in quickstart.VARIANTS)


# --- against Hugging Face transformers in float32 ---

MARGIN = 0.05  # between the reference's two likeliest tokens: below it, bf16 may prefer the other one


@pytest.fixture(scope="module")
def reference() -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@torch.inference_mode()
def reference_logits(model: transformers.LlamaForCausalLM, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens])).logits[0]


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode(read("heldout.txt")).ids


def test_logits_of_the_bf16_engine_are_those_of_transformers(
    table: tuple[Path, str], reference: transformers.LlamaForCausalLM, tokens: list[int]
) -> None:
    session = Session(table[0] / "BF16" / "engine", "cpu")
    request = Request(0, tokens[:256], SamplingParams(), 1, blocks=[2, 0, 3, 1], slot=0)
    found = session.token_logits([Row(request, 0, 256, True, 0)])
    assert hf_llama.sqnr(reference_logits(reference, tokens[:256]), found) >= 40


def test_greedy_texts_of_the_bf16_engine_are_those_of_transformers(
    table: tuple[Path, str], reference: transformers.LlamaForCausalLM, tokens: list[int]
) -> None:
    prompts = [tokens[i : i + 24] for i in range(0, 48_000, 6_000)]
    assert len(prompts) == 8
    llm = LLM(table[0] / "BF16" / "engine", "cpu")
    for completion in llm.generate(prompts, SamplingParams(max_tokens=64, ignore_eos=True)):
        whole = [*completion.prompt_token_ids, *completion.token_ids]
        assert len(completion.token_ids) == 64
        logits = reference_logits(reference, whole)[len(completion.prompt_token_ids) - 1 : -1]
        best, second = logits.topk(2).values.T
        for i, token in enumerate(completion.token_ids):  # each after what the engine itself wrote before it
            assert token == logits[i].argmax() or best[i] - second[i] < MARGIN, i


def test_a_failing_step_ends_the_quickstart_with_its_message(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert quickstart.main(["--model_dir", str(tmp_path), "--work_dir", str(tmp_path / "work")]) == 1
    error = capfd.readouterr().err
    assert "config.json" in error
    assert "Traceback" not in error


# --- the script that trained it ---


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A stand-in for a standard library: 200 modules, some of them not to be read."""
    for i in range(200):
        (tmp_path / f"module{i}.py").write_text(f"def function{i}():\n" + f"    return {i}  # {i}\n" * 150)
    for name in ("encodings", "site-packages", "test", "test/data"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test_x.py").write_text(f"'''{name}'''\n" + "x = 'left out'\n" * 100)
    (tmp_path / "third.py").write_text("# Permission is hereby granted to\n" + "y = 1\n" * 100)
    (tmp_path / "twin.py").write_text((tmp_path / "module7.py").read_text())
    return tmp_path


RECIPE = train_example.Recipe(heldout_bytes=30_000, validation_bytes=30_000, calibration_bytes=30_000)


def test_the_parts_of_the_corpus_do_not_overlap(library: Path) -> None:
    corpus = train_example.read_corpus(library, RECIPE)
    assert corpus.heldout and corpus.validation and corpus.calibration
    assert not {*corpus.train} & {*corpus.heldout, *corpus.validation}
    assert not {*corpus.heldout} & {*corpus.validation}
    assert {*corpus.calibration} <= {*corpus.train}
    everything = [*corpus.train, *corpus.validation, *corpus.heldout]
    assert len(everything) == len({*everything}) == 201  # the modules, and the `test` package's own file


def test_files_with_terms_of_their_own_are_left_out(library: Path) -> None:
    corpus = train_example.read_corpus(library, RECIPE)
    assert not any("Permission" in text for text in corpus.train)


def test_a_folder_without_the_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--stdlib"):
        train_example.read_corpus(tmp_path, RECIPE)


def test_a_training_step_lowers_the_loss(library: Path) -> None:
    """The loop as it is, on so little text that two seconds do."""
    torch.manual_seed(0)
    recipe = train_example.Recipe(context=64, batch=4, vocab_size=300, dropout=0.0, learning_rate=3e-2)
    corpus = train_example.read_corpus(library, RECIPE)
    few = train_example.Corpus(corpus.train[:10], corpus.validation[:1], corpus.heldout[:1], corpus.calibration[:1])
    tokenizer = train_example.train_tokenizer(few.train, recipe.vocab_size)
    model, history = train_example.train(few, tokenizer, recipe, minutes=1, steps=8)
    assert history[-1]["train_loss"] < math.log(recipe.vocab_size)
    assert model.config.hidden_size == 336
