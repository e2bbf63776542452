"""How long the device works at the steps that the host enqueues, and at what clock."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fp8.plugins.base import Kernel, StepShape
from fp8.runtime.session import Session
from fp8.scripts.benchmarks.case_buffers import Functions

if TYPE_CHECKING:
    import torch

STAMP = Kernel(str(Path(__file__).parent), "stamp.cu", "stamp", ())


@dataclass(frozen=True)
class Stamp:
    """What the clocks of all multiprocessors say when the device comes to it: i64 [multiprocessors, 2], clocks and
    nanoseconds, zeros where no block came. Of a CPU nothing."""

    clocks: torch.Tensor | None


class CoreClock:
    """Counts the SM clocks of what `session` runs, by stamps: 2 us of the device and 30 of the host each."""

    def __init__(self, session: Session) -> None:
        import torch

        self._session = session
        self._on_gpu = session.device.type == "cuda"
        if self._on_gpu:
            (self._function,) = Functions().of([STAMP])
            self._count = torch.cuda.get_device_properties(session.device).multi_processor_count
            self.stamp()  # the kernel is loaded when it runs first

    def stamp(self) -> Stamp:
        """A stamp after everything enqueued so far."""
        if not self._on_gpu:
            return Stamp(None)
        import torch

        from fp8.plugins.cuda import Launch

        with self._session.scope():
            clocks = torch.zeros(self._count, 2, dtype=torch.int64, device=self._session.device)
            Launch(self._function, 1, [clocks], grid=self._count, pdl=False)()
        return Stamp(clocks)

    def mhz(self, begin: Stamp, end: Stamp) -> float | None:
        """The mean SM clock between two stamps, over all multiprocessors (of which some had 1% more than others);
        None on a CPU. Waits for them."""
        if begin.clocks is None or end.clocks is None:
            return None
        with self._session.scope():
            clocks, nanoseconds = (end.clocks - begin.clocks).cpu().double().unbind(1)
            seen = ((begin.clocks[:, 1] > 0) & (end.clocks[:, 1] > 0)).cpu()
        return float((clocks[seen] / nanoseconds[seen]).mean()) * 1e3

    @contextmanager
    def behind_prompts(self) -> Iterator[list[Stamp]]:
        """A stamp after each step that takes in prompts."""
        found: list[Stamp] = []

        @contextmanager
        def around(shape: StepShape) -> Iterator[None]:
            yield
            if shape.decode_sequences < shape.sequences:
                found.append(self.stamp())

        before, self._session.around_step = self._session.around_step, around
        try:
            yield found
        finally:
            self._session.around_step = before


class DeviceClock:
    """Puts an event before and after each step of `session` from now on, which costs the host some microseconds."""

    def __init__(self, session: Session) -> None:
        self._steps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        if session.device.type == "cuda":
            session.around_step = self._step

    @contextmanager
    def _step(self, _: StepShape) -> Iterator[None]:
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
        """Of the steps since then: the mean time on the device, and what share it is of the time from the first step's
        start to the last one's end: 1 if the device never waited for the host. None on a CPU. Waits for them."""
        if not self._steps:
            return {"device_ms_per_step": None, "device_busy": None}
        self._steps[-1][1].synchronize()
        working = sum(begin.elapsed_time(end) for begin, end in self._steps)
        idle = sum(end.elapsed_time(begin) for (_, end), (begin, _) in itertools.pairwise(self._steps))
        return {"device_ms_per_step": working / len(self._steps), "device_busy": working / (working + idle)}
