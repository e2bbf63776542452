"""fp8: e4m3 weights and activations, one static scale each, calibrated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fp8.builder.e4m3 import quantize_with_amax
from fp8.builder.formats.base import Format, float8_scheme

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs
    import torch

    from fp8.builder.graph import GraphBuilder, Linear


@dataclass(frozen=True)
class Fp8(Format):
    name: ClassVar[str] = "fp8"
    static: ClassVar[bool] = True
    scheme: ClassVar[dict[str, Any] | None] = float8_scheme(weights="tensor", activations="tensor")

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """scale = max|w| / 448, f32 [1]."""
        codes, scale = quantize_with_amax(weight, weight.abs().amax().reshape(1))
        return {"weight": codes, "weight_scale": scale}

    def quantized_linears(self, b: GraphBuilder, x: gs.Tensor, linears: Sequence[Linear]) -> list[gs.Tensor]:
        if not linears:
            return []
        # Readers of one tensor share its scale. Files of other tools may differ per reader: the largest saturates none.
        scales = [b.checkpoint.scale(f"{m.name}.input_scale") for m in linears]
        scale = b.constant(f"{linears[0].name}.input_scale", np.max(scales).reshape(()))
        xq = b.quantize(x, scale, f"{linears[0].name}/quantize")
        outputs = []
        for m in linears:
            wide = self.dequantized(b, m)
            outputs.append(b.gemm(b.dequantize(xq, scale, f"{m.name}/dequantize"), wide, m, b.dtype))
        return outputs

    def dequantized(self, b: GraphBuilder, m: Linear) -> gs.Tensor:
        """A linear's weight, f32 [N, K]."""
        w_scale = b.scale(f"{m.name}.weight_scale")
        return b.dequantize(b.quantized_weight(m), w_scale, f"{m.name}/dequantize_weight")
