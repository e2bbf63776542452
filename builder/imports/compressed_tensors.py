"""compressed-tensors, as llm-compressor writes it: FP8 (static), FP8_DYNAMIC and FP8_BLOCK.

https://github.com/vllm-project/compressed-tensors. Scales are in the model's type; the KV cache's are `k_scale` and
`v_scale` of the attention, in older files the `output_scale` of k_proj and v_proj.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fp8.builder.formats.base import FormatError, load
from fp8.builder.imports.base import ORIGINAL, Quantization, Scheme, require, strings
from fp8.builder.quantization_config import agrees, object_of, reads_kv_cache
from fp8.plugins.base import SCALE_BLOCK

DEFAULTS = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "strategy": "tensor"}
K_SCALE, V_SCALE = ("k_scale", "k_proj.output_scale"), ("v_scale", "v_proj.output_scale")
Activations = tuple[str, bool, int | None] | None  # strategy, dynamic, size of a group; None: not quantized
STATIC, TOKEN, GROUP = ("tensor", False, None), ("token", True, None), ("group", True, SCALE_BLOCK)
# (weights, activations): format here
KEPT: dict[tuple[str, Activations], str] = {
    ("tensor", STATIC): "fp8", ("channel", STATIC): "fp8_channel", ("tensor", TOKEN): "fp8_rowwise",
    ("channel", TOKEN): "fp8_rowwise", ("block", GROUP): "fp8_block",
}  # fmt: skip
LOOSE = {"tensor": "fp8_rowwise", "channel": "fp8_rowwise", "block": "fp8_block"}  # whatever the activations were


def recognizes(quantization: Quantization) -> bool:
    return quantization.get("quant_method") == "compressed-tensors"


def read(quantization: Quantization) -> Scheme:
    require(object_of(quantization, "sparsity_config"), "format", "dense", None)
    if quantization.get("transform_config"):
        raise FormatError(f"quantization_config.transform_config is not read: activations are rotated; {ORIGINAL}")
    stored = object_of(quantization, "config_groups")
    groups = {name: _group(name, group) for name, group in stored.items()}
    fp8_kv_cache = reads_kv_cache(quantization)
    if not groups:  # the KV cache alone is quantized
        return Scheme("compressed-tensors", "bf16", k_scale=K_SCALE, v_scale=V_SCALE, fp8_kv_cache=fp8_kv_cache)
    if len(set(groups.values())) > 1:
        raise FormatError(
            f"quantization_config.config_groups has {len(set(groups.values()))} schemes; one is read; {ORIGINAL}"
        )
    weights, activations = next(iter(groups.values()))
    if activations and not activations[1] and (weights, activations) not in KEPT:
        raise FormatError(
            f"quantization_config.config_groups: static activations of strategy {activations[0]} with weights of "
            f"strategy {weights} are not read; with static activations of strategy tensor go weights of strategy "
            f"tensor or channel; {ORIGINAL}"
        )
    format = KEPT.get((weights, activations), LOOSE[weights])
    return Scheme(
        "compressed-tensors",
        format,
        options={"activation_scale_ub": None} if format == "fp8_rowwise" else {},
        departure=_departure(weights, activations, format),
        k_scale=K_SCALE,
        v_scale=V_SCALE,
        one_weight_scale=weights == "tensor" and format == "fp8_rowwise",
        fp8_kv_cache=fp8_kv_cache,
        direct=len(stored) == 1 and agrees(load(format).scheme, *stored.values()) and not fp8_kv_cache,
        ignored=strings(quantization, "ignore"),
    )


def _group(name: str, group: Any) -> tuple[str, Activations]:
    """Strategies of a group's weights and activations. Raises FormatError if they are not float8, or of other sizes."""
    where = f"quantization_config.config_groups.{name}"
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise FormatError(f"{where} has no weights, expected an object of them; {ORIGINAL}")
    weights = _arguments(f"{where}.weights", group["weights"])
    activations = group.get("input_activations") and _arguments(
        f"{where}.input_activations", group["input_activations"]
    )
    if group.get("output_activations"):
        raise FormatError(f"{where}.output_activations is not read; {ORIGINAL}")
    block = str(weights.get("block_structure"))
    if weights["strategy"] not in LOOSE or weights["dynamic"]:
        raise FormatError(
            f"{where}.weights: strategy {weights['strategy']!r}, dynamic {weights['dynamic']}, is not read; expected "
            f"{', '.join(LOOSE)}, not dynamic; {ORIGINAL}"
        )
    if weights["strategy"] == "block" and block not in (str([SCALE_BLOCK] * 2), f"{SCALE_BLOCK}x{SCALE_BLOCK}"):
        raise FormatError(f"{where}.weights.block_structure is {block}, expected {[SCALE_BLOCK] * 2}; {ORIGINAL}")
    if not activations:
        return weights["strategy"], None
    size = activations.get("group_size") if activations["strategy"] == "group" else None
    return weights["strategy"], (activations["strategy"], activations["dynamic"], size)


def _arguments(where: str, found: Any) -> dict[str, Any]:
    if not isinstance(found, Mapping):
        raise FormatError(f"{where} is {found!r}, expected an object; {ORIGINAL}")
    arguments = {**DEFAULTS, **{k: v for k, v in found.items() if v is not None}}
    for key, kind in (("strategy", str), ("group_size", int)):
        if not isinstance(arguments.get(key, kind()), kind):
            raise FormatError(f"{where}.{key} is {arguments[key]!r}, expected {kind.__name__}; {ORIGINAL}")
    if arguments["dynamic"] not in (True, False):
        raise FormatError(f"{where}.dynamic is {arguments['dynamic']!r}, expected true or false; {ORIGINAL}")
    if (arguments["num_bits"], arguments["type"], arguments["symmetric"]) != (8, "float", True):
        raise FormatError(
            f"{where}: {arguments['type']} of {arguments['num_bits']} bits, symmetric {arguments['symmetric']}, is not "
            f"read; expected float of 8 bits, symmetric; {ORIGINAL}"
        )
    return arguments


def _departure(weights: str, activations: Activations, format: str) -> str:
    if (weights, activations) in KEPT:
        return ""
    if activations is None:
        return f"its config_groups quantize weights alone; {format} quantizes activations too"
    strategy, dynamic, size = activations
    kind = f"dynamic {dynamic}, strategy {strategy}" + (f" of {size}" if size else "")
    return f"its activations ({kind}, with weights of strategy {weights}) are not those of {format}"
