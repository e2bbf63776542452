"""Cases of add: residual streams."""

from __future__ import annotations

import torch

from fp8.plugins.add.plugin import Add
from fp8.plugins.base import Case, StepShape


def case(tokens: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    def make(generator: torch.Generator, device: str) -> list[torch.Tensor | None]:
        return [torch.randn(tokens, width, dtype=dtype, device=device, generator=generator) for _ in range(2)]

    name = f"{tokens}x{width} {str(dtype).removeprefix('torch.')}"
    why = "one float32 addition and one rounding"
    return Case(name, Add(), make, StepShape.prefill(tokens), 0.0, why, 6 * tokens * width)


CASES = [case(3, 8), case(5, 200), case(1, 4096), case(64, 8192), case(4096, 4096), case(7, 4104, torch.float16)]
