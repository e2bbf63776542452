"""Cases of a linear layer with attention's first part in its epilogue (`joined`), and of what is left of attention.

The linear's sums are exact, so that both sides make codes of the same q, k and v."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fp8.plugins.attention import cases, joined
from fp8.plugins.attention.cases import Batch, whole
from fp8.plugins.attention.plugin import INPUTS as OF_ATTENTION
from fp8.plugins.attention.plugin import Attention, AttentionTactic
from fp8.plugins.base import Case, Kernel, Launcher, StepShape, Tensor
from fp8.plugins.gemm import many_tokens
from fp8.plugins.gemm.cases import OPERANDS, Types, apart, exact_operands
from fp8.plugins.gemm.many_tokens import ManyTokens
from fp8.plugins.gemm.plugin import Gemm

if TYPE_CHECKING:
    from fp8.plugins.cuda import Function

INPUTS = ("x", "w", "x_scale", "w_scale", "bias", *OF_ATTENTION[1:])
K = 512


@dataclass(frozen=True)
class JoinedTactic:
    linear: ManyTokens
    attention: AttentionTactic


@dataclass(frozen=True)
class LinearAttention(Attention):
    """The linear's inputs and attention's but for qkv -> attention's output."""

    name: ClassVar[str] = "linear_attention"
    linear: Gemm = field(default_factory=Gemm)

    def cache_places(self) -> list[tuple[int, int]]:
        return [(INPUTS.index("key_cache"), INPUTS.index("value_cache"))]

    def infer(self, inputs: Types) -> tuple[Tensor, ...]:
        return super().infer(apart(self.linear, inputs)[1] if len(inputs) == len(INPUTS) else inputs)

    def check(self, inputs: Types) -> None:
        super().check(apart(self.linear, inputs)[1])

    def reference(self, *inputs: torch.Tensor | None, step: StepShape) -> tuple[torch.Tensor, ...]:
        (qkv,) = self.linear.reference(*inputs[:OPERANDS], step=step)
        return super().reference(qkv, *inputs[OPERANDS:], step=step)

    def tactics(self, inputs: Types, tokens: int) -> list[JoinedTactic]:  # type: ignore[override]
        """Large tiles first."""
        operands, given = apart(self.linear, inputs)
        problem = many_tokens.problem(self.linear, operands)
        every = sorted(many_tokens.enumerate_tactics(problem, tokens), key=lambda t: -t.BLOCK_M)
        attention = super().tactics(given, tokens)[0]
        return [JoinedTactic(t, attention) for t in every if joined.kernel(self, given, self.linear, operands, t)]

    def tactic(self, fields: dict[str, Any]) -> JoinedTactic:  # type: ignore[override]
        return JoinedTactic(ManyTokens(**fields["linear"]), AttentionTactic(**fields["attention"]))

    def kernels(self, tactic: JoinedTactic, inputs: Types) -> tuple[Kernel, ...]:  # type: ignore[override]
        operands, given = apart(self.linear, inputs)
        front = joined.kernel(self, given, self.linear, operands, tactic.linear)
        assert front is not None
        return (front, *super().kernels(tactic.attention, given))

    def workspace(self, tactic: JoinedTactic, inputs: Types, max_tokens: int, max_sequences: int) -> int:  # type: ignore[override]
        return super().workspace(tactic.attention, apart(self.linear, inputs)[1], max_tokens, max_sequences)

    def bind(  # type: ignore[override]
        self,
        tactic: JoinedTactic,
        functions: Sequence[Function],
        tensors: Sequence[torch.Tensor | None],
        workspace: torch.Tensor | None,
    ) -> Launcher:
        operands, x = tensors[:OPERANDS], tensors[0]
        assert x is not None
        width = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        qkv = x.new_full((len(x), width), torch.nan, dtype=getattr(torch, self.linear.out_dtype))
        front, *of_attention = functions
        fronts, behind = self.bind_joined(
            tactic.attention, of_attention, [qkv, *tensors[OPERANDS:]], workspace,
            self.linear, [(tactic.linear, front)], [*operands, qkv],
        )  # fmt: skip

        def run(step: StepShape) -> None:
            assert fronts[0] is not None
            fronts[0](step)
            behind(step)

        return run


def joined_case(
    name: str, sequences: Sequence[tuple[int, int]], kind: str = "fp8", heads: tuple[int, int] = (8, 2), **options: Any
) -> Case:
    """kind: of the linear; options: as `cases.case` takes them."""
    alone = cases.case(name, list(sequences), heads, **options)
    attention: Attention = alone.plugin  # type: ignore[assignment]
    dtype = options.get("dtype", "bfloat16")
    fields = {**attention.attributes(), "linear": Gemm(dtype)}
    batch, n = Batch(tuple(sequences)), (heads[0] + 2 * heads[1]) * attention.head_dim

    def make(generator: torch.Generator, device: str) -> list[torch.Tensor | None]:
        front = exact_operands(kind, batch.step.tokens, n, K, generator, device)
        return [*front, *alone.make(generator, device)[1:]]

    flops = alone.flops + 2 * batch.step.tokens * n * K
    return replace(
        alone, name=f"behind {kind} {dtype}: {alone.name}", plugin=LinearAttention(**fields), make=make, flops=flops
    )


def cases_of_kinds() -> list[Case]:
    found = [joined_case("mixed", cases.MIXED, head_dim=d, fp8=fp8) for d in (64, 128) for fp8 in (True, False)]
    found += [joined_case("mixed", cases.MIXED, kind) for kind in ("rowwise", "16 bits")]
    found += [
        joined_case("mixed", cases.MIXED, dtype="float16"),
        joined_case("no rotary", cases.MIXED, rotary_dim=0),
        joined_case("rotary 40", cases.CHUNKS, rotary_dim=40),
        joined_case("empty sequence", [(9, 0), (70, 70)]),
        joined_case("several", whole(65, 2, 128, 300, 129), heads=(16, 16)),
        joined_case("chunks", cases.CHUNKS, heads=(8, 1), quant_out=False),
        joined_case("many", [*((1, n) for n in range(1, 150)), *whole(*range(2, 80))], heads=(4, 2), head_dim=64),
    ]
    return [*found, joined_case("8 x 1024", whole(*[1024] * 8), heads=(32, 8))]


CASES = cases_of_kinds()
