"""Engines of several ranks as real processes: the same results as one rank's, and an end to every fault."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import rank_jobs
import tiny_checkpoint as tiny
from rank_jobs import Ended, job, module, mpirun, run

from fp8.scripts.build import main as build
from fp8.scripts.evaluate import main as evaluate
from fp8.scripts.run import main as run_here

EXAMPLE = Path(__file__).resolve().parent.parent / "examples"
LAYOUTS = [(2, 1), (1, 2), (4, 1), (2, 2)]
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
def engines(tmp_path_factory) -> Path:
    """The example's engines in float32, where ranks differ from one by the order of sums alone: e11, e21, ..."""
    folder = tmp_path_factory.mktemp("engines")
    for tp, pp in [(1, 1), *LAYOUTS]:
        arguments = ["--checkpoint_dir", EXAMPLE / "tiny-python-llama", "--output_dir", folder / f"e{tp}{pp}"]
        limits = ["--max_batch_size", 4, "--max_seq_len", 256, "--max_num_tokens", 64, "--log_level", "error"]
        how = ["--target", "cpu", "--dtype", "float32", "--tp_size", tp, "--pp_size", pp]
        assert build(list(map(str, [*arguments, *limits, *how]))) == 0
    (folder / "text.txt").write_text((EXAMPLE / "heldout.txt").read_text()[:2500])
    return folder


@pytest.fixture(scope="session")
def alone(engines, tmp_path_factory) -> dict:
    """What the engine of one rank gives."""
    out = tmp_path_factory.mktemp("alone") / "perplexity.json"
    data = ["--data", str(engines / "text.txt"), "--window", "128", "--output", str(out)]
    assert evaluate(["--engine_dir", str(engines / "e11"), *data]) == 0
    return json.loads(out.read_text())


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


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_ranks_print_what_one_rank_prints(engines, capsys, tp, pp):
    arguments = [*PROMPTS, *SAMPLING, "--output", "jsonl"]
    ended = run(mpirun((tp * pp, module("run", "--engine_dir", engines / f"e{tp}{pp}", *arguments))))
    assert ended.status == 0, ended.err
    capsys.readouterr()
    assert run_here(["--engine_dir", str(engines / "e11"), *arguments]) == 0
    check_same(texts(ended.out), texts(capsys.readouterr().out))


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_ranks_have_the_perplexity_of_one(engines, alone, tmp_path, tp, pp):
    data = ["--data", engines / "text.txt", "--window", 128, "--output", tmp_path / "perplexity.json"]
    ended = run(mpirun((tp * pp, module("evaluate", "--engine_dir", engines / f"e{tp}{pp}", *data))))
    assert ended.status == 0, ended.err
    found = json.loads((tmp_path / "perplexity.json").read_text())
    assert found["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-4)
    assert ended.out.count("perplexity") == 1


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
