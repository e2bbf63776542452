"""How long the device works at the steps that the host enqueues."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fp8.runtime.session import Session

if TYPE_CHECKING:
    import torch


class DeviceClock:
    """From now on, each step of `session` has an event before it and one behind: some microseconds of the host's."""

    def __init__(self, session: Session) -> None:
        self._steps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        if session.device.type == "cuda":
            session.around_step = self._step

    @contextmanager
    def _step(self) -> Iterator[None]:
        import torch

        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._steps.append((begin, end))

    def restart(self) -> None:
        """Forgets the steps enqueued so far."""
        self._steps.clear()

    def facts(self) -> dict[str, float | None]:
        """Of the steps since, the mean time on the device, and what part of the time from the first step's begin to
        the last one's end that makes: 1 where the device never waited for the host. None on a CPU. Waits for them."""
        if not self._steps:
            return {"device_ms_per_step": None, "device_busy": None}
        self._steps[-1][1].synchronize()
        working = sum(begin.elapsed_time(end) for begin, end in self._steps)
        idle = sum(end.elapsed_time(begin) for (_, end), (begin, _) in itertools.pairwise(self._steps))
        return {"device_ms_per_step": working / len(self._steps), "device_busy": working / (working + idle)}
