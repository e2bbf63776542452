"""Commands whose standard output ends before they do: `fp8-inspect engine --json | head`, or a full disk."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec

Arguments = ParamSpec("Arguments")


def printing(name: str) -> Callable[[Callable[Arguments, int]], Callable[Arguments, int]]:
    """Decorates a command `name` that returns its exit status: 1 where its output cannot be written. One whom nobody
    reads any more says nothing; any other says why."""

    def decorate(command: Callable[Arguments, int]) -> Callable[Arguments, int]:
        @functools.wraps(command)
        def told(*arguments: Arguments.args, **options: Arguments.kwargs) -> int:
            try:
                status = command(*arguments, **options)
                if sys.stdout is not None:
                    sys.stdout.flush()
                return status
            except OSError as error:
                if error.errno not in (errno.EPIPE, errno.ENOSPC):
                    raise
                _forget_output()
                if error.errno == errno.ENOSPC:
                    print(f"{name}: the output cannot be written: {error.strerror}", file=sys.stderr)
                return 1

        return told

    return decorate


def _forget_output() -> None:
    """What is still buffered would fail once more at the interpreter's end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
