"""A linear layer that sends its rows and the norm that takes their sum, as one op to be checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fp8.plugins.all_reduce_norm_quant.plugin import AllReduceNormQuant, AllReduceNormQuantTactic
from fp8.plugins.base import Communicator, Kernel, Launcher, Plugin, StepShape, Tensor, types_of
from fp8.plugins.gemm.cases import OPERANDS, apart
from fp8.plugins.gemm_send.plugin import GemmSend

if TYPE_CHECKING:
    import torch

    from fp8.plugins.cuda import Function

DEPTH = 256  # columns of w


@dataclass(frozen=True)
class SentSum(Plugin):
    """x DT [T, DEPTH] and w DT [H, DEPTH] of every rank, no scales, no bias, residual DT [T, H], and the norm's other
    inputs -> its outputs. A launch makes two exchanges of the same values, as areas are taken in turn."""

    name: ClassVar[str] = "sent_sum"
    collective: ClassVar[bool] = True
    world: int
    quant: str = "static"

    @property
    def linear(self) -> GemmSend:
        return GemmSend(world=self.world)

    @property
    def norm(self) -> AllReduceNormQuant:
        return AllReduceNormQuant(quant=self.quant, world=self.world, slot=0)

    def infer(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        return self.norm.infer(apart(self.linear, inputs)[1])

    def reference(  # type: ignore[override]
        self, *inputs: torch.Tensor | None, step: StepShape, comm: Communicator
    ) -> tuple[torch.Tensor, ...]:
        (part,) = self.linear.reference(*inputs[:OPERANDS], step=step, comm=comm)
        return self.norm.reference(part, *inputs[OPERANDS:], step=step, comm=comm)

    def tactics(self, inputs: Sequence[Tensor | None], tokens: int) -> list[AllReduceNormQuantTactic]:
        return self.norm.tactics(apart(self.linear, inputs)[1], tokens)

    def kernels(self, tactic: AllReduceNormQuantTactic, inputs: Sequence[Tensor | None]) -> tuple[Kernel, ...]:
        return (
            *self.linear.kernels(self._tile(inputs), inputs[:OPERANDS]),
            *self.norm.kernels(tactic, apart(self.linear, inputs)[1]),
        )

    def bind(  # type: ignore[override]
        self,
        tactic: AllReduceNormQuantTactic,
        functions: Sequence[Function],
        tensors: Sequence[torch.Tensor | None],
        workspace: torch.Tensor | None,
        comm: Any,
    ) -> Launcher:
        x, w = tensors[:2]
        assert x is not None and w is not None
        part, tile = x.new_empty(len(x), len(w)), self._tile(types_of(tensors[:OPERANDS]))
        launches: list[Launcher] = []
        for slot in (0, 1):
            linear, norm = dataclasses.replace(self.linear, slot=slot), dataclasses.replace(self.norm, slot=slot)
            launches.append(linear.bind(tile, functions[:2], [*tensors[:OPERANDS], part], None, comm=comm))
            launches.append(norm.bind(tactic, functions[2:], [part, *tensors[OPERANDS:]], None, comm=comm))

        def run(step: StepShape) -> None:
            for launch in launches:
                launch(step)

        return run

    def _tile(self, inputs: Sequence[Tensor | None]) -> Any:
        return self.linear.tactics(inputs[:OPERANDS], int(inputs[0].shape[0]))[0]  # type: ignore[union-attr]


def whole(draw: torch.Generator, *shape: int) -> torch.Tensor:
    """-1, 0 and 1 in bfloat16: DEPTH products of them add up to whole numbers that it holds."""
    import torch

    return torch.randint(-1, 2, shape, device="cuda", generator=draw).bfloat16()
