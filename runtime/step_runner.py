"""One rank's device in the steps of an engine: buffers, launches, the KV pool. It does not know what rows are for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fp8.builder import engine as engine_format
from fp8.builder.engine import Engine, Plan
from fp8.plugins.base import Launcher, StepShape
from fp8.runtime import preflight
from fp8.runtime.comm import World
from fp8.runtime.device import blocks_in_host_memory, choose_device
from fp8.runtime.links import GpuLinks, HostLinks, Links, Returned, peers
from fp8.runtime.ranks import Ranks
from fp8.runtime.record import Recorder
from fp8.runtime.reference import MakeWeight, ReferenceExecutor, kv_buffers
from fp8.runtime.sampler import compiled_fetch, compiled_sampler, reference_sampler
from fp8.runtime.sampling_options import Drawn, Options, OptionSampler
from fp8.runtime.step_inputs import Packer, StepInputs

if TYPE_CHECKING:
    import torch

    from fp8.runtime.compiled import CompiledExecutor, Graphs


class StepRunner:
    """Buffers, launches and the KV pool (`num_blocks` blocks) are made once, here. A step's inputs lie in one of
    `max_unread` staging buffers, `stage`; what is enqueued within `scope` is in order.

    Raises EngineError for an engine that cannot run on `device`, or does not fit; RankError, on all ranks of `world`,
    if one cannot take part. `make_weight` makes what a hollow engine lacks.
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
        self.packer = Packer(self.limits)
        self.stream: torch.cuda.Stream | None = None  # None on a CPU, like the graphs
        self.graphs: Graphs | None = None
        self.logits_graphs: Graphs | None = None  # the same steps up to their logits
        self._links: Links | None = None
        self._returned: Returned | None = None  # where another stage samples for this one
        self._options = OptionSampler(self.limits, self.device)
        self.scope: Callable[[], AbstractContextManager] = torch.inference_mode
        self._fetch: Launcher | None = None  # a step begins with it where its inputs are not uploaded before
        self.recorder: Recorder | None = None  # where set, every step runs eagerly and its buffers go there
        self._open(engine, max_kv_blocks, kv_cache_free_gpu_memory_fraction, world)
        if world is not None:
            world.opened = True
            world.rest()

    def _open(self, engine: Engine, max_kv_blocks: int | None, fraction: float, world: World | None) -> None:
        """Opens on all ranks or on none, stage by stage, so that nobody waits for a rank that cannot go on."""
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
        if self._links is not None and not self.samples and self.first:
            self._returned = Returned(self._links, self.inputs.sampled, self.stages)

    def _prepare_cpu(self, engine: Engine, max_kv_blocks: int | None, _: float) -> int:
        engine_format.check_weights(engine, engine_format.file_digest(engine.weights_path))
        return blocks_in_host_memory(self.plan, self.plan.compatibility.world_size, max_kv_blocks)

    def _allocate_on_cpu(self, engine: Engine) -> None:
        group = None if self._links is None else self._links.group
        self.inputs = StepInputs(self.limits, self.device, self.max_unread)
        self.executor: ReferenceExecutor | CompiledExecutor = ReferenceExecutor(
            engine, self.inputs, self.num_blocks, group, self._make_weight
        )
        self._sample = reference_sampler(self.inputs)

    def _prepare_gpu(self, engine: Engine, max_kv_blocks: int | None, fraction: float) -> int:
        import torch

        from fp8.runtime import compiled
        from fp8.runtime.weights import load_to_gpu

        compiled.check_device(self.plan, self.device)
        torch.cuda.set_device(self.device)
        stream = self.stream = torch.cuda.Stream()
        self.scope = lambda: torch.cuda.stream(stream)
        with self.scope():
            free = torch.cuda.mem_get_info()[0]
            available = compiled.pool_blocks(self.plan, free, fraction)
            self._weights = load_to_gpu(engine, self.device, self._make_weight)
        return min(max_kv_blocks or available, available)

    def _allocate_on_gpu(self, engine: Engine) -> None:
        import torch

        from fp8.runtime import compiled

        assert self.stream is not None
        with self.scope():
            self.inputs = StepInputs(self.limits, self.device, self.max_unread)
            self._engine = engine
            self.executor = executor = self.another_executor()
            if self.samples:
                self._sample = compiled_sampler(engine, self.inputs, executor.result)
            self.graphs, self.logits_graphs = compiled.Graphs(self._launch), compiled.Graphs(self._forward)
            if self.stages > 1:
                self._fetch = compiled_fetch(engine, self.inputs)
            self._events = [torch.cuda.Event() for _ in range(self.max_unread)]
        self.stream.synchronize()

    def another_executor(self, peer_memory: bool = True) -> CompiledExecutor:
        """Another executor over this GPU's weights and inputs, with buffers and caches of its own, for comparing
        launches: the steps know nothing of it. Without `peer_memory` its launches reach other ranks through NCCL
        alone."""
        from fp8.runtime import compiled

        assert self._links is None or isinstance(self._links, GpuLinks)
        links = self._links if peer_memory or self._links is None else self._links.without_peer_memory()
        return compiled.CompiledExecutor(self._engine, self._weights, self.inputs, self.num_blocks, links)

    def start(
        self,
        shape: StepShape,
        stage: int,
        options: Options | None,
        copies: Mapping[int, int] | None,
        behind: int,
        packed: bool,
    ) -> Drawn:
        """Runs, or enqueues, the step whose inputs lie in that staging buffer, or, if it was not packed, are on the
        device. Before it, KV blocks get the contents of others, as Session.enqueue says."""
        if copies:
            self._copy_blocks(copies)
        count = shape.logits_rows
        if self._returned is not None:
            self._returned.begin(bool(count), behind)
        launch, forward = self._launch, self._forward
        replayed = self.graphs is not None and self.recorder is None
        if replayed and shape.decode_sequences == shape.sequences == count:
            assert self.graphs is not None and self.logits_graphs is not None
            shape = self.pad(shape, stage if packed else None)
            launch, forward = self.graphs.run, self.logits_graphs.run
        if packed and self._fetch is None:
            self.upload(shape, stage)
        elif packed:
            self.inputs.seal(stage)
        if options is None or not self.samples:
            drawn = Drawn(launch(shape))
        else:
            choose = partial(self._choose, shape)
            drawn = self._options.sample(options, forward(shape), choose)
        if self.graphs is not None:
            self._events[stage].record()
        return drawn

    def use_in_this_thread(self) -> None:
        """Makes the device current; every thread that runs steps calls it once."""
        if self.stream is not None:
            import torch

            torch.cuda.set_device(self.device)

    def wait(self, stage: int) -> None:
        """Waits until the step that last used that staging buffer has ended."""
        if self.graphs is None:
            return
        if self.ranks is None:
            self._events[stage].synchronize()
        else:
            self.ranks.wait_for(self._events[stage])

    def guard(self) -> AbstractContextManager:
        return nullcontext() if self.ranks is None else self.ranks.guard()

    def finish(self, stage: int) -> None:
        """Waits for what was launched."""
        if self.graphs is not None:
            self._events[stage].record()
            self.wait(stage)

    @property
    def stages(self) -> int:
        """Stages of the pipeline; each should always have a step to work on."""
        return self.plan.compatibility.pp_size

    @property
    def max_unread(self) -> int:
        """Steps whose tokens may be unread: one that runs in every stage, and one enqueued after them."""
        return self.stages + 1

    @property
    def samples(self) -> bool:
        """Whether this rank's stage has the logits."""
        return self.ranks is None or self.ranks.last

    @property
    def first(self) -> bool:
        """Whether this rank's stage takes in token ids."""
        return self.ranks is None or self.ranks.first

    @property
    def advances(self) -> bool:
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

    def pad(self, shape: StepShape, stage: int | None) -> StepShape:
        """A decode step grown to a size that there are graphs of; so are its inputs in that staging buffer."""
        from fp8.runtime.compiled import context_bucket, row_bucket

        rows = row_bucket(shape.tokens, self.limits.max_batch_size)
        if stage is not None:
            self.packer.pad(shape, rows, self.inputs.host[stage])
        return StepShape(rows, rows, rows, 0, context_bucket(shape.max_context, self.limits.max_seq_len), rows)

    def upload(self, shape: StepShape, stage: int) -> None:
        self.inputs.upload(stage)
        if self.first:
            self.inputs.gather_input_ids(shape.tokens)

    def _launch(self, shape: StepShape) -> torch.Tensor:
        """A whole step on the current stream, up to the next one's inputs; returns the sampled tokens [L]."""
        return self._choose(shape, self._forward(shape))

    def _forward(self, shape: StepShape) -> torch.Tensor:
        """A step up to its logits, with its inputs."""
        if self._fetch is not None:
            self._fetch(shape)
            if self.first:
                self.inputs.gather_input_ids(shape.tokens)
        return self.run(shape)

    def _choose(self, shape: StepShape, logits: torch.Tensor) -> torch.Tensor:
        """Samples: into the table, for the host, and into the next step's inputs, which go one token on."""
        if not shape.logits_rows or not self.samples:
            return self.inputs.sampled[:0]
        tokens = self._sample(shape, logits)
        if not self.first:
            assert self._links is not None
            self._links.return_sampled(self.inputs.sampled)
        return tokens

    def run(self, shape: StepShape) -> torch.Tensor:
        """A step up to its logits [L, V], or to what the next pipeline stage takes."""
        if self.ranks is not None:
            return self._run_stage(shape)
        if self.recorder is None:
            return self.executor.run(shape)
        self.recorder.begin(shape, self.inputs)
        logits = self.executor.run(shape, self.recorder.observe)
        self.recorder.end()
        return logits

    def _run_stage(self, shape: StepShape) -> torch.Tensor:
        """This rank's part of a step, where there are several ranks."""
        assert self.ranks is not None and self._links is not None
        samples = shape.logits_rows > 0
        hidden = self._links.receive(shape.tokens, samples)
        observe = self.ranks.tick if self.graphs is None else None
        out = self.executor.run(shape, observe, hidden)
        if not self.ranks.last:
            self._links.send(out, samples)
        return out
