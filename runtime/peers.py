"""Processes that each have an engine of their own and divide the items of a task."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import NoReturn, TypeVar

from fp8.runtime.comm import World
from fp8.runtime.launcher import Launch

T = TypeVar("T")


def share(items: Sequence[T], rank: int, world: int) -> Sequence[T]:
    """A rank's part of `items`: runs of neighbours, which may share a prefix, in the order of the ranks."""
    return items[len(items) * rank // world : len(items) * (rank + 1) // world]


class Peers:
    """One process among them; alone where `world` is None. A rank that dies or falls silent ends all."""

    def __init__(self, world: World | None = None) -> None:
        self._world = world
        self.launch = Launch() if world is None else world.launch
        self.rank, self.world = self.launch.rank, self.launch.world
        if world is not None:
            world.rest()  # how long an item takes is nobody's fault

    def share(self, items: Sequence[T]) -> Sequence[T]:
        return share(items, self.rank, self.world)

    def gather(self, part: Sequence[T]) -> list[T] | None:
        """On rank 0 everyone's parts in the order of the ranks, elsewhere None."""
        if self._world is None:
            return list(part)
        if self.rank:
            self._world.talk(pickle.dumps(list(part)), 0)
            return None
        parts = [list(part), *(pickle.loads(self._world.hear(rank)) for rank in range(1, self.world))]
        return [item for each in parts for item in each]

    def fail(self, why: str) -> NoReturn:
        """Ends all processes, as this one cannot go on. Not for one that is alone."""
        assert self._world is not None
        self._world.fail(why)
