"""One engine on one device: takes scheduled rows, gives tokens or logits. Knows no queue and no text."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fp8.builder import engine as engine_format
from fp8.builder.engine import Engine, Plan
from fp8.plugins.base import Launcher, StepShape
from fp8.runtime import preflight
from fp8.runtime.beam_search import Candidates
from fp8.runtime.comm import World
from fp8.runtime.device import blocks_in_host_memory, choose_device
from fp8.runtime.links import GpuLinks, HostLinks, Links, Returned, peers
from fp8.runtime.logprobs import TokenLogprobs
from fp8.runtime.ranks import Command, Ranks, Reply
from fp8.runtime.record import Recorder
from fp8.runtime.reference import MakeWeight, ReferenceExecutor, kv_buffers
from fp8.runtime.repeats import Repeated, Repeats
from fp8.runtime.sampler import compiled_fetch, compiled_sampler, reference_sampler
from fp8.runtime.sampling_options import Drawn, History, Options, OptionSampler, options_of
from fp8.runtime.scheduler import Row
from fp8.runtime.step_inputs import Packer, StepInputs

if TYPE_CHECKING:
    import torch

    from fp8.runtime.compiled import CompiledExecutor, Graphs

_T = TypeVar("_T")


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


class Session:
    """Runs steps of an engine. Buffers, launches and the KV pool (`num_blocks` blocks) are made once, here.

    `enqueue` returns before the step has run on a GPU; the next step may be enqueued before `read`, because sampled
    tokens stay on the device. Raises EngineError for an engine that cannot run on `device`, or does not fit.

    `world` are the ranks of an engine that is divided among several: rank 0 enqueues and reads, the others `follow`.
    Raises RankError, on all of them, if one cannot take part. `make_weight` makes what a hollow engine lacks.
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
        import torch

        self._make_weight = make_weight
        engine = preflight.load(engine_dir, world)
        self.plan: Plan = engine.plan
        self.limits, self.model = engine.plan.limits, engine.plan.model
        self.ranks = None if world is None else Ranks(world, engine.plan)
        target, place = engine.plan.compatibility.target, None if world is None else world.launch.local_rank
        self.device = preflight.all_or_none(world, lambda: choose_device(device, target, place))
        preflight.check_devices(world, self.device)
        self._packer = Packer(self.limits)
        self._stream: torch.cuda.Stream | None = None  # None on a CPU, like the graphs
        self._graphs: Graphs | None = None
        self._logits_graphs: Graphs | None = None  # the same steps up to their logits
        self._links: Links | None = None
        self._returned: Returned | None = None  # where another stage samples for this one
        self._options, self._history = OptionSampler(self.limits, self.device), History()
        self.scope: Callable[[], AbstractContextManager] = torch.inference_mode  # what is enqueued within is in order
        self._turn = 0
        self._fetch: Launcher | None = None  # a step begins with it where its inputs are not uploaded before
        self._replies: dict[int, Reply] = {}  # of the stage that samples, by staging buffer
        self.recorder: Recorder | None = None  # where set, every step runs eagerly and its buffers go there
        self.around_step: Callable[[StepShape], AbstractContextManager] = nullcontext  # what is enqueued around each
        self._open(engine, max_kv_blocks, kv_cache_free_gpu_memory_fraction, world)
        if world is not None:
            world.opened = True
            world.rest()

    def _open(self, engine: Engine, max_kv_blocks: int | None, fraction: float, world: World | None) -> None:
        """Each stage on all ranks or on none: a rank that cannot go on is not waited for by the next stage."""
        on_gpu = self.device.type == "cuda"
        prepare, allocate = (
            (self._prepare_gpu, self._allocate_on_gpu) if on_gpu else (self._prepare_cpu, self._allocate_on_cpu)
        )
        available = preflight.all_or_none(world, lambda: prepare(engine, max_kv_blocks, fraction))
        self.num_blocks = preflight.common_blocks(world, available)
        if world is not None:
            assert self.ranks is not None
            with self.ranks.guard(), self.scope():
                self._links = GpuLinks(world, engine, self.device) if on_gpu else HostLinks(world, self.plan)
        preflight.all_or_none(world, lambda: allocate(engine))
        if world is not None and not isinstance(self.executor, ReferenceExecutor):
            told = world.exchange(self.executor.one_launch)
            if len({told[rank] for rank in peers(world, self.plan)}) > 1:
                self.executor.launch_apart()
        if self._links is not None and not self._samples and self._first:
            self._returned = Returned(self._links, self._inputs.sampled, self.stages)

    def _prepare_cpu(self, engine: Engine, max_kv_blocks: int | None, _: float) -> int:
        engine_format.check_weights(engine, engine_format.file_digest(engine.weights_path))
        return blocks_in_host_memory(self.plan, self.plan.compatibility.world_size, max_kv_blocks)

    def _allocate_on_cpu(self, engine: Engine) -> None:
        group = None if self._links is None else self._links.group
        self._inputs = StepInputs(self.limits, self.device, self.max_unread)
        self.executor: ReferenceExecutor | CompiledExecutor = ReferenceExecutor(
            engine, self._inputs, self.num_blocks, group, self._make_weight
        )
        self._sample = reference_sampler(self._inputs)

    def _prepare_gpu(self, engine: Engine, max_kv_blocks: int | None, fraction: float) -> int:
        import torch

        from fp8.runtime import compiled
        from fp8.runtime.weights import load_to_gpu

        compiled.check_device(self.plan, self.device)
        torch.cuda.set_device(self.device)
        stream = self._stream = torch.cuda.Stream()
        self.scope = lambda: torch.cuda.stream(stream)
        with self.scope():
            free = torch.cuda.mem_get_info()[0]
            available = compiled.pool_blocks(self.plan, free, fraction)
            self._weights = load_to_gpu(engine, self.device, self._make_weight)
        return min(max_kv_blocks or available, available)

    def _allocate_on_gpu(self, engine: Engine) -> None:
        import torch

        from fp8.runtime import compiled

        assert self._stream is not None
        with self.scope():
            self._inputs = StepInputs(self.limits, self.device, self.max_unread)
            self._engine = engine
            self.executor = executor = self.another_executor()
            if self._samples:
                self._sample = compiled_sampler(engine, self._inputs, executor.result)
            self._graphs, self._logits_graphs = compiled.Graphs(self._launch), compiled.Graphs(self._forward)
            if self.stages > 1:
                self._fetch = compiled_fetch(engine, self._inputs)
            self._events = [torch.cuda.Event() for _ in range(self.max_unread)]
        self._stream.synchronize()

    def another_executor(self, peer_memory: bool = True) -> CompiledExecutor:
        """Of this GPU's weights and inputs, with buffers and caches of its own; without `peer_memory` its launches
        reach other ranks through NCCL alone. For who compares launches: the session's own steps know nothing of it."""
        from fp8.runtime import compiled

        assert self._links is None or isinstance(self._links, GpuLinks)
        links = self._links if peer_memory or self._links is None else self._links.without_peer_memory()
        return compiled.CompiledExecutor(self._engine, self._weights, self._inputs, self.num_blocks, links)

    def enqueue(self, rows: Sequence[Row], copies: Mapping[int, int] | None = None) -> Ticket:
        """Packs and starts a step; its tokens come from `read`. Before it, KV blocks get the contents of others: those
        that the keys of `copies` name, of those that its values name."""
        stage, self._turn = self._turn, (self._turn + 1) % self.max_unread
        with self._guard(), self.scope():
            following = self._packer.follows(rows) if self._advances else None
            packed = following is None
            shape = following or self._packer.pack(rows, self._inputs.host[stage])
            options = options_of(rows, self._history)
            behind = min((row.behind for row in rows if row.behind), default=0)
            self._tell("step", shape, stage, options, copies, behind, packed=packed)
            with self.around_step(shape):
                ticket = self._start(rows, shape, stage, options, copies, behind, packed)
            if self._advances:
                self._packer.ran(rows, shape)
        return ticket

    def _start(
        self,
        rows: Sequence[Row],
        shape: StepShape,
        stage: int,
        options: Options | None,
        copies: Mapping[int, int] | None,
        behind: int,
        packed: bool,
    ) -> Ticket:
        """Runs, or enqueues, the step whose inputs lie in that staging buffer, or, if it was not packed, are on the
        device."""
        if copies:
            self._copy_blocks(copies)
        count = shape.logits_rows
        if self._returned is not None:
            self._returned.begin(bool(count), behind)
        launch, forward = self._launch, self._forward
        replayed = self._graphs is not None and self.recorder is None
        if replayed and shape.decode_sequences == shape.sequences == count:
            assert self._graphs is not None and self._logits_graphs is not None
            shape = self._pad(shape, stage if packed else None)
            launch, forward = self._graphs.run, self._logits_graphs.run
        if packed and self._fetch is None:
            self._upload(shape, stage)
        elif packed:
            self._inputs.seal(stage)
        if options is None or not self._samples:
            drawn = Drawn(launch(shape))
        else:
            choose = partial(self._choose, shape)
            drawn = self._options.sample(options, forward(shape), choose)
        if self._graphs is not None:
            self._events[stage].record()
        return Ticket(rows, stage, count, drawn, options)

    def use_in_this_thread(self) -> None:
        """Makes the device current; every thread that runs steps calls it once."""
        if self._stream is not None:
            import torch

            torch.cuda.set_device(self.device)

    def read(self, ticket: Ticket) -> list[int | Candidates]:
        """What the step sampled, in the order of its sampling rows: a token, or a beam's candidates; waits for it."""
        with self._guard():
            if not self._samples:
                assert self.ranks is not None
                self._replies[ticket.stage] = reply = self.ranks.receive_reply()
                sampled = reply.sampled
                assert self._returned is not None
                with self.scope():
                    self._returned.read()
            else:
                self._wait(ticket.stage)
                sampled = self._sampled(ticket)
            if self.ranks is not None:
                self.ranks.end()
        return sampled

    def _sampled(self, ticket: Ticket) -> list[int | Candidates]:
        """Of a step that has ended here."""
        sampled: list[int | Candidates] = self._inputs.read[ticket.stage, : ticket.count].tolist()
        if ticket.drawn.candidates is not None and ticket.options is not None:
            for row, entry in zip(ticket.options.beam_rows, ticket.drawn.candidates.entries(), strict=True):
                sampled[row] = entry.top
        return sampled

    def read_logprobs(self, ticket: Ticket) -> list[TokenLogprobs | None]:
        """Log-probabilities of the tokens of `read`, None for rows that want none; call it after `read`."""
        if not self._samples:
            return self._replies[ticket.stage].logprobs
        found: list[TokenLogprobs | None] = [None] * ticket.count
        if ticket.drawn.logprobs is not None and ticket.options is not None:
            for row, entry in zip(ticket.options.logprob_rows, ticket.drawn.logprobs.entries(), strict=True):
                found[row] = entry
        return found

    def token_logits(self, rows: Sequence[Row]) -> torch.Tensor:
        """Logits f32 [T, V] after every token of `rows` (T at most `max_logits_rows`); good until the next step."""
        stage = self._turn
        host = self._inputs.host[stage]
        with self._guard(), self.scope():
            self._wait(stage)
            shape = self._packer.want_all_logits(self._packer.pack(rows, host), host)
            self._tell("logits", shape, stage)
            logits = self._score(shape, stage)
            if self.ranks is not None:
                logits = logits if self.ranks.last else self.ranks.receive_logits(self.device)
                self.ranks.end()
        return logits

    def _score(self, shape: StepShape, stage: int) -> torch.Tensor:
        self._upload(shape, stage)
        logits = self._run(shape)
        self._finish(stage)
        return logits

    def _finish(self, stage: int) -> None:
        """Waits for what was launched."""
        if self._graphs is not None:
            self._events[stage].record()
            self._wait(stage)

    def repeat(self, rows: Sequence[Row], times: int) -> Repeated:
        """What the logits of a step are that runs so often, one behind the other, as when serving but that nothing is
        sampled; writes the K and V of `rows`. In a pipeline each waits for the one before."""
        if self.stages > 1:
            repeats = Repeats()
            for _ in range(times):
                repeats.add(self.token_logits(rows))
            return repeats.found()
        return self._by_all("repeat", rows, times, self._repeat)

    def _by_all(self, what: str, rows: Sequence[Row], repeats: int, do: Callable[[StepShape, int, int], _T]) -> _T:
        """`do` of the step of `rows`, by every rank; what it gives here. The other ranks are told `what` it is."""
        stage = self._turn
        with self._guard(), self.scope():
            self._wait(stage)
            shape = self._packer.pack(rows, self._inputs.host[stage])
            self._tell(what, shape, stage, repeats=repeats)
            found = do(shape, stage, repeats)
            if self.ranks is not None:
                self.ranks.end()
        return found

    def _repeat(self, shape: StepShape, stage: int, times: int) -> Repeated:
        launch, rows, repeats = self._run, shape.logits_rows, Repeats()
        if self._logits_graphs is not None and shape.decode_sequences == shape.sequences == rows:
            shape, launch = self._pad(shape, stage), self._logits_graphs.run
        self._upload(shape, stage)
        for _ in range(times):
            repeats.add(launch(shape)[:rows])
        self._finish(stage)
        return repeats.found()

    def follow(self) -> None:
        """Runs the steps that rank 0 schedules, until it says stop. For every other rank."""
        assert self.ranks is not None
        open_: deque[Ticket] = deque()
        with self._guard():
            while (command := self.ranks.next_command(partial(self._tell_sampled, open_))).what != "stop":
                self.ranks.begin(command.what)
                self._perform(command, open_)
                self.ranks.end()
            if self._returned is not None:
                with self.scope():
                    self._returned.finish()

    def _perform(self, command: Command, open_: deque[Ticket]) -> None:
        assert self.ranks is not None and command.shape is not None
        stage, shape = self._turn, command.shape
        with self.scope():
            self._wait(stage)  # what is there has been read
            packed = command.inputs is not None
            if command.inputs is not None:
                self._packer.restore(shape, command.inputs, self._inputs.host[stage])
            if command.what == "logits":
                logits = self._score(shape, stage)
                if self.ranks.tells:
                    self.ranks.send_logits(logits)
                return
            if command.what == "repeat":
                self._repeat(shape, stage, command.repeats)
                return
            if command.what == "time":
                self._time(shape, stage, command.repeats)
                return
            self._turn = (self._turn + 1) % self.max_unread
            ticket = self._start((), shape, stage, command.options, command.copies, command.behind, packed)
        if self.ranks.tells:
            open_.append(ticket)

    def _tell_sampled(self, open_: deque[Ticket]) -> None:
        """Answers the steps that have ended, in order."""
        while open_ and (self._graphs is None or self._events[open_[0].stage].query()):
            ticket = open_.popleft()
            assert self.ranks is not None
            self.ranks.reply(Reply(self._sampled(ticket), self.read_logprobs(ticket)))

    def _tell(
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
            live = self._packer.live(shape, self._inputs.host[stage]) if packed else None
            self.ranks.tell(Command(what, shape, live, options, copies, behind, repeats))

    def _wait(self, stage: int) -> None:
        """Until the step that used that staging buffer last has ended."""
        if self._graphs is None:
            return
        if self.ranks is None:
            self._events[stage].synchronize()
        else:
            self.ranks.wait_for(self._events[stage])

    def _guard(self) -> AbstractContextManager:
        return nullcontext() if self.ranks is None else self.ranks.guard()

    def time_launches(self, rows: Sequence[Row], repeats: int) -> list[float]:
        """Seconds that each step of the plan takes for `rows` by itself; writes their K and V, samples nothing. Of
        several ranks, which share the layers, those of rank 0."""
        return self._by_all("time", rows, repeats, self._time)

    def place(self, rows: Sequence[Row]) -> StepShape:
        """Uploads a step's inputs, those of a decode step padded as its graph is, and launches nothing: for who times
        launches, or compares them. Of several ranks, all call it."""
        stage = self._turn
        with self.scope():
            self._wait(stage)
            shape = self._packer.pack(rows, self._inputs.host[stage])
            if shape.decode_sequences == shape.sequences:
                shape = self._pad(shape, stage)
            self._upload(shape, stage)
        if self._stream is not None:
            self._stream.synchronize()
        return shape

    def _time(self, shape: StepShape, stage: int, repeats: int) -> list[float]:
        self._upload(shape, stage)
        return self.executor.time_launches(shape, repeats)

    @property
    def stages(self) -> int:
        """Of the pipeline, each of which is to have a step to do."""
        return self.plan.compatibility.pp_size

    @property
    def max_unread(self) -> int:
        """Steps whose tokens may be unread: one that runs in every stage, and one enqueued behind them."""
        return self.stages + 1

    @property
    def _samples(self) -> bool:
        """Whether this rank's stage has the logits."""
        return self.ranks is None or self.ranks.last

    @property
    def _first(self) -> bool:
        """Whether this rank's stage takes in token ids."""
        return self.ranks is None or self.ranks.first

    @property
    def _advances(self) -> bool:
        """Whether a step leaves the device's inputs as the next one may take them: in a pipeline that is another one,
        and a step that is recorded is not padded."""
        return self.stages == 1 and self.recorder is None

    @property
    def max_logits_rows(self) -> int:
        return min(self.limits.logits_rows, self.limits.max_num_tokens)

    @property
    def max_kv_tokens(self) -> int:
        return self.num_blocks * self.limits.block_size

    def _copy_blocks(self, copies: Mapping[int, int]) -> None:
        import torch

        pairs = torch.tensor([list(copies), list(copies.values())])
        if self.device.type == "cuda":
            pairs = pairs.pin_memory().to(self.device, non_blocking=True)
        for buffer in kv_buffers(self.plan):
            # Bytes: not every type of a cache can be copied by index. All are read before any is written.
            blocks = self.executor.weight(buffer.name).flatten(1).view(torch.uint8)
            blocks.index_copy_(0, pairs[0], blocks.index_select(0, pairs[1]))

    def _pad(self, shape: StepShape, stage: int | None) -> StepShape:
        """A decode step grown to a size that there are graphs of; so are its inputs in that staging buffer."""
        from fp8.runtime.compiled import context_bucket, row_bucket

        rows = row_bucket(shape.tokens, self.limits.max_batch_size)
        if stage is not None:
            self._packer.pad(shape, rows, self._inputs.host[stage])
        return StepShape(rows, rows, rows, 0, context_bucket(shape.max_context, self.limits.max_seq_len), rows)

    def _upload(self, shape: StepShape, stage: int) -> None:
        self._inputs.upload(stage)
        if self._first:
            self._inputs.gather_input_ids(shape.tokens)

    def _launch(self, shape: StepShape) -> torch.Tensor:
        """A whole step on the current stream, up to the next one's inputs; returns the sampled tokens [L]."""
        return self._choose(shape, self._forward(shape))

    def _forward(self, shape: StepShape) -> torch.Tensor:
        """A step up to its logits, with its inputs."""
        if self._fetch is not None:
            self._fetch(shape)
            if self._first:
                self._inputs.gather_input_ids(shape.tokens)
        return self._run(shape)

    def _choose(self, shape: StepShape, logits: torch.Tensor) -> torch.Tensor:
        """Samples: into the table, for the host, and into the next step's inputs, which go one token on."""
        if not shape.logits_rows or not self._samples:
            return self._inputs.sampled[:0]
        tokens = self._sample(shape, logits)
        if not self._first:
            assert self._links is not None
            self._links.return_sampled(self._inputs.sampled)
        return tokens

    def _run(self, shape: StepShape) -> torch.Tensor:
        """A step up to its logits [L, V], or to what the next pipeline stage takes."""
        if self.ranks is not None:
            return self._run_stage(shape)
        if self.recorder is None:
            return self.executor.run(shape)
        self.recorder.begin(shape, self._inputs)
        logits = self.executor.run(shape, self.recorder.observe)
        self.recorder.end()
        return logits

    def _run_stage(self, shape: StepShape) -> torch.Tensor:
        """One of several ranks' part."""
        assert self.ranks is not None and self._links is not None
        samples = shape.logits_rows > 0
        hidden = self._links.receive(shape.tokens, samples)
        observe = self.ranks.tick if self._graphs is None else None
        out = self.executor.run(shape, observe, hidden)
        if not self.ranks.last:
            self._links.send(out, samples)
        return out
