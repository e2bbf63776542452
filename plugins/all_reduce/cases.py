"""Cases of all_reduce with one rank, for types and shapes; several ranks need several processes."""

from __future__ import annotations

import torch

from fp8.plugins.all_reduce.plugin import AllReduce
from fp8.plugins.base import Case, StepShape

WORLD = 2  # for which kernels are compiled


def case(operation: str, dtype: torch.dtype, *shape: int, fp8_tokens: int = 0) -> Case:
    def make(generator: torch.Generator, device: str) -> list[torch.Tensor | None]:
        return [torch.randn(shape, dtype=dtype, device=device, generator=generator)]

    name = f"{operation} {'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
    plugin = AllReduce(operation, WORLD, fp8_tokens)
    name += " fp8" if plugin.travels_in_fp8(shape[0]) else ""
    why = "one rank's sum is its part, or that rounded as the wire rounds"
    return Case(name, plugin, make, StepShape.prefill(shape[0]), 0.0, why)


CASES = [
    case("sum", torch.bfloat16, 3, 64),
    case("sum", torch.float16, 1, 4096),
    case("sum", torch.float32, 5, 60),
    case("max", torch.float32, 7),
    case("sum", torch.bfloat16, 5, 384, fp8_tokens=4),
    case("sum", torch.bfloat16, 3, 384, fp8_tokens=4),
]
