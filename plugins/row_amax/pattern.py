"""The largest magnitude of each row of a value that another plugin quantizes, once all ranks have been asked."""

from __future__ import annotations

from fp8.plugins.act_quant.pattern import hidden
from fp8.plugins.quantize import pattern


def row_amax(op, x, *, activation=("silu", "gelu", "gelu_tanh", ""), gated=(True, False)):
    if activation:
        y = op.module(hidden(op, x, activation, gated, op.shared))
    else:
        y = None if gated else op.shared(op.Cast(x, to="float32"))
    return y and pattern.row_amax(op, y)
