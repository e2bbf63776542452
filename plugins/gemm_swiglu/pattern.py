"""The merged gate and up linears of an MLP and silu(gate) * up, rounded or quantized once."""

from __future__ import annotations

import torch

from fp8.plugins.act_quant.pattern import activated
from fp8.plugins.base import PluginError
from fp8.plugins.gemm.pattern import per_channel, product
from fp8.plugins.gemm_swiglu.reference import GROUP, interleave
from fp8.plugins.quantize.pattern import finish


def gemm_swiglu(
    op, x, w, x_scale, w_scale, bias, out_scale,
    *, quantized=(True, False), biased=(True, False), quant=("static", "none"),
):  # fmt: skip
    y = op.Cast(product(op, x, w, x_scale, w_scale, bias, quantized, biased), to=op.attribute("out_dtype"))
    gate, up = op.Split(y, op.anything(), axis=1, outputs=2)
    h = op.Mul(activated(op, op.Cast(gate, to="float32"), "silu"), op.Cast(up, to="float32"))
    return finish(op, h, out_scale, quant, bounded=True)


def interleaved(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """[gate; up] -> groups of 8 gate rows and 8 up rows: a thread of a wgmma accumulator then holds both of a pair."""
    if rows % (2 * GROUP):
        raise PluginError(f"F={rows // 2} is not a multiple of {GROUP} (rows are interleaved in groups); use act_quant")
    return weight if weight.is_meta else interleave(*weight.chunk(2))  # same shape


def scales(scale: torch.Tensor, rows: int) -> torch.Tensor:
    if scale.ndim == 2:
        raise PluginError("blockwise scales are not interleaved; use act_quant")
    return interleaved(per_channel(scale, rows), rows)


PREPARE = {
    "w": interleaved,
    "w_scale": scales,
    "bias": lambda bias, rows: interleaved(bias.float(), rows),
}
