"""gemm_swiglu: the gate and up linears of an MLP and silu(gate) * up in one kernel, optionally quantized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fp8.plugins.base import PluginError, StepShape, Tensor
from fp8.plugins.gemm.linear import Linear
from fp8.plugins.gemm.types import blockwise, check_accumulation, check_tensor_cores, check_types, check_vector

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class GemmSwiglu(Linear):
    """x (e4m3 or 16-bit) [T, K], w (same) [2F, K], x_scale f32 [1] or [T]?, w_scale f32 [2F]?, bias f32 [2F]?,
    out_scale f32 [1] (quant "static" only) -> y [T, F]: e4m3 (quant "static") or out_dtype (quant "none").

    Rows of w, w_scale and bias are interleaved in groups of 8 (`reference.interleave`). Gate and up are rounded to
    `out_dtype`, the product silu(gate) * up is float32 and rounded or quantized once.
    `accumulation`: see `gemm.types.ACCUMULATIONS`.
    """

    name: ClassVar[str] = "gemm_swiglu"
    activation: str = "silu"
    quant: str = "static"
    out_dtype: str = "bfloat16"
    accumulation: str = "fast"

    def infer(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        if self.activation != "silu":
            raise PluginError(f"activation is {self.activation!r}, expected 'silu'; use gemm and act_quant")
        if self.quant not in ("none", "static"):
            raise PluginError(f"quant is {self.quant!r}, expected 'none' or 'static'; use gemm and act_quant")
        rows, n = check_types(inputs, self.out_dtype)
        check_accumulation(inputs, self.accumulation)
        if blockwise(inputs):
            raise PluginError("the scales are blockwise; use gemm and act_quant")
        if n % 16:
            raise PluginError(f"w has {n} rows, expected groups of 8 gate and 8 up rows; use gemm and act_quant")
        check_vector("out_scale", inputs[5], (1,))
        if (inputs[5] is not None) != (self.quant == "static"):
            raise PluginError(f"out_scale is {'given' if inputs[5] else 'absent'}, but quant is {self.quant!r}")
        return (Tensor("float8_e4m3fn" if self.quant == "static" else self.out_dtype, (rows, n // 2)),)

    def reference(self, *inputs: torch.Tensor | None, step: StepShape) -> tuple[torch.Tensor, ...]:
        import torch

        from fp8.plugins.gemm_swiglu.reference import gemm_swiglu

        return (gemm_swiglu(*inputs, out_dtype=getattr(torch, self.out_dtype)),)

    def check(self, inputs: Sequence[Tensor | None]) -> None:
        self.infer(inputs)
        check_tensor_cores(inputs)
        if self.out_dtype == "float32":
            raise PluginError("out_dtype is float32, but gate and up are rounded to a 16-bit dtype; choose one")
