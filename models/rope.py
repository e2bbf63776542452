"""Rotary position embedding: what config.json says of it, and the cos and sin tables.

Frequencies and angles are computed in float32, as Hugging Face does: models were trained with these roundings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fp8.models.config import ConfigError, flag, integer, number, refuse


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def apply(self, inv_freq: np.ndarray) -> np.ndarray:
        wavelength = (2 * math.pi / inv_freq).astype(np.float32)
        low = self.original_max_position_embeddings / self.low_freq_factor
        high = self.original_max_position_embeddings / self.high_freq_factor
        smooth = (self.original_max_position_embeddings / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        between = (1 - smooth) * inv_freq / self.factor + smooth * inv_freq
        scaled = np.where(wavelength > low, inv_freq / self.factor, np.where(wavelength < high, inv_freq, between))
        return scaled.astype(np.float32)


@dataclass(frozen=True)
class LinearScaling:
    """All positions divided by `factor`."""

    factor: float

    def apply(self, inv_freq: np.ndarray) -> np.ndarray:
        return inv_freq / np.float32(self.factor)


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071, section 3): pairs that turn often within the trained length are kept, those that hardly
    turn are divided by `factor`, those between interpolated; q and k each grow by `attention_factor`."""

    factor: float
    original_max_position_embeddings: int
    theta: float
    attention_factor: float
    beta_fast: float = 32.0  # turns from which on a pair is kept
    beta_slow: float = 1.0  # turns up to which it is divided
    truncate: bool = True  # the bounds between them to whole pairs

    def apply(self, inv_freq: np.ndarray) -> np.ndarray:
        low, high = self._pair(self.beta_fast, inv_freq.size), self._pair(self.beta_slow, inv_freq.size)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * inv_freq.size - 1)
        width = high - low or 0.001
        kept = 1 - np.clip((np.arange(inv_freq.size, dtype=np.float32) - np.float32(low)) / np.float32(width), 0, 1)
        return inv_freq / np.float32(self.factor) * (1 - kept) + inv_freq * kept

    def _pair(self, turns: float, pairs: int) -> float:
        """Which one turns so often within the trained length."""
        return pairs * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / math.log(self.theta)


@dataclass(frozen=True)
class Rope:
    theta: float
    head_dim: int
    scaling: Llama3Scaling | LinearScaling | YarnScaling | None = None

    def tables(self, positions: int) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin, times what YaRN lets q and k grow by, float32 [positions, head_dim / 2]."""
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        inv_freq = np.float32(1) / np.power(self.theta, exponents.astype(np.float64)).astype(np.float32)
        if self.scaling is not None:
            inv_freq = self.scaling.apply(inv_freq)
        angles = np.arange(positions, dtype=np.float32)[:, None] * inv_freq[None, :]
        growth = np.float32(self.scaling.attention_factor if isinstance(self.scaling, YarnScaling) else 1)
        return np.cos(angles) * growth, np.sin(angles) * growth


def read_rope(config: Mapping[str, Any], head_dim: int, max_position_embeddings: int) -> Rope:
    """Reads `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before).

    Raises ConfigError for a rope type other than default, dynamic, linear, llama3 and yarn.
    """
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping) or any(isinstance(v, Mapping) for v in parameters.values()):
        raise ConfigError("config.json: rope_parameters is not one flat object (per-layer RoPE is not supported)")
    parameters = {"rope_theta": config.get("rope_theta", 10000.0), **parameters}
    refuse(parameters, {"partial_rotary_factor": (None, 1.0)})
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    theta = number(parameters, "rope_theta")
    if kind == "yarn":
        return Rope(theta, head_dim, _yarn(config, parameters, theta, max_position_embeddings))
    refuse(parameters, {"attention_factor": (None, 1.0)})
    if kind in ("default", "dynamic"):  # the latter differs beyond max_position_embeddings, where no engine goes
        return Rope(theta, head_dim)
    if kind == "linear":
        return Rope(theta, head_dim, LinearScaling(number(parameters, "factor")))
    if kind == "llama3":
        original = _trained_length(config, parameters, max_position_embeddings)
        low, high = number(parameters, "low_freq_factor"), number(parameters, "high_freq_factor")
        if high <= low:
            raise ConfigError(f"config.json: high_freq_factor {high} must exceed low_freq_factor {low}")
        return Rope(theta, head_dim, Llama3Scaling(number(parameters, "factor"), low, high, original))
    raise ConfigError(
        f"config.json: rope_type {kind!r} is not supported; supported are default, dynamic, linear, llama3, yarn"
    )


def _trained_length(config: Mapping[str, Any], parameters: Mapping[str, Any], default: int) -> int:
    holder = config if config.get("original_max_position_embeddings") else parameters
    return integer(holder, "original_max_position_embeddings", default)


def _yarn(config: Mapping[str, Any], parameters: Mapping[str, Any], theta: float, positions: int) -> YarnScaling:
    original = _trained_length(config, parameters, positions)
    factor = number(parameters, "factor", positions / original)

    def growth(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    default = growth(1.0)
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        default = growth(number(parameters, "mscale")) / growth(number(parameters, "mscale_all_dim"))
    if theta <= 1:
        raise ConfigError(f"config.json: rope_theta is {theta}, expected more than 1 for rope_type yarn")
    fast, slow = number(parameters, "beta_fast", 32.0), number(parameters, "beta_slow", 1.0)
    if fast < slow:
        raise ConfigError(f"config.json: beta_fast {fast} must not be less than beta_slow {slow}")
    attention = number(parameters, "attention_factor", default)
    return YarnScaling(factor, original, theta, attention, fast, slow, flag(parameters, "truncate", True))
