"""Qwen2 and Qwen2.5: Llama with biases of q, k and v alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fp8.models import llama
from fp8.models.config import refuse
from fp8.models.llama import LlamaConfig, emit

__all__ = ["emit", "read_config"]

DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 32768}  # transformers' own


def read_config(config: Mapping[str, Any]) -> LlamaConfig:
    """From config.json. Raises ConfigError for what is malformed or not supported, by key."""
    refuse(config, {"use_sliding_window": (None, False)})
    # A window's size stands there also where none is used.
    fixed = {"sliding_window": None, "attention_bias": True, "mlp_bias": False}
    return dataclasses.replace(llama.read_config({**DEFAULTS, **config, **fixed}), output_bias=False)
