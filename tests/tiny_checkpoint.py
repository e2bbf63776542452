"""Tiny random Llama checkpoints as fp8-quantize writes them, in any format, without a calibration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fp8.builder.checkpoint import Checkpoint
from fp8.builder.formats.base import Format, load
from fp8.builder.quantization_config import write_engine_section, write_quantization
from fp8.builder.request import Source
from fp8.models import config as models

CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 320, "hidden_size": 192,
    "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SIZES = {"fp8_block": {"hidden_size": 256, "intermediate_size": 384}}  # its blocks are 128 wide
LINEARS = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
ODD = {"hidden_size": 60, "intermediate_size": 44, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 20}


def qformat(name: str, kv: str = "auto", exclude: tuple[str, ...] = ()) -> Format:
    return load(name)(kv_cache_dtype=kv, exclude_modules=exclude)


def tensors(config: dict[str, Any], format: Format, seed: int = 0) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint. Activation scales suit activations of unit variance."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, config.get("torch_dtype") or "bfloat16")
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    found = {"model.embed_tokens.weight": 4 * random(config["vocab_size"], hidden).to(dtype)}
    found["model.norm.weight"] = 1 + 0.1 * random(1, hidden)[0].to(dtype)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = random(config["vocab_size"], hidden).to(dtype)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}.{norm}.weight"] = (1 + 0.1 * random(1, hidden)[0]).to(dtype)
        linears = {
            "self_attn.q_proj": (heads, hidden), "self_attn.k_proj": (kv_heads, hidden),
            "self_attn.v_proj": (kv_heads, hidden), "self_attn.o_proj": (hidden, heads),
            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
        }  # fmt: skip
        for j, (name, shape) in enumerate(linears.items()):
            module, weight = f"{layer}.{name}", random(*shape) * (1 + 0.5 * j)
            if format.quantizes(module):
                found |= {f"{module}.{k}": v for k, v in format.quantize(weight).items()}
            else:
                found[f"{module}.weight"] = weight.to(dtype)
            if format.calibrated(f"{module}.input_scale"):
                found[f"{module}.input_scale"] = torch.tensor([0.011])
            if config["attention_bias" if "attn" in name else "mlp_bias"]:
                found[f"{module}.bias"] = random(1, shape[0])[0].to(dtype)
        if format.fp8_kv_cache:
            found |= {f"{layer}.self_attn.{n}_scale": torch.tensor([0.01 + 0.002 * i]) for n in "qkv"}
    return {name: tensor.contiguous() for name, tensor in found.items()}


def write(directory: Path, format: Format, seed: int = 0, **changes: Any) -> Path:
    """Writes config.json and model.safetensors; `changes` go into the config."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, **SIZES.get(format.name, {}), **changes}
    linears = [f"model.layers.{i}.{m}" for i in range(config["num_hidden_layers"]) for m in LINEARS]
    config["dtype"] = config["torch_dtype"] = format.dtype or config.get("torch_dtype") or "bfloat16"
    quantization = write_quantization(format, linears)
    if quantization is not None:
        config["quantization_config"] = quantization
    config["fp8_engine"] = write_engine_section(format, "0", None)
    save_file(tensors(config, format, seed), directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def source(directory: Path, format: Format, **changes: Any) -> Source:
    """A written checkpoint, opened as fp8-build opens it."""
    checkpoint = Checkpoint(write(directory, format, **changes))
    return Source(models.load(checkpoint.config), checkpoint)
