"""One engine on one device: takes scheduled rows, gives tokens or logits. Knows no queue and no text."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fp8.builder import engine as engine_format
from fp8.builder.engine import Engine, EngineError, Plan
from fp8.plugins.base import StepShape
from fp8.runtime.beam_search import Candidates
from fp8.runtime.logprobs import TokenLogprobs
from fp8.runtime.record import Recorder
from fp8.runtime.reference import ReferenceExecutor, kv_block_bytes, kv_buffers
from fp8.runtime.sampler import compiled_sampler, reference_sampler
from fp8.runtime.sampling_options import Drawn, Options, OptionSampler, options_of
from fp8.runtime.scheduler import Row
from fp8.runtime.step_inputs import Packer, StepInputs

if TYPE_CHECKING:
    import torch

    from fp8.runtime.compiled import CompiledExecutor, Graphs

STAGES = 2  # steps whose tokens may be unread: one running, one enqueued behind it


@dataclass(frozen=True)
class Ticket:
    """A step that has been enqueued. Read tickets in order, at most STAGES of them open."""

    rows: Sequence[Row]
    stage: int
    count: int  # tokens it samples
    drawn: Drawn
    options: Options | None = None


def choose_device(name: str, target: str) -> torch.device:
    """ "auto": the GPU if there is one and the engine holds kernels, else the CPU. Raises EngineError for none such."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and target != "cpu" else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise EngineError(f"device {name!r} is unknown; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise EngineError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EngineError(f"device {name!r} was asked for, and torch sees no CUDA GPU; use --device cpu")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


