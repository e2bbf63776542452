"""A session's place among the ranks of its engine, and what rank 0 and the others tell each other.

Rank 0 schedules; it sends every step's packed inputs to all others. The ranks of the last stage sample the same tokens
from the same logits; where that is another stage than rank 0's, the first of them tells rank 0.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fp8.builder.engine import Plan
from fp8.plugins.base import StepShape
from fp8.runtime.beam_search import Candidates
from fp8.runtime.comm import COMMAND, LOGITS, REPLY, World, tensor_bytes, tensor_of
from fp8.runtime.logprobs import TokenLogprobs
from fp8.runtime.sampling_options import Options

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Command:
    """What rank 0 has the others do. `inputs`: the live parts of a step's packed fields."""

    what: str  # "step"; "logits" (of all tokens; nothing is sampled), "time" (launch by launch), "repeat"; or "stop"
    shape: StepShape | None = None
    inputs: dict[str, np.ndarray] | None = None  # None of a step: they are what the step before left on the device
    options: Options | None = None
    copies: Mapping[int, int] | None = None  # KV blocks, before the step
    behind: int = 0  # how many steps before was the last one whose tokens it takes in unread; 0: the stages
    repeats: int = 0  # of "time" and "repeat"


@dataclass(frozen=True)
class Reply:
    """What the last stage sampled in a step."""

    sampled: list[int | Candidates]
    logprobs: list[TokenLogprobs | None]


class Ranks:
    """One rank's part in the steps of an engine that is divided among `world`."""

    def __init__(self, world: World, plan: Plan) -> None:
        tp, self.stages = plan.compatibility.tp_size, plan.compatibility.pp_size
        self.world = world
        self.stage = world.rank // tp
        self.first, self.last = self.stage == 0, self.stage == self.stages - 1
        self._teller = (self.stages - 1) * tp
        self.tells = self.stages > 1 and world.rank == self._teller  # what was sampled, to rank 0
        self._begun = self._open = 0

    def tick(self, *_: object) -> None:
        """A sign of progress, within a step."""
        self.world.tick()

    @contextmanager
    def guard(self) -> Iterator[None]:
        """A failure within a step ends the job: the others have begun it."""
        try:
            yield
        except Exception as error:
            self.world.fail(f"{type(error).__name__}: {error}")
        except BaseException as error:
            self.world.fail(f"interrupted ({type(error).__name__})")

    def tell(self, command: Command) -> None:
        """Sends from rank 0 to all others. When this returns they have it, or will get it without further help: what
        rank 0 enqueues next may fill its GPU's queue and block it until they take part."""
        tell(self.world, command)
        self.world.deliver()

    def next_command(self, meanwhile: Callable[[], None]) -> Command:
        """The next command from rank 0; until it comes, `meanwhile` is called again and again."""

        def look() -> bytes | None:
            meanwhile()
            return self.world.transport.receive(0, COMMAND)

        command: Command = pickle.loads(self.world.wait_for(look, 0))
        return command

    def reply(self, reply: Reply) -> None:
        self.world.send(pickle.dumps(reply, pickle.HIGHEST_PROTOCOL), 0, REPLY)

    def receive_reply(self) -> Reply:
        found: Reply = pickle.loads(self.world.receive(self._teller, REPLY))
        return found

    def send_logits(self, logits: torch.Tensor) -> None:
        self.world.send(tensor_bytes(logits.cpu()), 0, LOGITS)

    def receive_logits(self, device: torch.device) -> torch.Tensor:
        import torch

        return tensor_of(self.world.receive(self._teller, LOGITS), torch.float32).to(device)

    def wait_for(self, event: torch.cuda.Event) -> None:
        """Waits for the GPU; messages go on their way meanwhile."""
        self.world.wait_for(lambda: True if event.query() else None)

    def begin(self, what: str) -> None:
        """From here to `end`, every rank must make progress."""
        self._begun += 1
        self._open += 1
        self.world.begin(f"{what} {self._begun}")

    def end(self) -> None:
        self._open -= 1
        if not self._open:
            self.world.rest()


def tell(world: World, command: Command) -> None:
    data = pickle.dumps(command, pickle.HIGHEST_PROTOCOL)
    for rank in range(1, world.world):
        world.send(data, rank, COMMAND)


def stop(world: World) -> None:
    """Lets the other ranks leave Session.follow."""
    tell(world, Command("stop"))
