"""The next token of each row of logits, chosen where the logits are, by the sampling plugin."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fp8.builder.engine import Engine
from fp8.plugins.base import StepShape, Tensor, load
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
    """Binds the plugin's kernels to the buffer `logits` f32 [L, V] and to the step's inputs."""
    import torch

    from fp8.plugins.compile import compile_all, key
    from fp8.plugins.cuda import Module

    plugin, rows = load("sampling")(), logits.shape[0]
    types = [
        Tensor("float32", ("L", logits.shape[1])),
        Tensor("float32", ("L",)),
        Tensor("int64", ("L",)),
        Tensor("int32", ("L",)),
    ]
    tactic = plugin.tactics(types, rows)[0]
    kernels = plugin.kernels(tactic, types)
    cubins = compile_all(kernels)
    functions = [Module(cubins[key(kernel)].code).function(kernel.entry) for kernel in kernels]
    size = plugin.workspace(tactic, types, rows, rows)
    workspace = torch.zeros(size, dtype=torch.uint8, device=logits.device) if size else None
    tokens = torch.zeros(rows, dtype=torch.int32, device=logits.device)
    fields = inputs.device
    launch = plugin.bind(
        tactic, functions, [logits, fields["temperature"], fields["seed"], fields["counter"], tokens], workspace
    )

    def sample(shape: StepShape, _: torch.Tensor) -> torch.Tensor:
        launch(shape)
        return tokens[: shape.logits_rows]

    return sample
