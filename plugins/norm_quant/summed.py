"""A norm's residual, added in the epilogue of the linear layer before it, and the norm of that sum.

Where many rows come, a norm with a residual reads two tensors and writes their sum beside its own result: two thirds of
its traffic. gemm.cu's epilogue, which mostly runs under other tiles' products, adds the residual to the rounded output,
and rounds, as the norm would: the sum has the same bits.

Steps of llama-3.1-8B in turn on an H200, ms, apart and so: 1016 rows at 129 to 256 and eight prompts of 128 31.08,
30.75; 1023 at 1001 to 2000 and one of 1000 51.39, 50.98; 1001 at 501 to 2500 and 1046 tokens of prompts 47.29, 46.64;
480 at 2049 to 2176 and 7712 tokens of prompts 117.3, 116.7. At 1024 rows, where a tile of 128 x 256 on each
multiprocessor has nothing to hide its epilogue under, 33.09 and 33.39; by the tactic of more rows instead, 39.61 and
39.54 at 1020 of 500 to 2500 tokens, 25.84 and 26.24 at 640.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fp8.plugins.base import Kernel, Launcher, Tensor
from fp8.plugins.gemm import many_tokens
from fp8.plugins.gemm.linear import Linear
from fp8.plugins.gemm.many_tokens import ManyTokens

if TYPE_CHECKING:
    import torch

    from fp8.plugins.cuda import Function
    from fp8.plugins.norm_quant.plugin import NormQuant

LEAST = 1024  # rows from which on it is worth it
Types = Sequence[Tensor | None]


def norm_of_sum(norm: NormQuant) -> NormQuant:
    """The norm that reads the sum."""
    return dataclasses.replace(norm, residual=False)


def kernel(linear: Linear, types: Types, tactic: Any) -> Kernel | None:
    """The linear's kernel of that tactic that adds a residual. None where there is none: another kernel than gemm.cu,
    one whose epilogue does not run under other tiles' products, and where the output does not leave by TMA.

    types: of the linear's inputs."""
    if linear.name != "gemm" or not isinstance(tactic, ManyTokens) or not tactic.PINGPONG:
        return None
    p = many_tokens.adding(many_tokens.problem(linear, types))
    if not p["TMA_STORE"] or p.shared(tactic) > many_tokens.SHARED_MAX:
        return None
    return many_tokens.kernel(p, tactic)


def bind(
    linear: Linear,
    choices: Sequence[tuple[Any, Function | None]],
    operands: Sequence[torch.Tensor | None],
    norm: NormQuant,
    tactic: Any,
    functions: Sequence[Function],
    tensors: Sequence[torch.Tensor | None],
) -> tuple[list[Launcher | None], Launcher]:
    """The launches of the linear that adds, one for each of `choices` (a tactic, its kernel: None has none), and of the
    norm of the sum. operands: the linear's inputs and output; tensors: the norm's."""
    *given, y = operands
    *inputs, total = tensors
    one, other, *rest = inputs
    residual = other if one is y else one
    bound = lambda t, f: many_tokens.bind(linear, t, [f], [*given, total], added=residual)
    fronts = [bound(t, f) if f else None for t, f in choices]
    return fronts, norm_of_sum(norm).bind(tactic, functions, [total, None, *rest], None)
