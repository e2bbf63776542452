"""fp8_block: e4m3 weights with a scale per block of 128 x 128, e4m3 activations with a scale per 128 channels of a
token, at run time.

DeepSeek-V3's scheme (arXiv 2412.19437, section 3.3.2). A scale is amax / 448; one of an activation is at least
1 / (448 * 512), as in fp8_rowwise, so that zeros have one too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fp8.builder.e4m3 import quantize, scale_of
from fp8.builder.formats.base import Format, FormatError, float8_scheme
from fp8.builder.formats.fp8_rowwise import SCALE_FLOOR
from fp8.plugins.base import E4M3_MAX, SCALE_BLOCK

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs
    import torch

    from fp8.builder.graph import GraphBuilder, Linear

ROWS = 8  # output channels that a kernel's thread holds side by side: they must share a scale


@dataclass(frozen=True)
class Fp8Block(Format):
    name: ClassVar[str] = "fp8_block"
    scheme: ClassVar[dict[str, Any] | None] = float8_scheme(weights="block", activations="group")
    unit: ClassVar[int] = SCALE_BLOCK

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """scale[i, j] = max |w| over block (i, j) / 448, f32 [ceil(N / 128), ceil(K / 128)]."""
        import torch.nn.functional as F

        n, k = weight.shape
        padded = F.pad(weight.abs().float(), (0, -k % SCALE_BLOCK, 0, -n % SCALE_BLOCK))
        blocks = padded.unflatten(1, (-1, SCALE_BLOCK)).unflatten(0, (-1, SCALE_BLOCK))
        scale = scale_of(blocks.amax((1, 3)))
        spread = scale.repeat_interleave(SCALE_BLOCK, 0)[:n].repeat_interleave(SCALE_BLOCK, 1)[:, :k]
        return {"weight": quantize(weight, spread), "weight_scale": scale}

    def quantized_linears(self, b: GraphBuilder, x: gs.Tensor, linears: Sequence[Linear]) -> list[gs.Tensor]:
        if not linears:
            return []
        for m in linears:
            self.check(m.name, m.out_features, m.in_features)
        first = linears[0].name
        scale = self.group_scale(b, x, first)
        along = {"axis": 1, "block_size": SCALE_BLOCK}
        xq = b.quantize(x, scale, f"{first}/quantize", **along)
        outputs = []
        for m in linears:
            w_scale = self.row_scales(b, m)
            wide = b.dequantize(b.quantized_weight(m), w_scale, f"{m.name}/dequantize_weight", **along)
            outputs.append(b.gemm(b.dequantize(xq, scale, f"{m.name}/dequantize", **along), wide, m, b.dtype))
        return outputs

    def group_scale(self, b: GraphBuilder, x: gs.Tensor, name: str) -> gs.Tensor:
        """f32 [T, K / 128]."""
        tokens, k = x.shape
        groups = b.reshape(b.same("Abs", f"{name}/abs", x), [tokens, k // SCALE_BLOCK, SCALE_BLOCK], f"{name}/groups")
        amax = b.reduce("ReduceMax", groups, 2, f"{name}/group_amax", keepdims=False)
        scaled = b.same("Div", f"{name}/scaled_amax", amax, b.scalar(E4M3_MAX))
        return b.same("Max", f"{name}/input_scale", scaled, b.scalar(SCALE_FLOOR))

    def row_scales(self, b: GraphBuilder, m: Linear) -> gs.Tensor:
        """The scales of the weight's blocks for each of its rows, f32 [N, K / 128]: ONNX has blocks along one axis."""
        blocks = (-(-m.out_features // SCALE_BLOCK), m.in_features // SCALE_BLOCK)
        rows = b.constant(f"{m.name}/row_blocks", np.arange(m.out_features, dtype=np.int64) // SCALE_BLOCK)
        return b.gather(b.scales(f"{m.name}.weight_scale", blocks), rows, f"{m.name}/row_scales")

    def check(self, module: str, rows: int, columns: int) -> None:
        for what, size, unit in (("K", columns, SCALE_BLOCK), ("N", rows, ROWS)):
            if size % unit:
                raise FormatError(
                    f"fp8_block: {module}: {what}={size} is not a multiple of {unit}; keep this layer in 16 bits "
                    f"(--exclude_modules '{module}'), or choose fp8 or fp8_rowwise"
                )

    def attention_output(self, b: GraphBuilder, x: gs.Tensor, consumer: str) -> gs.Tensor:
        """128 channels of attention's output may be those of two heads: it is rounded to DT, and quantized after."""
        if not self.quantizes(consumer):
            return x
        return b.widen(b.round(x, f"{consumer}/round_input"), f"{consumer}/widen_input")
