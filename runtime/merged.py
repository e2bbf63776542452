"""One launch in place of many of a plan's steps, for steps of one token (`engine.Merged`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fp8.builder.engine import Plan, Step
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

    @property
    def facts(self) -> str:
        """What the ranks of a stage have to agree on, as their blocks wait for each other's."""
        return f"{self.first} {self.count} {self.max_context}"

    def fits(self, shape: StepShape) -> bool:
        return shape.tokens == shape.decode_sequences == 1 and shape.max_context <= self.max_context


def bind(
    plan: Plan,
    functions: dict[str, Function],
    tensors: dict[str, torch.Tensor],
    workspace: torch.Tensor,
    comm: Any = None,
) -> Bound | None:
    """None without one, and where the GPU has no multiprocessor for each of its blocks: they wait for each other, and
    for those of the other ranks of `comm`, the GPU's communicator, in memory that the ranks share or there is none."""
    found = plan.merged
    if found is None or not _fits(found.step, workspace.device, comm):
        return None
    step, plugin = found.step, load(found.step.plugin)(**found.step.attributes)
    further = {"comm": comm} if plugin.collective else {}
    (choice,) = step.tactics
    bound = [tensors[name] if name else None for name in (*step.inputs, *step.outputs)]
    region = workspace[choice.workspace_offset :][: choice.workspace]
    kernels = [functions[h] for h in choice.kernels]
    launcher = plugin.bind(plugin.tactic(choice.tactic), kernels, bound, region, **further)
    return Bound(found.first, found.count, found.max_context, launcher)


def _fits(step: Step, device: torch.device, comm: Any) -> bool:
    import torch

    plugin: Any = load(step.plugin)
    if plugin.collective and (comm is None or comm.regions is None):
        return False
    return torch.cuda.get_device_properties(device).multi_processor_count >= plugin.grid
