"""Cases of row_amax: a rank's part of attention outputs and of MLPs."""

from __future__ import annotations

import torch

from fp8.plugins.base import Case, StepShape
from fp8.plugins.row_amax.plugin import RowAmax

EXACT = "a maximum rounds nothing"
WHY = "exponentials are good to a few float32 roundings"


def case(
    tokens: int, width: int, activation: str = "", gated: bool = False, dtype: torch.dtype = torch.bfloat16
) -> Case:
    def make(generator: torch.Generator, device: str) -> list[torch.Tensor | None]:
        x = 3 * torch.randn(tokens, width * (2 if gated else 1), dtype=dtype, device=device, generator=generator)
        x[-1] *= 0 if tokens > 1 else 1
        return [x]

    kind = f"{activation or 'identity'}{' gated' if gated else ''}"
    name = f"{kind} {tokens}x{width} {str(dtype).removeprefix('torch.')}"
    tolerance, why = (1e-5, WHY) if activation else (0.0, EXACT)
    moved = 2 * tokens * width * (2 if gated else 1)
    return Case(name, RowAmax(activation, gated), make, StepShape.prefill(tokens), tolerance, why, moved)


CASES = [
    case(3, 8),
    case(5, 200, dtype=torch.float16),
    case(2, 36864),  # longer than the registers
    case(4, 136, "silu", True),
    case(5, 512, "gelu", dtype=torch.float16),
    case(1, 2048),
    case(64, 2048),
    case(1, 7168, "silu", True),
    case(2048, 7168, "silu", True),
]
