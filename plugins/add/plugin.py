"""add: a residual sum with no norm after it, as at the end of a pipeline stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fp8.plugins.base import Kernel, Launcher, Plugin, Tensor
from fp8.plugins.quantize.launch import DTYPE_CODES, RowTactic, row_launch, row_parts
from fp8.plugins.quantize.types import DTYPES, VECTOR, check_rows, check_tensor

if TYPE_CHECKING:
    import torch

    from fp8.plugins.cuda import Function


@dataclass(frozen=True)
class Add(Plugin):
    """a DT [T, H], b DT [T, H] -> y DT [T, H], added in float32 and rounded once."""

    name: ClassVar[str] = "add"

    def infer(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        a = check_tensor("a", inputs[0], DTYPES, (None, None))
        return (check_tensor("b", inputs[1], (a.dtype,), a.shape),)

    def reference(self, *inputs: torch.Tensor | None, step: object) -> tuple[torch.Tensor, ...]:
        a, b = inputs
        assert a is not None and b is not None
        return ((a.float() + b.float()).to(a.dtype),)

    def check(self, inputs: Sequence[Tensor | None]) -> None:
        (y,) = self.infer(inputs)
        check_rows("H", y.dtype, y.shape[1], 65536)

    def tactics(self, inputs: Sequence[Tensor | None], tokens: int) -> list[RowTactic]:
        self.check(inputs)
        return row_parts(inputs[0].shape[1], 1)[:1]

    def tactic(self, fields: dict[str, Any]) -> RowTactic:
        return RowTactic(**fields)

    def kernels(self, tactic: RowTactic, inputs: Sequence[Tensor | None]) -> tuple[Kernel, ...]:
        a = inputs[0]
        constants = (("WIDTH", a.shape[1]), ("THREADS", tactic.threads), ("DTYPE", DTYPE_CODES[a.dtype]))
        return (Kernel("add", "add.cu", "add", constants),)

    def bind(
        self,
        tactic: RowTactic,
        functions: Sequence[Function],
        tensors: Sequence[torch.Tensor | None],
        workspace: torch.Tensor | None,
    ) -> Launcher:
        parts = -(-tensors[0].shape[1] // (VECTOR * tactic.threads))
        return row_launch(functions[0], tactic.threads, tensors, lambda step: step.tokens, parts)
