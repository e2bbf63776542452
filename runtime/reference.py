"""Runs a plan through the plugins' torch references, on a CPU: any engine, no kernels, the same numbers to rounding."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from fp8.builder.engine import Buffer, Engine, EngineError, Plan, Step
from fp8.plugins.base import Communicator, Plugin, StepShape, load, run_reference
from fp8.runtime.step_inputs import StepInputs

if TYPE_CHECKING:
    import torch

MakeWeight = Callable[[Buffer, "torch.device"], "torch.Tensor"]  # a weight that a hollow engine's file leaves out
Observer = Callable[[str, "torch.Tensor"], None]  # a buffer's name and its live rows, right after they were written


def load_plugins(plan: Plan) -> list[Plugin]:
    """The plugin of every step, with its attributes."""
    return [load(step.plugin)(**step.attributes) for step in plan.steps]


def kv_buffers(plan: Plan) -> list[Buffer]:
    return [b for b in plan.buffers if b.kind == "kv_cache"]


def kv_block_bytes(plan: Plan) -> int:
    """Bytes of one block of 64 tokens, all layers, keys and values."""
    import torch

    return sum(math.prod(map(int, b.shape[1:])) * getattr(torch, b.dtype).itemsize for b in kv_buffers(plan))


class ReferenceExecutor:
    """Weights mapped from the engine's file, caches as [num_blocks, 64, KVH, D]. `comm` are the ranks that share the
    layers, None for one rank."""

    def __init__(
        self,
        engine: Engine,
        inputs: StepInputs,
        num_blocks: int,
        comm: Communicator | None = None,
        make: MakeWeight | None = None,
    ) -> None:
        import torch

        self._comm = comm
        self._plan = engine.plan
        self._plugins = load_plugins(engine.plan)
        self._inputs = inputs
        self._constants = map_weights(engine, make)
        for buffer in kv_buffers(engine.plan):
            shape, dtype = (num_blocks, *map(int, buffer.shape[1:])), getattr(torch, buffer.dtype)
            nothing = torch.zeros(
                math.prod(shape) * dtype.itemsize, dtype=torch.uint8
            )  # bytes: untouched pages cost nothing
            self._constants[buffer.name] = nothing.view(dtype).view(shape)
        self._result = next(b.name for b in engine.plan.buffers if b.kind == "output")
        self._dead_after = _dead_after(engine.plan)

    def run(
        self, shape: StepShape, observe: Observer | None = None, hidden_states: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The step whose inputs lie in the input buffer: logits f32 [L, V], or what the next pipeline stage takes as
        `hidden_states` DT [T, H]."""
        values = {**self._constants, **self._live_inputs(shape)}
        if hidden_states is not None:
            values["hidden_states"] = hidden_states
        for step, plugin, dead in zip(self._plan.steps, self._plugins, self._dead_after, strict=True):
            tensors = [values[name] if name else None for name in step.inputs]
            out = run_reference(plugin, tensors, shape, self._comm)
            values.update((name, t) for name, t in zip(step.outputs, out, strict=True) if name)
            if observe:
                for name in filter(None, step.outputs):
                    observe(name, values[name])
            for name in dead:
                del values[name]
        return values[self._result]

    def time_launches(self, shape: StepShape, repeats: int) -> list[float]:
        """Seconds of every plan step, the median of `repeats` passes."""
        passes = []
        for _ in range(repeats):
            ends: dict[str, float] = {"": time.perf_counter()}
            self.run(shape, lambda name, _, ends=ends: ends.setdefault(name, time.perf_counter()))  # type: ignore[misc]
            times = [ends[""], *(ends[step.outputs[0]] for step in self._plan.steps)]
            passes.append([b - a for a, b in itertools.pairwise(times)])
        return [statistics.median(times) for times in zip(*passes, strict=True)]

    def shapes(self, shape: StepShape) -> list[StepShape]:
        """What every plan step is run for."""
        return [shape] * len(self._plan.steps)

    def as_run(self, shape: StepShape) -> list[Step]:
        """The plan's steps."""
        return list(self._plan.steps)

    def weight(self, name: str) -> torch.Tensor:
        return self._constants[name]

    def _live_inputs(self, shape: StepShape) -> dict[str, torch.Tensor]:
        views = self._inputs.device
        live = {name: views[name][: shape.tokens] for name in ("position_ids", "slot_mapping")}
        live["input_ids"] = self._inputs.input_ids[: shape.tokens]
        live["query_start"] = views["query_start"][: shape.sequences + 1]
        live |= {name: views[name][: shape.sequences] for name in ("sequence_lengths", "block_tables")}
        live["logits_indices"] = views["logits_indices"][: shape.logits_rows]
        return live


def map_weights(engine: Engine, make: MakeWeight | None = None) -> dict[str, torch.Tensor]:
    """The weights as views of the mapped file; what it lacks `make` makes. Raises EngineError where the file does not
    hold what the plan wants."""
    import torch
    from safetensors import safe_open

    weights = {}
    with safe_open(engine.weights_path, framework="pt") as file:
        found = set(file.keys())
        for buffer in engine.plan.buffers:
            if buffer.kind != "weight":
                continue
            if buffer.name not in found:
                if make is None:
                    raise missing(engine, buffer)
                weights[buffer.name] = make(buffer, torch.device("cpu"))
                continue
            weight = weights[buffer.name] = file.get_tensor(buffer.name)
            check_weight(engine, buffer, str(weight.dtype).removeprefix("torch."), tuple(weight.shape))
    return weights


def missing(engine: Engine, buffer: Buffer) -> EngineError:
    return EngineError(
        f"{engine.weights_path}: {buffer.name} is missing; build the engine again (fp8-bench alone runs one that "
        f"python -m fp8.scripts.random_engine built without its matrices)"
    )


def check_weight(engine: Engine, buffer: Buffer, dtype: str, shape: tuple[int, ...]) -> None:
    if (dtype, shape) != (buffer.dtype, tuple(buffer.shape)):
        raise EngineError(
            f"{engine.weights_path}: {buffer.name} is {dtype} {list(shape)}, the plan wants {buffer.dtype} "
            f"{list(buffer.shape)}; build the engine again"
        )


def _dead_after(plan: Plan) -> list[list[str]]:
    """Per step, the activations that no later step reads (memory stays near that of one layer)."""
    last: dict[str, int] = {}
    for i, step in enumerate(plan.steps):
        for name in (*step.inputs, *step.outputs):
            if name and plan.buffer(name).kind == "activation":
                last[name] = i
    dead: list[list[str]] = [[] for _ in plan.steps]
    for name, i in last.items():
        dead[i].append(name)
    return dead
