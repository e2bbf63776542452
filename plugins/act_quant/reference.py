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
    return finish(hidden(x, activation, gated), quant, scale, scale_ub, x.dtype)


def hidden(x: torch.Tensor, activation: str, gated: bool) -> torch.Tensor:
    """f32 [T, F]."""
    h = x.float()
    if not gated:
        return ACTIVATIONS[activation](h)
    gate, up = h.chunk(2, 1)
    return ACTIVATIONS[activation](gate) * up
