"""The meaning of a linear layer: float32 products and sums, one rounding at the end."""

from __future__ import annotations

import torch

from fp8.plugins.base import SCALE_BLOCK
from fp8.plugins.gemm.types import GROUP_ROWS


def accumulate(
    x: torch.Tensor,
    w: torch.Tensor,
    x_scale: torch.Tensor | None,
    w_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """(x w^T) * x_scale * w_scale + bias in float32. x: [T, K], w: [N, K] (e4m3 codes or floats), x_scale: [1] or [T],
    w_scale and bias: [N]; or, blockwise, x_scale: [T, K / 128] and w_scale: [ceil(N / 128), K / 128] or
    [N / 8, K / 128]. Returns [T, N]."""
    if x_scale is not None and x_scale.ndim == 2:
        x, x_scale = x.float() * spread(x_scale), None
        group = SCALE_BLOCK if w_scale.shape[0] == -(-w.shape[0] // SCALE_BLOCK) else GROUP_ROWS
        w, w_scale = w.float() * spread(w_scale.repeat_interleave(group, 0)[: w.shape[0]]), None
    y = x.float() @ w.float().t()
    if x_scale is not None:
        y *= x_scale.float().reshape(-1, 1)
    if w_scale is not None:
        y *= w_scale.float()
    if bias is not None:
        y += bias.float()
    return y


def spread(scale: torch.Tensor) -> torch.Tensor:
    """[R, K / 128] -> [R, K]."""
    return scale.float().repeat_interleave(SCALE_BLOCK, 1)


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
