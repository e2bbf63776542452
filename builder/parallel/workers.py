"""Tasks side by side, each in a process of its own, which tell their progress; one failure ends all."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from fp8.builder.child import ending
from fp8.builder.workplace import BuildError

Result = TypeVar("Result")
Tell = Callable[..., None]  # passes its arguments to `hear` in the parent
Errors = tuple[type[Exception], ...]


def run(
    tasks: Sequence[Callable[[Tell], Result]],
    workers: int,
    hear: Callable[..., None],
    expected: Errors,
) -> list[Result]:
    """Results in the order of the tasks, which must be picklable. At most `workers` run at a time; `hear(index, ...)`
    gets what they tell. Raises BuildError, naming the task as a rank, if one fails; the others are ended. An error that
    is not one of `expected` is reported with its traceback."""
    context = multiprocessing.get_context("spawn")
    waiting = list(enumerate(tasks))
    running: dict[Connection, tuple[int, Any]] = {}
    results: dict[int, Result] = {}
    threads = max(1, (os.cpu_count() or 1) // workers)
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                index, task = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(task, theirs, expected, threads), daemon=True)
                process.start()
                theirs.close()
                running[ours] = index, process
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                index, process = running[connection]
                kind, *values = _receive(connection, process)
                if kind == "told":
                    hear(index, *values)
                    continue
                if kind == "failed":
                    raise BuildError(f"rank {index}: {values[0]}")
                results[index] = values[0]
                del running[connection]
                process.join()
    finally:
        for _, process in running.values():
            process.kill()
            process.join()
    return [results[i] for i in range(len(tasks))]


def _receive(connection: Connection, process: Any) -> tuple:
    try:
        return connection.recv()
    except EOFError:
        process.join()
        return "failed", f"its process {ending(process)}; if memory ran out, build with fewer --workers"


def _child(task: Callable[[Tell], Any], connection: Connection, expected: Errors, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends its children
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    try:
        connection.send(("done", task(lambda *values: connection.send(("told", *values)))))
    except BrokenPipeError:
        os._exit(1)  # the parent is gone
    except expected as error:
        connection.send(("failed", str(error)))
    except Exception:
        connection.send(("failed", traceback.format_exc()))
