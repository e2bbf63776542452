"""Engines of several ranks as real processes: the same results as one rank's, and an end to every fault."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import rank_jobs
import tiny_checkpoint as tiny
from rank_jobs import Ended, job, module, mpirun, run

from fp8.runtime.tokenizer import load_tokenizer
from fp8.scripts.build import main as build
from fp8.scripts.evaluate import main as evaluate
from fp8.scripts.gpu_faults import main as faults
from fp8.scripts.quantize import main as quantize
from fp8.scripts.run import main as run_here

EXAMPLE = Path(__file__).resolve().parent.parent / "examples"
LAYOUTS = [(2, 1), (1, 2), (4, 1), (2, 2)]
FORMATS = {"bf16": "auto", "fp8": "auto", "fp8_rowwise": "fp8"}  # and the KV cache
UNEVEN = {
    "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 208, "vocab_size": 321,
    "attention_bias": True, "mlp_bias": True, "num_hidden_layers": 3,
}  # fmt: skip
PROMPTS = ["--input_text", "def fibonacci(n):", "import os", "class A", "x = ["]
SAMPLING = [
    "--max_tokens",
    "12",
    "--temperature",
    "0.8",
    "--seed",
    "3",
    "--logprobs",
    "2",
    "--repetition_penalty",
    "1.2",
]
TIMEOUT = ["--rank_timeout", "4"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("engines")


def build_all(checkpoint: Path, output: Path, layouts: list[tuple[int, int]]) -> None:
    """Engines in float32, where ranks differ from one by the order of sums alone, and by FP8 codes that it flips."""
    for tp, pp in layouts:
        arguments = ["--checkpoint_dir", checkpoint, "--output_dir", f"{output}{tp}{pp}", "--log_level", "error"]
        limits = ["--max_batch_size", 4, "--max_seq_len", 256, "--max_num_tokens", 96]
        how = ["--target", "cpu", "--dtype", "float32", "--tp_size", tp, "--pp_size", pp]
        assert build(list(map(str, [*arguments, *limits, *how]))) == 0


@pytest.fixture(scope="session")
def engines(folder) -> Path:
    """The example's, in bf16: e11, e21, ..., and a text."""
    build_all(EXAMPLE / "tiny-python-llama", folder / "e", [(1, 1), *LAYOUTS])
    (folder / "text.txt").write_text((EXAMPLE / "heldout.txt").read_text()[:2500])
    return folder


@pytest.fixture(scope="session")
def quantized(folder) -> Path:
    """The example's checkpoints by format, and those of a model of which nothing divides evenly."""
    for name, kv in FORMATS.items():
        if name != "bf16":
            how = ["--qformat", name, "--kv_cache_dtype", kv, "--output_dir", str(folder / f"example {name}")]
            data = ["--calib_dataset", str(EXAMPLE / "calibration.txt"), "--calib_size", "4"]
            assert quantize(["--model_dir", str(EXAMPLE / "tiny-python-llama"), *how, *data]) == 0
        tiny.write(folder / f"uneven {name}", tiny.qformat(name, kv), **UNEVEN)
    return folder


def pairs(folder: Path, layouts: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """What rank_checks.py takes, every engine built."""
    text = (EXAMPLE / "heldout.txt").read_text()[:3000]
    tokenizer = load_tokenizer(folder / "e11")
    assert tokenizer is not None
    tokens = {"example": tokenizer.encode(text)[:400], "uneven": [(i * i * 7 + i) % 321 for i in range(400)]}
    found = []
    for model, name in itertools.product(tokens, FORMATS):
        if (model, name) == ("example", "bf16"):
            built = folder / "e"
        else:
            built = folder / f"{model} {name} "
            build_all(folder / f"{model} {name}", built, [(1, 1)] * (not Path(f"{built}11").exists()) + layouts)
        for tp, pp in layouts:
            pair = {
                "divided": f"{built}{tp}{pp}",
                "one": f"{built}11",
                "tokens": tokens[model],
                "exact": name != "bf16",
            }
            found.append({"name": f"{model} {name} tp {tp} pp {pp}", **pair})
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_compute_what_one_rank_does(engines, quantized, tmp_path, ranks):
    """Every format, on the example and on a model whose heads, MLP and vocabulary do not divide: the same bits from
    pipeline stages, in tensor parallelism the same but for the order of sums. The order flips an FP8 code in some 10^5,
    and then logits part by 40 dB: FP8 formats are held against each other in float64, where none flips."""
    layouts = [(tp, pp) for tp, pp in LAYOUTS if tp * pp == ranks]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs(quantized, layouts)))
    script = [sys.executable, str(Path(__file__).with_name("rank_checks.py"))]
    ended = run(mpirun((ranks, [*script, str(tmp_path / "pairs.json"), str(tmp_path / "found.json")])))
    assert ended.status == 0, ended.err
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == len(layouts) * len(FORMATS) * 2
    for row in found:
        one, many = row["perplexity"]
        assert many == pytest.approx(one, rel=1e-4), row["name"]
        assert row["texts"][0] == row["texts"][1], row["name"]
        if "tp 1 " in row["name"]:
            assert row["equal"], row["name"]
        else:
            assert row["error"] <= 1e-5 if "bf16" in row["name"] else row["sqnr"] >= 120, row


