"""The meaning of an all-reduce."""

from __future__ import annotations

import torch

from fp8.plugins.base import SCALE_BLOCK, Communicator
from fp8.plugins.quantize.reference import quantize_block


def all_reduce(x: torch.Tensor, operation: str, comm: Communicator) -> torch.Tensor:
    """The ranks' sum, in float32 in their order, rounded once to x's dtype; or their maximum. All of one shape."""
    parts = comm.all_gather(x)
    if operation == "max":
        first, *others = parts
        for part in others:
            first = torch.maximum(first, part)
        return first
    return _sum(parts).to(x.dtype)


def sum_of_e4m3(x: torch.Tensor, comm: Communicator) -> torch.Tensor:
    """The ranks' sum of x DT [T, H], each part quantized with a scale for 128 channels; among more than two ranks the
    sum is, too. float32 inside, in the order of the ranks."""
    codes, scale = quantize_block(x)
    parts = zip(comm.all_gather(codes.view(torch.uint8)), comm.all_gather(scale), strict=True)
    total = _sum([_dequantized(c.view(codes.dtype), s) for c, s in parts])
    if comm.world > 2:
        total = _dequantized(*quantize_block(total))
    return total.to(x.dtype)


def _sum(parts: list[torch.Tensor]) -> torch.Tensor:
    first, *others = parts
    total = first.float()
    for part in others:
        total = total + part.float()
    return total


def _dequantized(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return codes.float() * scale.repeat_interleave(SCALE_BLOCK, 1)
