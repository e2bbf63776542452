"""all_reduce: the sum or the maximum over all ranks of what each of them has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fp8.plugins.base import Communicator, Kernel, Launcher, Plugin, PluginError, StepShape, Tensor

if TYPE_CHECKING:
    import torch

    from fp8.plugins.cuda import Function

OPERATIONS = ("sum", "max")
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class AllReduceTactic:
    """`method` "nccl" is the library's; others are kernels of this folder."""

    method: str = "nccl"


@dataclass(frozen=True)
class AllReduce(Plugin):
    """x DT [T, ...] of every rank, all of one shape -> y DT [T, ...], the same on every rank.

    "sum": added in float32 in the order of the ranks, rounded once to DT. "max": the largest. NCCL adds in an order of
    its own, and with more than two ranks rounds in between.
    """

    name: ClassVar[str] = "all_reduce"
    collective: ClassVar[bool] = True
    operation: str = "sum"

    def infer(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        (x,) = inputs
        if self.operation not in OPERATIONS:
            raise PluginError(f"operation is {self.operation!r}, expected {' or '.join(map(repr, OPERATIONS))}")
        if x is None or x.dtype not in DTYPES or not x.shape:
            raise PluginError(f"x is {x and x.dtype}, expected rows of {' or '.join(DTYPES)}")
        return (x,)

    def reference(  # type: ignore[override]
        self, *inputs: torch.Tensor | None, step: StepShape, comm: Communicator
    ) -> tuple[torch.Tensor, ...]:
        from fp8.plugins.all_reduce.reference import all_reduce

        (x,) = inputs
        assert x is not None
        return (all_reduce(x, self.operation, comm),)

    def check(self, inputs: Sequence[Tensor | None]) -> None:
        self.infer(inputs)

    def tactics(self, inputs: Sequence[Tensor | None], tokens: int) -> list[AllReduceTactic]:
        self.check(inputs)
        return [AllReduceTactic()]

    def tactic(self, fields: dict[str, Any]) -> AllReduceTactic:
        return AllReduceTactic(**fields)

    def kernels(self, tactic: AllReduceTactic, inputs: Sequence[Tensor | None]) -> tuple[Kernel, ...]:
        return ()

    def bind(  # type: ignore[override]
        self,
        tactic: AllReduceTactic,
        functions: Sequence[Function],
        tensors: Sequence[torch.Tensor | None],
        workspace: torch.Tensor | None,
        comm: Any,
    ) -> Launcher:
        """`comm` is the GPU's communicator: `nccl_all_reduce(x, y, operation)` enqueues on the current stream."""
        x, y = tensors

        def run(step: StepShape) -> None:
            if step.tokens:
                comm.nccl_all_reduce(x[: step.tokens], y[: step.tokens], self.operation)

        return run
