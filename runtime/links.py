"""What a rank's device exchanges with others' inside a step: through host messages on CPUs, through NCCL on GPUs.

Both have `group`, the ranks of this pipeline stage, and hand hidden states from stage to stage and sampled tokens from
the last one to the first, each rank to its counterpart: all ranks of a stage hold the same ones.
"""

from __future__ import annotations

import copy
import logging
import os
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fp8.builder.engine import Engine, Plan
from fp8.plugins.all_reduce.region import region_bytes
from fp8.plugins.base import Communicator, load, types_of
from fp8.plugins.hand_on import launch as hand_on
from fp8.runtime.comm import HIDDEN, SAMPLED, HostGroup, World, tensor_bytes, tensor_of
from fp8.runtime.device import few_cores
from fp8.runtime.embedded import embedded

if TYPE_CHECKING:
    import torch

    from fp8.runtime.nccl import NcclGroup

LOG = logging.getLogger(__name__)
INPUT = "hidden_states"  # what a stage takes from the one before, DT [T, H]


class Links(Protocol):
    group: Communicator

    def receive(self, tokens: int, samples: bool) -> torch.Tensor | None:
        """What the stage before computed, [tokens, H]; None on the first stage. `samples`: a token comes of it."""

    def send(self, hidden: torch.Tensor, samples: bool) -> None:
        """Hands [T, H] to the next stage. `hidden` may be overwritten by the next step."""

    def return_sampled(self, table: torch.Tensor) -> None:
        """On the last stage: hands the table of sampled tokens i32 to the first. The next step may overwrite it."""

    def take_sampled(self, table: torch.Tensor) -> None:
        """On the first stage: the table becomes what the last stage returned, one step's after the other."""


class Returned:
    """The tables of sampled tokens that the last stage returns to this rank, which is of the first: one for every step
    that samples. No host stands between a token and the next; and as a step seldom needs what was sampled less than
    `stages` steps before it, each stage has a step to do."""

    def __init__(self, links: Links, table: torch.Tensor, stages: int) -> None:
        self._links, self._table, self._stages = links, table, stages
        self._begun = self._read = 0  # steps
        self._coming: deque[int] = deque()  # the steps whose tables were not taken

    def begin(self, samples: bool, behind: int) -> None:
        """Before a step: takes the tables that it needs, up to that of the step so many steps before."""
        self._take(self._begun - min(behind or self._stages, self._stages))
        if samples:
            self._coming.append(self._begun)
        self._begun += 1

    def read(self) -> None:
        """The next step is known to have ended: its table is there."""
        self._take(self._read)
        self._read += 1

    def finish(self) -> None:
        """Takes what is left: nobody sends what is never received."""
        self._take(self._begun)

    def _take(self, last: int) -> None:
        while self._coming and self._coming[0] <= last:
            self._links.take_sampled(self._table)
            self._coming.popleft()


def stage_of(world: World, plan: Plan) -> int:
    return world.rank // plan.compatibility.tp_size


def peers(world: World, plan: Plan) -> range:
    """The ranks of this one's stage."""
    tp = plan.compatibility.tp_size
    first = stage_of(world, plan) * tp
    return range(first, first + tp)


def neighbours(world: World, plan: Plan) -> tuple[int, int]:
    """This rank's counterparts in the stages before and after its own; the stages are a ring."""
    tp = plan.compatibility.tp_size
    return (world.rank - tp) % world.world, (world.rank + tp) % world.world


class HostLinks:
    """Every tensor as a message."""

    def __init__(self, world: World, plan: Plan) -> None:
        import torch

        self._world, self._first = world, stage_of(world, plan) == 0
        self._before, self._after = neighbours(world, plan)
        self._dtype = None if self._first else getattr(torch, plan.buffer(INPUT).dtype)
        self.group: Communicator = HostGroup(world, peers(world, plan))

    def receive(self, tokens: int, samples: bool) -> torch.Tensor | None:
        if self._dtype is None:
            return None
        found = tensor_of(self._world.receive(self._before, HIDDEN), self._dtype)
        assert len(found) == tokens, "stages run the same steps in the same order"
        return found

    def send(self, hidden: torch.Tensor, samples: bool) -> None:
        self._world.send(tensor_bytes(hidden), self._after, HIDDEN)

    def return_sampled(self, table: torch.Tensor) -> None:
        self._world.send(tensor_bytes(table), self._after, SAMPLED)

    def take_sampled(self, table: torch.Tensor) -> None:
        table.copy_(tensor_of(self._world.receive(self._before, SAMPLED), table.dtype))


def over_peers(plan: Plan) -> bool:
    """Whether some launch of the plan reaches into other GPUs' memory."""
    if plan.merged is not None and load(plan.merged.step.plugin).collective:
        return True
    collectives = ((step, plugin) for step in plan.steps if (plugin := load(step.plugin)).collective)
    return any(
        getattr(plugin(**step.attributes).tactic(choice.tactic), "over_peers", False)
        for step, plugin in collectives
        for choice in step.tactics
    )


