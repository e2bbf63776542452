"""Random checkpoints, and engines of a shape without its matrices."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import tiny_checkpoint
import torch

from fp8.builder import engine as engine_format
from fp8.builder.checkpoint import Checkpoint
from fp8.scripts import bench, build, random_checkpoint, random_engine, run
from fp8.scripts.benchmarks import (
    arguments,
)


def config_file(directory: Path) -> Path:
    path = directory / "shape.json"
    path.write_text(json.dumps(tiny_checkpoint.CONFIG))
    return path


@pytest.mark.parametrize(
    ("qformat", "kv"), [("fp8", "fp8"), ("fp8_channel", "fp8"), ("fp8_rowwise", "auto"), ("bf16", "fp8")]
)
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
    sizes = ["--input_len", "8", "--output_len", "3", "--runs", "1"]
    engine = ["--engine_dir", str(tmp_path / "alone"), "--device", "cpu"]
    assert bench.main(["latency", *engine, *sizes]) == 0
    table = plans[1].buffer("model.embed_tokens.weight")
    first, second = (arguments.make_weight(table, torch.device("cpu")) for _ in range(2))
    assert torch.equal(first, second) and 0.015 < float(first.float().std()) < 0.025
    assert run.main(["--engine_dir", str(tmp_path / "alone"), "--device", "cpu", "--input_tokens", "1,2"]) == 1
    assert "is missing; build the engine again (fp8-bench alone" in capsys.readouterr().err
