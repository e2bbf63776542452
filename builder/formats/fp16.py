"""fp16: linears in float16, nothing quantized but, on request, the KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fp8.builder.formats.base import Format


@dataclass(frozen=True)
class Fp16(Format):
    name: ClassVar[str] = "fp16"
    dtype: ClassVar[str | None] = "float16"
