"""What gemm and gemm_swiglu share: the ways to run a linear layer, which are few_tokens.cu, gemm.cu (many tokens) and
cuBLASLt through torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from fp8.plugins.base import Kernel, Launcher, Plugin, Tensor
from fp8.plugins.gemm import few_tokens, library, many_tokens
from fp8.plugins.gemm.few_tokens import FewTokens
from fp8.plugins.gemm.library import Library
from fp8.plugins.gemm.many_tokens import ManyTokens

if TYPE_CHECKING:
    import torch

    from fp8.plugins.cuda import Function

Tactic = FewTokens | ManyTokens | Library
KINDS = {"few_tokens": FewTokens, "many_tokens": ManyTokens, "library": Library}
OFFERED_FEW, OFFERED_CLOSE = 12, 6


class Linear(Plugin):
    """Tactics, kernels and launches; a subclass adds its fields, types and reference."""

    hands_over: ClassVar[bool] = True

    def tactics(self, inputs: Sequence[Tensor | None], tokens: int) -> list[Tactic]:
        """Few-token tactics first where they are likely to win, then the many-token ones, the library last."""
        few = few_tokens.candidates(self, inputs, tokens)
        many = many_tokens.candidates(self, inputs, tokens)
        if few and few_tokens.favoured(self, inputs, tokens):
            ours: list[Tactic] = [*few[:OFFERED_FEW], *many[:2]]
        else:
            ours = [*many, *few[: OFFERED_CLOSE if tokens <= 96 else 2]]
        return [*ours, *library.candidates(self, inputs)]

    def legal(self, tactic: Tactic, inputs: Sequence[Tensor | None], tokens: int) -> bool:
        if isinstance(tactic, FewTokens):
            return few_tokens.allowed(self, tactic, inputs, tokens)
        if isinstance(tactic, ManyTokens):
            return many_tokens.legal(tactic, many_tokens.problem(self, inputs), tokens)
        return tactic in library.candidates(self, inputs)

    def buckets(self, max_tokens: int) -> list[int]:
        """1, powers of two from 8 up, 96, then `max_tokens`. A step of one token is one launch where that can be, and
        its linears are not among others' kernels elsewhere: what is fastest for 2 to 8 is chosen in their steps."""
        ends = sorted([1, 96, *(1 << i for i in range(3, 31))])
        return [n for n in ends if n < max_tokens] + [max_tokens]

    def tactic(self, fields: dict[str, Any]) -> Tactic:
        return KINDS[fields["kind"]](**fields)

    def kernels(self, tactic: Tactic, inputs: Sequence[Tensor | None]) -> tuple[Kernel, ...]:
        if isinstance(tactic, Library):
            return ()
        if isinstance(tactic, FewTokens):
            return few_tokens.kernels(self, tactic, inputs)
        return many_tokens.kernels(self, tactic, inputs)

    def bind(
        self,
        tactic: Tactic,
        functions: Sequence[Function],
        tensors: Sequence[torch.Tensor | None],
        workspace: torch.Tensor | None,
        early: bool = False,
        windowed: bool = False,
    ) -> Launcher:
        if isinstance(tactic, Library):
            return library.bind(self, tensors)
        if isinstance(tactic, FewTokens):
            return few_tokens.bind(self, tactic, functions, tensors, workspace, early, windowed)
        return many_tokens.bind(self, tactic, functions, tensors)
