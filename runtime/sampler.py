"""A step's two ends: its inputs, and the next token of each row of logits, chosen where the logits are, from which come
the next step's inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fp8.builder.engine import Engine
from fp8.plugins.base import Launcher, StepShape, Tensor, load, types_of
from fp8.runtime.embedded import embedded
from fp8.runtime.step_inputs import StepInputs

if TYPE_CHECKING:
    import torch

Sampler = Callable[[StepShape, "torch.Tensor"], "torch.Tensor"]  # (shape, logits [L, V]) -> tokens int32 [L]
DRAWN_BY = ("temperature", "seed", "counter")  # inputs of the sampling plugin


def reference_sampler(inputs: StepInputs) -> Sampler:
    """Samples and advances the inputs with the plugins' torch references."""
    sampling, advance, fields = load("sampling")(), load("advance")(), inputs.device

    def sample(shape: StepShape, logits: torch.Tensor) -> torch.Tensor:
        rows = shape.logits_rows
        (tokens,) = sampling.reference(logits, *(fields[name][:rows] for name in DRAWN_BY), step=shape)
        advance.reference(tokens, *inputs.to_advance, step=shape)
        return tokens

    return sample


def compiled_sampler(engine: Engine, inputs: StepInputs, logits: torch.Tensor) -> Sampler:
    """Binds the engine's kernels to the buffer `logits` f32 [L, V] and to the step's inputs."""
    import torch

    rows = logits.shape[0]
    tokens = torch.zeros(rows, dtype=torch.int32, device=logits.device)
    drawn_by = [inputs.device[name] for name in DRAWN_BY]
    draw = _bound(engine, "sampling", [logits, *drawn_by], [tokens])
    advance = _bound(engine, "advance", [tokens, *inputs.to_advance], [])

    def sample(shape: StepShape, _: torch.Tensor) -> torch.Tensor:
        draw(shape)
        advance(shape)
        return tokens[: shape.logits_rows]

    return sample


def compiled_fetch(engine: Engine, inputs: StepInputs) -> Launcher:
    """Binds what brings a step's inputs from the host: the steps' staging buffers in turn."""
    plugin, tensors = load("fetch")(), inputs.to_fetch
    tactic, functions = embedded(engine, plugin, types_of(tensors), engine.plan.limits.max_num_tokens)
    return plugin.bind(tactic, functions, tensors, None)


def _bound(engine: Engine, name: str, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> Launcher:
    """The launch of a plugin whose kernels the engine holds; the first input says how many rows there may be."""
    import torch

    plugin, rows = load(name)(), len(inputs[0])
    types = [Tensor(str(t.dtype).removeprefix("torch."), ("L", *t.shape[1:])) for t in inputs]
    tactic, functions = embedded(engine, plugin, types, rows)
    size = plugin.workspace(tactic, types, rows, rows)
    workspace = torch.zeros(size, dtype=torch.uint8, device=inputs[0].device)
    return plugin.bind(tactic, functions, [*inputs, *outputs], workspace)
