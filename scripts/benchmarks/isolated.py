"""Work in a process of its own: where a kernel takes the process down, or never ends, that question alone is lost."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from fp8.builder.ending import ending

Answers = Callable[[Any], tuple[Any, bool]]  # an answer, and whether the process is good for more
STOP = 5.0  # seconds that a process is given to end by itself


class Lost(RuntimeError):
    """The process ended, or was silent for too long; the message says which."""


class Isolated:
    """A child process that answers questions: `make(*arguments)` is called there once, what it returns each time."""

    def __init__(self, make: Callable[..., Answers], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")  # a fork of a process that has used CUDA cannot use it
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self.usable = True

    def ask(self, question: Any, seconds: float) -> Any:
        """Raises Lost; the process is gone then."""
        try:
            self._connection.send(question)
            if not self._connection.poll(seconds):
                self.close(at_once=True)
                raise Lost(f"no answer within {seconds:.0f} s")
            answer, self.usable = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(STOP)
            how = ending(self._process)
            self.close(at_once=True)
            raise Lost(f"its process {how}") from error
        return answer

    def close(self, at_once: bool = False) -> None:
        self.usable = False
        self._connection.close()
        self._process.join(0 if at_once else STOP)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def ask_all(
    make: Callable[..., Answers], arguments: tuple[Any, ...], questions: Sequence[Any], workers: int, seconds: float
) -> Iterator[Any]:
    """The answers to all questions in their order, `workers` processes answering side by side. Where a process is lost
    over a question, the answer is the Lost that says how, and another one takes its place."""
    idle: SimpleQueue[Isolated | None] = SimpleQueue()  # None: a place without a process yet
    for _ in range(workers):
        idle.put(None)

    def ask(question: Any) -> Any:
        process = idle.get()
        try:
            if process is None or not process.usable:
                if process is not None:
                    process.close()
                process = Isolated(make, *arguments)
            return process.ask(question, seconds)
        except Lost as lost:
            return lost
        finally:
            idle.put(process)

    with ThreadPoolExecutor(workers) as threads:
        yield from threads.map(ask, questions)
    for process in (idle.get() for _ in range(workers)):
        if process is not None:
            process.close()


def _serve(connection: Connection, make: Callable[..., Answers], arguments: tuple[Any, ...]) -> None:
    import faulthandler

    faulthandler.enable()  # says on stderr where a segmentation fault was
    answers, usable = make(*arguments), True
    while usable:
        try:
            question = connection.recv()
        except EOFError:
            return
        answer, usable = answers(question)
        connection.send((answer, usable))
