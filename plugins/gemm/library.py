"""cuBLASLt through torch as a tactic of `gemm`, where it computes exactly the same op. It takes no part in
programmatic dependent launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fp8.plugins.base import Launcher, Plugin, StepShape, Tensor
from fp8.plugins.gemm.types import blockwise, operands

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Library:
    """No knobs: cuBLASLt's own heuristic chooses."""

    kind: str = "library"


def candidates(plugin: Plugin, inputs: Sequence[Tensor | None]) -> list[Library]:
    """[Library()] where it applies: no bias (its own is rounded to 16 bits); e4m3 with both scales, bfloat16 output and
    N, K in multiples of 16; or 16-bit operands of the output's dtype, unscaled."""
    x, w = operands(inputs)
    out = plugin.attributes()["out_dtype"]
    if plugin.name != "gemm" or inputs[4] is not None or blockwise(inputs):
        return []
    if x.dtype == out and inputs[2] is None and inputs[3] is None:
        return [Library()]
    scaled = inputs[2] is not None and inputs[3] is not None
    aligned = all(isinstance(n, int) and n % 16 == 0 for n in w.shape)
    return [Library()] if x.dtype == "float8_e4m3fn" and out == "bfloat16" and scaled and aligned else []


def bind(plugin: Plugin, tensors: Sequence[torch.Tensor | None]) -> Launcher:
    """A launch over x, w, x_scale, w_scale, bias (absent) and y. A scalar x_scale is spread over the rows once,
    here."""
    import torch

    x, w, x_scale, w_scale, _, y = tensors
    assert x is not None and w is not None and y is not None
    logits = plugin.attributes().get("rows") == "L"
    fast = plugin.attributes()["accumulation"] == "fast"
    quantized = x_scale is not None and w_scale is not None
    row_scale = x_scale.reshape(-1, 1).expand(x.shape[0], 1).contiguous() if x_scale is not None else None
    column_scale = w_scale.reshape(1, -1) if w_scale is not None else None

    def run(step: StepShape) -> None:
        rows = step.logits_rows if logits else step.tokens
        if rows == 0:
            return
        if quantized:
            scale = row_scale[:rows]
            torch._scaled_mm(x[:rows], w.t(), scale, column_scale, out_dtype=y.dtype, use_fast_accum=fast, out=y[:rows])
        else:
            torch.mm(x[:rows], w.t(), out=y[:rows])

    return run
