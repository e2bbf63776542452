"""The meaning of an all-reduce."""

from __future__ import annotations

import torch

from fp8.plugins.base import Communicator


def all_reduce(x: torch.Tensor, operation: str, comm: Communicator) -> torch.Tensor:
    """The ranks' sum, in float32 in their order, rounded once to x's dtype; or their maximum. All of one shape."""
    first, *others = comm.all_gather(x)
    if operation == "max":
        for part in others:
            first = torch.maximum(first, part)
        return first
    total = first.float()
    for part in others:
        total = total + part.float()
    return total.to(x.dtype)
