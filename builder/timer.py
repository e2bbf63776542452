"""Times tactics in a process of its own: one that crashes, hangs or computes wrongly is dropped, and nothing else."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from fp8.builder.ending import ending
from fp8.builder.trial import Job, Trial, serve

START_SECONDS = 180.0  # to import torch and make a CUDA context, on a busy machine
SECONDS = 20.0  # that one candidate may take to be checked, captured or replayed; it takes milliseconds
END_SECONDS = 10.0  # a process whose kernel hangs may not end at once


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
        self._process: Any = None
        self._connection: Connection | None = None
        self._ready = False

    def __enter__(self) -> Timer:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def start(self) -> None:
        """Starts the process, if there is none, and does not wait for it."""
        if self._process is not None:
            return
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, self._start), daemon=True)
        self._process.start()
        theirs.close()
        self._ready = False

    def time(self, job: Job) -> Outcome:
        """Raises TuneError if the process cannot be started."""
        dropped: dict[int, str] = {}
        while left := [i for i in range(len(job.candidates)) if i not in dropped]:
            before = len(dropped)
            self._wait_until_ready()
            outcome = self._attempt(dataclasses.replace(job, candidates=tuple(job.candidates[i] for i in left)))
            dropped |= {left[i]: why for i, why in outcome.dropped.items()}
            if outcome.seconds:
                return Outcome({left[i]: took for i, took in outcome.seconds.items()}, dropped)
            if outcome.skipped and len(dropped) == before:
                return Outcome({}, dropped, outcome.skipped)
        return Outcome({}, dropped)

    def _attempt(self, job: Job) -> Outcome:
        """One answer. A candidate during which the process is lost is dropped."""
        dropped: dict[int, str] = {}
        begun: int | None = None
        self._send(job)
        while True:
            kind, *values = self._hear(self._seconds)
            if kind == "begun":
                begun = values[0]
            elif kind == "failed":
                dropped[values[0]], begun = values[1], None
            elif kind == "timed":
                return Outcome(values[0], dropped)
            else:
                self._end()
                if begun is not None:
                    dropped[begun] = values[0]
                return Outcome({}, dropped, values[0])

    def _wait_until_ready(self) -> None:
        self.start()
        if not self._ready:
            kind, *values = self._hear(START_SECONDS)
            if kind != "ready":
                self._end()
                raise TuneError(f"the process that times kernels cannot start: {values[0]}")
            self._ready = True

    def _send(self, job: Job) -> None:
        assert self._connection is not None
        with contextlib.suppress(OSError):  # it is gone: `_hear` says how
            self._connection.send(job)

    def _hear(self, seconds: float) -> tuple:
        assert self._connection is not None
        try:
            if self._connection.poll(seconds):
                return self._connection.recv()
            why = f"it did not end within {seconds:.0f} s"
        except (EOFError, OSError):
            self._process.join(END_SECONDS)
            why = f"its process {ending(self._process)}"
        self._end()
        return "lost", why

    def _end(self) -> None:
        if self._process is None:
            return
        assert self._connection is not None
        self._connection.close()
        self._process.kill()
        self._process.join(END_SECONDS)
        self._process = self._connection = None
