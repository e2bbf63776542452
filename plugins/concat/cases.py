"""Cases of concat: two and three parts, rows that are no multiple of a block."""

from __future__ import annotations

import torch

from fp8.plugins.base import Case, StepShape
from fp8.plugins.concat.plugin import Concat


def case(tokens: int, widths: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Case:
    def make(generator: torch.Generator, device: str) -> list[torch.Tensor | None]:
        return [torch.randn(tokens, n, dtype=dtype, device=device, generator=generator) for n in widths]

    name = f"{tokens}x{'+'.join(map(str, widths))} {str(dtype).removeprefix('torch.')}"
    return Case(name, Concat(), make, StepShape.prefill(tokens), 0.0, "a copy", 4 * tokens * sum(widths))


CASES = [case(1, (64, 8)), case(37, (256, 128, 128), torch.float16), case(4096, (4096, 1024, 1024))]
