"""The next token of each row of logits, chosen where the logits are, by the sampling plugin."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fp8.builder.engine import Engine, EngineError
from fp8.plugins.base import Plugin, StepShape, Tensor, load
from fp8.runtime.step_inputs import StepInputs

if TYPE_CHECKING:
    import torch

Sampler = Callable[[StepShape, "torch.Tensor"], "torch.Tensor"]  # (shape, logits [L, V]) -> tokens int32 [L]


def reference_sampler(inputs: StepInputs) -> Sampler:
    """Samples with the plugin's torch reference."""
    plugin, fields = load("sampling")(), inputs.device

    def sample(shape: StepShape, logits: torch.Tensor) -> torch.Tensor:
        rows = shape.logits_rows
        (tokens,) = plugin.reference(
            logits, *(fields[name][:rows] for name in ("temperature", "seed", "counter")), step=shape
        )
        return tokens

    return sample


def compiled_sampler(engine: Engine, inputs: StepInputs, logits: torch.Tensor) -> Sampler:
    """Binds the engine's sampling kernel to the buffer `logits` f32 [L, V] and to the step's inputs."""
    import torch

    from fp8.plugins.cuda import Module

    plugin, rows = load("sampling")(), logits.shape[0]
    kinds = {"temperature": "float32", "seed": "int64", "counter": "int32"}
    types = [Tensor("float32", ("L", logits.shape[1])), *(Tensor(dtype, ("L",)) for dtype in kinds.values())]
    tactic, hashes = _embedded(engine, plugin, types, rows)
    functions = [Module(engine.cubins[h]).function(str(engine.plan.kernels[h]["entry"])) for h in hashes]
    workspace = torch.zeros(plugin.workspace(tactic, types, rows, rows), dtype=torch.uint8, device=logits.device)
    tokens = torch.zeros(rows, dtype=torch.int32, device=logits.device)
    launch = plugin.bind(tactic, functions, [logits, *(inputs.device[name] for name in kinds), tokens], workspace)

    def sample(shape: StepShape, _: torch.Tensor) -> torch.Tensor:
        launch(shape)
        return tokens[: shape.logits_rows]

    return sample


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
    raise EngineError(f"{engine.directory} holds no sampling kernel of this package's; build it again")
