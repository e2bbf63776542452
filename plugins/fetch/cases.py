"""Cases of fetch: fields of every count, of more rows than the step has, one block and several."""

from __future__ import annotations

import torch

from fp8.plugins.base import Case, StepShape
from fp8.plugins.fetch.plugin import Fetch

WIDTHS = ((0, 4), (1, 4), (2, 4), (1, 132), (3, 8))  # what counts a field's rows, bytes of a row


def case(stages: int, turn: int, step: StepShape) -> Case:
    def make(generator: torch.Generator, device: str) -> list[torch.Tensor | None]:
        fields, size = [], 64
        for counted, width in WIDTHS:
            fields.append([size, counted, width])
            size += -(-(step.tokens + 9) * width // 128) * 128
        staging, buffer = (
            torch.randint(256, shape, device=device, generator=generator).byte() for shape in ((stages, size), (size,))
        )
        state = torch.tensor([turn, 0], dtype=torch.int32, device=device)
        return [staging, torch.tensor(fields, dtype=torch.int32, device=device), buffer, state]

    name = f"copy {turn} of {stages}, {step.tokens} tokens of {step.sequences}"
    return Case(name, Fetch(), make, step, 0.0, "bytes are moved", 2 * 152 * step.tokens)


CASES = [
    case(3, 2, StepShape(1, 1, 1, 0, 90, 1)),
    case(3, 0, StepShape(33, 33, 33, 0, 900, 33)),
    case(5, 1, StepShape(2050, 7, 4, 1023, 1024, 6)),
]
