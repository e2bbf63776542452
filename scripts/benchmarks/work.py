"""What a plan step must at least move and compute: its share of the roofline."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from fp8.builder.engine import Buffer, Plan, Step
from fp8.plugins.base import StepShape
from fp8.runtime.scheduler import Row
from fp8.scripts.benchmarks.bound import LINEARS

WIDTHS = {"float8_e4m3fn": 1, "int8": 1, "uint8": 1, "bfloat16": 2, "float16": 2, "int64": 8}  # else 4 bytes


@dataclass(frozen=True)
class Work:
    """Least memory traffic in bytes, what of it is written, floating-point operations, and the type that the tensor
    cores multiply."""

    bytes: float
    written: float
    flops: float
    dtype: str


def label(step: Step) -> str:
    """A step's name without the layer's number."""
    return re.sub(r"\.\d+\.", ".*.", step.name)


def work_of(plan: Plan, step: Step, shape: StepShape, rows: Sequence[Row]) -> Work:
    """Live rows of activations once, weights once (of a table, the rows taken), K and V of every context once."""

    def total(names: Sequence[str]) -> float:
        named = (plan.buffer(name) for name in filter(None, names))
        return sum(_bytes(b, shape) for b in named if b.kind in ("activation", "output", "weight"))

    written = total(step.outputs)
    moved = total(step.inputs) + written
    if step.plugin == "attention":
        return _attention(plan, step, shape, rows)
    if step.plugin == "embedding":
        return Work(2.0 * written, written, 0.0, "bfloat16")
    if step.plugin not in LINEARS:
        return Work(moved, written, 0.0, "bfloat16")
    w, out = plan.buffer(step.inputs[1]), plan.buffer(step.outputs[0])
    n, k = (int(d) for d in w.shape)
    live = shape.logits_rows if out.shape[0] == "L" else shape.tokens
    return Work(moved, written, 2.0 * n * k * live, w.dtype)


def _attention(plan: Plan, step: Step, shape: StepShape, rows: Sequence[Row]) -> Work:
    """Rotary tables and scales are left out."""
    cache = next(b for b in map(plan.buffer, filter(None, step.inputs)) if b.kind == "kv_cache")
    kv_row = 2 * math.prod(int(d) for d in cache.shape[2:]) * WIDTHS.get(cache.dtype, 4)
    given, written = (_bytes(plan.buffer(name), shape) for name in (step.inputs[0], step.outputs[0]))
    written += sum(row.count for row in rows) * kv_row
    moved = given + written + sum(row.start for row in rows) * kv_row
    visible = sum(row.count * row.start + row.count * (row.count + 1) // 2 for row in rows)
    flops = 4.0 * visible * step.attributes["num_heads"] * step.attributes["head_dim"]
    return Work(moved, written, flops, cache.dtype)


def _bytes(buffer: Buffer, shape: StepShape) -> float:
    live = {"T": shape.tokens, "L": shape.logits_rows, "B": shape.sequences}
    return math.prod(live.get(d, 1) if isinstance(d, str) else d for d in buffer.shape) * WIDTHS.get(buffer.dtype, 4)
