"""What a rank's device exchanges with others' inside a step: through host messages on CPUs, through NCCL on GPUs.

Both have `group`, the ranks of this pipeline stage, and hand hidden states from stage to stage, each rank to its
counterpart: all ranks of a stage hold the same ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from fp8.builder.engine import Plan
from fp8.plugins.base import Communicator
from fp8.runtime.comm import HIDDEN, HostGroup, World, tensor_bytes, tensor_of

if TYPE_CHECKING:
    import torch

INPUT = "hidden_states"  # what a stage takes from the one before, DT [T, H]


class Links(Protocol):
    group: Communicator

    def receive(self, tokens: int) -> torch.Tensor | None:
        """What the stage before computed, [tokens, H]; None on the first stage."""

    def send(self, hidden: torch.Tensor) -> None:
        """Hands [T, H] to the next stage. `hidden` may be overwritten by the next step."""


def stage_of(world: World, plan: Plan) -> int:
    return world.rank // plan.compatibility.tp_size


def peers(world: World, plan: Plan) -> range:
    """The ranks of this one's stage."""
    tp = plan.compatibility.tp_size
    first = stage_of(world, plan) * tp
    return range(first, first + tp)


class HostLinks:
    """Every tensor as a message."""

    def __init__(self, world: World, plan: Plan) -> None:
        import torch

        tp = plan.compatibility.tp_size
        self._world, self._first = world, stage_of(world, plan) == 0
        self._before, self._after = world.rank - tp, world.rank + tp
        self._dtype = None if self._first else getattr(torch, plan.buffer(INPUT).dtype)
        self.group: Communicator = HostGroup(world, peers(world, plan))

    def receive(self, tokens: int) -> torch.Tensor | None:
        if self._dtype is None:
            return None
        found = tensor_of(self._world.receive(self._before, HIDDEN), self._dtype)
        assert len(found) == tokens, "stages run the same steps in the same order"
        return found

    def send(self, hidden: torch.Tensor) -> None:
        self._world.send(tensor_bytes(hidden), self._after, HIDDEN)


class GpuLinks:
    """NCCL on the current stream, into a buffer that launches are bound to."""

    def __init__(self, world: World, plan: Plan, device: torch.device) -> None:
        import torch

        from fp8.runtime.nccl import NcclGroup

        tp = plan.compatibility.tp_size
        self._before, self._after = world.rank - tp, world.rank + tp
        self.group: Communicator = NcclGroup(world, peers(world, plan))
        self._all = NcclGroup(world, range(world.world)) if plan.compatibility.pp_size > 1 else None
        self.hidden: torch.Tensor | None = None
        if stage_of(world, plan):
            buffer = plan.buffer(INPUT)
            shape = (plan.limits.max_num_tokens, int(buffer.shape[1]))
            self.hidden = torch.zeros(shape, dtype=getattr(torch, buffer.dtype), device=device)

    def receive(self, tokens: int) -> torch.Tensor | None:
        if self.hidden is None or self._all is None:
            return None
        self._all.receive(self.hidden[:tokens], self._before)
        return self.hidden[:tokens]

    def send(self, hidden: torch.Tensor) -> None:
        assert self._all is not None
        self._all.send(hidden, self._after)
