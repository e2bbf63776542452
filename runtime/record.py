"""What a step's buffers held: records of an eager run, and debug dumps as safetensors files.

A buffer shares its memory with others, so it is copied right after the plan step that writes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fp8.builder.engine import EngineError, Plan, unwritable, write_atomically
from fp8.plugins.base import StepShape
from fp8.runtime.step_inputs import StepInputs

if TYPE_CHECKING:
    import torch

E4M3 = "float8_e4m3fn"
LINEARS = ("gemm", "gemm_send", "gemm_swiglu")  # plugins with inputs x, w, x_scale, ...: they alone read codes


class Recorded(NamedTuple):
    """A buffer's live rows; `scale` f32 [1] or one per row, where `raw` are e4m3 codes."""

    raw: torch.Tensor
    scale: torch.Tensor | None

    @property
    def value(self) -> torch.Tensor:
        """raw * scale, f32."""
        return self.raw.float() if self.scale is None else self.raw.float() * self.scale.reshape(-1, 1)

    def columns(self, begin: int, end: int) -> Recorded:
        return Recorded(self.raw[:, begin:end].contiguous(), self.scale)


def scale_names(plan: Plan) -> dict[str, str]:
    """Per buffer of e4m3 activations, the buffer or weight that holds its scale: what its readers multiply by."""
    scales = {}
    for step in plan.steps:
        if step.plugin in LINEARS and plan.buffer(step.inputs[0]).dtype == E4M3:
            scales[step.inputs[0]] = step.inputs[2]
    return scales


class Recorder:
    """Keeps host copies of the buffers that `wanted` accepts, for one step; set as `Session.recorder`."""

    def __init__(
        self, plan: Plan, weight: Callable[[str], torch.Tensor], wanted: Callable[[str], bool] = lambda name: True
    ) -> None:
        self.plan = plan
        self._weight = weight
        self._scales = scale_names(plan)
        scales = {self._scales[n] for n in self._scales if wanted(n)}
        self._wanted = lambda name: name in scales or wanted(name)
        self._held: dict[str, torch.Tensor] = {}
        self.input_ids: torch.Tensor
        self.position_ids: torch.Tensor

    def begin(self, shape: StepShape, inputs: StepInputs) -> None:
        self._held = {}
        self.input_ids = inputs.input_ids[: shape.tokens].cpu().clone()
        self.position_ids = inputs.device["position_ids"][: shape.tokens].cpu().clone()

    def observe(self, name: str, rows: torch.Tensor) -> None:
        if self._wanted(name):
            self._held[name] = rows.detach().cpu().clone()

    def end(self) -> None:
        """After the step; a subclass does something with `buffers`."""

    def get(self, name: str) -> Recorded:
        scale = self._scales.get(name)
        if scale is None:
            return Recorded(self._held[name], None)
        stored = self._held[scale] if scale in self._held else self._weight(scale).cpu()
        return Recorded(self._held[name], stored)

    def buffers(self) -> Iterator[tuple[str, Recorded]]:
        """Buffers in the order of execution; the residual sum of a norm comes before what is made of it."""
        order = (name for step in self.plan.steps for name in reversed(step.outputs))
        return ((name, self.get(name)) for name in order if name in self._held)


class Dump(Recorder):
    """Writes `step_<n>.safetensors` per step: for each tap `<name>` raw, `<name>.scale` (e4m3 only) and
    `<name>.dequantized` f32, beside the step's `input_ids` and `position_ids`. Raises EngineError for an engine without
    taps."""

    def __init__(self, plan: Plan, weight: Callable[[str], torch.Tensor], directory: Path) -> None:
        if not plan.taps:
            raise EngineError(
                "the engine has no debug tensors; build it with --enable_debug_output --debug_tensors GLOB, "
                "such as 'model.layers.*.mlp.*'"
            )
        super().__init__(plan, weight, {tap.buffer for tap in plan.taps}.__contains__)
        self.directory = directory
        self.steps = 0
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EngineError(unwritable(directory, error)) from error

    def end(self) -> None:
        from safetensors.torch import save

        tensors = {"input_ids": self.input_ids, "position_ids": self.position_ids}
        for tap in self.plan.taps:
            found = self.get(tap.buffer)
            if tap.columns:
                found = found.columns(*tap.columns)
            tensors[tap.name] = found.raw
            tensors[f"{tap.name}.dequantized"] = found.value
            if found.scale is not None:
                tensors[f"{tap.name}.scale"] = found.scale
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # no two names share memory in the file
        facts = {"step": str(self.steps), "buffers": json.dumps({t.name: t.buffer for t in self.plan.taps})}
        path = self.directory / f"step_{self.steps:06d}.safetensors"
        try:
            write_atomically(path, [save(tensors, facts)])
        except OSError as error:
            raise EngineError(unwritable(path, error)) from error
        self.steps += 1
