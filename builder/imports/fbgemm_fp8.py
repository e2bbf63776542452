"""transformers' fbgemm_fp8, in which Llama-3.1-405B-Instruct-FP8 is stored: a scale per output channel; activations
with one per token, whose largest magnitude `activation_scale_ub` bounds: fp8_rowwise to the letter.
"""

from __future__ import annotations

from fp8.builder.formats.base import FormatError
from fp8.builder.imports.base import Quantization, Scheme, strings


def recognizes(quantization: Quantization) -> bool:
    return quantization.get("quant_method") == "fbgemm_fp8"


def read(quantization: Quantization) -> Scheme:
    bound = quantization.get("activation_scale_ub", 1200.0)  # transformers' default
    if isinstance(bound, bool) or not isinstance(bound, int | float):
        raise FormatError(f"quantization_config.activation_scale_ub is {bound!r}, expected a number")
    return Scheme(
        "transformers (fbgemm FP8)",
        "fp8_rowwise",
        options={"activation_scale_ub": float(bound)},
        ignored=strings(quantization, "modules_to_not_convert"),
    )
