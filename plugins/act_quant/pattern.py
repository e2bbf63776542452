"""activation(gate) * up or activation(x), in float32, rounded or quantized once."""

from __future__ import annotations

from fp8.plugins.quantize.pattern import finish


def act_quant(
    op, x, scale,
    *, activation=("silu", "gelu", "gelu_tanh"), gated=(True, False),
    quant=("per_token", "block", "from_amax", "static", "none"), bounded=(True, False),
):  # fmt: skip
    y = hidden(op, x, activation, gated, op.shared if quant == "from_amax" else op.alone)
    return finish(op, op.module(y), scale, quant, bounded)


def hidden(op, x, activation, gated, keep):
    """f32 [T, F]. `keep` is op.shared where a row_amax reads these values too, and both compute them."""
    if not gated:
        return keep(activated(op, keep(op.Cast(x, to="float32")), activation, keep))
    gate, up = (keep(half) for half in op.Split(x, op.anything(), axis=1, outputs=2))
    gate, up = keep(op.Cast(gate, to="float32")), keep(op.Cast(up, to="float32"))
    return keep(op.Mul(keep(activated(op, gate, activation, keep)), up))


def activated(op, x, activation, keep=None):
    """silu is x * sigmoid(x)."""
    keep = keep or op.alone
    if activation == "silu":
        return op.Mul(x, keep(op.Sigmoid(x)))
    return op.Gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
