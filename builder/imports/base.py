"""Checkpoints that another tool quantized: who did, and what its configuration says.

A tool lives in `builder/imports/<name>.py`, with `recognizes(quantization)` and `read(quantization) -> Scheme`; the
folder is the registry. What all of them share, the reading of tensors by a Scheme, is `fp8.builder.imported`.
"""

from __future__ import annotations

import fnmatch
import importlib
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fp8.builder.checkpoint import Checkpoint, read_json
from fp8.builder.formats.base import FormatError
from fp8.builder.quantization_config import object_of

Quantization = Mapping[str, Any]
ORIGINAL = "quantize the original model with fp8-quantize"


@dataclass(frozen=True)
class Scheme:
    """What a configuration says of the tensors beside it. A scale's value always multiplies.

    Names of scales are suffixes to a linear's module, or to an attention's; of several the first that is there counts.
    """

    tool: str
    format: str  # of builder/formats: what keeps every code and scale; bf16: linears are not quantized
    options: Mapping[str, Any] = field(default_factory=dict)
    departure: str = ""  # where that format's activations are not the tool's: only taken when asked for by name
    weight_scale: tuple[str, ...] = ("weight_scale",)
    input_scale: tuple[str, ...] = ("input_scale",)
    k_scale: tuple[str, ...] = ("k_scale",)
    v_scale: tuple[str, ...] = ("v_scale",)
    one_weight_scale: bool = False  # of a whole tensor, where the format has one per output channel
    fp8_kv_cache: bool = False
    direct: bool = False  # laid out as here: fp8-build reads it as it is
    ignored: tuple[str, ...] = ()  # modules, globs over them, or regular expressions after `re:`

    def ignores(self, module: str) -> str | None:
        """The entry of `ignored` that covers a module path."""
        return next((entry for entry in self.ignored if _covers(entry, module)), None)


def _covers(entry: str, module: str) -> bool:
    if entry.startswith("re:"):
        return re.match(entry[3:], module) is not None
    return fnmatch.fnmatchcase(module, entry)


class Tool(Protocol):
    """A module of this folder."""

    def recognizes(self, quantization: Quantization) -> bool: ...

    def read(self, quantization: Quantization) -> Scheme:
        """Raises FormatError, by key, for what no format here keeps."""
        ...


def quantization_of(directory: Path, config: Mapping[str, Any]) -> Quantization | None:
    """What a checkpoint says of its quantization, None if nothing. ModelOpt's own file comes first, then config.json,
    where old compressed-tensors files have another key. Raises CheckpointError, FormatError if malformed."""
    path = directory / "hf_quant_config.json"
    if path.is_file():
        found = read_json(path)
        return {**object_of(found, "quantization"), "quant_method": "modelopt"}
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            return object_of(config, key)
    return None


def read_scheme(checkpoint: Checkpoint) -> Scheme | None:
    """Of a quantized checkpoint, None of another. Raises FormatError for one that no tool here reads."""
    quantization = quantization_of(checkpoint.directory, checkpoint.config)
    if quantization is None:
        return None
    for tool in map(load, names()):
        if tool.recognizes(quantization):
            return tool.read(quantization)
    method = quantization.get("quant_method")
    raise FormatError(
        f"{checkpoint.directory}: quantization_config.quant_method {method!r} is not read; FP8 of "
        f"{', '.join(names())} is; {ORIGINAL}"
    )


def refuse_unconverted(checkpoint: Checkpoint) -> None:
    """Raises FormatError for a checkpoint that another tool quantized, unless its layout is ours."""
    scheme = None if "fp8_engine" in checkpoint.config else read_scheme(checkpoint)
    if scheme is not None and not (scheme.direct and checkpoint.config.get("quantization_config")):
        raise FormatError(
            f"{checkpoint.directory} was quantized by {scheme.tool}; give what fp8-quantize --model_dir "
            f"{checkpoint.directory} --output_dir CHECKPOINT makes of it (the same codes and scales)"
        )


def names() -> list[str]:
    """All tools: the files beside this one."""
    import fp8.builder.imports

    return sorted(m.name for m in pkgutil.iter_modules(fp8.builder.imports.__path__) if m.name != "base")


def load(name: str) -> Tool:
    return importlib.import_module(f"fp8.builder.imports.{name}")  # type: ignore[return-value]


# Keys, for the tools


def strings(quantization: Quantization, *keys: str) -> tuple[str, ...]:
    """The list of names under the first key that is there; () where there is none."""
    value: Any = next((quantization[k] for k in keys if quantization.get(k) is not None), [])
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise FormatError(f"{keys[0]} is {value!r}, expected a list of module names")
    for pattern in (v[3:] for v in value if v.startswith("re:")):
        try:
            re.compile(pattern)
        except re.error as error:
            raise FormatError(f"{keys[0]}: {pattern!r} is no regular expression: {error}") from error
    return tuple(value)


def require(quantization: Quantization, key: str, *values: Any, absent: bool = True) -> None:
    """Raises FormatError unless the key has one of the values, or (where permitted) is not there."""
    if key not in quantization and absent:
        return
    if quantization.get(key) not in values:
        raise FormatError(
            f"quantization_config.{key} is {quantization.get(key)!r}, expected "
            f"{' or '.join(repr(v) for v in values)}; {ORIGINAL}"
        )
