"""transformers' finegrained FP8, in which DeepSeek-V3 and Qwen3-FP8 are stored: blocks of 128 x 128; and the same keys
with `weight_block_size` null (Ministral, Devstral): one scale for a weight, one for an activation.

`weight_scale_inv` multiplies, despite its name.
"""

from __future__ import annotations

from fp8.builder.imports.autofp8 import DYNAMIC
from fp8.builder.imports.base import Quantization, Scheme, require, strings
from fp8.plugins.base import SCALE_BLOCK

POWERS = (
    "scale_fmt ue8m0 rounds the activations' scales to powers of two; fp8_block here does not (the weights' scales are "
    "kept)"
)


def recognizes(quantization: Quantization) -> bool:
    return quantization.get("quant_method") == "fp8" and "weight_block_size" in quantization


def read(quantization: Quantization) -> Scheme:
    require(quantization, "weight_block_size", [SCALE_BLOCK, SCALE_BLOCK], None)
    require(quantization, "fmt", "e4m3")
    require(quantization, "scale_fmt", "float", "ue8m0", None)
    blocks = quantization["weight_block_size"] is not None
    require(quantization, "activation_scheme", *(["dynamic"] if blocks else ["static", "dynamic"]), absent=blocks)
    static = quantization.get("activation_scheme") == "static"
    format = "fp8_block" if blocks else "fp8" if static else "fp8_rowwise"
    powers = POWERS if quantization.get("scale_fmt") == "ue8m0" else ""
    return Scheme(
        "transformers (finegrained FP8)",
        format,
        options={"activation_scale_ub": None} if format == "fp8_rowwise" else {},
        departure=DYNAMIC if format == "fp8_rowwise" else powers,
        weight_scale=("weight_scale_inv",),
        input_scale=("activation_scale",),
        one_weight_scale=format == "fp8_rowwise",
        ignored=strings(quantization, "modules_to_not_convert", "ignored_layers"),
    )
