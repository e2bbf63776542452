"""Steps with prompts run the first part of attention in the linear layer in front, where the plan joins the two."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fp8.builder.engine import Plan, Step
from fp8.plugins.base import Launcher, Plugin, StepShape

if TYPE_CHECKING:
    import torch

    from fp8.plugins.cuda import Function


@dataclass(frozen=True)
class Joined:
    """Launches in place of two of the plan's steps. The linear's by its ranges of rows, which end at `ends`: None where
    the two stay apart."""

    linear: int
    attention: int
    ends: list[int]
    fronts: Sequence[Launcher | None]
    behind: Launcher


def bind(
    plan: Plan,
    plugins: Sequence[Plugin],
    functions: dict[str, Function],
    tensors: dict[str, torch.Tensor],
    workspace: torch.Tensor,
) -> list[Joined]:
    """Of all that the plan joins, over an executor's buffers."""

    def of(step: Step) -> list[torch.Tensor | None]:
        return [tensors[name] if name else None for name in (*step.inputs, *step.outputs)]

    found = []
    for join in plan.joins:
        front, behind = plan.steps[join.linear], plan.steps[join.attention]
        (choice,) = behind.tactics  # attention has one for all sizes
        linear, attention = plugins[join.linear], plugins[join.attention]
        region = workspace[choice.workspace_offset :][: choice.workspace]
        choices = [
            (linear.tactic(c.tactic), functions[h] if h else None)
            for c, h in zip(front.tactics, join.kernels, strict=True)
        ]
        fronts, rest = attention.bind_joined(  # type: ignore[attr-defined]
            attention.tactic(choice.tactic), [functions[h] for h in choice.kernels], of(behind), region,
            linear, choices, of(front),
        )  # fmt: skip
        ends = [c.max_tokens for c in front.tactics][:-1]
        found.append(Joined(join.linear, join.attention, ends, fronts, rest))
    return found


def launchers(found: Sequence[Joined], shape: StepShape) -> Iterator[tuple[int, Launcher]]:
    """Places among the plan's steps, and what to launch there for a step of that shape. Steps without prompts are
    padded with rows of no sequence, and stay as they are."""
    if shape.sequences == shape.decode_sequences:
        return
    for join in found:
        front = join.fronts[bisect.bisect_left(join.ends, shape.tokens)]
        if front is not None:
            yield join.linear, front
            yield join.attention, join.behind
