"""What a quantization format is: how its linears are emitted, how its weights are stored, what it wants observed.

A format lives in `builder/formats/<name>.py` as a frozen dataclass named in CamelCase (`fp8_rowwise` -> `Fp8Rowwise`).
The folder is the registry: `load("fp8_rowwise")`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib
import pkgutil
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fp8.plugins.base import SCALE_BLOCK

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs
    import torch

    from fp8.builder.graph import GraphBuilder, Linear

KV_CACHE_DTYPES = ("auto", "fp8")  # auto: the model's dtype


class FormatError(ValueError):
    """A format, a flag of one, or a checkpoint's quantization that is not known here."""


@dataclass(frozen=True)
class Format:
    """Base of all formats; on its own it quantizes no linear, only the KV cache if asked to.

    `exclude_modules` are globs over module paths (`model.layers.0.*`, `*.down_proj`), or regular expressions after
    `re:`; lm_head is never quantized.
    """

    kv_cache_dtype: str = "auto"
    exclude_modules: tuple[str, ...] = ()

    name: ClassVar[str]
    dtype: ClassVar[str | None] = None  # the model's dtype, if the format dictates it
    static: ClassVar[bool] = False  # activations have calibrated scales
    scheme: ClassVar[dict[str, Any] | None] = None  # compressed-tensors group of the quantized linears
    unit: ClassVar[int] = 16  # columns of an MLP that ranks do not part: what kernels read at once
    foreign_options: ClassVar[dict[str, Any]] = {}  # own fields' values in checkpoints that do not state them

    def __post_init__(self) -> None:
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise FormatError(f"kv_cache_dtype {self.kv_cache_dtype!r} is not one of {', '.join(KV_CACHE_DTYPES)}")
        for pattern in self.exclude_modules:
            try:
                re.compile(pattern[3:] if pattern.startswith("re:") else "")
            except re.error as error:
                raise FormatError(f"exclude_modules {pattern!r} is no regular expression: {error}") from error

    @property
    def fp8_kv_cache(self) -> bool:
        return self.kv_cache_dtype == "fp8"

    @property
    def rounds_to_fp8(self) -> bool:
        """Whether anything is quantized, so that a last-bit difference may flip a code."""
        return self.scheme is not None or self.fp8_kv_cache

    def excludes(self, module: str) -> bool:
        return any(
            re.match(pattern[3:], module) if pattern.startswith("re:") else fnmatch.fnmatchcase(module, pattern)
            for pattern in self.exclude_modules
        )

    @classmethod
    def option_names(cls) -> list[str]:
        """Fields that only this format has."""
        common = {f.name for f in dataclasses.fields(Format)}
        return [f.name for f in dataclasses.fields(cls) if f.name not in common]

    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.option_names()}

    def quantizes(self, module: str) -> bool:
        """Whether the linear at this module path is quantized."""
        return self.scheme is not None and not self.excludes(module)

    def check(self, module: str, rows: int, columns: int) -> None:
        """Raises FormatError for a linear [N, K] that cannot be quantized so: known before anything is calibrated."""

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """[N, K] of any float dtype -> what is stored for it: `weight` e4m3 [N, K], `weight_scale` f32."""
        raise NotImplementedError

    def calibrated(self, scale: str) -> bool:
        """Whether the checkpoint stores this activation scale (`<linear>.input_scale`, `<attention>.k_scale`, ...)."""
        module, _, kind = scale.rpartition(".")
        return self.static and self.quantizes(module) if kind == "input_scale" else self.fp8_kv_cache

    def linears(self, b: GraphBuilder, x: gs.Tensor, linears: Sequence[Linear]) -> list[gs.Tensor]:
        """Emits the linears that read x (float32 [T, K]); one quantization of x, one dequantization per reader."""
        quantized = [m for m in linears if self.quantizes(m.name)]
        plain = [m for m in linears if not self.quantizes(m.name)]
        outputs = dict(zip((m.name for m in quantized), self.quantized_linears(b, x, quantized), strict=True))
        for m in plain:
            outputs[m.name] = b.plain_linear(x, m, b.dtype, first=plain[0].name)
        return [outputs[m.name] for m in linears]

    def quantized_linears(self, b: GraphBuilder, x: gs.Tensor, linears: Sequence[Linear]) -> list[gs.Tensor]:
        """`linears` for those that are quantized."""
        return []

    def attention_output(self, b: GraphBuilder, x: gs.Tensor, consumer: str) -> gs.Tensor:
        """What the linear `consumer` reads of attention's float32 output."""
        return x


def float8_scheme(weights: str, activations: str) -> dict[str, Any]:
    """A compressed-tensors group: strategies `tensor`, `channel`, `block` (128 x 128) of weights; `tensor`, `token`,
    `group` (of 128 channels) of activations, dynamic but for `tensor`."""
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    block = {"block_structure": [SCALE_BLOCK, SCALE_BLOCK]} if weights == "block" else {}
    group = {"group_size": SCALE_BLOCK} if activations == "group" else {}
    return {
        "targets": ["Linear"],
        "weights": {**common, "strategy": weights, "dynamic": False, **block},
        "input_activations": {**common, "strategy": activations, "dynamic": activations != "tensor", **group},
    }


def names() -> list[str]:
    """All formats: the files beside this one."""
    import fp8.builder.formats

    return sorted(m.name for m in pkgutil.iter_modules(fp8.builder.formats.__path__) if m.name != "base")


def load(name: str) -> type[Format]:
    """The format class of a file."""
    if name not in names():
        raise FormatError(f"qformat {name!r} does not exist; there are {', '.join(names())}")
    module = importlib.import_module(f"fp8.builder.formats.{name}")
    return getattr(module, "".join(part.capitalize() for part in name.split("_")))
