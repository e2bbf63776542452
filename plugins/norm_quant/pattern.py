"""[residual add,] [chosen rows,] a norm in float32, rounded or quantized once, for each kind of reader."""

from __future__ import annotations

from fp8.plugins.quantize.pattern import finish


def norm_quant(
    op, x, stream, weight, bias, scale, rows,
    *, residual=(True, False), gather=(True, False), norm=("rms", "layer"), affine=(True, False),
    quant=("per_token", "block", "static", "none"), bounded=(True, False),
):  # fmt: skip
    h = op.Add(x, stream) if residual else x
    wide = op.Cast(op.Gather(h, rows, axis=0) if gather else h, to="float32")
    y = normalized(op, op.shared(wide), op.shared(op.Cast(op.constant(weight), to="float32")), bias, norm, affine)
    outputs = y and finish(op, op.module(op.shared(y)), scale, quant, bounded)
    return outputs and ((*outputs, h) if residual and not gather else outputs)


def normalized(op, x, weight, bias, norm, affine):
    if norm == "layer":
        shift = (op.shared(op.Cast(op.constant(bias), to="float32")),) if affine else ()
        return op.LayerNormalization(x, weight, *shift, axis=-1, epsilon=op.attribute("epsilon"))
    return op.RMSNormalization(x, weight, axis=-1, epsilon=op.attribute("epsilon")) if affine else None
