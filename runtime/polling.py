"""Waiting for another process without handing it the power to keep this one waiting for ever."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
SPIN_SECONDS = 100e-6  # then a waiting rank sleeps: ranks may share a core
FIRST_SLEEP, LONGEST_SLEEP = 20e-6, 1e-3


class Backoff:
    """What to do between two looks: first give way, then sleep longer and longer."""

    def __init__(self) -> None:
        self._begin, self._sleep = time.perf_counter(), FIRST_SLEEP

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._begin

    def wait(self) -> None:
        if self.seconds < SPIN_SECONDS:
            os.sched_yield()
        else:
            time.sleep(self._sleep)
            self._sleep = min(self._sleep * 1.2, LONGEST_SLEEP)


def poll(look: Callable[[], T | None]) -> T:
    """What `look` returns once that is not None."""
    backoff = Backoff()
    while (found := look()) is None:
        backoff.wait()
    return found
