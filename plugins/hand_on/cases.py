"""Cases of hand_on with one rank, which gets its own; several need several processes."""

from __future__ import annotations

import torch

from fp8.plugins.base import Case, StepShape
from fp8.plugins.hand_on.plugin import HandOn


def case(dtype: torch.dtype, *shape: int) -> Case:
    def make(generator: torch.Generator, device: str) -> list[torch.Tensor | None]:
        return [torch.randint(1 << 15, shape, device=device, generator=generator).to(dtype)]

    name = f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
    return Case(name, HandOn(), make, StepShape.prefill(shape[0]), 0.0, "bytes are moved")


CASES = [case(torch.bfloat16, 3, 64), case(torch.float32, 5, 4096), case(torch.int32, 65)]
