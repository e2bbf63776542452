"""One launch in place of many of a plan's steps, for steps of one token (`engine.Merged`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fp8.builder.engine import Plan
from fp8.plugins.base import Launcher, StepShape, load

if TYPE_CHECKING:
    import torch

    from fp8.plugins.cuda import Function


@dataclass(frozen=True)
class Bound:
    """It stands for `count` steps from `first` on."""

    first: int
    count: int
    max_context: int
    launcher: Launcher

    def fits(self, shape: StepShape) -> bool:
        return shape.tokens == shape.decode_sequences == 1 and shape.max_context <= self.max_context


def bind(
    plan: Plan, functions: dict[str, Function], tensors: dict[str, torch.Tensor], workspace: torch.Tensor
) -> Bound | None:
    """None without one, and where the GPU has no multiprocessor for each of its blocks: they wait for each other."""
    import torch

    found = plan.merged
    if found is None:
        return None
    step, plugin = found.step, load(found.step.plugin)(**found.step.attributes)
    multiprocessors = torch.cuda.get_device_properties(workspace.device).multi_processor_count
    if multiprocessors < plugin.grid:  # type: ignore[attr-defined]
        return None
    (choice,) = step.tactics
    bound = [tensors[name] if name else None for name in (*step.inputs, *step.outputs)]
    region = workspace[choice.workspace_offset :][: choice.workspace]
    kernels = [functions[h] for h in choice.kernels]
    launcher = plugin.bind(plugin.tactic(choice.tactic), kernels, bound, region)
    return Bound(found.first, found.count, found.max_context, launcher)
