"""The meaning of a gate and an up linear followed by silu(gate) * up, and the order of their interleaved rows."""

from __future__ import annotations

import torch

from fp8.plugins.base import E4M3_MAX
from fp8.plugins.gemm.reference import gemm

GROUP = 8  # rows of gate, then rows of up, in turn: the columns that one thread of a wgmma accumulator holds in pairs


def interleave(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """[F, ...] and [F, ...] -> [2F, ...]: 8 rows of gate, 8 rows of up, and so on (weights, weight scales, biases).

    Raises ValueError if the shapes differ or F is not a multiple of 8.
    """
    if gate.shape != up.shape or gate.shape[0] % GROUP:
        raise ValueError(
            f"gate {tuple(gate.shape)} and up {tuple(up.shape)}: expected one shape, with rows in multiples of {GROUP}"
        )
    rows, tail = gate.shape[0], gate.shape[1:]
    parts = [t.reshape(rows // GROUP, 1, GROUP, *tail) for t in (gate, up)]
    return torch.cat(parts, 1).reshape(2 * rows, *tail)


def deinterleave(both: torch.Tensor, dim: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `interleave`, along any dimension of size 2F."""
    rows = both.movedim(dim, 0)
    pairs = rows.reshape(-1, 2, GROUP, *rows.shape[1:])
    gate, up = (pairs[:, i].flatten(0, 1).movedim(0, dim) for i in (0, 1))
    return gate, up


def gemm_swiglu(
    x: torch.Tensor,
    w: torch.Tensor,
    x_scale: torch.Tensor | None,
    w_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Gate and up are rounded to `out_dtype`, as two separate linears would; silu(gate) * up is float32; then it is
    rounded to `out_dtype`, or (with `out_scale`) divided, saturated at 448 and rounded to e4m3. Returns [T, F]."""
    gate, up = deinterleave(gemm(x, w, x_scale, w_scale, bias, out_dtype), 1)
    gate, up = gate.float(), up.float()
    h = gate * torch.sigmoid(gate) * up
    if out_scale is None:
        return h.to(out_dtype)
    return (h / out_scale.float()).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
