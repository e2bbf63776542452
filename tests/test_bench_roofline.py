"""fp8-bench roofline: a step's work, and bounds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import tiny_engine

from fp8.builder import engine as engine_format
from fp8.plugins.base import StepShape
from fp8.plugins.compile import compile_kernel
from fp8.runtime.session import Session
from fp8.scripts import bench
from fp8.scripts.benchmarks import (
    bound,
    ceilings,
    roofline,
    work,
)


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_engine.write(tmp_path_factory.mktemp("tiny"))


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


def test_a_mixture_is_its_sequences_decode_rows_first() -> None:
    found = roofline.mixture("2x70+1x20+2x9@100")
    assert found.sequences == ((70, 1), (70, 1), (20, 20), (100, 9), (100, 9))


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
