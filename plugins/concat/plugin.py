"""concat: the outputs of two or three linears side by side, for the readers of [q | k | v] or [gate | up].

It is needed only where a group of linears is of several kinds (one of them excluded from quantization): linears of one
kind are merged and write their common output themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fp8.plugins.base import Kernel, Launcher, OneTactic, PluginError, StepShape, Tensor, Threads
from fp8.plugins.quantize.types import DTYPES, VECTOR, check_rows, check_tensor

if TYPE_CHECKING:
    import torch

    from fp8.plugins.cuda import Function

INPUTS = 3


@dataclass(frozen=True)
class Concat(OneTactic):
    """a DT [T, A], b DT [T, B], c DT [T, C]? -> y DT [T, A + B + C], a copy."""

    name: ClassVar[str] = "concat"

    def infer(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        a = check_tensor("a", inputs[0], DTYPES, (None, None))
        others = [check_tensor("b", inputs[1], (a.dtype,), (a.shape[0], None))]
        if len(inputs) == INPUTS and inputs[2] is not None:
            others.append(check_tensor("c", inputs[2], (a.dtype,), (a.shape[0], None)))
        return (Tensor(a.dtype, (a.shape[0], sum(_width(t) for t in (a, *others)))),)

    def reference(self, *inputs: torch.Tensor | None, step: object) -> tuple[torch.Tensor, ...]:
        import torch

        return (torch.cat([t for t in inputs if t is not None], 1),)

    def check(self, inputs: Sequence[Tensor | None]) -> None:
        super().check(inputs)
        for name, tensor in zip("abc", inputs, strict=False):
            if tensor is not None:
                check_rows(f"the width of {name}", tensor.dtype, tensor.shape[1], 1 << 20)

    def kernels(self, tactic: Threads, inputs: Sequence[Tensor | None]) -> tuple[Kernel, ...]:
        widths = [_width(t) if t is not None else 0 for t in (*inputs, None)[:INPUTS]]
        constants = (*zip(("A", "B", "C"), widths, strict=True), ("THREADS", tactic.threads))
        return (Kernel("concat", "concat.cu", "concat", constants),)

    def bind(
        self,
        tactic: Threads,
        functions: Sequence[Function],
        tensors: Sequence[torch.Tensor | None],
        workspace: torch.Tensor | None,
    ) -> Launcher:
        from fp8.plugins.cuda import Launch

        *parts, y = tensors
        assert y is not None
        launch = Launch(functions[0], tactic.threads, [*(*parts, None)[:INPUTS], y])
        blocks = -(-y.shape[1] // (VECTOR * tactic.threads))

        def run(step: StepShape) -> None:
            if step.tokens:
                launch((step.tokens, blocks, 1))

        return run


def _width(tensor: Tensor) -> int:
    width = tensor.shape[1]
    if not isinstance(width, int):
        raise PluginError(f"a part has {width} columns, expected a known number")
    return width
