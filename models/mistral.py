"""Mistral and its kin of that model_type (7B from version 0.2 on, Nemo, Large, Codestral): Llama without biases.

The window of version 0.1, over which attention slides, is refused where a context can be longer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fp8.models import llama
from fp8.models.config import ConfigError, integer, refuse
from fp8.models.llama import LlamaConfig, emit

__all__ = ["emit", "read_config"]

DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}  # transformers' own


def read_config(config: Mapping[str, Any]) -> LlamaConfig:
    """From config.json. Raises ConfigError for what is malformed or not supported, by key."""
    config = {**DEFAULTS, **config}
    refuse(config, {"attention_bias": (None, False), "mlp_bias": (None, False)})
    if config["sliding_window"] is not None:
        window, positions = integer(config, "sliding_window"), integer(config, "max_position_embeddings")
        if window < positions:
            raise ConfigError(
                f"config.json: sliding_window={window} is not supported; as far as it reaches it changes nothing: set "
                f"it to null, and max_position_embeddings from {positions} to {window}"
            )
    return llama.read_config({**config, "sliding_window": None})
