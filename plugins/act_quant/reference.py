"""The meaning of an MLP's activation: float32 inside, rounded or quantized once."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fp8.plugins.quantize.reference import finish

ACTIVATIONS = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def act_quant(
    x: torch.Tensor, scale: torch.Tensor | None, activation: str, gated: bool, quant: str, scale_ub: float
) -> tuple[torch.Tensor, ...]:
    """x: [T, 2F] = [gate | up] -> activation(gate) * up, or [T, F] -> activation(x); then `finish`."""
    h = x.float()
    if gated:
        gate, up = h.chunk(2, 1)
        h = ACTIVATIONS[activation](gate) * up
    else:
        h = ACTIVATIONS[activation](h)
    return finish(h, quant, scale, scale_ub, x.dtype)
