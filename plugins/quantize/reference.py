"""Quantization to float8_e4m3fn by true division, rounded to nearest even and saturating at 448."""

from __future__ import annotations

import torch

from fp8.plugins.base import E4M3_MAX, SCALE_BLOCK

MIN_SCALE = 1 / (E4M3_MAX * 512)  # of a per-token scale: rows of zeros divide by it, as in FBGEMM's rowwise recipe


def quantize_static(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """e4m3(clamp(x / scale, +-448)). x: any shape, read as float32; scale: one float32, or one that broadcasts to x."""
    return (x.float() / scale.float()).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def per_token_scale(x: torch.Tensor, scale_ub: float) -> torch.Tensor:
    """max(min(amax_row, scale_ub) / 448, 1 / (448 * 512)) in float32. x: [T, K] -> [T]; scale_ub 0 = no bound."""
    return scale_of_amax(x.float().abs().amax(1), scale_ub)


def scale_of_amax(amax: torch.Tensor, scale_ub: float) -> torch.Tensor:
    if scale_ub > 0:
        amax = amax.clamp(max=scale_ub)
    return (amax / torch.full_like(amax, E4M3_MAX)).clamp(min=MIN_SCALE)  # by a number, CUDA would multiply by 1 / 448


def quantize_per_token(x: torch.Tensor, scale_ub: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x: [T, K] -> e4m3 [T, K] and its scales f32 [T]."""
    scale = per_token_scale(x, scale_ub)
    return quantize_static(x, scale[:, None]), scale


def quantize_block(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x: [T, K] -> e4m3 [T, K] and its scales f32 [T, K / 128], each of 128 values of a row."""
    groups = x.float().unflatten(1, (-1, SCALE_BLOCK)).flatten(0, 1)
    codes, scale = quantize_per_token(groups, 0)
    return codes.reshape(x.shape), scale.reshape(x.shape[0], -1)


def finish(
    y: torch.Tensor, quant: str, scale: torch.Tensor | None, scale_ub: float, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """The end of every row plugin: y f32 [T, K] rounded to `dtype`, or quantized (with its scales if dynamic)."""
    if quant == "static":
        assert scale is not None
        return (quantize_static(y, scale),)
    if quant == "from_amax":
        assert scale is not None
        own = scale_of_amax(scale, scale_ub)
        return quantize_static(y, own[:, None]), own
    if quant == "per_token":
        return quantize_per_token(y, scale_ub)
    if quant == "block":
        return quantize_block(y)
    return (y.to(dtype),)
