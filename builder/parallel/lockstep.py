"""All ranks in one process: those of a stage are threads in lockstep. What verification and tests run graphs with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import onnx_graphsurgeon as gs
import torch

from fp8.builder.interpret import Interpreter, empty_caches, next_caches

Result = TypeVar("Result")


class Member:
    """One rank's `fp8.plugins.base.Communicator`."""

    def __init__(self, rank: int, group: Group) -> None:
        self.rank, self.world, self._group = rank, group.world, group

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        parts, barrier = self._group.parts, self._group.barrier
        parts[self.rank] = tensor
        barrier.wait()
        found = list(parts.values())
        barrier.wait()  # all have read, so the places may be used again
        return found


class Group:
    """Ranks that exchange tensors."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.barrier = threading.Barrier(world)
        self.parts: dict[int, torch.Tensor] = dict.fromkeys(range(world), torch.empty(0))  # in rank order
        self.members = [Member(rank, self) for rank in range(world)]

    def run(self, functions: Sequence[Callable[[], Result]]) -> list[Result]:
        """Runs one function per rank side by side. Raises what the first failing one raised."""

        def guarded(function: Callable[[], Result]) -> Result:
            try:
                return function()
            except BaseException:
                self.barrier.abort()  # the others end with BrokenBarrierError instead of waiting for ever
                raise

        with ThreadPoolExecutor(self.world) as pool:
            futures = [pool.submit(guarded, function) for function in functions]
        errors = [e for f in futures if (e := f.exception())]
        for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            raise error
        return [f.result() for f in futures]


class Ranks:
    """The graphs of all ranks, in order, run step by step; their KV caches are kept from step to step."""

    def __init__(self, graphs: Sequence[gs.Graph], tp_size: int, kind: type[Interpreter] = Interpreter) -> None:
        self._groups = [Group(tp_size) for _ in range(len(graphs) // tp_size)]
        members = [member for group in self._groups for member in group.members]
        self._ranks = [kind(graph, comm=member) for graph, member in zip(graphs, members, strict=True)]
        self.caches: list[dict[str, torch.Tensor]] = []

    def __call__(self, feeds: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The logits. Raises AssertionError if the ranks of a stage do not agree on what it yields, bit for bit."""
        if not self.caches:
            self.caches = [empty_caches(rank.graph, feeds) for rank in self._ranks]
        result = torch.empty(0)
        for stage, group in enumerate(self._groups):
            first = stage * group.world
            results = group.run([self._run(rank, feeds) for rank in range(first, first + group.world)])
            result = results[0]
            assert all(torch.equal(result, other) for other in results[1:]), "ranks differ in what is theirs in common"
            feeds = {**feeds, "hidden_states": result}
        return result

    def _run(self, rank: int, feeds: Mapping[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
        def function() -> torch.Tensor:
            results = self._ranks[rank]({**feeds, **self.caches[rank]})
            self.caches[rank] = next_caches(self.caches[rank], results)
            return next(value for name, value in results.items() if not name.startswith("kv_cache."))

        return function
