"""Steps that serve nobody: their logits, again and again, and their launches' times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from fp8.plugins.base import StepShape
from fp8.runtime.ranks import Command
from fp8.runtime.repeats import Repeated, Repeats
from fp8.runtime.scheduler import Row

if TYPE_CHECKING:
    from fp8.runtime.session import Session

_T = TypeVar("_T")


class Probing:
    """Probes a session's steps. Each writes the K and V of its rows and samples nothing."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def repeat(self, rows: Sequence[Row], times: int) -> Repeated:
        """What the logits of a step are that runs so often, one after the other, as when serving. In a pipeline each
        waits for the one before."""
        if self._session.stages > 1:
            repeats = Repeats()
            for _ in range(times):
                repeats.add(self._session.token_logits(rows))
            return repeats.found()
        return self._by_all("repeat", rows, times, self._repeat)

    def time_launches(self, rows: Sequence[Row], repeats: int) -> list[float]:
        """Seconds that each step of the plan takes for `rows` by itself. Of several ranks, which share the layers,
        those of rank 0."""
        return self._by_all("time", rows, repeats, self._time)

    def perform(self, command: Command, stage: int) -> None:
        """Another rank's part in what rank 0 was asked for."""
        assert command.shape is not None
        do: Callable[[StepShape, int, int], object] = self._repeat if command.what == "repeat" else self._time
        do(command.shape, stage, command.repeats)

    def place(self, rows: Sequence[Row]) -> StepShape:
        """Uploads a step's inputs, those of a decode step padded as its graph is, and launches nothing: for who times
        launches, or compares them. Of several ranks, all call it."""
        session = self._session
        stage = session.turn
        with session.scope():
            session.wait(stage)
            shape = session.packer.pack(rows, session.inputs.host[stage])
            if shape.decode_sequences == shape.sequences:
                shape = session.pad(shape, stage)
            session.upload(shape, stage)
        if session.stream is not None:
            session.stream.synchronize()
        return shape

    def _by_all(self, what: str, rows: Sequence[Row], repeats: int, do: Callable[[StepShape, int, int], _T]) -> _T:
        """`do` of the step of `rows`, by every rank; what it gives here. The other ranks are told `what` it is."""
        session = self._session
        stage = session.turn
        with session.guard(), session.scope():
            session.wait(stage)
            shape = session.packer.pack(rows, session.inputs.host[stage])
            session.tell(what, shape, stage, repeats=repeats)
            found = do(shape, stage, repeats)
            if session.ranks is not None:
                session.ranks.end()
        return found

    def _repeat(self, shape: StepShape, stage: int, times: int) -> Repeated:
        session = self._session
        launch, rows, repeats = session.run, shape.logits_rows, Repeats()
        if session.logits_graphs is not None and shape.decode_sequences == shape.sequences == rows:
            shape, launch = session.pad(shape, stage), session.logits_graphs.run
        session.upload(shape, stage)
        for _ in range(times):
            repeats.add(launch(shape)[:rows])
        session.finish(stage)
        return repeats.found()

    def _time(self, shape: StepShape, stage: int, repeats: int) -> list[float]:
        self._session.upload(shape, stage)
        return self._session.executor.time_launches(shape, repeats)
