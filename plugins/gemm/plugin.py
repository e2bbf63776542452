"""gemm: a linear layer y = (x w^T) * x_scale * w_scale + bias, quantized or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fp8.plugins.base import PluginError, StepShape, Tensor
from fp8.plugins.gemm.linear import Linear
from fp8.plugins.gemm.types import check_accumulation, check_tensor_cores, check_types

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Gemm(Linear):
    """x (e4m3 or 16-bit) [rows, K], w (same) [N, K], x_scale f32 [1] or [rows]?, w_scale f32 [N]?, bias f32 [N]?
    -> y out_dtype [rows, N]. Sums in float32, rounds once. Blockwise: x_scale f32 [rows, K / 128], w_scale f32
    [ceil(N / 128), K / 128], or [N / 8, K / 128].

    `rows` says which of a step's sizes counts the rows of x: "T" packed tokens or "L" rows whose logits are wanted.
    `accumulation`: see `types.ACCUMULATIONS`; blockwise sums are precise in any case.
    """

    name: ClassVar[str] = "gemm"
    out_dtype: str = "bfloat16"
    rows: str = "T"
    accumulation: str = "fast"

    def infer(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        if self.rows not in ("T", "L"):
            raise PluginError(
                f"rows is {self.rows!r}, expected 'T' (packed tokens) or 'L' (rows whose logits are wanted)"
            )
        rows, n = check_types(inputs, self.out_dtype)
        check_accumulation(inputs, self.accumulation)
        return (Tensor(self.out_dtype, (rows, n)),)

    def reference(self, *inputs: torch.Tensor | None, step: StepShape) -> tuple[torch.Tensor, ...]:
        import torch

        from fp8.plugins.gemm.reference import gemm

        return (gemm(*inputs, out_dtype=getattr(torch, self.out_dtype)),)

    def check(self, inputs: Sequence[Tensor | None]) -> None:
        (y,) = self.infer(inputs)
        if isinstance(y.shape[0], str) and y.shape[0] != self.rows:
            raise PluginError(
                f"x has {y.shape[0]} rows, but the launch would count {self.rows}; set rows to {y.shape[0]!r}"
            )
        check_tensor_cores(inputs)