def texts(output: str) -> list[dict]:
    """What fp8-run --output jsonl printed, without the times."""
    return [{k: v for k, v in json.loads(line).items() if k != "timing"} for line in output.splitlines()]


def check_same(ours: list[dict], theirs: list[dict]) -> None:
    """Equal but for the last digits of log-probabilities."""
    for a, b in zip(ours, theirs, strict=True):
        found, expected = a.pop("logprobs"), b.pop("logprobs")
        assert a.pop("cumulative_logprob") == pytest.approx(b.pop("cumulative_logprob"), abs=1e-4)
        assert a == b
        for x, y in zip(found, expected, strict=True):
            assert x["token"] == y["token"] and x["logprob"] == pytest.approx(y["logprob"], abs=1e-4)


def test_fp8_run_prints_what_one_rank_prints(engines, capsys):
    arguments = [*PROMPTS, *SAMPLING, "--output", "jsonl"]
    ended = run(mpirun((4, module("run", "--engine_dir", engines / "e22", *arguments))))
    assert ended.status == 0, ended.err
    capsys.readouterr()
    assert run_here(["--engine_dir", str(engines / "e11"), *arguments]) == 0
    check_same(texts(ended.out), texts(capsys.readouterr().out))


def test_fp8_eval_gives_the_perplexity_of_one_rank(engines, tmp_path):
    data = ["--data", str(engines / "text.txt"), "--window", "128", "--output"]
    ended = run(mpirun((2, module("evaluate", "--engine_dir", engines / "e12", *data, tmp_path / "ranks.json"))))
    assert ended.status == 0, ended.err
    assert ended.out.count("perplexity") == 1
    assert evaluate(["--engine_dir", str(engines / "e11"), *data, str(tmp_path / "alone.json")]) == 0
    found, alone = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("ranks", "alone"))
    assert found["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-4) and found["tokens"] == alone["tokens"]


@pytest.mark.parametrize(("name", "tp_size"), [("e21", 2), ("e12", 1)])
def test_fp8_bench_measures_all_ranks_together(engines, tmp_path, name, tp_size):
    sizes = ["--batch_size", "1", "4", "--input_len", "20", "--output_len", "5", "--runs", "1", "--output"]
    ended = run(
        mpirun((2, module("bench", "latency", "--engine_dir", engines / name, *sizes, tmp_path / "found.json")))
    )
    assert ended.status == 0, ended.err
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["batch_size"] for row in found["results"]] == [1, 4] and ended.out.count("output_len") == 1
    engine = json.loads((EXAMPLE / "tiny-python-llama" / "config.json").read_text())
    assert (found["engine"]["tp_size"], found["engine"]["mlp_size"]) == (tp_size, engine["intermediate_size"])
    checked = [[row[f"{kind}_steps"] for kind in ("repeated", "unsteady", "not_finite")] for row in found["results"]]
    assert checked == [[44, 0, 0]] * 2


def test_fp8_bench_times_the_launches_of_all_ranks(engines, tmp_path):
    sizes = ["--batch_size", "2", "--context_len", "16", "--prompt_len", "--runs", "2", "--output"]
    ended = run(mpirun((2, module("bench", "roofline", "--engine_dir", engines / "e21", *sizes, tmp_path / "f.json"))))
    assert ended.status == 0, ended.err
    rows = json.loads((tmp_path / "f.json").read_text())["results"]
    assert {"all_reduce_norm_quant", "all_gather"} <= {row["plugin"] for row in rows}
    ended = run(mpirun((2, module("bench", "roofline", "--engine_dir", engines / "e12"))))
    check_fault(ended, "a pipeline stage has only some")


