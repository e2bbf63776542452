"""Cases of gemm_swiglu: ragged sizes for correctness, Llama-7B's gate and up for speed."""

from __future__ import annotations

import torch

from fp8.plugins.base import Case, StepShape
from fp8.plugins.gemm.cases import operands
from fp8.plugins.gemm.types import BYTES
from fp8.plugins.gemm_swiglu.plugin import GemmSwiglu

TO_CODES = (
    "gate and up differ by one bfloat16 rounding here and there (2^-9), which moves h across a rounding boundary of "
    "e4m3 (a step of 2^-3) for about one value in 40: rms 0.09 * 40^-0.5 = 1.4e-2, more in a single row"
)
TO_16_BITS = "gate, up and the product are each rounded to 16 bits: three roundings, bfloat16 rms 1.6e-3 each"


def case(
    rows: int,
    features: int,
    k: int,
    mode: str = "static",
    dtype: str = "float8_e4m3fn",
    quant: str = "static",
    out: str = "bfloat16",
    bias: bool = False,
    accumulation: str = "fast",
) -> Case:
    def make(generator: torch.Generator, device: str) -> list[torch.Tensor | None]:
        inputs = operands(rows, 2 * features, k, dtype, mode, bias, generator, device)
        if mode != "none":  # gate and up of about unit size: the curved part of silu
            inputs[2] = inputs[2] * (4 * (4096 / k) ** 0.5)
        scale = torch.tensor([0.02], device=device) if quant == "static" else None
        return [*inputs, scale]

    moved = (rows + 2 * features) * k * BYTES[dtype] + rows * features * (1 if quant == "static" else 2)
    name = f"{rows}x{features}x{k} {dtype} {mode} quant {quant} {out}{' bias' if bias else ''}"
    tolerance, why = (4e-2, TO_CODES) if quant == "static" else (5e-3, TO_16_BITS)
    name += " precise" if accumulation == "precise" else ""
    plugin = GemmSwiglu("silu", quant, out, accumulation)
    return Case(name, plugin, make, StepShape.prefill(rows), tolerance, why, moved, 4 * rows * features * k)


CASES = [case(rows, 192, 320) for rows in (1, 7, 63, 65, 127, 129, 300)]
CASES += [
    case(129, 200, 864),  # F = 8 * odd: no TMA store of the codes
    case(300, 200, 864, "rowwise", quant="none"),
    case(300, 1384, 2064, "rowwise", bias=True),
    case(65, 72, 328, "none", "bfloat16", "none", bias=True),
    case(129, 1000, 328, "none", "float16", "none", "float16"),
    case(515, 2752, 1024),
    *(case(rows, 192, 320, accumulation="precise") for rows in (1, 7, 65, 300)),
    case(129, 1384, 2064, "rowwise", quant="none", bias=True, accumulation="precise"),
    case(512, 11008, 4096, accumulation="precise"),
]
CASES += [case(m, 11008, 4096) for m in (1, 16, 64, 128, 512, 2048)]
CASES += [case(2048, 11008, 4096, "rowwise", quant="none")]
