"""Cases of norm_quant: every combination on small rows, and the rows of real models."""

from __future__ import annotations

import torch

from fp8.plugins.base import Case, StepShape
from fp8.plugins.norm_quant.plugin import NormQuant

WHY = "float32 sums in another order move a result across a rounding boundary in about one of 10^4"
TOLERANCE = {
    "none": 5e-4,
    "static": 3e-3,
    "per_token": 3e-3,
    "block": 3e-3,
}  # such a step is 2^-8 of a bfloat16, 2^-3 of an e4m3


def tolerance(quant: str, codes: int) -> float:
    """TOLERANCE, or what one flip can do among so few codes: 32, from 448 to 416, beside a root mean square of 80."""
    return TOLERANCE[quant] if quant == "none" else max(TOLERANCE[quant], 32 / (80 * codes**0.5))


def case(
    tokens: int,
    hidden: int,
    quant: str,
    norm: str = "rms",
    residual: bool = True,
    gather: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    """`gather` is the number of gathered rows, 0 for none."""

    def make(generator: torch.Generator, device: str) -> list[torch.Tensor | None]:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, dtype=dtype, device=device, generator=generator)

        rows = torch.randint(tokens, (gather,), device=device, generator=generator).int() if gather else None
        return [
            normal(tokens, hidden) + 1,
            3 * normal(tokens, hidden) if residual else None,
            1 + 0.2 * normal(hidden),
            normal(hidden) if norm == "layer" else None,
            torch.tensor([0.0071], device=device) if quant == "static" else None,
            rows,
        ]

    plugin = NormQuant(norm, 1e-5, quant, 1200.0 if quant == "per_token" else 0.0, residual, bool(gather))
    name = f"{norm}{' residual' if residual else ''}{f' gather {gather}' if gather else ''} {quant} {tokens}x{hidden}"
    computed = gather or tokens
    read_and_summed = (6 if residual and not gather else 4 if residual else 2) * computed * hidden
    moved = read_and_summed + (2 if quant == "none" else 1) * computed * hidden + 2 * hidden
    step = StepShape(tokens, 1, 0, tokens, tokens, gather or 1)
    allowed = tolerance(quant, hidden if gather else tokens * hidden)  # gathered rows may be one and the same
    return Case(f"{name} {str(dtype).removeprefix('torch.')}", plugin, make, step, allowed, WHY, moved)


CASES = [
    *(
        case(5, 264, quant, norm, residual, gather)
        for norm in ("rms", "layer")
        for quant in ("none", "static", "per_token")
        for residual in (False, True)
        for gather in (0, 3)
    ),
    case(3, 8, "none", dtype=torch.float16),
    case(3, 16384, "per_token", dtype=torch.float16),
    case(3, 12296, "static"),
    case(5, 384, "block"),
    case(3, 2176, "block", "layer", dtype=torch.float16),
    case(1, 4096, "block"),
    case(8192, 4096, "block"),
    case(1, 4096, "static"),
    case(1, 4096, "per_token"),
    case(16, 4096, "static"),
    case(64, 8192, "static"),
    case(2048, 4096, "static"),
    case(8192, 4096, "static"),
    case(8192, 4096, "per_token"),
    case(8192, 4096, "none"),
    case(4096, 8192, "static"),
    case(4096, 2048, "none", "layer"),
]