def test_rank_0_serves_and_says_when_all_end(engines, capsys):
    """SIGTERM to another rank, as mpirun sends it to all, ends nothing; to rank 0, everything, and well."""
    with job(mpirun((2, module("serve", "--engine_dir", engines / "e12", "--port", 0)))) as started:
        url = started.wait_for_error(r"running on \S*(http://[\d.:]+)")[1]
        body = {"model": "e12", "prompt": PROMPTS[1], "max_tokens": 12, "temperature": 0}
        headers = {"Content-Type": "application/json"}
        with urlopen(Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)) as answer:
            text = json.load(answer)["choices"][0]["text"]
        started.kill(1, signal.SIGTERM)
        with urlopen(f"{url}/health") as answer:
            assert answer.status == 200
        started.kill(0, signal.SIGTERM)
        ended = started.end()
    assert ended.status == 0 and ended.seconds < 10, ended.err
    capsys.readouterr()
    assert run_here(["--engine_dir", str(engines / "e11"), *PROMPTS[:2], "--max_tokens", "12"]) == 0
    assert capsys.readouterr().out.startswith(PROMPTS[1] + text)


def test_torchrun_starts_ranks_too(engines, capsys):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = [*PROMPTS, *SAMPLING, "--output", "jsonl"]
    command = module("run", "--engine_dir", engines / "e12", *arguments)
    ended = run([*torchrun, *command[1:]])
    assert ended.status == 0, ended.err
    capsys.readouterr()
    assert run_here(["--engine_dir", str(engines / "e11"), *arguments]) == 0
    check_same(texts(ended.out), texts(capsys.readouterr().out))


# --- faults ---


def endless(engine: Path) -> list[str]:
    """fp8-run with work for a long while, printed as it is done."""
    prompts = ["--input_text", *["def f(x):"] * 200]
    return module("run", "--engine_dir", engine, *prompts, "--max_tokens", 240, "--ignore_eos", "--streaming", *TIMEOUT)


def check_fault(ended: Ended, *said: str) -> None:
    assert ended.status != 0
    for text in said:
        assert text in ended.err, ended.err
    assert ended.seconds < 30
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_job(engines, rank):
    with job(mpirun((2, endless(engines / "e21")))) as started:
        started.wait_for_output()
        started.kill(rank, signal.SIGKILL)
        check_fault(started.end(), f"rank {rank} ")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_ends_the_job(engines, rank):
    with job(mpirun((2, endless(engines / "e12")))) as started:
        started.wait_for_output()
        started.kill(rank, signal.SIGSTOP)
        check_fault(started.end(), f"rank {rank} ", "gave no sign of life for 4 s")


def test_a_rank_that_stands_still_while_others_wait_for_it_ends_the_job(engines, tmp_path, capsys, monkeypatch):
    beside = Path(sys.executable).parent  # where the tests' packages put an mpirun
    monkeypatch.setenv("PATH", str(beside), prepend=os.pathsep)
    output = tmp_path / "faults.json"
    flags = ["--device", "cpu", "--rank_timeout", "2", "--faults", "rank 0 stands still", "--output", str(output)]
    assert faults(["--engine_dir", str(engines / "e21"), *flags]) == 0
    (row,) = json.loads(output.read_text())["rows"]
    assert row["met"] and row["status"] and row["seconds"] < row["allowed_seconds"] and not row["left"]
    assert "gpu_faults: rank 0 " in row["says"] and "made no progress for 2 s" in row["says"]
    assert faults(["--engine_dir", str(tmp_path)]) == 1
    assert "is no engine" in capsys.readouterr().err


LIMITED = """
import resource, sys
from fp8.runtime.session import Session
from fp8.scripts.run import main
prepare = Session._prepare_cpu
def limited(*arguments):
    held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + (300 << 20),) * 2)
    return prepare(*arguments)
Session._prepare_cpu = limited
sys.exit(main())
"""

FAILING = """
import sys
from fp8.runtime.reference import ReferenceExecutor
from fp8.scripts.run import main
run, calls = ReferenceExecutor.run, []
def failing(*arguments):
    calls.append(1)
    if len(calls) == 5:
        raise ArithmeticError("five is too many")
    return run(*arguments)
ReferenceExecutor.run = failing
sys.exit(main())
"""


