"""The meaning of residual add, norm and quantization: the sum is rounded to x's dtype, the norm is float32."""

from __future__ import annotations

import torch

from fp8.plugins.quantize.reference import finish


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight (Zhang & Sennrich 2019). x: f32 [T, H]."""
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + epsilon) * weight.float()


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias (Ba et al. 2016). x: f32 [T, H]."""
    centered = x - x.mean(1, keepdim=True)
    y = centered * torch.rsqrt(centered.square().mean(1, keepdim=True) + epsilon) * weight.float()
    return y if bias is None else y + bias.float()


def norm_quant(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    rows: torch.Tensor | None,
    norm: str,
    epsilon: float,
    quant: str,
    scale_ub: float,
) -> tuple[torch.Tensor, ...]:
    """(y, y_scale if it is dynamic, the rounded sum if there is a residual and no gather)."""
    total = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    h = (total if rows is None else total[rows.long()]).float()
    y = rms_norm(h, weight, epsilon) if norm == "rms" else layer_norm(h, weight, bias, epsilon)
    out = finish(y, quant, scale, scale_ub, x.dtype)
    return out if residual is None or rows is not None else (*out, total)
