"""Where the plan says so, a linear layer also does a part of what comes after it: the first part of attention in steps
with prompts, the addition of a norm's residual in steps of many rows."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fp8.builder.engine import Plan, Step
from fp8.plugins.base import Launcher, Plugin, StepShape

if TYPE_CHECKING:
    import torch

    from fp8.plugins.cuda import Function


@dataclass(frozen=True)
class Joined:
    """Launches in place of two of the plan's steps, a linear layer and what comes after it. The linear's by its ranges
    of rows, which end at `ends`: None where the two stay apart. `prompts`: for steps with prompts alone."""

    linear: int
    second: int
    ends: list[int]
    fronts: Sequence[Launcher | None]
    behind: Launcher
    prompts: bool = True


def bind(
    plan: Plan,
    plugins: Sequence[Plugin],
    functions: dict[str, Function],
    tensors: dict[str, torch.Tensor],
    workspace: torch.Tensor,
) -> list[Joined]:
    """Binds all pairs that the plan joins, over an executor's buffers."""

    def of(step: Step) -> list[torch.Tensor | None]:
        return [tensors[name] if name else None for name in (*step.inputs, *step.outputs)]

    found = []

    def choices(place: int, kernels: Sequence[str]) -> list[tuple[Any, Function | None]]:
        return [
            (plugins[place].tactic(c.tactic), functions[h] if h else None)
            for c, h in zip(plan.steps[place].tactics, kernels, strict=True)
        ]

    def ends(place: int) -> list[int]:
        return [c.max_tokens for c in plan.steps[place].tactics][:-1]

    for join in plan.joins:
        front, behind = plan.steps[join.linear], plan.steps[join.attention]
        (choice,) = behind.tactics  # attention has one for all sizes
        linear, attention = plugins[join.linear], plugins[join.attention]
        region = workspace[choice.workspace_offset :][: choice.workspace]
        fronts, rest = attention.bind_joined(  # type: ignore[attr-defined]
            attention.tactic(choice.tactic), [functions[h] for h in choice.kernels], of(behind), region,
            linear, choices(join.linear, join.kernels), of(front),
        )  # fmt: skip
        found.append(Joined(join.linear, join.attention, ends(join.linear), fronts, rest))
    for one in plan.sums:
        norm, behind = plugins[one.norm], plan.steps[one.norm]
        fronts, rest = norm.bind_summed(  # type: ignore[attr-defined]
            norm.tactic(one.behind.tactic), [functions[h] for h in one.behind.kernels], of(behind),
            plugins[one.linear], choices(one.linear, one.kernels), of(plan.steps[one.linear]),
        )  # fmt: skip
        found.append(Joined(one.linear, one.norm, ends(one.linear), fronts, rest, prompts=False))
    return found


def launchers(found: Sequence[Joined], shape: StepShape, count: int) -> Iterator[tuple[int, Launcher]]:
    """Places among the first `count` of the plan's steps, and what to launch there for a step of that shape. Steps
    without prompts are padded with rows of no sequence, and stay as they are where that counts."""
    mixed = shape.sequences > shape.decode_sequences
    for join in found:
        front = join.fronts[bisect.bisect_left(join.ends, shape.tokens)]
        if front is not None and join.second < count and (mixed or not join.prompts):
            yield join.linear, front
            yield join.second, join.behind


def as_run(plan: Plan, found: Sequence[Joined], shape: StepShape, count: int) -> list[Step]:
    """The plan's steps with the inputs and outputs that they have in a step of that shape, for who counts the bytes."""
    steps = list(plan.steps)
    places = {place for place, _ in launchers(found, shape, count)}
    for one in plan.sums:
        linear, norm = steps[one.linear], steps[one.norm]
        if one.linear in places:
            total, y = norm.outputs[-1], linear.outputs[0]
            residual = next(name for name in norm.inputs if name != y)
            steps[one.linear] = replace(linear, inputs=(*linear.inputs, residual), outputs=(total,))
            steps[one.norm] = replace(norm, inputs=(total, *norm.inputs[2:]), outputs=norm.outputs[:-1])
    return steps
