"""Waiting for another process without handing it the power to keep this one waiting for ever."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
SPIN_SECONDS = 100e-6  # then a waiting rank sleeps: ranks may share a core
LONGEST_SLEEP = 1e-4  # a look takes a tenth of it, and a first token waits for several
OVERSLEPT = 1 / 16  # of the time waited so far


class Backoff:
    """What to do between two looks: first give way, then sleep longer and longer."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._begin

    def wait(self) -> None:
        seconds = self.seconds
        if seconds < SPIN_SECONDS:
            os.sched_yield()
        else:
            time.sleep(min(seconds * OVERSLEPT, LONGEST_SLEEP))


def poll(look: Callable[[], T | None]) -> T:
    """What `look` returns once that is not None."""
    backoff = Backoff()
    while (found := look()) is None:
        backoff.wait()
    return found
