"""fp8-bench and random checkpoints."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import signal
import statistics
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest
import tiny_checkpoint
import tiny_engine
import torch

from fp8.builder import build as builder
from fp8.builder import engine as engine_format
from fp8.builder.checkpoint import Checkpoint
from fp8.builder.engine import Limits
from fp8.models.config import load as load_model
from fp8.plugins import timing
from fp8.plugins.base import StepShape, types_of
from fp8.plugins.compile import compile_kernel
from fp8.plugins.gemm import cases as gemm_cases
from fp8.plugins.timing import Graph, Pace
from fp8.runtime.kv_cache import BlockPool
from fp8.runtime.llm import LLM
from fp8.runtime.reference import ReferenceExecutor
from fp8.runtime.request import Request, SamplingParams
from fp8.runtime.scheduler import Scheduler
from fp8.runtime.session import Session
from fp8.scripts import bench, build, random_checkpoint, random_engine, run
from fp8.scripts.benchmarks import (
    arguments,
    bound,
    case_buffers,
    ceilings,
    device_clock,
    isolated,
    kernel,
    kernel_rows,
    peers,
    roofline,
    startup,
    work,
)
from fp8.scripts.benchmarks import latency as latency_mode
from fp8.scripts.benchmarks import throughput as throughput_mode
from fp8.scripts.benchmarks.kernel_cases import Timed


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_engine.write(tmp_path_factory.mktemp("tiny"))


def latency(engine: Path, *flags: str) -> int:
    return bench.main(["latency", "--engine_dir", str(engine), "--device", "cpu", *flags])


def test_latency_reports_every_batch_size(engine_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "bench.json"
    sizes = ["--batch_size", "1", "3", "--input_len", "40", "--output_len", "5", "--runs", "2", "--prompt_runs", "3"]
    assert latency(engine_dir, *sizes, "--output", str(output)) == 0
    result = json.loads(output.read_text())
    assert {"command", "commit", "device", "date"} <= set(result)
    for row, batch in zip(result["results"], (1, 3), strict=True):
        assert row["batch_size"] == batch and len(row["all_seconds"]) == 2
        assert row["tokens_per_second"] == pytest.approx(batch * 5 / row["seconds"])
        assert 0 < row["first_token_ms_in_runs"] < row["seconds"] * 1e3
        assert len(row["all_first_token_ms"]) == 3
        assert row["first_token_ms"] == pytest.approx(statistics.median(row["all_first_token_ms"]))
        assert row["bound_tokens_per_second"] is None, "the bound is the GPU's"
    assert "tokens_per_second" in capsys.readouterr().out


def test_where_nothing_is_decoded_a_run_is_its_first_token(engine_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    flags = ["--input_len", "40", "--output_len", "1", "--prompt_runs", "2", "--output", str(output)]
    assert latency(engine_dir, *flags) == 0
    (row,) = json.loads(output.read_text())["results"]
    pairs = list(zip(row["all_first_token_ms"], row["all_seconds"], strict=True))
    assert len(pairs) == 2 and all(first <= 1e3 * total for first, total in pairs)
    assert row["tokens_per_second"] == pytest.approx(1 / row["seconds"])


@pytest.mark.parametrize(
    ("count", "seconds", "most", "expected"),
    [
        (3, 0.0, None, 3),
        (3, 2.0, None, 4),  # short ones go on until their time has passed
        (7, 0.0, 1.2, 3),  # of long ones none begins after their time
        (7, 0.0, 0.1, 1),
        (1, 9.0, 1.2, 3),
    ],
)
def test_runs_go_on_for_as_many_or_as_long_as_asked_for(
    count: int, seconds: float, most: float | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(latency_mode.time, "perf_counter", lambda: now[0])

    def run() -> latency_mode.Run:
        now[0] += 0.5
        return latency_mode.Run(0.4, 0.5)

    assert len(latency_mode._several(run, count, seconds, most)) == expected


def values(path: Path) -> list[tuple[int, int, int]]:
    rows = json.loads(path.read_text())["results"]
    names = ("repeated_steps", "unsteady_steps", "not_finite_steps")
    return [tuple(row[name] for name in names) for row in rows if names[0] in row]


def broken(monkeypatch: pytest.MonkeyPatch, every: int, value: float) -> None:
    """Every so many steps of single tokens one logit is another."""
    run, steps = ReferenceExecutor.run, itertools.count(1)

    def changed(self: ReferenceExecutor, shape: StepShape, *arguments: object) -> torch.Tensor:
        logits = run(self, shape, *arguments)
        if shape.decode_sequences == shape.tokens and next(steps) % every == 0:
            logits = logits.clone()
            logits[-1, 7] = value
        return logits

    monkeypatch.setattr(ReferenceExecutor, "run", changed)


@pytest.mark.parametrize(("value", "not_finite"), [(3.5, 0), (math.nan, 10), (math.inf, 10)])
def test_values_stand_beside_times(
    engine_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    value: float, not_finite: int,
) -> None:  # fmt: skip
    """A time of wrong logits is no figure: the row says so, and the status."""
    output, sizes = tmp_path / "found.json", ["--input_len", "40", "--output_len", "5", "--runs", "1"]
    assert latency(engine_dir, *sizes, "--batch_size", "1", "3", "--output", str(output)) == 0
    assert values(output) == [(44, 0, 0)] * 2
    assert latency(engine_dir, "--input_len", "9", "--output_len", "1", "--runs", "1", "--output", str(output)) == 0
    assert values(output) == [(4, 0, 0)]
    steps = ["--engine_dir", str(engine_dir), "--device", "cpu", "--context_len", "70", "--prompt_len", "50"]
    assert bench.main(["roofline", *steps, "--runs", "1", "--output", str(output)]) == 0
    assert values(output) == [(40, 0, 0), (4, 0, 0)]
    capsys.readouterr()
    broken(monkeypatch, 4, value)
    assert latency(engine_dir, *sizes, "--batch_size", "3", "--output", str(output)) == 1
    assert values(output) == [(44, 10, not_finite)]
    found = f"of 44 equal steps 10 gave other bits, {not_finite} logits that are not finite"
    assert f"fp8-bench: batch 3, 40 in, 5 out: {found}" in capsys.readouterr().err
    assert bench.main(["roofline", *steps, "--runs", "1", "--output", str(output)]) == 1
    assert values(output)[0][0] == 40 and values(output)[0][1] and values(output)[1] == (4, 0, 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch_size", "9"], "exceeds the engine's max_batch_size 8"),
        (["--input_len", "250", "--output_len", "10"], "exceed the engine's max_seq_len 256"),
        (
            ["--batch_size", "4", "--input_len", "100", "--output_len", "20", "--max_kv_blocks", "7"],
            "needs 8 KV blocks",
        ),
    ],
)
def test_what_the_engine_cannot_hold_is_refused(
    engine_dir: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert latency(engine_dir, "--input_len", "16", "--output_len", "8", *flags) == 1
    assert message in capsys.readouterr().err


def test_roofline_accounts_for_every_launch(engine_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "roofline.json"
    sizes = ["--batch_size", "1", "3", "--context_len", "70", "--prompt_len", "50", "--runs", "2"]
    sizes += ["--mixed", "3x70+2x20+1x9@100"]
    assert (
        bench.main(["roofline", "--engine_dir", str(engine_dir), "--device", "cpu", *sizes, "--output", str(output)])
        == 0
    )
    rows, plan = json.loads(output.read_text())["results"], engine_format.load(engine_dir).plan
    for step in ("decode 1 x 70", "decode 3 x 70", "prompt 50", "mixed 3x70+2x20+1x9@100"):
        whole, *kernels = [row for row in rows if row["step"] == step]
        assert whole["kernel"] == "whole step" and whole["launches"] == len(plan.steps)
        assert sum(row["launches"] for row in kernels) == len(plan.steps)
        assert sum(row["share"] for row in kernels) == pytest.approx(1)
        assert whole["gflop"] == pytest.approx(sum(row["gflop"] for row in kernels))
        assert whole["bound_us"] is None, "the bound is the GPU's"


def test_a_step_s_work_is_that_of_its_formulas(tmp_path: Path) -> None:
    """Two decode rows over 70 tokens: by hand."""
    plan = engine_format.load(tiny_engine.write(tmp_path, tiny_engine.E4M3)).plan
    session = Session(tmp_path, "cpu")
    rows = roofline.step_rows(session, [(70, 1)] * 2, 0)
    shape = StepShape(2, 2, 2, 0, 70, 2)
    found = {step.name: work.work_of(plan, step, shape, rows) for step in plan.steps}
    down = found["model.layers.0.mlp.down_proj"]
    hidden, mlp, heads, dim = tiny_engine.HIDDEN, tiny_engine.MLP, tiny_engine.HEADS, tiny_engine.HEAD_DIM
    assert down.flops == 2 * 2 * hidden * mlp and down.bytes == 4 * (hidden * mlp + 2 * mlp + 2 * hidden)
    assert down.written == 4 * 2 * hidden
    attention = found["model.layers.0.self_attn"]
    assert attention.flops == 4 * 2 * 70 * heads * dim
    kv = 2 * 70 * 2 * tiny_engine.KV_HEADS * dim
    assert attention.bytes == kv + 4 * 2 * (tiny_engine.QKV + tiny_engine.WIDTH)
    assert attention.written == kv // 70 + 4 * 2 * tiny_engine.WIDTH, "one token of each sequence, and y"
    norm = next(work for name, work in found.items() if name.startswith("model.layers.0.post_attention_layernorm"))
    assert norm.bytes == 2 * norm.written + 4 * hidden, "two tensors read and two written, and the weight"


def test_what_is_written_goes_at_the_rate_of_a_copy_and_what_is_read_beyond_it_at_that_of_a_read() -> None:
    found = ceilings.Ceilings(5.0, 4.0, 100.0, 10.0)
    assert found.memory_seconds(40.0, 0.0) == 8.0
    assert found.memory_seconds(40.0, 20.0) == found.memory_seconds(40.0, 40.0) == 10.0
    assert found.memory_seconds(40.0, 10.0) == 20.0 / 4 + 20.0 / 5
    assert (found.product_seconds(200.0, "float8_e4m3fn"), found.product_seconds(200.0, "bfloat16")) == (2.0, 20.0)


def test_the_kernel_that_only_reads_compiles() -> None:
    found = compile_kernel(ceilings.READING)
    assert not found.spill_bytes and not found.serialized


def test_roofline_refuses_what_the_engine_cannot_hold(engine_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["roofline", "--engine_dir", str(engine_dir), "--device", "cpu"]
    assert bench.main([*command, "--batch_size", "9", "--context_len", "16"]) == 1
    assert "9 sequences of 16 tokens" in capsys.readouterr().err
    for text, why in (("3x70", "is not ROWSxCONTEXT+PROMPTS"), ("3x70+1x9@8", "no more than its context")):
        with pytest.raises(SystemExit):
            bench.main([*command, "--mixed", text])
        assert why in capsys.readouterr().err


def config_file(directory: Path) -> Path:
    path = directory / "shape.json"
    path.write_text(json.dumps(tiny_checkpoint.CONFIG))
    return path


@pytest.mark.parametrize(("qformat", "kv"), [("fp8", "fp8"), ("fp8_rowwise", "auto"), ("bf16", "fp8")])
def test_a_random_checkpoint_has_the_tensors_of_a_quantized_one_and_builds(
    tmp_path: Path, qformat: str, kv: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "random"
    model = ["--model", str(config_file(tmp_path)), "--output_dir", str(out)]
    assert random_checkpoint.main([*model, "--qformat", qformat, "--kv_cache_dtype", kv]) == 0
    made = Checkpoint(out)
    like = Checkpoint(tiny_checkpoint.write(tmp_path / "like", tiny_checkpoint.qformat(qformat, kv)))
    assert {n: (e.dtype, e.shape) for n, e in made.entries.items()} == {
        n: (e.dtype, e.shape) for n, e in like.entries.items()
    }
    assert made.config["quantization_config"] == like.config["quantization_config"]
    engine = tmp_path / "engine"
    limits = ["--max_batch_size", "2", "--max_num_tokens", "64", "--log_level", "error"]
    assert build.main(["--checkpoint_dir", str(out), "--output_dir", str(engine), "--target", "cpu", *limits]) == 0
    tokens = ["--input_tokens", "1,2", "--max_output_len", "3"]
    assert run.main(["--engine_dir", str(engine), "--device", "cpu", *tokens]) == 0
    assert random_checkpoint.main(model) == 1, "it overwrites nothing"
    assert "holds a checkpoint already" in capsys.readouterr().err


def test_decode_is_bound_by_reading_weights_and_cache(tmp_path: Path) -> None:
    """Weights in their own width and the K and V of the mean context, once per step."""
    plan = engine_format.load(tiny_engine.write(tmp_path, tiny_engine.E4M3)).plan
    weights = [b for b in plan.buffers if b.name.endswith("_proj.weight")] + [plan.buffer("lm_head.weight")]
    read = sum(2 * b.shape[0] * b.shape[1] for b in weights)
    kv = 2 * tiny_engine.LAYERS * tiny_engine.KV_HEADS * tiny_engine.HEAD_DIM
    one_step = (read + kv * 1000) / ceilings.H200.copy
    assert bound.bound(plan, 1, 1, 1999) == pytest.approx(1999 / (1998 * one_step), rel=1e-3)


def test_a_rank_s_bound_is_that_of_its_part(tmp_path: Path) -> None:
    """Two of two stages take each one of two sequences at a time: as long as one rank for both. Alone, one waits."""
    plan = engine_format.load(tiny_engine.write(tmp_path, tiny_engine.E4M3)).plan
    two = dataclasses.replace(plan, compatibility=dataclasses.replace(plan.compatibility, pp_size=2))
    weights = sum(2 * b.shape[0] * b.shape[1] for b in plan.buffers if b.name.endswith("_proj.weight"))
    weights += 2 * plan.buffer("lm_head.weight").shape[0] * plan.buffer("lm_head.weight").shape[1]
    kv = 2 * tiny_engine.LAYERS * tiny_engine.KV_HEADS * tiny_engine.HEAD_DIM
    both = (2 * weights + 8 * kv * 1000) / ceilings.H200.copy
    assert bound.bound(two, 8, 1, 1999) == pytest.approx(8 * 1999 / (1998 * both), rel=1e-3)
    assert bound.bound(two, 1, 1, 1999) == pytest.approx(bound.bound(two, 2, 1, 1999) / 2, rel=1e-3)


def test_a_random_engine_is_what_is_built_of_a_random_checkpoint(tmp_path: Path, capsys) -> None:
    """But for its matrices, which are made up where it is measured, the same on every rank; nothing else runs it."""
    shape = ["--model", str(config_file(tmp_path)), "--kv_cache_dtype", "fp8"]
    limits = ["--max_batch_size", "2", "--max_num_tokens", "64", "--target", "cpu", "--tp_size", "2"]
    assert random_checkpoint.main([*shape, "--output_dir", str(tmp_path / "checkpoint")]) == 0
    built = ["--checkpoint_dir", str(tmp_path / "checkpoint"), "--output_dir", str(tmp_path / "built")]
    assert build.main([*built, *limits, "--log_level", "error"]) == 0
    assert random_engine.main([*shape, "--output_dir", str(tmp_path / "hollow"), *limits]) == 0
    plans = [engine_format.load(tmp_path / name, 1).plan for name in ("built", "hollow")]
    assert dataclasses.replace(plans[0], weights_digest="") == dataclasses.replace(plans[1], weights_digest="")
    alone = [*limits[:-1], "1"]
    assert random_engine.main([*shape, "--output_dir", str(tmp_path / "alone"), *alone]) == 0
    assert latency(tmp_path / "alone", "--input_len", "8", "--output_len", "3", "--runs", "1") == 0
    table = plans[1].buffer("model.embed_tokens.weight")
    first, second = (arguments.make_weight(table, torch.device("cpu")) for _ in range(2))
    assert torch.equal(first, second) and 0.015 < float(first.float().std()) < 0.025
    assert run.main(["--engine_dir", str(tmp_path / "alone"), "--device", "cpu", "--input_tokens", "1,2"]) == 1
    assert "is missing; build the engine again (fp8-bench alone" in capsys.readouterr().err


def test_the_host_s_part_of_a_step_is_measured_without_an_engine(tmp_path: Path) -> None:
    output = tmp_path / "host.json"
    sizes = ["--batch_size", "4", "32", "--input_len", "20", "--output_len", "9"]
    assert bench.main(["host", *sizes, "--output", str(output)]) == 0
    for row, batch in zip(json.loads(output.read_text())["results"], (4, 32), strict=True):
        assert row["batch_size"] == batch and row["decode_steps"] > 0
        assert 0 < row["decode_ms"] <= row["longest_ms"]


def test_a_mixture_is_its_sequences_decode_rows_first() -> None:
    found = roofline.mixture("2x70+1x20+2x9@100")
    assert found.sequences == ((70, 1), (70, 1), (20, 20), (100, 9), (100, 9))


class _Event:
    """An event of a device whose clock is a list of times to come."""

    times: ClassVar[list[float]] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = self.times.pop(0)

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return end.at - self.at


def test_the_device_is_busy_while_steps_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(_Event, "times", [0.0, 9.0, 10.0, 14.0, 14.0, 20.0])
    session = SimpleNamespace(device=torch.device("cuda"))
    clock = device_clock.DeviceClock(session)  # type: ignore[arg-type]
    for again in (False, False, True):
        with session.around_step(None):
            pass
        if again:
            assert clock.facts() == {"device_ms_per_step": 19 / 3, "device_busy": 19 / 20}
    clock.restart()
    assert clock.facts() == {"device_ms_per_step": None, "device_busy": None}


def test_clocks_between_two_stamps_are_those_of_the_multiprocessors_that_both_saw(engine_dir: Path) -> None:
    """Each counts from a begin of its own; no block came to the second at first, none to the third at the end."""
    clock = device_clock.CoreClock(Session(engine_dir, "cpu"))
    stamps = ([[5_000, 100], [0, 0], [70, 100], [9, 200]], [[5_000 + 1_400, 1_100], [3, 1_100], [0, 0], [2_809, 2_200]])
    begin, end = (device_clock.Stamp(torch.tensor(rows)) for rows in stamps)
    assert clock.mhz(begin, end) == pytest.approx(1400)
    assert clock.mhz(clock.stamp(), clock.stamp()) is None, "a CPU has none"


def test_stamps_stand_behind_the_steps_that_take_in_prompts(engine_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(engine_dir, "cpu")
    clock, at = device_clock.CoreClock(llm.session), list[int]()
    monkeypatch.setattr(clock, "stamp", lambda: at.append(llm.worker.statistics.step_count))
    before = llm.session.around_step
    with clock.behind_prompts() as found:
        llm.generate([list(range(70)), list(range(10, 80))], SamplingParams(max_tokens=5, ignore_eos=True))
    assert llm.session.limits.max_num_tokens == 96 and at == [0, 1], "140 tokens are two steps"
    assert len(found) == 2 and llm.session.around_step is before


def test_the_kernel_that_stamps_compiles() -> None:
    found = compile_kernel(device_clock.STAMP)
    assert not found.spill_bytes and found.registers < 32


def throughput(engine: Path, *flags: str) -> int:
    return bench.main(["throughput", "--engine_dir", str(engine), "--device", "cpu", *flags])


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main(["host", "--output", str(tmp_path / "absent" / "host.json")])
    assert stopped.value.code == 2 and "there is no directory" in capsys.readouterr().err


def test_throughput_of_a_whole_queue_counts_every_token(engine_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "throughput.json"
    lengths = ["--input_len", "40", "20", "--output_len", "5", "30", "--num_requests", "12"]
    assert throughput(engine_dir, *lengths, "--output", str(output)) == 0
    for row, out in zip(json.loads(output.read_text())["results"], (5, 30), strict=True):
        assert row["measured"] == "whole" and row["requests"] == 12
        assert row["output_tokens_per_second"] * row["seconds"] == pytest.approx(12 * out)


def test_the_steady_state_keeps_the_batch_full_from_the_window_s_first_step(engine_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "steady.json"
    lengths = ["--input_len", "100", "20", "--output_len", "50", "130", "--max_seconds", "0.4"]
    assert throughput(engine_dir, *lengths, "--output", str(output)) == 0
    for row in json.loads(output.read_text())["results"]:
        assert row["measured"] == "steady" and row["requests"] is None
        assert 0.4 <= row["seconds"] < 1 and row["rows_per_step"] > 7.5, "the engine takes 8 sequences"


def test_each_queue_runs_as_many_sequences_at_a_time_as_asked_for(engine_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "steady.json"
    lengths = ["--input_len", "100", "20", "--output_len", "50", "130", "--max_seconds", "0.4"]
    assert throughput(engine_dir, *lengths, "--max_batch_size", "3", "6", "--output", str(output)) == 0
    for row, most in zip(json.loads(output.read_text())["results"], (3, 6), strict=True):
        assert row["max_batch_size"] == most and 0.9 * most < row["rows_per_step"] <= most


@pytest.mark.parametrize(("input_len", "output_len"), [(2048, 128), (128, 128), (5000, 500)])
def test_the_steady_state_starts_with_the_sequences_that_a_long_queue_ends_up_with(
    input_len: int, output_len: int
) -> None:
    """Prompts of 2048 tokens for 128 each do not come fast enough to fill the batch, whatever the pool holds."""
    limits = Limits(max_batch_size=256, max_seq_len=8192, max_num_tokens=2048)
    scheduler = Scheduler(BlockPool(8192, 64), limits.max_batch_size, limits.max_num_tokens, reuse_prefixes=False)
    load = SimpleNamespace(input_len=input_len, output_len=output_len, max_batch_size=limits.max_batch_size)
    session = SimpleNamespace(limits=limits)
    begun = len(list(throughput_mode._ages(load, session, scheduler.pool)))  # type: ignore[arg-type]
    tokens, params, made, decoding = [1] * input_len, SamplingParams(ignore_eos=True), itertools.count(), []
    for _ in range(4 * output_len):
        while len(scheduler.waiting) < 64:
            scheduler.add(Request(next(made), tokens, params, output_len))
        rows = scheduler.schedule()
        scheduler.update(rows, [0] * sum(row.samples for row in rows))
        decoding.append(sum(row.count == 1 for row in rows))
    settled = decoding[2 * output_len :]
    assert begun == pytest.approx(sum(settled) / len(settled), rel=0.05)


def test_throughput_refuses_what_the_engine_cannot_hold(engine_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert throughput(engine_dir, "--input_len", "250", "--output_len", "10") == 1
    assert "exceed the engine's max_seq_len 256" in capsys.readouterr().err
    assert throughput(engine_dir, "--input_len", "50", "60", "--output_len", "10") == 1
    assert "2 values of --input_len and 1 of --output_len" in capsys.readouterr().err
    assert throughput(engine_dir, "--max_batch_size", "4", "5") == 1
    assert "1 values of --input_len and 2 of --max_batch_size" in capsys.readouterr().err
    assert throughput(engine_dir, "--input_len", "50", "--output_len", "9", "--max_batch_size", "9") == 1
    assert "--max_batch_size 9 exceeds the engine's, 8" in capsys.readouterr().err


def test_matrices_of_a_case_lie_in_several_places(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers = case_buffers.CaseBuffers(gemm_cases.case(2, 32, 64, "static"), 0, "cpu")
    monkeypatch.setattr(case_buffers, "sets_for", lambda size: 1)
    first, *others = buffers.sets
    assert len(others) == 2
    for tensors in others:
        assert all(a is None or a.data_ptr() != b.data_ptr() for a, b in zip(first, tensors, strict=True))
        assert all(torch.equal(first[i].view(torch.uint8), tensors[i].view(torch.uint8)) for i in (0, 1))
    del buffers.sets
    monkeypatch.setattr(case_buffers, "SMALLER", 0)
    assert len(buffers.sets) == 1


def test_kernels_are_timed_on_a_gpu_only(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        pytest.skip("there is a Hopper GPU")
    assert bench.main(["kernel"]) == 1
    assert "needs a Hopper GPU" in capsys.readouterr().err


def test_deep_gemm_is_a_peer_of_what_it_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the layouts that it documents: matrices, scales beside them, those of x in columns padded to 16 bytes."""
    outputs = []

    def fp8_gemm_nt(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...], d: torch.Tensor) -> None:
        (x, x_scale), (w, w_scale) = a, b
        assert x_scale.stride() == (1, -(-x.shape[0] // 4) * 4)
        x = x.float() * x_scale.repeat_interleave(128, 1)
        w = w.float() * w_scale.repeat_interleave(128, 0)[: w.shape[0]].repeat_interleave(128, 1)
        outputs.append(d.copy_(x @ w.t()))

    package = ModuleType("deep_gemm")
    package.__spec__ = ModuleSpec("deep_gemm", None)
    package.fp8_gemm_nt = fp8_gemm_nt  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deep_gemm", package)
    case = gemm_cases.case(7, 200, 384, "block")
    inputs = case.make(torch.Generator().manual_seed(0), "cpu")
    (expected,) = case.plugin.reference(*inputs, step=case.step)
    found = peers.peers_of(case.plugin, case.step, inputs)
    assert list(found) == ["cuBLASLt", "DeepGEMM"]
    found["DeepGEMM"](inputs)()
    torch.testing.assert_close(outputs[0], expected, rtol=1e-2, atol=1e-2)
    for other in (gemm_cases.case(7, 200, 384, "block8"), gemm_cases.case(7, 200, 384, "block", out="float32")):
        assert not peers.peers_of(other.plugin, other.step, other.make(torch.Generator().manual_seed(0), "cpu"))


def test_scales_in_blocks_go_to_torch_in_the_layouts_that_tell_it_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's ScaledBlas.cpp knows blocks of 1 x 128 by 128 x 128 by strides: (1, M) of x's scales, and of those of w^T
    (1, K / 128 rounded up to 4)."""

    def scaled_mm(
        a: torch.Tensor, b: torch.Tensor, s: torch.Tensor, t: torch.Tensor, *, out_dtype: object, out: torch.Tensor
    ) -> torch.Tensor:
        assert a.stride(1) == b.stride(0) == 1 and s.dtype == t.dtype == torch.float32
        assert s.shape == (7, 3) and s.stride() == (1, 7) and t.shape == (3, 2) and t.stride() == (1, 4)
        x, w = (
            a.float() * s.repeat_interleave(128, 1),
            b.t().float() * t.t().repeat_interleave(128, 1).repeat_interleave(128, 0)[:200],
        )
        return out.copy_(x @ w.t())

    case = gemm_cases.case(7, 200, 384, "block")
    inputs = case.make(torch.Generator().manual_seed(0), "cpu")
    (expected,) = case.plugin.reference(*inputs, step=case.step)
    launch = peers.peers_of(case.plugin, case.step, inputs)["cuBLASLt"](inputs)
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    torch.testing.assert_close(launch(), expected, rtol=1e-2, atol=1e-2)


def test_bursts_follow_a_pause_and_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("idle"))
    monkeypatch.setattr(timing.time, "sleep", seen.append)
    monkeypatch.setattr(timing, "replays", lambda graph, seconds: seen.append((graph, seconds)) or [len(seen)])
    assert timing.in_bursts(["a", "b"], 2, 0.012, 0.02) == [6.0, 9.0]  # type: ignore[list-item]
    once = ["idle", 0.02, ("a", 0.012), "idle", 0.02, ("b", 0.012)]
    assert seen == 2 * once


def test_startup_measures_processes_of_their_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint, output = tiny_checkpoint.write(tmp_path / "ckpt", tiny_checkpoint.qformat("fp8", "fp8")), tmp_path / "o"
    command = ["startup", "--checkpoint_dir", str(checkpoint), "--device", "cpu", "--output", str(output)]
    assert bench.main([*command, "--", "--target", "cpu", "--max_batch_size", "2", "--max_num_tokens", "64"]) == 0
    rows = json.loads(output.read_text())["results"]
    assert [row["what"] for row in rows] == list(startup.WHAT)
    assert all(row["seconds"] > 0.1 and row["peak_gb"] > 0.01 for row in rows)
    assert bench.main([*command, "--", "--target", "sm_12"]) == 1
    assert "ended with status 1" in capfd.readouterr().err


@pytest.mark.parametrize(("format", "mode", "rows"), [("fp8", "static", (0,)), ("fp8_rowwise", "rowwise", (0, 2))])
def test_the_tactics_timed_are_those_that_an_engine_gets(
    tmp_path: Path, format: str, mode: str, rows: tuple[int, ...]
) -> None:
    directory = tiny_checkpoint.write(tmp_path, tiny_checkpoint.qformat(format))
    source = builder.Source(load_model(Checkpoint(directory).config), Checkpoint(directory))
    request = builder.Request(max_num_tokens=kernel_rows.MAX_NUM_TOKENS)
    plan = builder.compile(source, request, builder.Reporter(), dry_run=True).plan
    step = next(s for s in plan.steps if s.name == "model.layers.0.mlp.down_proj")
    n, k = (int(d) for d in plan.buffer(step.inputs[1]).shape)
    for m in (1, 16, 64, 128, 4096):
        case = gemm_cases.case(m, n, k, mode)
        types = types_of(case.make(torch.Generator(), "cpu"))
        (tactic,), _ = kernel_rows.tactics_of(Timed("", "gemm", case, rows), types, 1)
        held = next(choice for choice in step.tactics if choice.max_tokens >= m)
        assert dataclasses.asdict(tactic) == held.tactic


def _answers(first: int) -> isolated.Answers:
    def answer(question: str) -> tuple[str, bool]:
        if question == "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        if question == "hang":
            time.sleep(60)
        return f"{first} {question}", question != "last"

    return answer


def test_a_process_that_is_lost_takes_its_question_along_and_no_more() -> None:
    process = isolated.Isolated(_answers, 5)
    assert process.ask("one", 60) == "5 one" and process.usable
    with pytest.raises(isolated.Lost, match="ended by SIGSEGV"):
        process.ask("die", 60)
    assert not process.usable
    with pytest.raises(isolated.Lost, match="no answer within 0 s"):
        isolated.Isolated(_answers, 5).ask("hang", 0.1)
    process = isolated.Isolated(_answers, 6)
    assert process.ask("last", 60) == "6 last" and not process.usable
    process.close()


def test_kernel_rows_go_on_where_a_process_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second case ends its process; the next one starts with the third."""
    started = []

    class Process:
        def __init__(self, _: object, chosen: kernel_rows.Chosen, first: int) -> None:
            started.append(first)
            self.usable = True

        def ask(self, place: int, seconds: float) -> dict:
            if place == 1:
                self.usable = False
                raise isolated.Lost("its process was ended by SIGSEGV")
            return {"place": place}

        def close(self) -> None:
            self.usable = False

    monkeypatch.setattr(kernel, "Isolated", Process)
    chosen = kernel_rows.Chosen("norm_quant")
    measuring = kernel.Measuring(chosen)
    rows = [measuring.row(place, timed) for place, timed in enumerate(chosen.cases()[:3])]
    assert rows[0] == {"place": 0} and rows[2] == {"place": 2} and started == [0, 2]
    assert rows[1]["failure"] == "its process was ended by SIGSEGV" and rows[1]["name"].startswith("norm_quant")


def test_contestants_under_load_alternate_quickly_and_take_a_bounded_time() -> None:
    def graph(seconds: float, count: int = 1) -> Graph:
        return Graph(None, (), count, seconds)  # type: ignore[arg-type]

    pace = kernel_rows._loaded([graph(15e-6, 33), graph(14e-6, 35)])
    assert pace == Pace(kernel_rows.TURNS, kernel_rows.TURN, 5)
    assert kernel_rows._loaded([graph(15e-6, 33)]) == Pace(kernel_rows.TURNS, kernel_rows.TURN, 10)
    for count in (1, 2, 6):
        for seconds in (0.006, 0.04, 0.2):
            pace = kernel_rows._loaded([graph(seconds)] * count)
            turn = count * max(pace.seconds, seconds)
            assert pace.before is not None and pace.before * turn >= kernel_rows.HEATED, "the clock is steady by then"
            assert pace.turns >= 3 and pace.turns * turn <= max(
                3 * turn, min(kernel_rows.LOADED * count, kernel_rows.STEADY - kernel_rows.HEATED)
            )
