"""embedding: the rows of a table that the token ids name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fp8.plugins.base import Kernel, Launcher, Plugin, Tensor
from fp8.plugins.quantize.launch import RowTactic, row_launch, row_parts
from fp8.plugins.quantize.types import DTYPES, VECTOR, check_rows, check_tensor

if TYPE_CHECKING:
    import torch

    from fp8.plugins.cuda import Function


@dataclass(frozen=True)
class Embedding(Plugin):
    """input_ids int32 [T], table DT [V, H] -> y DT [T, H]. An id outside [0, V), as in padding, gives zeros."""

    name: ClassVar[str] = "embedding"

    def infer(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        input_ids = check_tensor("input_ids", inputs[0], ("int32",), (None,))
        table = check_tensor("table", inputs[1], DTYPES, (None, None))
        return (Tensor(table.dtype, (input_ids.shape[0], table.shape[1])),)

    def reference(self, *inputs: torch.Tensor | None, step: object) -> tuple[torch.Tensor, ...]:
        from fp8.plugins.embedding.reference import embedding

        input_ids, table = inputs
        assert input_ids is not None and table is not None
        return (embedding(input_ids, table),)

    def check(self, inputs: Sequence[Tensor | None]) -> None:
        self.infer(inputs)
        table = inputs[1]
        assert table is not None
        check_rows("H", table.dtype, table.shape[1], 65536)

    def tactics(self, inputs: Sequence[Tensor | None], tokens: int) -> list[RowTactic]:
        self.check(inputs)
        return row_parts(inputs[1].shape[1], 1)[:1]

    def tactic(self, fields: dict[str, Any]) -> RowTactic:
        return RowTactic(**fields)

    def kernels(self, tactic: RowTactic, inputs: Sequence[Tensor | None]) -> tuple[Kernel, ...]:
        vocabulary, hidden = inputs[1].shape
        constants = (("HIDDEN", hidden), ("VOCABULARY", vocabulary), ("THREADS", tactic.threads))
        return (Kernel("embedding", "embedding.cu", "embedding", constants),)

    def bind(
        self,
        tactic: RowTactic,
        functions: Sequence[Function],
        tensors: Sequence[torch.Tensor | None],
        workspace: torch.Tensor | None,
    ) -> Launcher:
        parts = -(-tensors[1].shape[1] // (VECTOR * tactic.threads))
        return row_launch(functions[0], tactic.threads, tensors, lambda step: step.tokens, parts)
