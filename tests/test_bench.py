"""fp8-bench startup and host, and where results go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_checkpoint

from fp8.scripts import bench
from fp8.scripts.benchmarks import (
    startup,
)


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main(["host", "--output", str(tmp_path / "absent" / "host.json")])
    assert stopped.value.code == 2 and "there is no directory" in capsys.readouterr().err


def test_the_host_s_part_of_a_step_is_measured_without_an_engine(tmp_path: Path) -> None:
    output = tmp_path / "host.json"
    sizes = ["--batch_size", "4", "32", "--input_len", "20", "--output_len", "9"]
    assert bench.main(["host", *sizes, "--output", str(output)]) == 0
    for row, batch in zip(json.loads(output.read_text())["results"], (4, 32), strict=True):
        assert row["batch_size"] == batch and row["decode_steps"] > 0
        assert 0 < row["decode_ms"] <= row["longest_ms"]


def test_startup_measures_processes_of_their_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint, output = tiny_checkpoint.write(tmp_path / "ckpt", tiny_checkpoint.qformat("fp8", "fp8")), tmp_path / "o"
    command = ["startup", "--checkpoint_dir", str(checkpoint), "--device", "cpu", "--output", str(output)]
    assert bench.main([*command, "--", "--target", "cpu", "--max_batch_size", "2", "--max_num_tokens", "64"]) == 0
    rows = json.loads(output.read_text())["results"]
    assert [row["what"] for row in rows] == list(startup.WHAT)
    assert all(row["seconds"] > 0.1 and row["peak_gb"] > 0.01 for row in rows)
    assert bench.main([*command, "--", "--target", "sm_12"]) == 1
    assert "ended with status 1" in capfd.readouterr().err
