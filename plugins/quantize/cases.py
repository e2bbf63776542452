"""Cases of quantize: attention outputs before a quantized o_proj."""

from __future__ import annotations

import torch

from fp8.plugins.base import Case, StepShape
from fp8.plugins.quantize.plugin import Quantize

EXACT = "one IEEE division and one rounding: codes and scales are equal bit for bit"


def case(
    tokens: int,
    width: int,
    quant: str,
    dtype: torch.dtype = torch.bfloat16,
    scale_ub: float = 0.0,
    size: float = 1.0,  # of the values
) -> Case:
    def make(generator: torch.Generator, device: str) -> list[torch.Tensor | None]:
        x = 2 * size * torch.randn(tokens, width, dtype=dtype, device=device, generator=generator)
        x[0] *= 1000  # saturates, or meets scale_ub
        x[-1] *= 0 if tokens > 1 else 1
        if quant == "from_amax":  # other ranks' parts of the row may hold more
            return [x, x.float().abs().amax(1) * (1 + torch.rand(tokens, device=device, generator=generator))]
        return [x, torch.tensor([0.0137 * size], device=device)] if quant == "static" else [x]

    name = f"{quant} {tokens}x{width} {str(dtype).removeprefix('torch.')}" + (f" ub {scale_ub}" if scale_ub else "")
    name += f" of size {size:.0e}" if size != 1 else ""
    moved = 3 * tokens * width + 4 * tokens * {"static": 0, "block": width // 128}.get(quant, 1)
    return Case(name, Quantize(quant, scale_ub), make, StepShape.prefill(tokens), 0.0, EXACT, moved)


CASES = [
    case(3, 8, "static"),
    case(64, 2048, "static", size=1e-36),  # of scales like these the reciprocal, or the remainder, is no normal float32
    case(64, 2048, "static", size=1e33),
    case(5, 200, "per_token"),
    case(4, 264, "per_token", torch.float16, 3.0),
    case(2, 36864, "per_token"),  # longer than the registers
    case(3, 8, "from_amax"),
    case(5, 200, "from_amax", torch.float16, 3.0),
    case(64, 2048, "from_amax"),
    case(4096, 2048, "from_amax"),
    case(5, 640, "block"),
    case(2, 36864, "block", torch.float16),
    case(4096, 4096, "block"),
    case(1, 4096, "static"),
    case(1, 4096, "per_token"),
    case(64, 4096, "per_token"),
    case(4096, 4096, "static"),
    case(4096, 4096, "per_token"),
    case(4096, 8192, "per_token", torch.float16, 1200.0),
]
