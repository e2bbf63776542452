"""all_gather: the ranks' columns side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fp8.plugins.base import Communicator, Kernel, Launcher, Plugin, PluginError, StepShape, Tensor

if TYPE_CHECKING:
    import torch

    from fp8.plugins.cuda import Function

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class AllGatherTactic:
    """`method` "nccl" is the library's; others are kernels of this folder."""

    method: str = "nccl"
    over_peers: ClassVar[bool] = False  # of this host's GPUs, into their memory


@dataclass(frozen=True)
class AllGather(Plugin):
    """x DT [rows, parts[rank]] -> y DT [rows, sum(parts)]: the ranks' columns in the order of the ranks, the same on
    every rank. `parts` may differ."""

    name: ClassVar[str] = "all_gather"
    collective: ClassVar[bool] = True
    parts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))

    def infer(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        (x,) = inputs
        if x is None or x.dtype not in DTYPES or len(x.shape) != 2 or x.shape[1] not in self.parts:
            found = f"{x.dtype} {list(x.shape)}" if x else "absent"
            raise PluginError(f"x is {found}, expected rows of one of {list(self.parts)} columns")
        return (Tensor(x.dtype, (x.shape[0], sum(self.parts))),)

    def reference(  # type: ignore[override]
        self, *inputs: torch.Tensor | None, step: StepShape, comm: Communicator
    ) -> tuple[torch.Tensor, ...]:
        import torch

        (x,) = inputs
        assert x is not None
        return (torch.cat(comm.all_gather(x), -1),)

    def check(self, inputs: Sequence[Tensor | None]) -> None:
        self.infer(inputs)

    def tactics(self, inputs: Sequence[Tensor | None], tokens: int) -> list[AllGatherTactic]:
        self.check(inputs)
        return [AllGatherTactic()]

    def tactic(self, fields: dict[str, Any]) -> AllGatherTactic:
        return AllGatherTactic(**fields)

    def kernels(self, tactic: AllGatherTactic, inputs: Sequence[Tensor | None]) -> tuple[Kernel, ...]:
        return ()

    def bind(  # type: ignore[override]
        self,
        tactic: AllGatherTactic,
        functions: Sequence[Function],
        tensors: Sequence[torch.Tensor | None],
        workspace: torch.Tensor | None,
        comm: Any,
    ) -> Launcher:
        """`comm` is the GPU's communicator: `nccl_all_gather(x, y, parts)` enqueues on the current stream."""
        x, y = tensors

        def run(step: StepShape) -> None:
            if step.logits_rows:
                comm.nccl_all_gather(x[: step.logits_rows], y[: step.logits_rows], self.parts)

        return run
