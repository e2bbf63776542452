"""The meaning of a linear layer: float32 products and sums, one rounding at the end."""

from __future__ import annotations

import torch


def accumulate(
    x: torch.Tensor,
    w: torch.Tensor,
    x_scale: torch.Tensor | None,
    w_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """(x w^T) * x_scale * w_scale + bias in float32. x: [T, K], w: [N, K] (e4m3 codes or floats), x_scale: [1] or [T],
    w_scale and bias: [N]; returns [T, N]."""
    y = x.float() @ w.float().t()
    if x_scale is not None:
        y *= x_scale.float().reshape(-1, 1)
    if w_scale is not None:
        y *= w_scale.float()
    if bias is not None:
        y += bias.float()
    return y


def gemm(
    x: torch.Tensor,
    w: torch.Tensor,
    x_scale: torch.Tensor | None,
    w_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """`accumulate`, rounded once to `out_dtype`."""
    return accumulate(x, w, x_scale, w_scale, bias).to(out_dtype)