def _group(world: World, plan: Plan, device: torch.device) -> NcclGroup:
    """The ranks of this stage, with the memory that they share if a tactic wants it and they can."""
    from fp8.runtime.nccl import NcclGroup
    from fp8.runtime.peer_memory import share

    members = peers(world, plan)
    group = NcclGroup(world, members)
    if over_peers(plan):
        found = share(HostGroup(world, members), device, region_bytes(group.world))
        if isinstance(found, str):
            if group.rank == 0:
                LOG.warning("ranks %s sum up through NCCL alone: %s", f"{members[0]} to {members[-1]}", found)
        else:
            group.regions = found.regions
            world.at_end(found.close)
    return group


@dataclass(frozen=True)
class Channels:
    """Peer memory from each of this rank's counterparts in the stages to the next."""

    hidden: hand_on.Channel
    sampled: hand_on.Channel


def _channels(world: World, engine: Engine, device: torch.device) -> Channels | None:
    """None where the GPUs of this rank's ring share no memory."""
    import torch

    from fp8.plugins.hand_on.plugin import HandOn
    from fp8.runtime.peer_memory import share

    tp, stages = engine.plan.compatibility.tp_size, engine.plan.compatibility.pp_size
    members = range(world.rank % tp, world.world, tp)
    found = share(HostGroup(world, members), device, hand_on.region_bytes(stages))
    if isinstance(found, str):
        if world.rank == members[0]:
            LOG.warning("ranks %s hand on through NCCL alone: %s", ", ".join(map(str, members)), found)
        return None
    world.at_end(found.close)
    types = types_of([torch.zeros(1, dtype=torch.int32)])
    _, functions = embedded(engine, HandOn(), types, engine.plan.limits.max_num_tokens)
    return Channels(*(hand_on.Channel(functions, found.regions, kind, stages) for kind in range(2)))


class GpuLinks:
    """NCCL on the current stream, into a buffer that launches are bound to; and the GPUs' own memory, where they share
    it: small messages go there, of hidden states those of steps that sample. The sampled tokens' way back tells that
    such a step has ended, as the first stage takes those of a step in front of the step `stages` later: none but the
    last `stages` messages are under way."""

    def __init__(self, world: World, engine: Engine, device: torch.device) -> None:
        import torch

        from fp8.runtime.nccl import NcclGroup

        plan = engine.plan
        if wrong := few_cores(len(os.sched_getaffinity(0)), os.cpu_count() or 1):
            LOG.warning("rank %d: %s", world.rank, wrong)
        self._before, self._after = neighbours(world, plan)
        self.group: Communicator = _group(world, plan, device)
        self._ring = NcclGroup(world, range(world.world)) if plan.compatibility.pp_size > 1 else None
        self._channels = None if self._ring is None else _channels(world, engine, device)
        self.hidden: torch.Tensor | None = None
        if stage_of(world, plan):
            buffer = plan.buffer(INPUT)
            shape = (plan.limits.max_num_tokens, int(buffer.shape[1]))
            self.hidden = torch.zeros(shape, dtype=getattr(torch, buffer.dtype), device=device)
        self._connect(world, device)

    def without_peer_memory(self) -> GpuLinks:
        """The same ranks, with NCCL alone between those of a stage."""
        found = copy.copy(self)
        found.group = copy.copy(self.group)
        found.group.regions = None  # type: ignore[attr-defined]
        return found

    def _connect(self, world: World, device: torch.device) -> None:
        """NCCL connects two GPUs when they first exchange something, and the calls wait for each other: here, where all
        ranks make them at once, and not in a step that some have not heard of yet."""
        import torch

        part = torch.zeros(1 << 22, dtype=torch.uint8, device=device)
        if self.group.world > 1:
            for size in (1 << 4, 1 << 16, len(part)):  # NCCL takes another way for each
                self.group.nccl_all_reduce(part[:size], part[:size], "max")  # type: ignore[attr-defined]
            self.group.all_gather(part[:16])
        if self._ring is not None:
            self._ring.exchange(part[:16], self._after, part[16:32], self._before)
        event = torch.cuda.Event()
        event.record()
        world.wait_for(lambda: event.query() or None)

    def receive(self, tokens: int, samples: bool) -> torch.Tensor | None:
        if self.hidden is None or self._ring is None:
            return None
        into = self.hidden[:tokens]
        if samples and self._channels is not None and hand_on.fits(into):
            self._channels.hidden.receive(into)
        else:
            self._ring.receive(into, self._before)
        return into

    def send(self, hidden: torch.Tensor, samples: bool) -> None:
        assert self._ring is not None
        if samples and self._channels is not None and hand_on.fits(hidden):
            self._channels.hidden.send(hidden)
        else:
            self._ring.send(hidden, self._after)

    def return_sampled(self, table: torch.Tensor) -> None:
        assert self._ring is not None
        if self._channels is not None and hand_on.fits(table):
            self._channels.sampled.send(table)
        else:  # some hundred bytes: NCCL keeps them for the receiver, so this rank's next step does not wait for it
            self._ring.send(table, self._after)

    def take_sampled(self, table: torch.Tensor) -> None:
        assert self._ring is not None
        if self._channels is not None and hand_on.fits(table):
            self._channels.sampled.receive(table)
        else:
            self._ring.receive(table, self._before)
