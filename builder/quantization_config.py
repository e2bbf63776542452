"""What config.json says of quantization: compressed-tensors' `quantization_config` and our own `fp8_engine` section.

`quantization_config` is what vLLM and transformers read; `fp8_engine` adds what it has no words for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fp8.builder.formats.base import Format, FormatError, load, names

KV_CACHE_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
DTYPES = ("bfloat16", "float16", "float32")


def write_quantization(format: Format, linears: Sequence[str]) -> dict[str, Any] | None:
    """The `quantization_config` of a checkpoint with these linears, or None if nothing is quantized."""
    if format.scheme is None and not format.fp8_kv_cache:
        return None
    excluded = [m for m in linears if not format.quantizes(m)]
    groups = {} if format.scheme is None else {"group_0": {**format.scheme, "output_activations": None}}
    return {
        "quant_method": "compressed-tensors",
        "format": "dense" if format.scheme is None else "float-quantized",
        "config_groups": groups,
        "ignore": ["lm_head", *excluded] if groups else [],
        "kv_cache_scheme": KV_CACHE_SCHEME if format.fp8_kv_cache else None,
        "quantization_status": "compressed",
    }


def write_engine_section(format: Format, version: str, calibration: Mapping[str, Any] | None) -> dict[str, Any]:
    """The `fp8_engine` section."""
    return {
        "format": format.name,
        "kv_cache_dtype": format.kv_cache_dtype,
        **format.options(),
        "version": version,
        "calibration": calibration,
    }


def read_format(config: Mapping[str, Any]) -> Format:
    """The format of a checkpoint. Raises FormatError, by name, for a quantization that is not read here."""
    own = object_of(config, "fp8_engine")
    quantization = object_of(config, "quantization_config")
    if not quantization:
        kind = load(own.get("format", "fp16" if read_dtype(config) == "float16" else "bf16"))
        if kind.scheme is not None:
            raise FormatError(f"config.json: fp8_engine.format is {kind.name}, but there is no quantization_config")
        return kind()
    method = quantization.get("quant_method")
    if method != "compressed-tensors":
        raise FormatError(
            f"config.json: quantization_config.quant_method {method!r} is not read; quantize the original model with "
            "fp8-quantize, or give a compressed-tensors checkpoint"
        )
    ignored = quantization.get("ignore") or []
    if not isinstance(ignored, list) or not all(isinstance(m, str) for m in ignored):
        raise FormatError(f"config.json: quantization_config.ignore is {ignored!r}, expected a list of modules")
    common: dict[str, Any] = {
        "kv_cache_dtype": "fp8" if reads_kv_cache(quantization) else "auto",
        "exclude_modules": tuple(m for m in ignored if m != "lm_head"),
    }
    named = object_of(quantization, "config_groups")
    groups = [object_of(named, name) for name in named]
    if not groups:
        return load(own.get("format", "bf16"))(**common)
    if len(groups) > 1:
        raise FormatError(f"config.json: quantization_config has {len(groups)} config_groups; one is read")
    kind = _kind(groups[0])
    options = {k: own[k] for k in kind.option_names() if k in own} if own else kind.foreign_options
    return kind(**common, **options)


def object_of(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object under a key, empty where there is none."""
    value = config.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise FormatError(f"config.json: {key} is {value!r}, expected an object")
    return value or {}


def reads_kv_cache(quantization: Mapping[str, Any]) -> bool:
    """Whether `kv_cache_scheme` is that of an FP8 KV cache. Raises FormatError for any other."""
    scheme = quantization.get("kv_cache_scheme")
    if scheme is not None and not agrees(KV_CACHE_SCHEME, scheme):
        raise FormatError(
            f"config.json: kv_cache_scheme {scheme} is not read; only e4m3 with static per-tensor scales is"
        )
    return scheme is not None


def _kind(group: Mapping[str, Any]) -> type[Format]:
    for name in names():
        kind = load(name)
        if kind.scheme is not None and agrees(kind.scheme, group):
            return kind
    weights, activations = (object_of(group, k) for k in ("weights", "input_activations"))
    raise FormatError(
        "config.json: the quantization scheme of config_groups (weights: "
        f"{weights.get('type')} {weights.get('num_bits')} {weights.get('strategy')}, activations: "
        f"{activations.get('strategy')}, dynamic {activations.get('dynamic')}, targets {group.get('targets')}) "
        f"is not read; known are {', '.join(n for n in names() if load(n).scheme)}"
    )


def agrees(expected: Any, found: Any) -> bool:
    """Whether every key of `expected` has its value in `found`."""
    if isinstance(expected, Mapping):
        return isinstance(found, Mapping) and all(agrees(v, found.get(k)) for k, v in expected.items())
    return bool(expected == found)


def read_dtype(config: Mapping[str, Any]) -> str:
    """The model's dtype by config.json, default float32 as in transformers."""
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in DTYPES:
        raise FormatError(f"config.json: dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return dtype
