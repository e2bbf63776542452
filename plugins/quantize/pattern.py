"""Quantization of a float32 value, and the three ways in which every row plugin ends."""

from __future__ import annotations

SCALE_FLOOR = 1 / (448 * 512)


def quantize(op, x, scale, *, quant=("per_token", "static"), bounded=(True, False)):
    outputs = finish(op, op.Cast(x, to="float32"), scale, quant, bounded)
    return outputs and (op.module(outputs[0]), *outputs[1:])


def finish(op, y, scale, quant, bounded):
    """y f32 [T, K] rounded to 16 bits, or quantized: the outputs of the plugin. None for a variant that is no other."""
    if not bounded and quant != "per_token":
        return None
    if quant == "none":
        return (op.Cast(y, to=op.attribute("dtype", "bfloat16", "float16")),)
    if quant == "static":
        return (op.QuantizeLinear(y, scale, saturate=1, output_dtype="float8_e4m3fn"),)
    amax = op.ReduceMax(op.Abs(y), 1, keepdims=0)
    if bounded:
        amax = op.Min(amax, op.scalar("scale_ub"))
    scale = op.Max(op.Div(amax, 448), SCALE_FLOOR)
    return op.QuantizeLinear(y, scale, axis=0, saturate=1, output_dtype="float8_e4m3fn"), scale
