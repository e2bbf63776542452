"""Times tactics in a process of its own: one that crashes, hangs or computes wrongly is dropped, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

from fp8.builder.child import Child, Lost
from fp8.builder.trial import Job, Trial, serve

START_SECONDS = 180.0  # to import torch and make a CUDA context, on a busy machine
SECONDS = 20.0  # that one candidate may take to be checked, captured or replayed; it takes milliseconds


class TuneError(RuntimeError):
    """Tuning without a GPU that can run the kernels, or where no tactic works."""


class NothingWorks(TuneError):
    """Every tactic of a site failed."""


@dataclass(frozen=True)
class Outcome:
    """Seconds of a launch and why a candidate is dropped, by index; or why nothing could be timed."""

    seconds: dict[int, float] = field(default_factory=dict)
    dropped: dict[int, str] = field(default_factory=dict)
    skipped: str = ""


class Timer:
    """Asks a process that holds trials; replaces it when it is lost. To be closed."""

    def __init__(self, start: Callable[[], Trial] = Trial, seconds: float = SECONDS) -> None:
        """`start` is called in the process, and pickled to get there."""
        self._start, self._seconds = start, seconds
        self._child: Child | None = None
        self._ready = False

    def __enter__(self) -> Timer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            self._child.close(0)
            self._child = None

    def start(self) -> None:
        """Starts the process, if there is none, and does not wait for it."""
        if self._child is None:
            self._child, self._ready = Child(serve, self._start), False

    def time(self, job: Job) -> Outcome:
        """Raises TuneError if the process cannot be started."""
        dropped: dict[int, str] = {}
        while left := [i for i in range(len(job.candidates)) if i not in dropped]:
            before = len(dropped)
            child = self._ready_child()
            outcome = self._attempt(child, dataclasses.replace(job, candidates=tuple(job.candidates[i] for i in left)))
            dropped |= {left[i]: why for i, why in outcome.dropped.items()}
            if outcome.seconds:
                return Outcome({left[i]: took for i, took in outcome.seconds.items()}, dropped)
            if outcome.skipped and len(dropped) == before:
                return Outcome({}, dropped, outcome.skipped)
        return Outcome({}, dropped)

    def _attempt(self, child: Child, job: Job) -> Outcome:
        """One answer. A candidate during which the process is lost is dropped."""
        dropped: dict[int, str] = {}
        begun: int | None = None
        child.send(job)
        try:
            while True:
                kind, value, *why = self._hear(child, self._seconds)
                if kind == "begun":
                    begun = value
                elif kind == "failed":
                    dropped[value], begun = why[0], None
                else:
                    return Outcome(value, dropped)
        except Lost as lost:
            if begun is not None:
                dropped[begun] = str(lost)
            return Outcome({}, dropped, str(lost))

    def _ready_child(self) -> Child:
        self.start()
        assert self._child is not None
        try:
            if not self._ready:
                self._hear(self._child, START_SECONDS)
        except Lost as lost:
            raise TuneError(f"the process that times kernels cannot start: {lost}") from None
        self._ready = True
        return self._child

    def _hear(self, child: Child, seconds: float) -> tuple:
        """What `serve` tells. Raises Lost, and forgets the process, where it is lost or says why it gives up."""
        try:
            kind, *values = child.hear(seconds)
            if kind in ("refused", "skipped"):
                child.close()
                raise Lost(values[0])
        except Lost:
            self._child = None
            raise
        return kind, *values
