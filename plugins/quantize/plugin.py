"""quantize: a 16-bit activation to float8_e4m3fn, with a calibrated scale or one per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fp8.plugins.base import Kernel, Launcher, Tensor
from fp8.plugins.quantize.launch import RowPlugin, RowTactic, quantize_kernel, quantize_launch, quantize_tactics
from fp8.plugins.quantize.types import DTYPES, check_quant, check_rows, check_tensor, outputs, scaled

if TYPE_CHECKING:
    import torch

    from fp8.plugins.cuda import Function


@dataclass(frozen=True)
class Quantize(RowPlugin):
    """x DT [T, K], scale f32 [1] (quant "static") or [T] (quant "from_amax") -> y e4m3 [T, K], y_scale f32 [T] (quant
    "per_token" and "from_amax") or [T, K / 128] (quant "block").

    y = e4m3(clamp(x / scale, +-448)); per token, scale = max(min(amax, scale_ub) / 448, 1 / (448 * 512)), and
    scale_ub = 0 sets no bound. "from_amax" is the same with amax given in the place of the scale: the amax of rows of
    which x is a part. "block" is the same for every 128 values of a row, without a bound.
    """

    name: ClassVar[str] = "quantize"
    quant: str = "static"
    scale_ub: float = 0.0

    def infer(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        x, scale = (*inputs, None)[:2]
        x = check_tensor("x", x, DTYPES, (None, None))
        check_quant(self.quant, scale, ("static", "per_token", "block", "from_amax"))
        return outputs(self.quant, x.dtype, *x.shape)

    def reference(self, *inputs: torch.Tensor | None, step: object) -> tuple[torch.Tensor, ...]:
        from fp8.plugins.quantize.reference import finish

        x, scale = (*inputs, None)[:2]
        assert x is not None
        return finish(x.float(), self.quant, scale, self.scale_ub, x.dtype)

    def check(self, inputs: Sequence[Tensor | None]) -> None:
        self.infer(inputs)
        x = inputs[0]
        assert x is not None
        check_rows("K", x.dtype, x.shape[1], 65536)

    def tactics(self, inputs: Sequence[Tensor | None], tokens: int) -> list[RowTactic]:
        self.check(inputs)
        return quantize_tactics(inputs[0].shape[1], self.quant, tokens)

    def kernels(self, tactic: RowTactic, inputs: Sequence[Tensor | None]) -> tuple[Kernel, ...]:
        x = inputs[0]
        return (quantize_kernel(tactic, x.shape[1], x.dtype, "", False, self.quant, self.scale_ub),)

    def bind(
        self,
        tactic: RowTactic,
        functions: Sequence[Function],
        tensors: Sequence[torch.Tensor | None],
        workspace: torch.Tensor | None,
    ) -> Launcher:
        given = len(tensors) - (2 if scaled(self.quant) else 1)  # the scale may be left out
        x, scale = (*tensors[:given], None)[:2]
        return quantize_launch(tactic, functions[0], x.shape[1], x, scale, tensors[given:])
