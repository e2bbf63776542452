"""Work in a process of its own: where a kernel takes the process down, or never ends, that question alone is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from fp8.builder.child import Child, Lost

Answers = Callable[[Any], tuple[Any, bool]]  # an answer, and whether the process is good for more


class Isolated:
    """A child process that answers questions: `make(*arguments)` is called there once, what it returns each time."""

    def __init__(self, make: Callable[..., Answers], *arguments: Any) -> None:
        self._child = Child(_serve, make, arguments)
        self.usable = True

    def ask(self, question: Any, seconds: float) -> Any:
        """Raises Lost; the process is gone then."""
        self._child.send(question)
        try:
            answer, self.usable = self._child.hear(seconds)
        except Lost:
            self.usable = False
            raise
        return answer

    def close(self) -> None:
        self.usable = False
        self._child.close()


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
