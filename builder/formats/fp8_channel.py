"""fp8_channel: e4m3 weights with a scale per output channel, e4m3 activations with one static scale, calibrated.

The kernels are those of fp8, whose epilogue takes a scale per channel in any case: merged linears have one per part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fp8.builder.e4m3 import quantize_with_amax
from fp8.builder.formats.base import float8_scheme
from fp8.builder.formats.fp8 import Fp8

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs
    import torch

    from fp8.builder.graph import GraphBuilder, Linear


@dataclass(frozen=True)
class Fp8Channel(Fp8):
    name: ClassVar[str] = "fp8_channel"
    scheme: ClassVar[dict[str, Any] | None] = float8_scheme(weights="channel", activations="tensor")

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """scale[n] = max_k|w[n, k]| / 448, f32 [N, 1]."""
        codes, scale = quantize_with_amax(weight, weight.abs().amax(1, keepdim=True))
        return {"weight": codes, "weight_scale": scale}

    def dequantized(self, b: GraphBuilder, m: Linear) -> gs.Tensor:
        scale = b.scale(f"{m.name}.weight_scale", m.out_features)
        return b.dequantize(b.quantized_weight(m), scale, f"{m.name}/dequantize_weight", axis=0)
