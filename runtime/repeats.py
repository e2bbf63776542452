"""A step that runs several times, one after the other: are its logits the same bits each time, and finite?

Nothing here waits for the device before `found`: what launches of neighbouring steps do to each other is to show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Repeated:
    """How many of `times` runs gave other bits than the first, and how many a value that is not finite."""

    times: int
    unsteady: int
    not_finite: int


class Repeats:
    """Takes the logits f32 [rows, V] of a step in, time after time."""

    def __init__(self) -> None:
        self._first: torch.Tensor | None = None
        self._counts: list[torch.Tensor] = []  # unsteady, not finite: of each time

    def add(self, logits: torch.Tensor) -> None:
        import torch

        if self._first is None:
            self._first = logits.clone()
        other = (logits.view(torch.int32) != self._first.view(torch.int32)).any()
        self._counts.append(torch.stack([other, ~logits.isfinite().all()]))

    def found(self) -> Repeated:
        import torch

        unsteady, not_finite = torch.stack(self._counts).sum(0).tolist()
        return Repeated(len(self._counts), unsteady, not_finite)
