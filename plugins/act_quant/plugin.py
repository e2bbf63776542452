"""act_quant: the activation between an MLP's linears, gated or not, rounded or quantized once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fp8.plugins.base import Dim, Kernel, Launcher, PluginError, Tensor
from fp8.plugins.quantize.launch import RowPlugin, RowTactic, quantize_kernel, quantize_launch, quantize_tactics
from fp8.plugins.quantize.types import DTYPES, ROW_QUANTS, check_quant, check_rows, check_tensor, outputs, scaled

if TYPE_CHECKING:
    import torch

    from fp8.plugins.cuda import Function

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


@dataclass(frozen=True)
class ActQuant(RowPlugin):
    """x DT [T, 2F] = [gate | up] (gated) or [T, F], scale f32 [1] (quant "static") or [T] (quant "from_amax")
    -> y (e4m3, or DT for quant "none") [T, F], y_scale f32 [T] (quant "per_token" and "from_amax") or
    [T, F / 128] (quant "block").

    y = activation(gate) * up or activation(x), in float32, rounded or quantized (see quantize) once.
    """

    name: ClassVar[str] = "act_quant"
    activation: str = "silu"
    gated: bool = True
    quant: str = "none"
    scale_ub: float = 0.0

    def infer(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        x, scale = (*inputs, None)[:2]
        x = check_tensor("x", x, DTYPES, (None, None))
        if self.activation not in ACTIVATIONS:
            raise PluginError(f"activation is {self.activation!r}, expected {' or '.join(map(repr, ACTIVATIONS))}")
        check_quant(self.quant, scale, ROW_QUANTS)
        return outputs(self.quant, x.dtype, x.shape[0], self.width(x))

    def reference(self, *inputs: torch.Tensor | None, step: object) -> tuple[torch.Tensor, ...]:
        from fp8.plugins.act_quant.reference import act_quant

        x, scale = (*inputs, None)[:2]
        assert x is not None
        return act_quant(x, scale, self.activation, self.gated, self.quant, self.scale_ub)

    def check(self, inputs: Sequence[Tensor | None]) -> None:
        self.infer(inputs)
        x = inputs[0]
        assert x is not None
        check_rows("F", x.dtype, self.width(x), 65536)

    def width(self, x: Tensor) -> Dim:
        width = x.shape[1]
        if not self.gated:
            return width
        if not isinstance(width, int) or width % 2:
            raise PluginError(f"x has rows of {width} values, expected an even number: [gate | up]")
        return width // 2

    def tactics(self, inputs: Sequence[Tensor | None], tokens: int) -> list[RowTactic]:
        self.check(inputs)
        return quantize_tactics(self.width(inputs[0]), self.quant, tokens)

    def kernels(self, tactic: RowTactic, inputs: Sequence[Tensor | None]) -> tuple[Kernel, ...]:
        x = inputs[0]
        width = self.width(x)
        return (quantize_kernel(tactic, width, x.dtype, self.activation, self.gated, self.quant, self.scale_ub),)

    def bind(
        self,
        tactic: RowTactic,
        functions: Sequence[Function],
        tensors: Sequence[torch.Tensor | None],
        workspace: torch.Tensor | None,
    ) -> Launcher:
        given = len(tensors) - (2 if scaled(self.quant) else 1)  # the scale may be left out
        x, scale = (*tensors[:given], None)[:2]
        width = x.shape[1] // 2 if self.gated else x.shape[1]
        return quantize_launch(tactic, functions[0], width, x, scale, tensors[given:])
