"""Quantization of a float32 value, and the ways in which every row plugin ends."""

from __future__ import annotations

from fp8.plugins.base import SCALE_BLOCK

ROUNDED = ("bfloat16", "float16", "float32")  # of float32 to itself in an engine for references alone
SCALE_FLOOR = 1 / (448 * 512)


def quantize(op, x, scale, *, quant=("per_token", "block", "from_amax", "static"), bounded=(True, False)):
    wide = op.Cast(x, to="float32")
    outputs = finish(op, op.shared(wide) if quant == "from_amax" else wide, scale, quant, bounded)
    return outputs and (op.module(outputs[0]), *outputs[1:])


def finish(op, y, scale, quant, bounded):
    """y f32 [T, K] rounded to the model's type, or quantized: the plugin's outputs. None for a variant like another.

    "from_amax": `scale` is the largest magnitude of each row, already known."""
    if not bounded and quant not in ("per_token", "from_amax"):
        return None
    if quant == "none":
        return (op.Cast(y, to=op.attribute("dtype", *ROUNDED)),)
    if quant == "static":
        return (op.QuantizeLinear(y, scale, saturate=1, output_dtype="float8_e4m3fn"),)
    if quant == "block":
        amax = op.ReduceMax(op.Reshape(op.Abs(y), op.anything()), 2, keepdims=0)
    else:
        amax = scale if quant == "from_amax" else row_amax(op, y)
        if bounded:
            amax = op.Min(amax, op.scalar("scale_ub"))
    along = {"axis": 1, "block_size": SCALE_BLOCK} if quant == "block" else {"axis": 0}
    scale = op.Max(op.Div(amax, 448), SCALE_FLOOR)
    return op.QuantizeLinear(y, scale, saturate=1, output_dtype="float8_e4m3fn", **along), scale


def row_amax(op, y):
    """f32 [T]."""
    return op.ReduceMax(op.Abs(y), 1, keepdims=0)
