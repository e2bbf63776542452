"""sampling: the next token of each row of logits, greedy or at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fp8.plugins.base import Plugin, Tensor
from fp8.plugins.quantize.types import check_tensor

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sampling(Plugin):
    """logits f32 [L, V], temperature f32 [L], seed int64 [L], counter int32 [L]? -> token int32 [L].

    argmax(logits) where temperature <= 0, else argmax(logits / temperature + Gumbel noise): a draw from
    softmax(logits / temperature), fixed by (seed, counter). Equal scores go to the lowest index.
    """

    name: ClassVar[str] = "sampling"

    def infer(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        logits, temperature, seed, counter = (*inputs, None)[:4]
        rows, _ = check_tensor("logits", logits, ("float32",), (None, None)).shape
        check_tensor("temperature", temperature, ("float32",), (rows,))
        check_tensor("seed", seed, ("int64",), (rows,))
        if counter is not None:
            check_tensor("counter", counter, ("int32",), (rows,))
        return (Tensor("int32", (rows,)),)

    def reference(self, *inputs: torch.Tensor | None, step: object) -> tuple[torch.Tensor, ...]:
        from fp8.plugins.sampling.reference import sample

        return (sample(*(*inputs, None)[:4]),)

    def check(self, inputs: Sequence[Tensor | None]) -> None:
        self.infer(inputs)
