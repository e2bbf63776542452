"""all_reduce: the sum or the maximum over all ranks of what each of them has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fp8.plugins.all_reduce.tactics import AllReduceTactic, candidates, kernels
from fp8.plugins.base import SCALE_BLOCK, Communicator, Kernel, Launcher, Plugin, PluginError, StepShape, Tensor

if TYPE_CHECKING:
    import torch

    from fp8.plugins.cuda import Function

OPERATIONS = ("sum", "max")
BUCKETS = (16, 64, 256, 512, 1024)  # rows
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class AllReduce(Plugin):
    """x DT [T, ...] of every rank, all of one shape -> y DT [T, ...], the same on every rank.

    "sum": added in float32 in the order of the ranks, rounded once to DT. "max": the largest. NCCL adds in an order of
    its own, and with more than two ranks rounds in between. `world`: how many ranks there are, 0 if that is not known;
    then NCCL is the only tactic.

    Steps of `fp8_tokens` rows and more (0: none) exchange e4m3 with a float32 scale for 128 channels: each rank's part
    is quantized, as is the sum among more than two ranks.
    """

    name: ClassVar[str] = "all_reduce"
    collective: ClassVar[bool] = True
    operation: str = "sum"
    world: int = 0
    fp8_tokens: int = 0

    def infer(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        (x,) = inputs
        if self.operation not in OPERATIONS:
            raise PluginError(f"operation is {self.operation!r}, expected {' or '.join(map(repr, OPERATIONS))}")
        if x is None or x.dtype not in DTYPES or not x.shape:
            raise PluginError(f"x is {x and x.dtype}, expected rows of {' or '.join(DTYPES)}")
        if self.fp8_tokens:
            self._check_fp8(x)
        return (x,)

    def _check_fp8(self, x: Tensor) -> None:
        if self.operation != "sum":
            raise PluginError("fp8_tokens is given, but a maximum is exchanged as it is")
        if len(x.shape) != 2 or not isinstance(x.shape[1], int) or x.shape[1] % SCALE_BLOCK:
            raise PluginError(
                f"x is {list(x.shape)}, expected rows of a multiple of {SCALE_BLOCK} channels, which share a scale on "
                "the wire; build without --fp8_all_reduce"
            )

    def travels_in_fp8(self, rows: int) -> bool:
        return 0 < self.fp8_tokens <= rows

    def reference(  # type: ignore[override]
        self, *inputs: torch.Tensor | None, step: StepShape, comm: Communicator
    ) -> tuple[torch.Tensor, ...]:
        from fp8.plugins.all_reduce.reference import all_reduce, sum_of_e4m3

        (x,) = inputs
        assert x is not None
        return (sum_of_e4m3(x, comm) if self.travels_in_fp8(len(x)) else all_reduce(x, self.operation, comm),)

    def check(self, inputs: Sequence[Tensor | None]) -> None:
        self.infer(inputs)
        if self.fp8_tokens and inputs[0].dtype == "float32":
            raise PluginError("x is float32, but the kernels quantize bfloat16 or float16; choose a 16-bit dtype")

    def tactics(self, inputs: Sequence[Tensor | None], tokens: int) -> list[AllReduceTactic]:
        self.check(inputs)
        return candidates(inputs[0], tokens, self.world, self.travels_in_fp8(tokens))

    def buckets(self, max_tokens: int) -> list[int]:
        """A bucket is in FP8 or it is not."""
        ends = {*BUCKETS, self.fp8_tokens - 1}
        return sorted({end for end in ends if 0 < end < max_tokens} | {max_tokens})

    def tactic(self, fields: dict[str, Any]) -> AllReduceTactic:
        return AllReduceTactic(**fields)

    def kernels(self, tactic: AllReduceTactic, inputs: Sequence[Tensor | None]) -> tuple[Kernel, ...]:
        return kernels(tactic, inputs[0].dtype, self.operation, self.world)

    def bind(  # type: ignore[override]
        self,
        tactic: AllReduceTactic,
        functions: Sequence[Function],
        tensors: Sequence[torch.Tensor | None],
        workspace: torch.Tensor | None,
        comm: Any,
    ) -> Launcher:
        """`comm` is the GPU's communicator: `nccl_all_reduce(x, y, operation)` enqueues on the current stream,
        `regions` is the ranks' peer memory, None where there is none."""
        from fp8.plugins.all_reduce.launch import bind

        x, y = tensors
        return bind(tactic, functions, x, y, self.operation, comm)
