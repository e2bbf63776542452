"""embedding: the rows of a table that the token ids name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fp8.plugins.base import Plugin, Tensor
from fp8.plugins.quantize.types import DTYPES, check_rows, check_tensor

if TYPE_CHECKING:
    import torch


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
