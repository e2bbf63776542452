"""The ranks of a job: who there is, messages between them, and the groups that share layers or hand them on."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn, TypeVar

from fp8.runtime.launcher import Launch, RankError
from fp8.runtime.polling import Backoff
from fp8.runtime.transport import Transport
from fp8.runtime.watch import Watch

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
RANK_TIMEOUT = 20.0  # seconds

# Tags: messages of one kind from one rank arrive in order.
TALK, COMMAND, REPLY, LOGITS, HIDDEN, SAMPLED, PART = range(7)


class World:
    """All ranks of a job. Handed in, never global; one thread at a time.

    Every wait is watched: where the rank that it is for is dead, stopped or stuck, the job ends (fp8.runtime.watch).
    """

    def __init__(self, launch: Launch, limit: float = RANK_TIMEOUT, program: str = "fp8") -> None:
        """Returns when all ranks have come. `limit`: seconds that a rank may be silent, or stand still in a step.
        Raises RankError if they have not come in that time, or in RANK_TIMEOUT, if that is longer."""
        start = max(limit, RANK_TIMEOUT)
        self.launch, self.rank, self.world = launch, launch.rank, launch.world
        self.opened = False  # all ranks have opened the engine
        self._limit: float | None = start  # of waits; None once the watch looks after them
        self.transport = _transport(launch, start)
        self._ends: list[Callable[[], None]] = []
        self.watch: Watch | None = None
        self.watch = Watch(self.rank, self.world, self.exchange, limit, program)
        self._limit = None

    def send(self, data: bytes, to: int, tag: int) -> None:
        self.transport.send(data, to, tag)

    def deliver(self) -> None:
        """Returns when what was sent arrives without help of this rank, which may then turn to something that others
        have to hear of first."""
        self.wait_for(lambda: self.transport.delivered() or None, *(r for r in range(self.world) if r != self.rank))

    def receive(self, source: int, tag: int) -> bytes:
        return self.wait_for(lambda: self.transport.receive(source, tag), source)

    def wait_for(self, look: Callable[[], T | None], *sources: int) -> T:
        """What `look` returns once that is not None; messages go on their way meanwhile. `sources`: whom it is for."""
        found, backoff = look(), Backoff()
        if found is not None:
            return found
        self._note(sources)
        while (found := look()) is None:
            self.transport.progress()
            if self._limit is not None and backoff.seconds > self._limit:
                names = ", ".join(map(str, sources))
                raise RankError(f"rank {self.rank}: rank {names} did not come within {self._limit:g} s")
            backoff.wait()
        self._note(())
        return found

    def talk(self, data: bytes, to: int) -> None:
        self.send(data, to, TALK)

    def hear(self, source: int) -> bytes:
        return self.receive(source, TALK)

    def exchange(self, text: str) -> list[str]:
        """The texts of all ranks, in their order, on every rank."""
        if self.rank:
            self.send(text.encode(), 0, TALK)
            return json.loads(self.receive(0, TALK))
        texts = [text, *(self.receive(r, TALK).decode() for r in range(1, self.world))]
        for rank in range(1, self.world):
            self.send(json.dumps(texts).encode(), rank, TALK)
        return texts

    def tick(self) -> None:
        """A sign of progress."""
        assert self.watch is not None
        self.watch.tick()

    def begin(self, what: str) -> None:
        """Work that has to get on."""
        assert self.watch is not None
        self.watch.begin(what)

    def rest(self) -> None:
        """Nothing to do until further notice."""
        assert self.watch is not None
        self.watch.rest()

    def fail(self, why: str) -> NoReturn:
        """Ends all ranks; `why` is printed with this rank's number, unless another failed before."""
        assert self.watch is not None
        self.watch.fail(why)

    def abandon(self, status: int) -> None:
        """On rank 0: the job ends here, its reason is printed; the other ranks exit with that status."""
        assert self.watch is not None
        self.watch.abandon(status)

    def await_end(self) -> int:
        """On another rank than 0: something failed that rank 0 will report; returns a status if it does not."""
        assert self.watch is not None
        self.watch.await_end()
        return 1

    def at_end(self, function: Callable[[], None]) -> None:
        """Has `function` called on all ranks when the job ends well; messages can still be exchanged then."""
        self._ends.append(function)

    def close(self) -> None:
        """The job has ended well, here; returns when it has on all ranks."""
        assert self.watch is not None
        self.watch.begin("the end")
        for end in self._ends:
            end()
        self.transport.close()
        self.watch.leave()

    def _note(self, sources: tuple[int, ...]) -> None:
        if self.watch is not None:
            self.watch.status.waits = sources
            self.watch.tick()


def _transport(launch: Launch, limit: float) -> Transport:
    if launch.launcher == "torchrun":
        from fp8.runtime.sockets import SocketTransport

        return SocketTransport(launch, limit)
    from fp8.runtime.transport import MpiTransport

    return MpiTransport(launch, limit)


class HostGroup:
    """Ranks that exchange tensors of host memory, in order; a Communicator of fp8.plugins.base."""

    def __init__(self, world: World, members: Sequence[int]) -> None:
        self._world, self._members = world, list(members)
        self.rank, self.world = self._members.index(world.rank), len(self._members)

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's tensor, in rank order, on every rank; dtypes are equal, shapes may differ."""
        message = tensor_bytes(tensor)
        for peer in self._members:
            if peer != self._world.rank:
                self._world.send(message, peer, PART)
        return [
            tensor if peer == self._world.rank else tensor_of(self._world.receive(peer, PART), tensor.dtype)
            for peer in self._members
        ]


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """Sizes and values of a tensor in host memory, as a message."""
    import torch

    sizes = struct.pack(f"<q{tensor.dim()}q", tensor.dim(), *tensor.shape)
    return b"".join((sizes, tensor.contiguous().view(-1).view(torch.uint8).numpy().data))


def tensor_of(message: bytes, dtype: torch.dtype) -> torch.Tensor:
    """The tensor of such a message."""
    import torch

    (dims,) = struct.unpack_from("<q", message)
    shape = struct.unpack_from(f"<{dims}q", message, 8)
    data = torch.frombuffer(bytearray(memoryview(message)[8 + 8 * dims :]) or bytearray(1), dtype=torch.uint8)
    return data[: len(message) - 8 - 8 * dims].view(dtype).view(shape)
