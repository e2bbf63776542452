"""The end of a step: the next token of each row of logits, chosen where the logits are, and the next step's inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fp8.builder.engine import Engine, EngineError
from fp8.plugins.base import Launcher, Plugin, StepShape, Tensor, load
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


def _bound(engine: Engine, name: str, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> Launcher:
    """The launch of a plugin whose kernels the engine holds; the first input says how many rows there may be."""
    import torch

    from fp8.plugins.cuda import Module

    plugin, rows = load(name)(), len(inputs[0])
    types = [Tensor(str(t.dtype).removeprefix("torch."), ("L", *t.shape[1:])) for t in inputs]
    tactic, hashes = _embedded(engine, plugin, types, rows)
    functions = [Module(engine.cubins[h]).function(str(engine.plan.kernels[h]["entry"])) for h in hashes]
    size = plugin.workspace(tactic, types, rows, rows)
    workspace = torch.zeros(size, dtype=torch.uint8, device=inputs[0].device)
    return plugin.bind(tactic, functions, [*inputs, *outputs], workspace)


def _embedded(engine: Engine, plugin: Plugin, types: list[Tensor], rows: int) -> tuple[Any, list[str]]:
    """The tactic whose kernels the engine holds, and their hashes."""
    held = {
        (f["plugin"], f["source"], f["entry"], tuple(sorted(f["constants"].items()))): h
        for h, f in engine.plan.kernels.items()
    }
    for tactic in plugin.tactics(types, rows):
        kernels = plugin.kernels(tactic, types)
        hashes = [held.get((k.plugin, k.source, k.entry, tuple(sorted(k.constants)))) for k in kernels]
        if all(hashes):
            return tactic, [h for h in hashes if h]
    raise EngineError(f"{engine.directory} holds no {plugin.name} kernel of this package's; build it again")
