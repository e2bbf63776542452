"""Cases of a linear layer that adds a residual (`summed`), and of the norm of the sum after it.

The linear's sums are exact, so that both sides round the same numbers, and its sum with the residual has the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fp8.plugins.base import Case, Kernel, Launcher, StepShape, Tensor
from fp8.plugins.gemm import many_tokens
from fp8.plugins.gemm.cases import OPERANDS, Types, apart, exact_operands
from fp8.plugins.gemm.many_tokens import ManyTokens
from fp8.plugins.gemm.plugin import Gemm
from fp8.plugins.norm_quant import cases, summed
from fp8.plugins.norm_quant.plugin import NormQuant
from fp8.plugins.quantize.launch import RowTactic

if TYPE_CHECKING:
    from fp8.plugins.cuda import Function

OFFERED = 8  # tactics of the linear, of all sizes


@dataclass(frozen=True)
class SummedTactic:
    linear: ManyTokens
    norm: RowTactic


@dataclass(frozen=True)
class LinearNorm(NormQuant):
    """The linear's inputs and the norm's but for x -> the norm's outputs."""

    name: ClassVar[str] = "linear_norm"
    linear: Gemm = field(default_factory=Gemm)

    @property
    def alone(self) -> NormQuant:
        return NormQuant(**{name: value for name, value in vars(self).items() if name != "linear"})

    def infer(self, inputs: Types) -> tuple[Tensor, ...]:
        return self.alone.infer(apart(self.linear, inputs)[1])

    def check(self, inputs: Types) -> None:
        self.alone.check(apart(self.linear, inputs)[1])

    def reference(self, *inputs: torch.Tensor | None, step: object) -> tuple[torch.Tensor, ...]:
        (y,) = self.linear.reference(*inputs[:OPERANDS], step=step)  # type: ignore[arg-type]
        return self.alone.reference(y, *inputs[OPERANDS:], step=step)

    def tactics(self, inputs: Types, tokens: int) -> list[SummedTactic]:  # type: ignore[override]
        """Some of all sizes of tiles, with and without clusters."""
        operands, given = apart(self.linear, inputs)
        every = many_tokens.enumerate_tactics(many_tokens.problem(self.linear, operands), tokens)
        fit = [t for t in every if summed.kernel(self.linear, operands, t)]
        norm = summed.norm_of_sum(self.alone).tactics([given[0], None, *given[2:]], tokens)[0]
        return [SummedTactic(t, norm) for t in fit[:: -(-len(fit) // OFFERED)]]

    def tactic(self, fields: dict[str, Any]) -> SummedTactic:  # type: ignore[override]
        return SummedTactic(ManyTokens(**fields["linear"]), RowTactic(**fields["norm"]))

    def kernels(self, tactic: SummedTactic, inputs: Types) -> tuple[Kernel, ...]:  # type: ignore[override]
        operands, given = apart(self.linear, inputs)
        front = summed.kernel(self.linear, operands, tactic.linear)
        assert front is not None
        return front, *summed.norm_of_sum(self.alone).kernels(tactic.norm, [given[0], None, *given[2:]])

    def bind(  # type: ignore[override]
        self,
        tactic: SummedTactic,
        functions: Sequence[Function],
        tensors: Sequence[torch.Tensor | None],
        workspace: torch.Tensor | None,
    ) -> Launcher:
        operands, residual = tensors[:OPERANDS], tensors[OPERANDS]
        assert residual is not None
        y = torch.empty_like(residual)  # nobody writes it
        front, *behind = functions
        (first,), second = self.alone.bind_summed(
            tactic.norm, behind, [y, *tensors[OPERANDS:]], self.linear, [(tactic.linear, front)], [*operands, y]
        )

        def run(step: StepShape) -> None:
            assert first is not None
            first(step)
            second(step)

        return run


def summed_case(
    tokens: int,
    hidden: int,
    kind: str = "fp8",
    quant: str = "static",
    k: int = 512,
    bias: bool = False,
    **options: Any,
) -> Case:
    """kind: of the linear; options: as `cases.case` takes them."""
    alone = cases.case(tokens, hidden, quant, **options)
    dtype = str(options.get("dtype", torch.bfloat16)).removeprefix("torch.")

    def make(generator: torch.Generator, device: str) -> list[torch.Tensor | None]:
        front = exact_operands(kind, tokens, hidden, k, generator, device)
        if bias:
            front[-1] = torch.randint(-8, 9, (hidden,), generator=generator, device=device).float()
        return [*front, *alone.make(generator, device)[1:]]

    name = f"behind {kind}{' bias' if bias else ''} k {k}: {alone.name}"
    plugin, flops = LinearNorm(**alone.plugin.attributes(), linear=Gemm(dtype)), 2 * tokens * hidden * k
    return replace(alone, name=name, plugin=plugin, make=make, flops=flops, bytes=alone.bytes + (tokens + hidden) * k)


CASES = [
    *(summed_case(tokens, 384) for tokens in (1, 63, 65, 129, 300)),
    *(summed_case(300, 1000, kind) for kind in ("rowwise", "16 bits")),
    summed_case(300, 1024, quant="block"),
    summed_case(129, 520, quant="per_token"),
    summed_case(515, 1544, quant="none", norm="layer", bias=True, dtype=torch.float16),
    summed_case(1500, 4096, k=4096),
    summed_case(2200, 4096, k=1024),
]
