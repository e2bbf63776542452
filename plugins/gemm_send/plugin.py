"""gemm_send: a linear layer that sends its rows to all ranks as it has them; their sum does not wait for its end."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeGuard

from fp8.plugins.all_reduce.region import SENT_ROWS, sent_area, sent_constants
from fp8.plugins.base import Communicator, Kernel, Launcher, PluginError, StepShape, Tensor
from fp8.plugins.gemm import few_tokens
from fp8.plugins.gemm.few_tokens import FewTokens
from fp8.plugins.gemm.linear import Tactic
from fp8.plugins.gemm.plugin import Gemm

if TYPE_CHECKING:
    import torch

    from fp8.plugins.cuda import Function


@dataclass(frozen=True)
class GemmSend(Gemm):
    """gemm with a 16-bit y. Steps of up to SENT_ROWS rows leave it in the memory of all `world` ranks instead, as
    exchange `slot` of `region.sent_slot`, where the `all_reduce_norm_quant` of that slot, which must follow, takes
    it."""

    name: ClassVar[str] = "gemm_send"
    collective: ClassVar[bool] = True
    world: int = 0
    slot: int = 0

    @property
    def timed_as(self) -> Gemm:
        return Gemm(self.out_dtype, self.rows, self.accumulation)

    def infer(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        (y,) = super().infer(inputs)
        if self.rows != "T" or y.dtype == "float32" or int(y.shape[1]) % 8:
            raise PluginError(f"y is {y.dtype} {list(y.shape)}, expected 16-bit rows of whole groups of 8; use gemm")
        return (y,)

    def reference(  # type: ignore[override]
        self, *inputs: torch.Tensor | None, step: StepShape, comm: Communicator
    ) -> tuple[torch.Tensor, ...]:
        return super().reference(*inputs, step=step)

    def tactics(self, inputs: Sequence[Tensor | None], tokens: int) -> list[Tactic]:
        found = self.timed_as.tactics(inputs, tokens)
        return found if tokens > SENT_ROWS else [t for t in found if isinstance(t, FewTokens)]

    def legal(self, tactic: Tactic, inputs: Sequence[Tensor | None], tokens: int) -> bool:
        return (tokens > SENT_ROWS or isinstance(tactic, FewTokens)) and super().legal(tactic, inputs, tokens)

    def kernels(self, tactic: Tactic, inputs: Sequence[Tensor | None]) -> tuple[Kernel, ...]:
        """gemm's; before it, for as few rows as are sent, one that sends, for ranks that have peer memory."""
        plain = super().kernels(tactic, inputs)
        if not _sends(tactic):
            return plain
        return (*(Kernel(k.plugin, k.source, k.entry, (*k.constants, *self._constants)) for k in plain), *plain)

    @property
    def _constants(self) -> tuple[tuple[str, int | str], ...]:
        return (("SEND", 1), *sent_constants(self.world))

    def bind(  # type: ignore[override]
        self,
        tactic: Tactic,
        functions: Sequence[Function],
        tensors: Sequence[torch.Tensor | None],
        workspace: torch.Tensor | None,
        early: bool = False,
        windowed: bool = False,
        comm: Any = None,
    ) -> Launcher:
        """`comm`: as all_reduce's; without its `regions`, and without one, nothing is sent."""
        if not _sends(tactic):
            return super().bind(tactic, functions, tensors, workspace, early, windowed)
        if comm is None or comm.regions is None:
            return super().bind(tactic, functions[1:], tensors, workspace, early, windowed)
        regions = comm.regions
        sent = [regions.argument, ctypes.c_uint32(regions.rank), sent_area(self.world, self.slot)]
        return few_tokens.bind(self, tactic, functions[:1], tensors, workspace, early, windowed, sent)


def _sends(tactic: Tactic) -> TypeGuard[FewTokens]:
    return isinstance(tactic, FewTokens) and tactic.TOKENS <= SENT_ROWS
