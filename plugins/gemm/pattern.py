"""A linear layer: float32 sums of (dequantized) rows, one rounding. Its scales become vectors per output channel."""

from __future__ import annotations

import torch

from fp8.plugins.base import SCALE_BLOCK
from fp8.plugins.gemm.types import GROUP_ROWS
from fp8.plugins.quantize.pattern import ROUNDED


def gemm(op, x, w, x_scale, w_scale, bias, *, quantized=(True, False), biased=(True, False), rounded=(True, False)):
    y = product(op, x, w, x_scale, w_scale, bias, quantized, biased)
    if rounded:
        return op.Cast(y, to=op.attribute("out_dtype", *ROUNDED))
    op.set(out_dtype="float32")
    return y


def product(op, x, w, x_scale, w_scale, bias, quantized, biased):
    """y f32 [T, N] = x w^T + bias."""
    if quantized:
        wide = op.DequantizeLinear(x, x_scale), op.DequantizeLinear(op.constant(w), w_scale)
    else:
        wide = op.Cast(x, to="float32"), op.Cast(op.constant(w), to="float32")
    shift = (op.Cast(op.constant(bias), to="float32"),) if biased else ()
    return op.module(op.Gemm(*wide, *shift, transA=0, transB=1, alpha=1.0, beta=1.0))


def complete(inputs, attributes):
    """`rows` says which of a step's sizes counts the rows of x."""
    return {"rows": inputs[0].shape[0]}


def per_channel(scale: torch.Tensor, rows: int) -> torch.Tensor:
    """The weight's scale, one or one per channel, as f32 [N]; blockwise (given per row) as f32
    [ceil(N / 128), K / 128], or [N / 8, K / 128] where blocks of joined or cut parts begin elsewhere."""
    if scale.ndim == 2:
        blocks = scale[::SCALE_BLOCK]
        whole = torch.equal(blocks.repeat_interleave(SCALE_BLOCK, 0)[: len(scale)], scale)
        return blocks if whole else scale[::GROUP_ROWS]
    return scale.float().reshape(-1).expand(rows)


def as_float(bias: torch.Tensor, rows: int) -> torch.Tensor:
    return bias.float()


PREPARE = {"w_scale": per_channel, "bias": as_float}
