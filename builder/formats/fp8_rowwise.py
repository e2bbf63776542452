"""fp8_rowwise: e4m3 weights with a scale per output channel, e4m3 activations with a scale per token, at run time.

FBGEMM's scheme (facebookresearch FBGEMM, quantize_fp8_per_row): scale = max(min(rowmax|x|, ub) / 448, 1 / (448 * 512)),
so elements beyond the upper bound saturate, and a row of zeros still has a scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fp8.builder.e4m3 import quantize_with_amax
from fp8.builder.formats.base import Format, FormatError, float8_scheme
from fp8.plugins.base import E4M3_MAX

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs
    import torch

    from fp8.builder.graph import GraphBuilder, Linear

SCALE_FLOOR = 1.0 / (E4M3_MAX * 512.0)


@dataclass(frozen=True)
class Fp8Rowwise(Format):
    activation_scale_ub: float | None = 1200.0  # None: no bound

    name: ClassVar[str] = "fp8_rowwise"
    scheme: ClassVar[dict[str, Any] | None] = float8_scheme(weights="channel", activations="token")
    foreign_options: ClassVar[dict[str, Any]] = {"activation_scale_ub": None}  # compressed-tensors has no bound

    def __post_init__(self) -> None:
        super().__post_init__()
        ub = self.activation_scale_ub
        if ub is not None and not (isinstance(ub, int | float) and np.isfinite(ub) and ub > 0):
            raise FormatError(f"activation_scale_ub {ub!r} must be a finite number above 0")

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """scale[n] = max_k|w[n, k]| / 448, f32 [N, 1]."""
        codes, scale = quantize_with_amax(weight, weight.abs().amax(1, keepdim=True))
        return {"weight": codes, "weight_scale": scale}

    def quantized_linears(self, b: GraphBuilder, x: gs.Tensor, linears: Sequence[Linear]) -> list[gs.Tensor]:
        if not linears:
            return []
        first = linears[0].name
        scale = self.token_scale(b, x, first)
        xq = b.quantize(x, scale, f"{first}/quantize", axis=0)
        outputs = []
        for m in linears:
            w_scale = b.scale(f"{m.name}.weight_scale", m.out_features)
            wide = b.dequantize(b.quantized_weight(m), w_scale, f"{m.name}/dequantize_weight", axis=0)
            outputs.append(b.gemm(b.dequantize(xq, scale, f"{m.name}/dequantize", axis=0), wide, m, b.dtype))
        return outputs

    def token_scale(self, b: GraphBuilder, x: gs.Tensor, name: str) -> gs.Tensor:
        """f32 [T]."""
        amax = b.reduce("ReduceMax", b.same("Abs", f"{name}/abs", x), 1, f"{name}/row_amax", keepdims=False)
        if self.activation_scale_ub is not None:
            amax = b.same("Min", f"{name}/bounded_amax", amax, b.scalar(self.activation_scale_ub))
        scaled = b.same("Div", f"{name}/scaled_amax", amax, b.scalar(E4M3_MAX))
        return b.same("Max", f"{name}/input_scale", scaled, b.scalar(SCALE_FLOOR))

    def attention_output(self, b: GraphBuilder, x: gs.Tensor, consumer: str) -> gs.Tensor:
        """A row of attention's output is spread over the blocks of its heads, so no kernel has its amax: the output is
        rounded to DT, and a kernel of its own quantizes that."""
        if not self.quantizes(consumer):
            return x
        return b.widen(b.round(x, f"{consumer}/round_input"), f"{consumer}/widen_input")
