"""How long the device works at the steps that the host enqueues, and at what clock."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fp8.runtime.session import Session

if TYPE_CHECKING:
    import torch


SPIN, START = 100_000, 1_000  # clocks that a kernel waits, longer than another one does


class CoreClock:
    """Counts the SM clock while `session` runs steps: behind each, two kernels wait for some clocks, one for SPIN more
    than the other, and by how much longer it takes tells the clock. They cost some 80 us of the device a step."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._waits: list[Sequence[torch.cuda.Event]] = []

    @contextmanager
    def counting(self) -> Iterator[None]:
        before = self._session.around_step
        if self._session.device.type == "cuda":
            self._session.around_step = self._step
        try:
            yield
        finally:
            self._session.around_step = before

    @contextmanager
    def _step(self) -> Iterator[None]:
        import torch

        yield
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        events[0].record()
        for event, clocks in zip(events[1:], (START, START + SPIN), strict=True):
            torch.cuda._sleep(clocks)
            event.record()
        self._waits.append(events)

    def mhz(self) -> float | None:
        """The mean over the middle half of the steps since; None on a CPU. Waits for them."""
        if not self._waits:
            return None
        self._waits[-1][-1].synchronize()
        found = sorted(SPIN / (b.elapsed_time(c) - a.elapsed_time(b)) / 1e3 for a, b, c in self._waits)
        return statistics.mean(found[len(found) // 4 : len(found) - len(found) // 4])


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