def test_a_rank_without_memory_is_named(engines):
    arguments = module("run", "--engine_dir", engines / "e21", "--max_kv_blocks", 10000, *PROMPTS, *TIMEOUT)[3:]
    limited = [sys.executable, "-c", LIMITED, *arguments]
    ended = run(mpirun((1, module("run", *arguments)), (1, limited)))
    check_fault(ended, "fp8-run: rank 1: ", "allocate memory")
    assert "rank 0:" not in ended.err


def test_a_rank_that_fails_in_a_step_is_named(engines):
    arguments = endless(engines / "e21")[3:]
    ended = run(mpirun((1, module("run", *arguments)), (1, [sys.executable, "-c", FAILING, *arguments])))
    check_fault(ended, "fp8-run: rank 1: ArithmeticError: five is too many\n")
    assert ended.err.count("fp8-run:") == 1


@pytest.mark.parametrize("name", ["rank1.engine", "rank1.safetensors"])
def test_a_truncated_file_is_named_with_its_rank(engines, tmp_path, name):
    damaged = shutil.copytree(engines / "e21", tmp_path / "damaged")
    content = (damaged / name).read_bytes()
    (damaged / name).write_bytes(content[: len(content) // 2])
    ended = run(mpirun((2, module("run", "--engine_dir", damaged, *PROMPTS, *TIMEOUT))))
    check_fault(ended, f"fp8-run: rank 1: {damaged / name}")
    assert ended.err.count("fp8-run:") == 1 and "rank 0:" not in ended.err


def test_engines_that_do_not_belong_together_are_refused(engines, tmp_path):
    checkpoint = tiny.write(tmp_path / "checkpoint", tiny.qformat("bf16"))
    other = ["--output_dir", tmp_path / "other", "--target", "cpu", "--tp_size", 2, "--log_level", "error"]
    assert build(list(map(str, ["--checkpoint_dir", checkpoint, *other]))) == 0
    commands = [module("run", "--engine_dir", e, *PROMPTS, *TIMEOUT) for e in (engines / "e21", tmp_path / "other")]
    ended = run(mpirun((1, commands[0]), (1, commands[1])))
    check_fault(ended, "do not belong together: model and limits differs", str(tmp_path / "other"))


def test_a_rank_file_of_another_engine_is_refused(engines, tmp_path):
    mixed = shutil.copytree(engines / "e21", tmp_path / "mixed")
    for name in ("rank1.engine", "rank1.safetensors"):
        shutil.copyfile(engines / "e12" / name, mixed / name)
    ended = run(mpirun((2, module("run", "--engine_dir", mixed, *PROMPTS, *TIMEOUT))))
    check_fault(ended, "fp8-run: rank 1: rank1.engine is of another engine than ")


def test_a_wrong_number_of_ranks_is_refused(engines, capsys):
    ended = run(mpirun((3, module("run", "--engine_dir", engines / "e21", *PROMPTS))))
    check_fault(ended, "is built for 2 ranks (tp 2, pp 1), and 3 were started; use mpirun -n 2")
    assert ended.err.count("fp8-run:") == 1
    ended = run(mpirun((2, module("run", "--engine_dir", engines / "e11", *PROMPTS))))
    check_fault(ended, "is built for 1 rank (tp 1, pp 1), and 2 were started")
    assert run_here(["--engine_dir", str(engines / "e21"), *PROMPTS]) == 1
    assert "is built for 2 ranks (tp 2, pp 1), and 1 was started" in capsys.readouterr().err


def test_a_refused_request_ends_all_ranks_and_is_told_once(engines):
    ended = run(mpirun((2, module("run", "--engine_dir", engines / "e21", "--input_tokens", "1,99999"))))
    check_fault(ended, "outside the vocabulary")
    assert ended.err.count("fp8-run:") == 1 and ended.status == 1


def test_nothing_of_mpi_is_loaded_for_one_rank(engines):
    code = (
        "import sys; from fp8.scripts.run import main; status = main(sys.argv[1:]); "
        "print([m for m in sys.modules if m.startswith('mpi4py')]); sys.exit(status)"
    )
    arguments = ["--engine_dir", str(engines / "e11"), "--input_text", "def", "--max_tokens", "1"]
    ended = rank_jobs.run([sys.executable, "-c", code, *arguments])
    assert ended.status == 0 and ended.out.endswith("[]\n")
