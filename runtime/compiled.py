"""Runs a plan's cubins on a GPU: every launch bound once to fixed buffers, decode steps replayed as CUDA graphs."""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fp8.builder.engine import Buffer, Engine, EngineError, Plan, Step
from fp8.plugins.base import Launcher, Plugin, StepShape
from fp8.plugins.timing import seconds_of_each
from fp8.runtime import joins, merged, tail
from fp8.runtime.links import INPUT
from fp8.runtime.reference import Observer, kv_block_bytes, kv_buffers, load_plugins
from fp8.runtime.step_inputs import StepInputs

if TYPE_CHECKING:
    import torch

    from fp8.plugins.cuda import Function
    from fp8.runtime.links import GpuLinks

Bound = tuple[str, list[int], list[Launcher]]  # a plan step's rows ("T", "L"), the ends of its ranges, their launches

RESERVE = 1 << 30  # bytes left to the driver: graphs, kernels' local memory, the allocator's rounding


def check_device(plan: Plan, device: torch.device) -> None:
    """Raises EngineError if the engine's cubins cannot run there."""
    import torch

    target = plan.compatibility.target
    if target == "cpu":
        raise EngineError(
            "this engine was built for target cpu and holds no kernels; run it with --device cpu, or build for sm_90a"
        )
    major, minor = torch.cuda.get_device_capability(device)
    if target != "sm_90a" or (major, minor) != (9, 0):
        raise EngineError(
            f"this engine is built for {target}, and {torch.cuda.get_device_name(device)} is sm_{major}{minor}; "
            f"run it on a Hopper GPU (compute capability 9.0) or with --device cpu"
        )


def sizes(plan: Plan) -> dict[str, int]:
    """What the symbolic dimensions are at most."""
    limits = plan.limits
    return {"T": limits.max_num_tokens, "B": limits.max_batch_size, "L": limits.logits_rows}


def buffer_bytes(plan: Plan, buffer: Buffer) -> int:
    import torch

    top = sizes(plan)
    return (
        math.prod(top.get(d, 1) if isinstance(d, str) else d for d in buffer.shape)
        * getattr(torch, buffer.dtype).itemsize
    )


def fixed_bytes(plan: Plan) -> int:
    """Device memory that does not depend on the KV pool: weights, activations, workspace, outputs."""
    apart = (b for b in plan.buffers if b.kind == "weight" or (b.kind == "output" and b.offset is None))
    return sum(buffer_bytes(plan, b) for b in apart) + plan.arena_bytes + plan.workspace_bytes


def pool_blocks(plan: Plan, free: int, fraction: float) -> int:
    """Blocks that `fraction` of the memory left beside the fixed buffers holds, never more than all sequences need.
    What options of sampling take comes out of the rest, and out of the pool only as far as the rest is too small.

    Raises EngineError, before anything is loaded, if weights, activations and sampling, or one whole sequence, or a
    block for each sequence of the batch, do not fit.
    """
    limits, beside = plan.limits, free - fixed_bytes(plan) - RESERVE
    need = free - beside + plan.sampling_bytes
    if need > free:
        raise EngineError(
            f"the engine needs {_gib(need)} for weights, activations and sampling, {_gib(need - free)} more than are "
            "free on the GPU; free some, or build with a smaller --max_num_tokens or --max_batch_size"
        )
    per_sequence = limits.sequence_blocks
    size = kv_block_bytes(plan)
    blocks = min(int(beside * fraction), free - need) // size
    for name, wanted, what in (
        ("max_seq_len", per_sequence, f"one sequence of max_seq_len {limits.max_seq_len} needs"),
        ("max_batch_size", limits.max_batch_size, "one block for each sequence of max_batch_size makes"),
    ):
        if blocks < wanted:
            raise EngineError(
                f"the KV pool would have {blocks} blocks, and {what} {wanted}, {_gib((wanted - blocks) * size)} more; "
                f"build with a smaller --{name}, or raise kv_cache_free_gpu_memory_fraction"
            )
    return min(blocks, per_sequence * limits.max_batch_size)


