"""fp8-bench throughput: whole queues and the steady state."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_engine

from fp8.builder.engine import Limits
from fp8.runtime.kv_cache import BlockPool
from fp8.runtime.request import Request, SamplingParams
from fp8.runtime.scheduler import Scheduler
from fp8.scripts import bench
from fp8.scripts.benchmarks import throughput as throughput_mode


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_engine.write(tmp_path_factory.mktemp("tiny"))


def throughput(engine: Path, *flags: str) -> int:
    return bench.main(["throughput", "--engine_dir", str(engine), "--device", "cpu", *flags])


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
