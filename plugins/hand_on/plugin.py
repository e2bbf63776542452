"""hand_on: every rank gets what the rank before it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fp8.plugins.all_reduce.region import PATIENCE
from fp8.plugins.base import Communicator, Kernel, Launcher, OneTactic, PluginError, StepShape, Tensor, Threads
from fp8.plugins.hand_on.launch import BLOCKS, THREADS, Channel

if TYPE_CHECKING:
    import torch

    from fp8.plugins.cuda import Function


@dataclass(frozen=True)
class HandOn(OneTactic):
    """x [T, ...] of every rank, all of one type -> y: that of the rank before, bit for bit, but for words of all ones,
    which arrive as another NaN (peers.cuh, to_wire) and are no token; the first rank gets the last one's.

    A pipeline's ranks send and receive through `launch.Channel`; as a step of a plan all ranks do both.
    """

    name: ClassVar[str] = "hand_on"
    collective: ClassVar[bool] = True
    threads: ClassVar[int] = THREADS

    def infer(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        (x,) = inputs
        if x is None or not x.shape:
            raise PluginError(f"x is {x}, expected rows of any type")
        return (x,)

    def reference(  # type: ignore[override]
        self, *inputs: torch.Tensor | None, step: StepShape, comm: Communicator
    ) -> tuple[torch.Tensor, ...]:
        (x,) = inputs
        assert x is not None
        return (comm.all_gather(x)[comm.rank - 1].clone(),)

    def kernels(self, tactic: Threads, inputs: Sequence[Tensor | None]) -> tuple[Kernel, ...]:
        own = (("THREADS", tactic.threads), ("BLOCKS", BLOCKS), ("PATIENCE", f"{PATIENCE * 10**9}ull"))
        unused = (("WORLD", 1), ("MOST_BLOCKS", BLOCKS), ("EPOCHS", 0), ("FLAGS", 0))
        return tuple(Kernel("hand_on", "hand_on.cu", entry, (*own, *unused)) for entry in ("send", "receive"))

    def bind(  # type: ignore[override]
        self,
        tactic: Threads,
        functions: Sequence[Function],
        tensors: Sequence[torch.Tensor | None],
        workspace: torch.Tensor | None,
        comm: Any,
    ) -> Launcher:
        """`comm.ring` is the ranks' peer memory, of `launch.region_bytes(world)` each: as nobody goes on before it has
        received, one is never more than `world` messages ahead of the next."""
        x, y = tensors
        channel = Channel(functions, comm.ring, 0, len(comm.ring.addresses))

        def run(step: StepShape) -> None:
            if step.tokens:
                channel.send(x[: step.tokens])
                channel.receive(y[: step.tokens])

        return run
