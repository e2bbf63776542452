"""Reading Hugging Face's config.json: typed keys, refusal of what is not supported, the file of a model_type."""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any


class ConfigError(ValueError):
    """A config.json that is malformed, or asks for something that is not supported: names the key."""


def integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive int."""
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 < value < 1 << 31:
        raise ConfigError(f"config.json: {key} is {value!r}, expected a positive integer (of 31 bits)")
    return value


def number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive finite float."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"config.json: {key} is {value!r}, expected a positive number")
    return float(value)


def flag(config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise ConfigError(f"config.json: {key} is {value!r}, expected true or false")
    return value


def refuse(config: Mapping[str, Any], supported: Mapping[str, Sequence[Any]]) -> None:
    """Raises ConfigError for the first key whose value is not among its supported ones; an absent key is fine."""
    for key, values in supported.items():
        if key in config and config[key] not in values:
            raise ConfigError(
                f"config.json: {key}={config[key]!r} changes the model's result and is not supported; "
                f"supported: {', '.join(repr(v) for v in values)}"
            )


def model_types() -> list[str]:
    """All supported model types: the modules of this folder that can emit."""
    import fp8.models

    helpers = {"blocks", "config", "rope"}
    return sorted(m.name for m in pkgutil.iter_modules(fp8.models.__path__) if m.name not in helpers)


def load(config: Mapping[str, Any]) -> ModuleType:
    """The model file for a config.json; it has `read_config` and `emit`."""
    kind = config.get("model_type")
    if kind not in model_types():
        raise ConfigError(
            f"config.json: model_type {kind!r} is not supported; supported are {', '.join(model_types())}"
        )
    return importlib.import_module(f"fp8.models.{kind}")
