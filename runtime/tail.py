"""What comes after the last attention of a plan needs the rows whose logits are wanted, and no others.

The other rows of a step are prompts' tokens, of which later ones ask for K and V alone. So most of a prompt is spared
the linear layers after the last attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fp8.builder.engine import Plan

if TYPE_CHECKING:
    import torch

ROWWISE = {"gemm", "gemm_swiglu", "norm_quant", "quantize", "act_quant", "add"}  # a row of the result is of a row's
INDICES = "logits_indices"
LEAST = 256  # rows that are worth to be left out: the copies and their launches take some microseconds


@dataclass(frozen=True)
class Tail:
    """Steps from `first` on, and the activations [T, ...] that they take over from the steps before."""

    first: int
    carried: tuple[str, ...]


def find(plan: Plan) -> Tail | None:
    """The tail of a plan; None if it has none: a pipeline stage without logits, steps that look at more than a row."""
    last = max((i for i, step in enumerate(plan.steps) if step.plugin == "attention"), default=len(plan.steps))
    before, behind = plan.steps[: last + 1], plan.steps[last + 1 :]
    written = {name for step in before for name in step.outputs}
    reads = {name for step in behind for name in step.inputs if name}
    carried = sorted(name for name in reads & written if plan.buffer(name).shape[:1] == ("T",))
    inputs = {name for name in reads if plan.buffer(name).kind == "input"}
    output = next(b for b in plan.buffers if b.kind == "output")
    rowwise = all(step.plugin in ROWWISE for step in behind) and reads & written == set(carried)
    if not carried or not rowwise or output.shape[0] != "L" or not inputs <= {INDICES}:
        return None
    return Tail(last + 1, tuple(carried))


class Rows:
    """The rows that the tail goes on with: places for them, and how they get there."""

    def __init__(self, tail: Tail, tensors: dict[str, torch.Tensor]) -> None:
        """`tensors`: those of the whole step, by name."""
        import torch

        self._indices = tensors[INDICES]
        self._pairs, self.tensors = [], dict(tensors)
        most = len(self._indices)
        for name in tail.carried:
            whole = tensors[name]
            self.tensors[name] = whole.new_empty((most, *whole.shape[1:]))
            self._pairs.append((_words(whole), _words(self.tensors[name])))
        self.tensors[INDICES] = torch.arange(most, dtype=torch.int32, device=self._indices.device)

    def gather(self, rows: int) -> None:
        """Enqueues the copy of the first `rows` rows wanted."""
        import torch

        if not rows:
            return
        for whole, wanted in self._pairs:
            torch.index_select(whole, 0, self._indices[:rows], out=wanted[:rows])


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as integers, since not every type can be copied by index."""
    import torch

    size = tensor[0].nbytes
    return tensor.flatten(1).view(torch.int32 if size % 4 == 0 else torch.uint8)
