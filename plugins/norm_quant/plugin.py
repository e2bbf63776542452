"""norm_quant: residual add, RMSNorm or LayerNorm, and rounding or quantization, in one pass over the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fp8.plugins.base import Kernel, Launcher, Plugin, PluginError, Tensor
from fp8.plugins.gemm.plugin import Gemm
from fp8.plugins.quantize.launch import DTYPE_CODES, FEW_TOKENS, RowPlugin, RowTactic, row_launch, whole_rows
from fp8.plugins.quantize.types import (
    DTYPES,
    QUANTS,
    check_absent,
    check_quant,
    check_rows,
    check_tensor,
    outputs,
    scaled,
)

if TYPE_CHECKING:
    import torch

    from fp8.plugins.cuda import Function

INPUTS = 6
MANY_ROWS_THREADS = 512  # of a block, best of 128 to 1024 (figures in norm_quant.cu)


@dataclass(frozen=True)
class NormQuant(RowPlugin):
    """x DT [T, H], residual DT [T, H] (if `residual`), weight DT [H], bias DT [H]? (layer norm only), scale f32 [1]
    (quant "static" only), rows i32 [L] (if `gather`) -> y (e4m3, or DT for quant "none") [T or L, H], y_scale f32
    [T or L] (quant "per_token") or [T or L, H / 128] (quant "block"), residual_out DT [T, H] (if `residual` and not
    `gather`).

    residual_out is x + residual rounded to DT, and what the norm reads; the norm is float32 and rounded or quantized
    (see quantize) once. With `gather` only the rows `rows` are computed.
    """

    name: ClassVar[str] = "norm_quant"
    norm: str = "rms"
    epsilon: float = 1e-5
    quant: str = "none"
    scale_ub: float = 0.0
    residual: bool = False
    gather: bool = False

    def infer(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        x, residual, weight, bias, scale, rows = self._padded(inputs)
        if self.norm not in ("rms", "layer"):
            raise PluginError(f"norm is {self.norm!r}, expected 'rms' or 'layer'")
        x = check_tensor("x", x, DTYPES, (None, None))
        tokens, hidden = x.shape
        check_tensor("weight", weight, (x.dtype,), (hidden,))
        self._check_optional("residual", residual, self.residual, x)
        if bias is not None and self.norm == "rms":
            check_absent("bias", bias, "norm is 'rms'")
        if bias is not None:
            check_tensor("bias", bias, (x.dtype,), (hidden,))
        check_quant(self.quant, scale)
        if not self.gather:
            check_absent("rows", rows, "gather is False")
            sums = (x,) if self.residual else ()
            return (*outputs(self.quant, x.dtype, tokens, hidden), *sums)
        rows = check_tensor("rows", rows, ("int32",), (None,))
        return outputs(self.quant, x.dtype, rows.shape[0], hidden)

    def summed_by(self, before: Plugin) -> bool:
        """Whether `before`, a linear, may write residual_out in place of its own output (`summed`): not where rows are
        left out."""
        return self.residual and not self.gather and isinstance(before, Gemm) and before.rows == "T"

    def early_outputs(self, before: Plugin) -> tuple[int, ...]:
        return (-1,) if self.summed_by(before) else ()

    def reference(self, *inputs: torch.Tensor | None, step: object) -> tuple[torch.Tensor, ...]:
        from fp8.plugins.norm_quant.reference import norm_quant

        return norm_quant(*self._padded(inputs), self.norm, self.epsilon, self.quant, self.scale_ub)

    def check(self, inputs: Sequence[Tensor | None]) -> None:
        self.infer(inputs)
        x = inputs[0]
        assert x is not None
        check_rows("H", x.dtype, x.shape[1], 16384)

    @staticmethod
    def _padded(inputs: Sequence) -> list:
        return [*inputs, *[None] * (INPUTS - len(inputs))]

    @staticmethod
    def _check_optional(name: str, found: Tensor | None, wanted: bool, like: Tensor) -> None:
        if wanted:
            check_tensor(name, found, (like.dtype,), like.shape)
        else:
            check_absent(name, found, f"the attribute {name} is False")

    def tactics(self, inputs: Sequence[Tensor | None], tokens: int) -> list[RowTactic]:
        self.check(inputs)
        found = whole_rows(inputs[0].shape[1], tokens)
        return found if tokens <= FEW_TOKENS else sorted(found, key=lambda t: abs(t.threads - MANY_ROWS_THREADS))

    def kernels(self, tactic: RowTactic, inputs: Sequence[Tensor | None]) -> tuple[Kernel, ...]:
        x, _, _, bias, _, _ = self._padded(inputs)
        constants = (
            ("HIDDEN", x.shape[1]),
            ("THREADS", tactic.threads),
            ("DTYPE", DTYPE_CODES[x.dtype]),
            ("LAYER_NORM", int(self.norm == "layer")),
            ("BIAS", int(bias is not None)),
            ("EPSILON", self.epsilon),
            ("QUANT", QUANTS.index(self.quant)),
            ("SCALE_UB", self.scale_ub),
            ("RESIDUAL", int(self.residual)),
            ("GATHER", int(self.gather)),
        )
        return (Kernel("norm_quant", "norm_quant.cu", "norm_quant", constants),)

    def bind(
        self,
        tactic: RowTactic,
        functions: Sequence[Function],
        tensors: Sequence[torch.Tensor | None],
        workspace: torch.Tensor | None,
    ) -> Launcher:
        dynamic, summed = scaled(self.quant), self.residual and not self.gather
        given = len(tensors) - (1 + dynamic + summed)  # trailing inputs may be left out
        inputs, outputs = self._padded(tensors[:given]), list(tensors[given:])
        y = outputs.pop(0)
        y_scale = outputs.pop(0) if dynamic else None
        residual_out = outputs.pop(0) if summed else None
        rows = (lambda step: step.logits_rows) if self.gather else (lambda step: step.tokens)
        return row_launch(functions[0], tactic.threads, [*inputs, y, y_scale, residual_out], rows)

    def bind_summed(
        self,
        tactic: RowTactic,
        functions: Sequence[Function],
        tensors: Sequence[torch.Tensor | None],
        linear: Any,
        choices: Sequence[tuple[Any, Function | None]],
        operands: Sequence[torch.Tensor | None],
    ) -> tuple[list[Launcher | None], Launcher]:
        """See `summed.bind`."""
        from fp8.plugins.norm_quant import summed

        return summed.bind(linear, choices, operands, self, tactic, functions, tensors)
