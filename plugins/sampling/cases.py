"""Cases of sampling: real vocabularies and sizes that fill no vector; ties; greedy and random rows together."""

from __future__ import annotations

import torch

from fp8.plugins.base import Case, StepShape
from fp8.plugins.sampling.plugin import Sampling

WHY = "the random bits are equal; logarithms good to a few roundings swap two scores in one of millions of draws"


def case(rows: int, vocabulary: int, temperature: float, counter: bool = True) -> Case:
    """Rows 0, 2, ... have the temperature, the others are greedy; row 1 has ties, and row 3 nothing but -inf."""

    def make(generator: torch.Generator, device: str) -> list[torch.Tensor | None]:
        logits = 4 * torch.randn(rows, vocabulary, device=device, generator=generator)
        logits[1:2, vocabulary // 2 :] = 100.0
        logits[3:4] = -torch.inf
        hot = torch.full((rows,), temperature, device=device)
        hot[1::2] = 0
        seed = torch.randint(-(2**62), 2**62, (rows,), device=device, generator=generator)
        steps = torch.randint(2**31 - 1, (rows,), device=device, generator=generator).int()
        return [logits, hot, seed, steps] if counter else [logits, hot, seed]

    step = StepShape(rows, rows, rows, 0, 1, rows)
    name = f"{rows}x{vocabulary} temperature {temperature}{'' if counter else ' uncounted'}"
    return Case(name, Sampling(), make, step, 0.0, WHY, 4 * rows * vocabulary)


CASES = [
    case(4, 1, 1.0),
    case(5, 37, 0.7, counter=False),
    case(6, 50257, 1.3),
    case(1, 128256, 0.0),
    case(1, 128256, 0.8),
    case(64, 128256, 0.8),
    case(256, 32000, 1.0),
]
