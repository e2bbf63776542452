"""Cases of act_quant: the MLPs of small and large models."""

from __future__ import annotations

import torch

from fp8.plugins.act_quant.plugin import ActQuant
from fp8.plugins.act_quant.reference import hidden
from fp8.plugins.base import Case, StepShape

WHY = "exponentials good to a few float32 roundings move a result across a rounding boundary in about one of 10^4"
STEP = 3e-3  # such a step is 2^-3 of an e4m3, 2^-8 of a bfloat16
TOLERANCE = {"none": 5e-4, "static": STEP, "per_token": STEP, "block": STEP, "from_amax": STEP}


def case(
    tokens: int,
    width: int,
    quant: str,
    activation: str = "silu",
    gated: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    scale_ub: float = 0.0,
) -> Case:
    def make(generator: torch.Generator, device: str) -> list[torch.Tensor | None]:
        x = 3 * torch.randn(tokens, width * (2 if gated else 1), dtype=dtype, device=device, generator=generator)
        if quant == "from_amax":  # other ranks' parts of the row may hold more
            amax = hidden(x, activation, gated).abs().amax(1)
            return [x, amax * (1 + torch.rand(tokens, device=device, generator=generator))]
        return [x, torch.tensor([0.021], device=device)] if quant == "static" else [x]

    kind = f"{activation}{' gated' if gated else ''} {quant}"
    plugin = ActQuant(activation, gated, quant, scale_ub)
    moved = tokens * width * ((4 if gated else 2) + (2 if quant == "none" else 1))
    name = f"{kind} {tokens}x{width} {str(dtype).removeprefix('torch.')}"
    return Case(name, plugin, make, StepShape.prefill(tokens), TOLERANCE[quant], WHY, moved)


CASES = [
    case(3, 8, "none"),
    case(3, 136, "static"),
    case(3, 136, "per_token", dtype=torch.float16),
    case(5, 512, "none", "gelu", gated=False),
    case(5, 512, "static", "gelu_tanh", gated=False, dtype=torch.float16),
    case(5, 512, "per_token", "gelu", scale_ub=20.0),
    case(2, 40960, "per_token"),  # longer than the registers
    case(3, 136, "from_amax"),
    case(1, 7168, "from_amax"),
    case(2048, 7168, "from_amax"),
    case(3, 384, "block"),
    case(5, 40960, "block", dtype=torch.float16),
    case(1, 14336, "block"),
    case(2048, 14336, "block"),
    case(1, 14336, "static"),
    case(1, 14336, "per_token"),
    case(64, 14336, "per_token"),
    case(2048, 14336, "none"),
    case(2048, 14336, "static"),
    case(2048, 14336, "per_token"),
]
