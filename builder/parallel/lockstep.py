"""Ranks as threads of one process: what verification and tests run the graphs of all ranks with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from fp8.plugins.base import Communicator

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")


class _Exchange:
    """Where the ranks of one group leave their tensors."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world)
        self.parts: list[torch.Tensor | None] = [None] * world


class _Member:
    def __init__(self, rank: int, world: int, exchange: _Exchange) -> None:
        self.rank, self.world, self._exchange = rank, world, exchange

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self._exchange.parts[self.rank] = tensor
        self._exchange.barrier.wait()
        found = [part for part in self._exchange.parts if part is not None]
        self._exchange.barrier.wait()  # all have read, so the places may be used again
        return found


def run(ranks: Sequence[Callable[[Communicator], Result]]) -> list[Result]:
    """Runs one function per rank side by side, each with its communicator. Raises what the first failing one raised."""
    exchange = _Exchange(len(ranks))

    def member(rank: int) -> Result:
        try:
            return ranks[rank](_Member(rank, len(ranks), exchange))
        except BaseException:
            exchange.barrier.abort()  # the others end with BrokenBarrierError instead of waiting for ever
            raise

    with ThreadPoolExecutor(len(ranks)) as pool:
        futures = [pool.submit(member, rank) for rank in range(len(ranks))]
    errors = [e for f in futures if (e := f.exception())]
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
    return [f.result() for f in futures]
