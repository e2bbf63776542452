"""E4M3 arithmetic of weights and calibrated activations: scale = amax / 448, code = e4m3(clamp(x / scale, +-448)).

All in float32, so that dequantized values are code * scale to the last bit wherever they are computed.
"""

from __future__ import annotations

import torch

from fp8.plugins.base import E4M3_MAX

# An all-zero tensor has no scale of its own. This one keeps e4m3's range around values as small as FBGEMM's floor.
ZERO_AMAX = 1.0 / 512.0


def scale_of(amax: torch.Tensor) -> torch.Tensor:
    """float32 scales of float amaxes; never zero or subnormal."""
    amax = amax.float()
    return torch.where(amax > 0, amax, ZERO_AMAX).div(E4M3_MAX).clamp_min(torch.finfo(torch.float32).tiny)


def quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """e4m3 codes, saturating. `scale` broadcasts against x."""
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def quantize_with_amax(x: torch.Tensor, amax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and their scale (of amax's shape)."""
    scale = scale_of(amax)
    return quantize(x, scale), scale
