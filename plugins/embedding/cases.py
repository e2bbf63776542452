"""Cases of embedding: rows small and large, ids of padding among them."""

from __future__ import annotations

import torch

from fp8.plugins.base import Case, StepShape
from fp8.plugins.embedding.plugin import Embedding


def case(tokens: int, vocabulary: int, hidden: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    def make(generator: torch.Generator, device: str) -> list[torch.Tensor | None]:
        ids = torch.randint(vocabulary, (tokens,), device=device, generator=generator).int()
        ids[-1] = -1 if tokens > 1 else ids[-1]
        return [ids, torch.randn(vocabulary, hidden, dtype=dtype, device=device, generator=generator)]

    name = f"{tokens} of {vocabulary}x{hidden} {str(dtype).removeprefix('torch.')}"
    return Case(name, Embedding(), make, StepShape.prefill(tokens), 0.0, "a copy", 4 * tokens * hidden)


CASES = [
    case(5, 17, 8),
    case(33, 100, 200, torch.float16),
    case(1, 32000, 4096),
    case(4096, 32000, 4096),
]
