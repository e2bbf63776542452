"""NVIDIA ModelOpt's unified Hugging Face export: hf_quant_config.json, and the same in config.json.

q, k, v, gate and up each have a scale of their own; those of K and V stand beside k_proj and v_proj. (Version 0.33
wrote at least 1.0 for the latter: valid, not tight.)
"""

from __future__ import annotations

from typing import Any

from fp8.builder.formats.base import FormatError
from fp8.builder.imports.base import ORIGINAL, Quantization, Scheme, strings
from fp8.builder.quantization_config import object_of

# quant_algo: format here, and the departure from the activations that ModelOpt simulated
ALGORITHMS: dict[str, tuple[str, str]] = {
    "NONE": ("bf16", ""),  # the KV cache alone
    "FP8": ("fp8", ""),
    "FP8_PER_CHANNEL_PER_TOKEN": ("fp8_rowwise", ""),
    "FP8_PB_WO": ("fp8_block", "quant_algo fp8_pb_wo quantizes weights alone; fp8_block quantizes activations too"),
}


def recognizes(quantization: Quantization) -> bool:
    return "modelopt" in (quantization.get("quant_method"), quantization.get("quant_library"))


def read(quantization: Quantization) -> Scheme:
    if "quantization" in quantization:  # nested, as version 0.33 wrote it into config.json
        quantization = {**quantization, **object_of(quantization, "quantization")}
    algorithm = str(quantization.get("quant_algo", "absent"))
    if algorithm.upper() not in ALGORITHMS:
        raise FormatError(
            f"ModelOpt's quant_algo {algorithm!r} is not read; known are {', '.join(ALGORITHMS)}; {ORIGINAL}"
        )
    format, departure = ALGORITHMS[algorithm.upper()]
    return Scheme(
        "ModelOpt",
        format,
        options={"activation_scale_ub": None} if format == "fp8_rowwise" else {},
        departure=departure,
        k_scale=("k_proj.k_scale", "k_scale"),
        v_scale=("v_proj.v_scale", "v_scale"),
        fp8_kv_cache=_kv_cache(quantization),
        ignored=strings(quantization, "exclude_modules", "ignore"),
    )


def _kv_cache(quantization: Quantization) -> bool:
    found: Any = quantization.get("kv_cache_quant_algo") or quantization.get("kv_cache_scheme")
    if isinstance(found, dict) and (found.get("num_bits"), found.get("type")) == (8, "float"):
        found = "FP8"
    if found not in (None, "FP8"):
        raise FormatError(f"ModelOpt's kv_cache_quant_algo {found!r} is not read; expected 'FP8' or none; {ORIGINAL}")
    return found == "FP8"
