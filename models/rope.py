"""Rotary position embedding: what config.json says of it, and the cos and sin tables.

Frequencies and angles are computed in float32, as Hugging Face does: models were trained with these roundings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fp8.models.config import ConfigError, integer, number, refuse


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
class Rope:
    theta: float
    head_dim: int
    scaling: Llama3Scaling | LinearScaling | None = None

    def tables(self, positions: int) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin, float32 [positions, head_dim / 2]."""
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        inv_freq = np.float32(1) / np.power(self.theta, exponents.astype(np.float64)).astype(np.float32)
        if self.scaling is not None:
            inv_freq = self.scaling.apply(inv_freq)
        angles = np.arange(positions, dtype=np.float32)[:, None] * inv_freq[None, :]
        return np.cos(angles), np.sin(angles)


def read_rope(config: Mapping[str, Any], head_dim: int, max_position_embeddings: int) -> Rope:
    """Reads `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before).

    Raises ConfigError for a rope type other than default, linear and llama3.
    """
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping) or any(isinstance(v, Mapping) for v in parameters.values()):
        raise ConfigError("config.json: rope_parameters is not one flat object (per-layer RoPE is not supported)")
    parameters = {"rope_theta": config.get("rope_theta", 10000.0), **parameters}
    refuse(parameters, {"partial_rotary_factor": (None, 1.0), "attention_factor": (None, 1.0)})
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    theta = number(parameters, "rope_theta")
    if kind == "default":
        return Rope(theta, head_dim)
    if kind == "linear":
        return Rope(theta, head_dim, LinearScaling(number(parameters, "factor")))
    if kind == "llama3":
        holder = config if config.get("original_max_position_embeddings") else parameters
        original = integer(holder, "original_max_position_embeddings", max_position_embeddings)
        low, high = number(parameters, "low_freq_factor"), number(parameters, "high_freq_factor")
        if high <= low:
            raise ConfigError(f"config.json: high_freq_factor {high} must exceed low_freq_factor {low}")
        return Rope(theta, head_dim, Llama3Scaling(number(parameters, "factor"), low, high, original))
    raise ConfigError(f"config.json: rope_type {kind!r} is not supported; supported are default, linear, llama3")
