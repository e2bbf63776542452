"""activation(gate) * up or activation(x), in float32, rounded or quantized once."""

from __future__ import annotations

from fp8.plugins.quantize.pattern import finish


def act_quant(
    op, x, scale,
    *, activation=("silu", "gelu", "gelu_tanh"), gated=(True, False), quant=("per_token", "static", "none"),
    bounded=(True, False),
):  # fmt: skip
    if gated:
        gate, up = op.Split(x, op.anything(), axis=1, outputs=2)
        y = op.module(op.Mul(activated(op, op.Cast(gate, to="float32"), activation), op.Cast(up, to="float32")))
    else:
        y = op.module(activated(op, op.Cast(x, to="float32"), activation))
    return finish(op, y, scale, quant, bounded)


def activated(op, x, activation):
    """silu is x * sigmoid(x)."""
    if activation == "silu":
        return op.Mul(x, op.Sigmoid(x))
    return op.Gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
