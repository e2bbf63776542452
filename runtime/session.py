"""One engine on one device: takes scheduled rows, gives tokens or logits. Knows nothing of queues or text."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fp8.plugins.base import StepShape
from fp8.runtime.beam_search import Candidates
from fp8.runtime.comm import World
from fp8.runtime.logprobs import TokenLogprobs
from fp8.runtime.probing import Probing
from fp8.runtime.ranks import Command, Reply
from fp8.runtime.reference import MakeWeight
from fp8.runtime.sampling_options import Drawn, History, Options, options_of
from fp8.runtime.scheduler import Row
from fp8.runtime.step_runner import StepRunner

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Ticket:
    """A step that has been enqueued. Read tickets in order, at most Session.max_unread of them open."""

    rows: Sequence[Row]
    stage: int  # which staging buffers it uses
    count: int  # tokens it samples
    drawn: Drawn
    options: Options | None = None

    @property
    def wants_logprobs(self) -> bool:
        return self.options is not None and bool(self.options.logprob_rows)


class Session(StepRunner):
    """Runs steps of an engine. `enqueue` returns before the step has run on a GPU; the next step may be enqueued before
    `read`, because sampled tokens stay on the device.

    `world` are the ranks of an engine that is divided among several: rank 0 enqueues and reads, the others `follow`.
    Raises what StepRunner does. `probing` is for looking at steps; it serves no request.
    """

    def __init__(
        self,
        engine_dir: str | Path,
        device: str = "auto",
        max_kv_blocks: int | None = None,
        kv_cache_free_gpu_memory_fraction: float = 0.9,
        world: World | None = None,
        make_weight: MakeWeight | None = None,
    ) -> None:
        self._history = History()
        self.turn = 0  # the staging buffer of the next step
        self._replies: dict[int, Reply] = {}  # of the stage that samples, by staging buffer
        self.around_step: Callable[[StepShape], AbstractContextManager] = nullcontext  # what is enqueued around each
        super().__init__(engine_dir, device, max_kv_blocks, kv_cache_free_gpu_memory_fraction, world, make_weight)
        self.probing = Probing(self)

    def enqueue(self, rows: Sequence[Row], copies: Mapping[int, int] | None = None) -> Ticket:
        """Packs and starts a step; its tokens come from `read`. Before it, KV blocks get the contents of others: those
        that the keys of `copies` name, of those that its values name."""
        stage, self.turn = self.turn, (self.turn + 1) % self.max_unread
        with self.guard(), self.scope():
            following = self.packer.follows(rows) if self.advances else None
            packed = following is None
            shape = following or self.packer.pack(rows, self.inputs.host[stage])
            options = options_of(rows, self._history)
            behind = min((row.behind for row in rows if row.behind), default=0)
            self.tell("step", shape, stage, options, copies, behind, packed=packed)
            with self.around_step(shape):
                drawn = self.start(shape, stage, options, copies, behind, packed)
            if self.advances:
                self.packer.ran(rows, shape)
        return Ticket(rows, stage, shape.logits_rows, drawn, options)

    def read(self, ticket: Ticket) -> list[int | Candidates]:
        """What the step sampled, in the order of its sampling rows: a token, or a beam's candidates; waits for it."""
        with self.guard():
            if not self.samples:
                assert self.ranks is not None
                self._replies[ticket.stage] = reply = self.ranks.receive_reply()
                sampled = reply.sampled
                assert self._returned is not None
                with self.scope():
                    self._returned.read()
            else:
                self.wait(ticket.stage)
                sampled = self._sampled(ticket)
            if self.ranks is not None:
                self.ranks.end()
        return sampled

    def _sampled(self, ticket: Ticket) -> list[int | Candidates]:
        """What a step that has ended sampled here."""
        sampled: list[int | Candidates] = self.inputs.read[ticket.stage, : ticket.count].tolist()
        if ticket.drawn.candidates is not None and ticket.options is not None:
            for row, entry in zip(ticket.options.beam_rows, ticket.drawn.candidates.entries(), strict=True):
                sampled[row] = entry.top
        return sampled

    def read_logprobs(self, ticket: Ticket) -> list[TokenLogprobs | None]:
        """Log-probabilities of the tokens of `read`, None for rows that want none; call it after `read`."""
        if not self.samples:
            return self._replies[ticket.stage].logprobs
        found: list[TokenLogprobs | None] = [None] * ticket.count
        if ticket.drawn.logprobs is not None and ticket.options is not None:
            for row, entry in zip(ticket.options.logprob_rows, ticket.drawn.logprobs.entries(), strict=True):
                found[row] = entry
        return found

    def token_logits(self, rows: Sequence[Row]) -> torch.Tensor:
        """Logits f32 [T, V] after every token of `rows` (T at most `max_logits_rows`); good until the next step."""
        stage = self.turn
        host = self.inputs.host[stage]
        with self.guard(), self.scope():
            self.wait(stage)
            shape = self.packer.want_all_logits(self.packer.pack(rows, host), host)
            self.tell("logits", shape, stage)
            logits = self._score(shape, stage)
            if self.ranks is not None:
                logits = logits if self.ranks.last else self.ranks.receive_logits(self.device)
                self.ranks.end()
        return logits

    def _score(self, shape: StepShape, stage: int) -> torch.Tensor:
        self.upload(shape, stage)
        logits = self.run(shape)
        self.finish(stage)
        return logits

    def follow(self) -> None:
        """Runs the steps that rank 0 schedules, until it says stop. For every other rank."""
        assert self.ranks is not None
        open_: deque[Ticket] = deque()
        with self.guard():
            while (command := self.ranks.next_command(partial(self._tell_sampled, open_))).what != "stop":
                self.ranks.begin(command.what)
                self._perform(command, open_)
                self.ranks.end()
            if self._returned is not None:
                with self.scope():
                    self._returned.finish()

    def _perform(self, command: Command, open_: deque[Ticket]) -> None:
        assert self.ranks is not None and command.shape is not None
        stage, shape = self.turn, command.shape
        with self.scope():
            self.wait(stage)  # what is there has been read
            packed = command.inputs is not None
            if command.inputs is not None:
                self.packer.restore(shape, command.inputs, self.inputs.host[stage])
            if command.what == "logits":
                logits = self._score(shape, stage)
                if self.ranks.tells:
                    self.ranks.send_logits(logits)
                return
            if command.what != "step":
                self.probing.perform(command, stage)
                return
            self.turn = (self.turn + 1) % self.max_unread
            drawn = self.start(shape, stage, command.options, command.copies, command.behind, packed)
        if self.ranks.tells:
            open_.append(Ticket((), stage, shape.logits_rows, drawn, command.options))

    def _tell_sampled(self, open_: deque[Ticket]) -> None:
        """Answers the steps that have ended, in order."""
        while open_ and (self.graphs is None or self._events[open_[0].stage].query()):
            ticket = open_.popleft()
            assert self.ranks is not None
            self.ranks.reply(Reply(self._sampled(ticket), self.read_logprobs(ticket)))

    def tell(
        self,
        what: str,
        shape: StepShape,
        stage: int,
        options: Options | None = None,
        copies: Mapping[int, int] | None = None,
        behind: int = 0,
        repeats: int = 0,
        packed: bool = True,
    ) -> None:
        if self.ranks is not None:
            self.ranks.begin(what)
            live = self.packer.live(shape, self.inputs.host[stage]) if packed else None
            self.ranks.tell(Command(what, shape, live, options, copies, behind, repeats))