def _gib(size: int) -> str:
    """In GiB, rounded up, so that this much is enough."""
    return f"{math.ceil(size / 2**30 * 10) / 10:.1f} GiB"


def load_functions(engine: Engine) -> dict[str, Function]:
    """The kernels of all tactics by content hash."""
    from fp8.plugins.cuda import Module

    return {h: Module(engine.cubins[h]).function(str(facts["entry"])) for h, facts in engine.plan.kernels.items()}


class CompiledExecutor:
    """One GPU's buffers and bound launches. `run` enqueues a step on the current stream and returns its logits, or
    what the next pipeline stage takes. `links`: what goes between the GPUs of several ranks."""

    def __init__(
        self,
        engine: Engine,
        weights: dict[str, torch.Tensor],
        inputs: StepInputs,
        num_blocks: int,
        links: GpuLinks | None = None,
    ) -> None:
        import torch

        plan = engine.plan
        device = inputs.input_ids.device
        self.plan = plan
        self._tensors: dict[str, torch.Tensor] = {**weights, **inputs.device, "input_ids": inputs.input_ids}
        self._comm = None if links is None else links.group
        if links is not None and links.hidden is not None:
            self._tensors[INPUT] = links.hidden
        self._arena = torch.zeros(max(plan.arena_bytes, 1), dtype=torch.uint8, device=device)
        self._workspace = torch.zeros(max(plan.workspace_bytes, 1), dtype=torch.uint8, device=device)
        self._plugins = load_plugins(plan)
        self._allocate(plan, self._plugins, num_blocks, device)
        functions, steps = load_functions(engine), range(len(plan.steps))
        self._steps = [self._bind(i, functions, self._tensors) for i in steps]
        self._joined = joins.bind(plan, self._plugins, functions, self._tensors, self._workspace)
        self._merged = merged.bind(plan, functions, self._tensors, self._workspace, self._comm)
        self._tail: list[Bound] = []  # launches of the steps after the last attention, for the rows wanted
        found = tail.find(plan)
        if found is not None:
            self._first_of_tail, self._wanted = found.first, tail.Rows(found, self._tensors)
            self._tail = [self._bind(i, functions, self._wanted.tensors) for i in steps[found.first :]]
        output = next(b for b in plan.buffers if b.kind == "output")
        self.result, self._rows = self._tensors[output.name], output.shape[0]

    def run(
        self, shape: StepShape, observe: Observer | None = None, hidden_states: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`hidden_states`, if any, lie where the launches are bound to."""
        if observe is None and self._merged is not None and self._merged.fits(shape):
            self._run_merged(self._merged, shape)
            return self.result[: shape.logits_rows if self._rows == "L" else shape.tokens]
        for i, (launcher, live) in enumerate(self.launches(shape, whole=observe is not None)):
            if live is not shape and i == self._first_of_tail:
                self._wanted.gather(live.tokens)
            launcher(live)
            if observe:
                step = self.plan.steps[i]
                for name in filter(None, step.outputs):
                    rows = shape.logits_rows if self.plan.buffer(name).shape[0] == "L" else shape.tokens
                    observe(name, self._tensors[name][:rows])
        return self.result[: shape.logits_rows if self._rows == "L" else shape.tokens]

    @property
    def one_launch(self) -> str:
        """What one launch stands for, for the other ranks; "" if each step has its own."""
        return "" if self._merged is None else self._merged.facts

    def launch_apart(self) -> None:
        """Gives each step its own launch from now on."""
        self._merged = None

    def _run_merged(self, one: merged.Bound, shape: StepShape) -> None:
        for step in self._steps[: one.first]:
            _launcher(step, shape)(shape)
        one.launcher(shape)
        for step in self._steps[one.first + one.count :]:
            _launcher(step, shape)(shape)

    def shapes(self, shape: StepShape) -> list[StepShape]:
        """What every plan step of a step is launched for: after the last attention, often fewer rows."""
        return [live for _, live in self.launches(shape)]

    def rebound(self, index: int, tactic: Any, functions: Sequence[Function], in_place: bool = True) -> Launcher:
        """The launch of the plan's step `index` by another tactic, one without a workspace; if not `in_place`, as it
        is among its like."""
        step, plugin = self.plan.steps[index], self._plugins[index]
        tensors = [self._tensors[name] if name else None for name in (*step.inputs, *step.outputs)]
        return plugin.bind(tactic, functions, tensors, None, **(self._further(index) if in_place else {}))

    def weight(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def time_launches(self, shape: StepShape, repeats: int) -> list[float]:
        """Seconds of every plan step's launch, the median of `repeats` passes; without overlap between launches."""
        import torch

        launches, passes = [partial(launch, live) for launch, live in self.launches(shape)], []
        for _ in range(repeats):
            torch.cuda._sleep(20_000_000)  # some 10 ms: the host gets ahead, so that its own time is not measured
            if self._comm is not None:  # ranks begin together
                self._comm.all_gather(self._workspace[:1])
            passes.append(seconds_of_each(launches))
        return [statistics.median(times) for times in zip(*passes, strict=True)]

    def launches(self, shape: StepShape, whole: bool = False) -> list[tuple[Launcher, StepShape]]:
        """The launch of every plan step that fits the step's size, and what it is for. `whole`: every step writes all
        that it does in the plan, for all rows."""
        joinable = self._joinable(shape)
        if whole or joinable == len(self._steps):
            found = [(_launcher(step, shape), shape) for step in self._steps]
        else:
            few = replace(shape, tokens=shape.logits_rows)
            found = [(_launcher(step, shape), shape) for step in self._steps[: self._first_of_tail]]
            found += [(_launcher(step, few), few) for step in self._tail]
        if not whole:
            for place, launcher in joins.launchers(self._joined, shape, joinable):
                found[place] = launcher, shape
        return found

    def as_run(self, shape: StepShape) -> list[Step]:
        """The plan's steps with the inputs and outputs that they have in a step of that shape."""
        return joins.as_run(self.plan, self._joined, shape, self._joinable(shape))

    def _joinable(self, shape: StepShape) -> int:
        """How many of the plan's steps run for all rows of a step; those after them, for the rows wanted."""
        few = self._tail and shape.tokens - shape.logits_rows >= tail.LEAST
        return self._first_of_tail if few else len(self._steps)

    def _allocate(self, plan: Plan, plugins: list[Plugin], num_blocks: int, device: torch.device) -> None:
        import torch

        top = sizes(plan)
        for buffer in plan.buffers:
            if buffer.kind not in ("activation", "output"):
                continue
            dtype, shape = getattr(torch, buffer.dtype), [top[d] if isinstance(d, str) else d for d in buffer.shape]
            size = math.prod(shape) * dtype.itemsize
            if buffer.offset is None:
                memory = torch.zeros(size, dtype=torch.uint8, device=device)
            else:
                memory = self._arena[buffer.offset : buffer.offset + size]
            self._tensors[buffer.name] = memory.view(dtype).view(shape)
        for name, cache in cache_shapes(plan, plugins, num_blocks).items():
            # Zeros, and only ever finite codes: kernels may read the stale tail of a block under a mask.
            dtype = getattr(torch, plan.buffer(name).dtype)
            memory = torch.zeros(math.prod(cache) * dtype.itemsize, dtype=torch.uint8, device=device)
            self._tensors[name] = memory.view(dtype).view(cache)

    def _further(self, index: int) -> dict[str, Any]:
        """Arguments of a plan step's `bind` that not every plugin takes. A linear layer's first weights would be in the
        way of the last ones of the linear layer before it, and, all at once, of what a norm or attention loads; what
        else comes next is to start at once."""
        plugin = self._plugins[index]
        behind = self._plugins[index + 1 : index + 2]
        further: dict[str, Any] = {"comm": self._comm} if plugin.collective else {}
        if plugin.hands_over:
            further |= {"early": bool(behind) and not behind[0].hands_over, "windowed": True}
        return further

    def _bind(self, index: int, functions: dict[str, Function], named: dict[str, torch.Tensor]) -> Bound:
        step, plugin = self.plan.steps[index], self._plugins[index]
        tensors = [named[name] if name else None for name in (*step.inputs, *step.outputs)]
        rows = self.plan.buffer(step.outputs[0]).shape[0]
        launchers = []
        for choice in step.tactics:
            region = self._workspace[choice.workspace_offset :][: choice.workspace] if choice.workspace else None
            tactic = plugin.tactic(choice.tactic)
            found = [functions[h] for h in choice.kernels]
            launchers.append(plugin.bind(tactic, found, tensors, region, **self._further(index)))
        if not launchers:
            raise EngineError(f"{step.plugin}: {step.name}: the engine holds no tactic for it; build it again")
        ends = [choice.max_tokens for choice in step.tactics]
        return str(rows), ends[:-1], launchers  # the last one takes whatever is larger


def _launcher(bound: Bound, shape: StepShape) -> Launcher:
    rows, ends, launchers = bound
    return launchers[bisect.bisect_left(ends, shape.logits_rows if rows == "L" else shape.tokens)]


def cache_shapes(plan: Plan, plugins: list[Plugin], num_blocks: int) -> dict[str, tuple[int, ...]]:
    """The GPU layout of every KV-cache buffer; the attention plugin that owns the cache says what it is."""
    caches = {b.name for b in kv_buffers(plan)}
    shapes: dict[str, tuple[int, ...]] = {}
    for step, plugin in zip(plan.steps, plugins, strict=True):
        names = [n for n in step.inputs if n in caches]
        if names:
            _, _, kv_heads, head_dim = plan.buffer(names[0]).shape
            pair = plugin.cache_shape(num_blocks, int(kv_heads), int(head_dim), plan.buffer(names[0]).dtype)  # type: ignore[attr-defined]
            shapes.update(zip(names, pair, strict=True))
    return shapes


class Graphs:
    """CUDA graphs of decode steps: one per padded number of rows and bound on the context.

    `enqueue(shape)` must launch everything of a step on the current stream (not the default one), reading and writing
    only fixed buffers, and return one of them.
    """

    def __init__(self, enqueue: Callable[[StepShape], torch.Tensor]) -> None:
        self._enqueue = enqueue
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    def run(self, shape: StepShape) -> torch.Tensor:
        """Replays the graph of `shape`; the first time runs eagerly, which loads the kernels, then captures it."""
        key = (shape.tokens, shape.max_context)
        if key in self._graphs:
            graph, out = self._graphs[key]
            graph.replay()
            return out
        out = self._enqueue(shape)
        self._graphs[key] = self._capture(shape)
        return out

    def _capture(self, shape: StepShape) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        import torch

        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        out = self._enqueue(shape)
        graph.capture_end()
        return graph, out


def row_bucket(rows: int, max_batch_size: int) -> int:
    """1, 2, 4, 8, then multiples of 8 (16 from 64 on, 32 from 256 on): padding costs a few rows of every GEMM."""
    unit = 1 << (rows - 1).bit_length() if rows <= 8 else 8 if rows <= 64 else 16 if rows <= 256 else 32
    return min(-(-rows // unit) * unit, max_batch_size)


def context_bucket(context: int, max_seq_len: int) -> int:
    """512 and its multiples by powers of four: a graph fixes how many blocks the decode attention has at hand."""
    bits = (context - 1).bit_length()
    return min(max(512, 1 << (bits + 1 - bits % 2)), max_seq_len)
