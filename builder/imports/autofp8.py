"""AutoFP8: `quant_method` fp8 without blocks; one scale for a weight, one for an activation.

https://github.com/neuralmagic/AutoFP8, archived. K's scale is that of the projection's output, before RoPE: valid, not
tight. Old files name an activation's scale `act_scale`, and have one `kv_scale` for both K and V.
"""

from __future__ import annotations

from fp8.builder.formats.base import FormatError
from fp8.builder.imports.base import ORIGINAL, Quantization, Scheme, require, strings

DYNAMIC = (
    "its activations (activation_scheme dynamic) have one scale per tensor, computed at run time; here a scale that is "
    "computed is one per token"
)


def recognizes(quantization: Quantization) -> bool:
    return quantization.get("quant_method") == "fp8" and "weight_block_size" not in quantization


def read(quantization: Quantization) -> Scheme:
    require(quantization, "activation_scheme", "static", "dynamic", absent=False)
    kv = quantization.get("kv_cache_scheme")
    if kv not in (None, "static"):
        raise FormatError(f"quantization_config.kv_cache_scheme is {kv!r}, expected 'static' or null; {ORIGINAL}")
    static = quantization["activation_scheme"] == "static"
    return Scheme(
        "AutoFP8",
        "fp8" if static else "fp8_rowwise",
        options={} if static else {"activation_scale_ub": None},
        departure="" if static else DYNAMIC,
        input_scale=("input_scale", "act_scale"),
        k_scale=("k_scale", "kv_scale"),
        v_scale=("v_scale", "kv_scale"),
        one_weight_scale=not static,
        fp8_kv_cache=kv == "static",
        ignored=strings(quantization, "ignored_layers"),
    )
