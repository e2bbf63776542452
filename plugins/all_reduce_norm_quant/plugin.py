"""all_reduce_norm_quant: the sum over all ranks, then norm_quant of it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fp8.plugins.all_reduce import launch
from fp8.plugins.all_reduce.plugin import AllReduce
from fp8.plugins.all_reduce.region import MOST_BLOCKS, PUSH_SLOT, SENT_ROWS, push_constants, sent_area, sent_constants
from fp8.plugins.all_reduce.tactics import NCCL, UNIT, AllReduceTactic
from fp8.plugins.base import Communicator, Kernel, Launcher, Plugin, PluginError, StepShape, Tensor
from fp8.plugins.norm_quant.plugin import NormQuant
from fp8.plugins.quantize.launch import RowTactic, whole_rows
from fp8.plugins.quantize.types import scaled

if TYPE_CHECKING:
    import torch

    from fp8.plugins.cuda import Function


@dataclass(frozen=True)
class AllReduceNormQuantTactic:
    """`row` is the norm's. Without `reduce` all is one kernel, push_norm.cu, or where the linear layer `sent` the rows,
    sent_norm.cu; else it is that all-reduce and then norm_quant."""

    row: RowTactic
    reduce: AllReduceTactic | None = None
    sent: bool = False

    @property
    def over_peers(self) -> bool:
        return self.reduce is None or self.reduce.over_peers


@dataclass(frozen=True)
class AllReduceNormQuant(NormQuant):
    """x DT [T, H] of every rank, and norm_quant's other inputs and outputs, with a residual: y = norm_quant(sum of the
    ranks' x, rounded to DT). `world` and `fp8_tokens` are all_reduce's; `slot` is that of the gemm_send that x comes
    from, -1 where x is another's."""

    name: ClassVar[str] = "all_reduce_norm_quant"
    collective: ClassVar[bool] = True
    residual: bool = True
    world: int = 0
    fp8_tokens: int = 0
    slot: int = -1

    @property
    def _reduce(self) -> AllReduce:
        return AllReduce("sum", self.world, self.fp8_tokens)

    def summed_by(self, before: Plugin) -> bool:
        return False  # the sum is of other ranks' rows, too

    def early_outputs(self, before: Plugin) -> tuple[int, ...]:
        """All, where the linear sends its rows: the norm waits for these and not for the linear (sent_norm.cu)."""
        return tuple(range(3 if scaled(self.quant) else 2)) if self.slot >= 0 else ()

    def infer(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        if not self.residual or self.gather:
            raise PluginError("all_reduce_norm_quant adds a residual, to every row")
        self._reduce.infer([inputs[0]])
        return super().infer(inputs)

    def reference(  # type: ignore[override]
        self, *inputs: torch.Tensor | None, step: StepShape, comm: Communicator
    ) -> tuple[torch.Tensor, ...]:
        x, *others = inputs
        (total,) = self._reduce.reference(x, step=step, comm=comm)
        return super().reference(total, *others, step=step)

    def check(self, inputs: Sequence[Tensor | None]) -> None:
        super().check(inputs)
        self._reduce.check([inputs[0]])

    def tactics(self, inputs: Sequence[Tensor | None], tokens: int) -> list[AllReduceNormQuantTactic]:  # type: ignore[override]
        self.check(inputs)
        rows = whole_rows(inputs[0].shape[1], tokens)
        if self.slot >= 0 and tokens <= SENT_ROWS:
            return [AllReduceNormQuantTactic(r, sent=True) for r in rows]
        apart = [AllReduceNormQuantTactic(rows[0], t) for t in self._reduce.tactics([inputs[0]], tokens)]
        if tokens > MOST_BLOCKS or apart[0].reduce == NCCL or self._reduce.travels_in_fp8(tokens):
            return apart
        fused = [AllReduceNormQuantTactic(r) for r in rows if r.threads * r.held * UNIT <= PUSH_SLOT]
        fused.sort(key=lambda t: t.row.held)
        return [*fused, *apart] if apart[0].reduce.method == "push" else [*apart, *fused]

    def buckets(self, max_tokens: int) -> list[int]:
        sent = {SENT_ROWS} if 0 <= SENT_ROWS < max_tokens and self.slot >= 0 else set()
        return sorted({*self._reduce.buckets(max_tokens), *sent})

    def tactic(self, fields: dict[str, Any]) -> AllReduceNormQuantTactic:  # type: ignore[override]
        reduce = fields.get("reduce")
        row, sent = RowTactic(**fields["row"]), fields.get("sent", False)
        return AllReduceNormQuantTactic(row, reduce and AllReduceTactic(**reduce), sent)

    def kernels(self, tactic: AllReduceNormQuantTactic, inputs: Sequence[Tensor | None]) -> tuple[Kernel, ...]:  # type: ignore[override]
        """norm_quant's, and before it, if there is one, that of the sum. Where the ranks have no peer memory, NCCL and
        norm_quant do the work of the one kernel."""
        (norm,) = super().kernels(tactic.row, inputs)
        if tactic.reduce is not None:
            return (*self._reduce.kernels(tactic.reduce, inputs[:1]), norm)
        if tactic.sent:
            constants = (*norm.constants, *sent_constants(self.world), ("MAXIMUM", 0))
            return (Kernel("all_reduce_norm_quant", "sent_norm.cu", "sent_norm", constants), norm)
        constants = (*norm.constants, *push_constants(self.world), ("MAXIMUM", 0), ("FP8", 0))
        return (Kernel("all_reduce_norm_quant", "push_norm.cu", "push_norm", constants), norm)

    def bind(  # type: ignore[override]
        self,
        tactic: AllReduceNormQuantTactic,
        functions: Sequence[Function],
        tensors: Sequence[torch.Tensor | None],
        workspace: torch.Tensor | None,
        comm: Any,
    ) -> Launcher:
        """`comm`: as all_reduce's."""
        if tactic.reduce is None and comm.regions is not None:
            return self._bind_one(tactic, functions[0], tensors, comm)
        total = tensors[-1]  # the rounded sum is done with before residual_out is written, row by row
        *before, norm = functions
        reduce = launch.bind(tactic.reduce or NCCL, before, tensors[0], total, "sum", comm)
        after = super().bind(tactic.row, [norm], [total, *tensors[1:]], workspace)

        def run(step: StepShape) -> None:
            reduce(step)
            after(step)

        return run

    def _bind_one(
        self, tactic: AllReduceNormQuantTactic, function: Function, tensors: Sequence[torch.Tensor | None], comm: Any
    ) -> Launcher:
        from fp8.plugins.cuda import Launch

        given = len(tensors) - (3 if scaled(self.quant) else 2)
        x, residual, weight, bias, scale, _ = self._padded(tensors[:given])
        y, *scales, residual_out = tensors[given:]
        regions = comm.regions
        arguments = [residual, weight, bias, scale, y, (*scales, None)[0], residual_out]
        peers = [regions.argument, ctypes.c_uint32(regions.rank)]
        if tactic.sent:
            launch = Launch(function, tactic.row.threads, [*arguments, *peers, sent_area(self.world, self.slot)])
        else:
            launch = Launch(function, tactic.row.threads, [x, *arguments, *peers])

        def run(step: StepShape) -> None:
            if step.tokens:
                launch(step.tokens)

        return run
