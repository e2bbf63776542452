"""fp8-bench latency: rows, refusals, and values beside times."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from pathlib import Path

import pytest
import tiny_engine
import torch

from fp8.plugins.base import StepShape
from fp8.runtime.reference import ReferenceExecutor
from fp8.scripts import bench
from fp8.scripts.benchmarks import latency as latency_mode


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


def test_clocks_of_runs_are_those_of_the_median_run() -> None:
    """Three runs of 400, 600 and 800 million clocks, in another order than their seconds."""
    assert latency_mode._mhz([(0.5, 800.0), (0.4, 1500.0), (0.4, 2000.0)]) == pytest.approx(600 / 0.4)
    assert latency_mode._mhz([(0.5, None), (0.4, None)]) is None


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
