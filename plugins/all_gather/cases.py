"""Cases of all_gather with one rank, for types and shapes; several ranks need several processes."""

from __future__ import annotations

import torch

from fp8.plugins.all_gather.plugin import AllGather
from fp8.plugins.base import Case, StepShape


def case(rows: int, columns: int, dtype: torch.dtype) -> Case:
    def make(generator: torch.Generator, device: str) -> list[torch.Tensor | None]:
        return [torch.randn(rows, columns, dtype=dtype, device=device, generator=generator)]

    step = StepShape(rows, rows, rows, 0, rows, rows)
    return Case(f"{rows}x{columns}", AllGather((columns,)), make, step, 0.0, "a copy")


CASES = [case(1, 321, torch.float32), case(7, 64, torch.bfloat16)]
