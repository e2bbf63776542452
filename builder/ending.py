"""What is told of a child process that did not answer."""

from __future__ import annotations

import signal
from typing import Any


def ending(process: Any) -> str:
    """ "was ended by SIGSEGV" or "ended with status 1", of a multiprocessing.Process that has been joined."""
    code = process.exitcode
    return f"was ended by {signal.Signals(-code).name}" if code and code < 0 else f"ended with status {code}"
