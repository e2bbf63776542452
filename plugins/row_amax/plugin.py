"""row_amax: the largest magnitude of each row of an activation, before it is quantized by a scale for all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fp8.plugins.act_quant.plugin import ActQuant
from fp8.plugins.base import Kernel, Launcher, Tensor
from fp8.plugins.quantize.launch import AMAX, RowPlugin, RowTactic, quantize_kernel, quantize_launch, whole_rows
from fp8.plugins.quantize.types import DTYPES, check_tensor

if TYPE_CHECKING:
    import torch

    from fp8.plugins.cuda import Function


@dataclass(frozen=True)
class RowAmax(RowPlugin):
    """x DT [T, 2F] = [gate | up] (gated) or [T, F] -> amax f32 [T] of |activation(gate) * up|, |activation(x)|, or
    (with activation "") |x|, computed in float32."""

    name: ClassVar[str] = "row_amax"
    activation: str = ""
    gated: bool = False

    @property
    def _act(self) -> ActQuant:
        """The plugin that computes the same values, for what it asks of x."""
        return ActQuant(self.activation or "silu", self.gated)

    def infer(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        x = check_tensor("x", inputs[0], DTYPES, (None, None))
        self._act.infer([x, None])
        return (Tensor("float32", (x.shape[0],)),)

    def reference(self, *inputs: torch.Tensor | None, step: object) -> tuple[torch.Tensor, ...]:
        from fp8.plugins.act_quant.reference import hidden

        (x,) = inputs
        assert x is not None
        y = hidden(x, self.activation, self.gated) if self.activation else x.float()
        return (y.abs().amax(1),)

    def check(self, inputs: Sequence[Tensor | None]) -> None:
        self._act.check([inputs[0], None])

    def tactics(self, inputs: Sequence[Tensor | None], tokens: int) -> list[RowTactic]:
        self.check(inputs)
        return whole_rows(self._act.width(inputs[0]), tokens)

    def kernels(self, tactic: RowTactic, inputs: Sequence[Tensor | None]) -> tuple[Kernel, ...]:
        x = inputs[0]
        return (quantize_kernel(tactic, self._act.width(x), x.dtype, self.activation, self.gated, AMAX, 0.0),)

    def bind(
        self,
        tactic: RowTactic,
        functions: Sequence[Function],
        tensors: Sequence[torch.Tensor | None],
        workspace: torch.Tensor | None,
    ) -> Launcher:
        x, amax = tensors
        width = x.shape[1] // 2 if self.gated else x.shape[1]
        return quantize_launch(tactic, functions[0], width, x, None, [amax])