class Session:
    """Runs steps of an engine. Buffers, launches and the KV pool (`num_blocks` blocks) are made once, here.

    `enqueue` returns before the step has run on a GPU; the next step may be enqueued before `read`, because sampled
    tokens stay on the device. Raises EngineError for an engine that cannot run on `device`, or does not fit.
    """

    def __init__(
        self,
        engine_dir: str | Path,
        device: str = "auto",
        max_kv_blocks: int | None = None,
        kv_cache_free_gpu_memory_fraction: float = 0.9,
    ) -> None:
        import torch

        engine = engine_format.load(engine_dir, verify_weights=False)
        self.plan: Plan = engine.plan
        self.limits, self.model = engine.plan.limits, engine.plan.model
        self.device = choose_device(device, engine.plan.compatibility.target)
        self._packer = Packer(self.limits)
        self._stream: torch.cuda.Stream | None = None  # None on a CPU, like the graphs
        self._graphs: Graphs | None = None
        self._logits_graphs: Graphs | None = None  # the same steps up to their logits
        self._options = OptionSampler(self.limits, self.device)
        self._scope: Callable[[], AbstractContextManager]
        self._turn = 0
        self.recorder: Recorder | None = None  # where set, every step runs eagerly and its buffers go there
        if self.device.type == "cuda":
            self._open_on_gpu(engine, max_kv_blocks, kv_cache_free_gpu_memory_fraction)
        else:
            self._open_on_cpu(engine, max_kv_blocks)
        pinned = self.device.type == "cuda"
        self._tokens = [
            torch.zeros(self.limits.logits_rows, dtype=torch.int32, pin_memory=pinned) for _ in range(STAGES)
        ]

    def _open_on_cpu(self, engine: Engine, max_kv_blocks: int | None) -> None:
        import torch

        engine_format.check_weights(engine, engine_format.file_sha256(engine.weights_path))
        self.num_blocks = max_kv_blocks or _blocks_in_host_memory(self.plan)
        self._inputs = StepInputs(self.limits, self.device, STAGES)
        self.executor: ReferenceExecutor | CompiledExecutor = ReferenceExecutor(engine, self._inputs, self.num_blocks)
        self._sample = reference_sampler(self._inputs)
        self._scope = torch.inference_mode

    def _open_on_gpu(self, engine: Engine, max_kv_blocks: int | None, fraction: float) -> None:
        import torch

        from fp8.runtime import compiled
        from fp8.runtime.weights import load_to_gpu

        compiled.check_device(self.plan, self.device)
        torch.cuda.set_device(self.device)
        stream = self._stream = torch.cuda.Stream()
        self._scope = lambda: torch.cuda.stream(stream)
        with self._scope():
            free = torch.cuda.mem_get_info()[0]
            available = compiled.pool_blocks(self.plan, free, fraction)
            self.num_blocks = min(max_kv_blocks or available, available)
            weights = load_to_gpu(engine, self.device)
            self._inputs = StepInputs(self.limits, self.device, STAGES)
            self.executor = executor = compiled.CompiledExecutor(engine, weights, self._inputs, self.num_blocks)
            self._sample = compiled_sampler(engine, self._inputs, executor.logits)
            self._graphs, self._logits_graphs = compiled.Graphs(self._launch), compiled.Graphs(self._forward)
            self._events = [torch.cuda.Event() for _ in range(STAGES)]
        stream.synchronize()

    def enqueue(self, rows: Sequence[Row], copies: Mapping[int, int] | None = None) -> Ticket:
        """Packs and starts a step; its tokens come from `read`. Before it, KV blocks get the contents of others: those
        that the keys of `copies` name, of those that its values name."""
        stage, self._turn = self._turn, (self._turn + 1) % STAGES
        host, options = self._inputs.host[stage], options_of(rows)
        with self._scope():
            if copies:
                self._copy_blocks(copies)
            shape = self._packer.pack(rows, host)
            count = shape.logits_rows
            launch, forward = self._launch, self._forward
            replayed = self._graphs is not None and self.recorder is None
            if replayed and shape.decode_sequences == shape.sequences == count:
                assert self._graphs is not None and self._logits_graphs is not None
                shape = self._pad(shape, stage)
                launch, forward = self._graphs.run, self._logits_graphs.run
            self._inputs.upload(stage)
            if options is None:
                drawn = Drawn(launch(shape))
            else:
                choose = partial(self._choose, shape)
                drawn = self._options.sample(options, forward(shape), choose)
            self._tokens[stage][:count].copy_(drawn.tokens[:count], non_blocking=True)
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
        if self._graphs is not None:
            self._events[ticket.stage].synchronize()
        sampled: list[int | Candidates] = self._tokens[ticket.stage][: ticket.count].tolist()
        if ticket.drawn.candidates is not None and ticket.options is not None:
            for row, entry in zip(ticket.options.beam_rows, ticket.drawn.candidates.entries(), strict=True):
                sampled[row] = entry.top
        return sampled

    def read_logprobs(self, ticket: Ticket) -> list[TokenLogprobs | None]:
        """Log-probabilities of the tokens of `read`, None for rows that want none; call it after `read`."""
        found: list[TokenLogprobs | None] = [None] * ticket.count
        if ticket.drawn.logprobs is not None and ticket.options is not None:
            for row, entry in zip(ticket.options.logprob_rows, ticket.drawn.logprobs.entries(), strict=True):
                found[row] = entry
        return found

    def token_logits(self, rows: Sequence[Row]) -> torch.Tensor:
        """Logits f32 [T, V] after every token of `rows` (T at most `max_logits_rows`); good until the next step."""
        host = self._inputs.host[self._turn]
        with self._scope():
            if self._graphs is not None:
                self._events[self._turn].synchronize()
            shape = self._packer.want_all_logits(self._packer.pack(rows, host), host)
            self._inputs.upload(self._turn)
            self._inputs.gather_input_ids(shape.tokens)
            logits = self._run(shape)
        if self._stream is not None:
            self._stream.synchronize()
        return logits

    def time_launches(self, rows: Sequence[Row], repeats: int) -> list[float]:
        """Seconds that each step of the plan takes for `rows` by itself; writes their K and V, samples nothing."""
        with self._scope():
            if self._graphs is not None:
                self._events[self._turn].synchronize()
            shape = self._packer.pack(rows, self._inputs.host[self._turn])
            self._inputs.upload(self._turn)
            self._inputs.gather_input_ids(shape.tokens)
            return self.executor.time_launches(shape, repeats)

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

    def _pad(self, shape: StepShape, stage: int) -> StepShape:
        """A decode step grown to a size that there are graphs of."""
        from fp8.runtime.compiled import context_bucket, row_bucket

        rows = row_bucket(shape.tokens, self.limits.max_batch_size)
        context = context_bucket(shape.max_context, self.limits.max_seq_len)
        return self._packer.pad(shape, rows, context, self._inputs.host[stage])

    def _launch(self, shape: StepShape) -> torch.Tensor:
        """A whole step on the current stream, from `sources` to the table of sampled tokens; returns these [L]."""
        return self._choose(shape, self._forward(shape))

    def _forward(self, shape: StepShape) -> torch.Tensor:
        """A step up to its logits [L, V]."""
        self._inputs.gather_input_ids(shape.tokens)
        return self._run(shape)

    def _choose(self, shape: StepShape, logits: torch.Tensor) -> torch.Tensor:
        """Samples, into the table too."""
        if not shape.logits_rows:
            return self._inputs.sampled[:0]
        tokens = self._sample(shape, logits)
        self._inputs.sampled.scatter_(0, self._inputs.device["slots"][: shape.logits_rows], tokens)
        return tokens

    def _run(self, shape: StepShape) -> torch.Tensor:
        if self.recorder is None:
            return self.executor.run(shape)
        self.recorder.begin(shape, self._inputs)
        logits = self.executor.run(shape, self.recorder.observe)
        self.recorder.end()
        return logits


def _blocks_in_host_memory(plan: Plan) -> int:
    """As many blocks as all sequences need, or as half of the free memory holds."""
    limits = plan.limits
    per_sequence = -(-limits.max_seq_len // limits.block_size)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    blocks = min(per_sequence * limits.max_batch_size, free // 2 // kv_block_bytes(plan))
    if blocks < per_sequence:
        raise EngineError(
            f"the KV pool would have {blocks} blocks in {free / 2**30:.1f} GiB of free memory, and one sequence of "
            f"max_seq_len {limits.max_seq_len} needs {per_sequence}; build with a smaller --max_seq_len, "
            f"or give max_kv_blocks"
        )
    return blocks
