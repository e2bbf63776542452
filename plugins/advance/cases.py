"""Cases of advance: fewer rows than places for them, some of them padding, one block and several."""

from __future__ import annotations

import torch

from fp8.plugins.advance.plugin import Advance
from fp8.plugins.base import Case, StepShape


def case(rows: int, stages: int, padding: int = 0) -> Case:
    """Of `rows` rows the last `padding` have no context; all of these write to the table's last place."""

    def make(generator: torch.Generator, device: str) -> list[torch.Tensor | None]:
        def draw(top: int, *size: int) -> torch.Tensor:
            return torch.randint(top, size, device=device, generator=generator).int()

        spare, places = rows + 7, rows + 3
        token, slots = draw(32000, rows), torch.randperm(spare, device=device, generator=generator)[:rows]
        slots[rows - padding :] = spare
        token[rows - padding :] = 5
        input_ids, positions, mapping, lengths = (draw(n, places) + 1 for n in (32000, 9000, 900, 9000))
        lengths[rows - padding : rows] = 0
        mapping[rows - padding : rows] = -1
        state = [draw(32000, spare + 1), input_ids, positions, mapping, lengths, draw(500, places)]
        return [token, slots, *state, draw(stages, places), draw(32000, stages, places)]

    name = f"{rows} rows, {padding} of padding, {stages} stages"
    step = StepShape(rows, rows, rows, 0, 9000, rows)
    return Case(name, Advance(), make, step, 0.0, "integers", 60 * rows)


CASES = [case(1, 2), case(8, 2, 3), case(300, 3, 12), case(1024, 2)]
