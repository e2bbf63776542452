"""A child process that may be lost: to a crash, to a kernel that hangs. The parent learns how it ended and goes on."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable
from typing import Any

GRACE = 10.0  # seconds that a process is given to end, killed or by itself: one whose kernel hangs may not at once


class Lost(RuntimeError):
    """The process ended, or was silent for too long; the message says which."""


class Child:
    """Runs `target(connection, *arguments)` in a spawned process, and holds the other end of the connection."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")  # a fork of a process that has used CUDA cannot use it
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, message: Any) -> None:
        """Where the process is gone nothing is sent; `hear` says how it ended."""
        with contextlib.suppress(OSError):
            self._connection.send(message)

    def hear(self, seconds: float) -> Any:
        """The next message. Raises Lost if none comes within so many seconds or ever; the process is gone then."""
        try:
            if self._connection.poll(seconds):
                return self._connection.recv()
            why = f"no answer within {seconds:.0f} s"
        except (EOFError, OSError):
            self._process.join(GRACE)
            why = f"its process {ending(self._process)}"
        self.close(0)
        raise Lost(why)

    def close(self, grace: float = GRACE) -> None:
        """Closes the connection, gives the process so many seconds to end by itself, and kills it."""
        self._connection.close()
        self._process.join(grace)
        self._process.kill()
        self._process.join(GRACE)


def ending(process: Any) -> str:
    """ "was ended by SIGSEGV" or "ended with status 1", of a multiprocessing.Process that has been joined."""
    code = process.exitcode
    return f"was ended by {signal.Signals(-code).name}" if code and code < 0 else f"ended with status {code}"
