"""all_gather: the ranks' columns side by side."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fp8.plugins.all_reduce.region import MOST_BLOCKS, MOST_WORLD, PUSH_SLOT, push_constants
from fp8.plugins.all_reduce.tactics import ITEM_BYTES, UNIT
from fp8.plugins.base import Communicator, Kernel, Launcher, Plugin, PluginError, StepShape, Tensor

if TYPE_CHECKING:
    import torch

    from fp8.plugins.all_reduce.region import Regions
    from fp8.plugins.cuda import Function

BUCKETS = (16, 64)  # rows
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class AllGatherTactic:
    """`method` "nccl" is the library's, "push" push_gather.cu, in which each of `threads` moves `units` of 16 bytes."""

    method: str = "nccl"
    threads: int = 0
    units: int = 0

    @property
    def over_peers(self) -> bool:
        return self.method != "nccl"

    @property
    def block_bytes(self) -> int:
        return self.threads * self.units * UNIT


NCCL = AllGatherTactic()
PUSHES = [AllGatherTactic("push", threads, units) for threads, units in ((256, 1), (512, 1), (512, 2), (512, 4))]
assert all(t.block_bytes <= PUSH_SLOT for t in PUSHES)


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
        """The smallest blocks that hold all rows are the fastest."""
        self.check(inputs)
        parts = [part * ITEM_BYTES[inputs[0].dtype] for part in self.parts]
        if not 2 <= len(parts) <= MOST_WORLD or any(part % UNIT for part in parts):
            return [NCCL]
        return [*(t for t in PUSHES if tokens * max(parts) <= MOST_BLOCKS * t.block_bytes), NCCL]

    def buckets(self, max_tokens: int) -> list[int]:
        return sorted({end for end in BUCKETS if end < max_tokens} | {max_tokens})

    def tactic(self, fields: dict[str, Any]) -> AllGatherTactic:
        return AllGatherTactic(**fields)

    def kernels(self, tactic: AllGatherTactic, inputs: Sequence[Tensor | None]) -> tuple[Kernel, ...]:
        if not tactic.over_peers:
            return ()
        units = ", ".join(str(part * ITEM_BYTES[inputs[0].dtype] // UNIT) for part in self.parts)
        own = (("PARTS", units), ("THREADS", tactic.threads), ("HELD", tactic.units))
        unused = (("DTYPE", 0), ("MAXIMUM", 0), ("FP8", 0))
        constants = (*push_constants(len(self.parts)), *own, *unused)
        return (Kernel("all_gather", "push_gather.cu", "all_gather", constants),)

    def bind(  # type: ignore[override]
        self,
        tactic: AllGatherTactic,
        functions: Sequence[Function],
        tensors: Sequence[torch.Tensor | None],
        workspace: torch.Tensor | None,
        comm: Any,
    ) -> Launcher:
        """`comm` is the GPU's communicator: `nccl_all_gather(x, y, parts)` enqueues on the current stream, `regions`
        is the ranks' peer memory, None where there is none."""
        x, y = tensors
        if tactic.over_peers and comm.regions is not None:
            return self._bind_push(tactic, functions[0], x, y, comm.regions)

        def run(step: StepShape) -> None:
            if step.logits_rows:
                comm.nccl_all_gather(x[: step.logits_rows], y[: step.logits_rows], self.parts)

        return run

    def _bind_push(
        self, tactic: AllGatherTactic, function: Function, x: torch.Tensor, y: torch.Tensor, regions: Regions
    ) -> Launcher:
        from fp8.plugins.cuda import Launch

        largest, own = max(self.parts) * x.element_size(), x[:1].nbytes // UNIT
        rows, units = ctypes.c_uint32(0), ctypes.c_uint32(0)
        arguments = [x, y, regions.argument, ctypes.c_uint32(regions.rank), rows, units]
        launch = Launch(function, tactic.threads, arguments)

        def run(step: StepShape) -> None:
            if step.logits_rows:
                rows.value, units.value = step.logits_rows, step.logits_rows * own
                launch(-(-step.logits_rows * largest // tactic.block_bytes))

        return run
