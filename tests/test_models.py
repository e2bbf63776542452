"""Llama and its kin against Hugging Face transformers, and what of a config.json is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hf_llama
import numpy as np
import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fp8.builder.checkpoint import Checkpoint
from fp8.builder.formats.bf16 import Bf16
from fp8.builder.interpret import Interpreter, empty_caches, next_caches, step_inputs
from fp8.models import config as models
from fp8.models import llama, mistral, qwen2
from fp8.models.config import ConfigError
from fp8.models.rope import read_rope


def interpreted_logits(directory: Path, sequences: list[list[int]], dtype: str) -> torch.Tensor:
    checkpoint = Checkpoint(directory)
    model = models.load(checkpoint.config)
    graph = model.emit(model.read_config(checkpoint.config), checkpoint, Bf16(), dtype)
    feeds = step_inputs([(s, 0) for s in sequences])
    return Interpreter(graph)({**feeds, **empty_caches(graph, feeds)})["logits"]


@pytest.mark.parametrize("name", [*hf_llama.CONFIGS, *hf_llama.KIN])
def test_float32_graph_is_transformers_model(name: str, tmp_path: Path) -> None:
    config = {**hf_llama.CONFIGS, **hf_llama.KIN}[name]
    model = hf_llama.make(tmp_path, **config)
    sequences = hf_llama.sequences(1, 30, 75, vocab=config.get("vocab_size", 300))
    assert hf_llama.sqnr(hf_llama.logits(model, sequences), interpreted_logits(tmp_path, sequences, "float32")) > 100


@pytest.mark.parametrize("name", hf_llama.CONFIGS)
def test_bfloat16_graph_is_close_to_transformers_in_float32(name: str, tmp_path: Path) -> None:
    config = hf_llama.CONFIGS[name]
    model = hf_llama.make(tmp_path, torch.bfloat16, **config)
    sequences = hf_llama.sequences(1, 30, 75, vocab=config.get("vocab_size", 300))
    assert hf_llama.sqnr(hf_llama.logits(model, sequences), interpreted_logits(tmp_path, sequences, "bfloat16")) > 35


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_checkpoints_of_any_float_dtype_are_read(stored: torch.dtype, tmp_path: Path) -> None:
    model = hf_llama.make(tmp_path, stored)
    sequences = hf_llama.sequences(20)
    assert hf_llama.sqnr(hf_llama.logits(model, sequences), interpreted_logits(tmp_path, sequences, "float32")) > 100


def test_sharded_checkpoint_is_read(tmp_path: Path) -> None:
    model = hf_llama.make(tmp_path, shard="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    sequences = hf_llama.sequences(20)
    assert hf_llama.sqnr(hf_llama.logits(model, sequences), interpreted_logits(tmp_path, sequences, "float32")) > 100


def test_decoding_over_written_caches_is_prefill(tmp_path: Path) -> None:
    model = hf_llama.make(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    graph = llama.emit(llama.read_config(checkpoint.config), checkpoint, Bf16(), "float32")
    interpreter = Interpreter(graph)
    sequences = hf_llama.sequences(10, 70, 3)
    expected = hf_llama.logits(model, sequences)
    prefill = step_inputs([(s[:-2], 0) for s in sequences])
    caches = empty_caches(graph, prefill)
    found = [interpreter({**prefill, **caches})]
    for last in (2, 1):
        caches = next_caches(caches, found[-1])
        step = step_inputs([(s[len(s) - last : len(s) - last + 1], len(s) - last) for s in sequences])
        found.append(interpreter({**step, **caches}))
    ends = np.cumsum([len(s) for s in sequences])
    assert hf_llama.sqnr(expected[ends - 2], found[1]["logits"]) > 100
    assert hf_llama.sqnr(expected[ends - 1], found[2]["logits"]) > 100


def test_chained_layer_slices_are_the_whole_graph(tmp_path: Path) -> None:
    hf_llama.make(tmp_path, torch.bfloat16, num_hidden_layers=3)
    checkpoint = Checkpoint(tmp_path)
    config = llama.read_config(checkpoint.config)
    sequences = hf_llama.sequences(12, 5)
    feeds = step_inputs([(s, 0) for s in sequences])
    for layers in (range(0, 1), range(1, 2), range(2, 3)):
        graph = llama.emit(config, checkpoint, Bf16(), "bfloat16", layers=layers)
        results = Interpreter(graph)({**feeds, **empty_caches(graph, feeds)})
        feeds["hidden_states"] = results.get("hidden_states.out")
    assert torch.equal(results["logits"], interpreted_logits(tmp_path, sequences, "bfloat16"))


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e4},
        hf_llama.LLAMA3_ROPE,
        {**hf_llama.CONFIGS["linear_rope"]["rope_parameters"]},
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0},
        YARN,
        {**YARN, "attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
        {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2},
    ],
)
def test_rope_tables_are_transformers_own(rope: dict[str, Any]) -> None:
    hf = transformers.LlamaConfig(**hf_llama.BASE, head_dim=64, rope_parameters=dict(rope))
    cos, sin = LlamaRotaryEmbedding(hf)(torch.zeros(1), torch.arange(128)[None])
    ours = read_rope({"rope_parameters": rope}, 64, 128).tables(128)
    for expected, found in zip((cos, sin), ours, strict=True):
        # torch's pow may be one unit in the last place off, which position 127 multiplies.
        np.testing.assert_allclose(found, expected[0, :, :32].numpy(), rtol=0, atol=127 * 2**-23)


def test_old_and_new_rope_keys_mean_the_same() -> None:
    scaling = {k: v for k, v in hf_llama.LLAMA3_ROPE.items() if k not in ("rope_theta", "rope_type")}
    old = {"rope_theta": 500000.0, "rope_scaling": {**scaling, "type": "llama3"}}
    assert read_rope(old, 64, 128) == read_rope({"rope_parameters": hf_llama.LLAMA3_ROPE}, 64, 128)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
REFUSED: dict[str, Any] = {
    "hidden_act": "gelu",
    "pretraining_tp": 2,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "layer_types": ["sliding_attention"],
    "rope_type": {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}},
    "attention_factor": {"rope_scaling": {"rope_type": "linear", "factor": 4.0, "attention_factor": 1.1}},
    "rope_theta": {"rope_theta": 1.0, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "beta_fast": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 0.5}},
    "partial_rotary_factor": 0.5,
    "num_key_value_heads": 3,
    "vocab_size": "many",
    "rms_norm_eps": -1.0,
    "head_dim": 7,
    "factor": {"rope_scaling": {"rope_type": "linear"}},
    "tie_word_embeddings": "yes",
    "num_hidden_layers": 10**30,
    "original_max_position_embeddings": {"original_max_position_embeddings": "8192", "rope_scaling": LLAMA3},
}


def test_layer_types_that_are_no_list_are_refused() -> None:
    with pytest.raises(ConfigError, match="layer_types"):
        llama.read_config({**hf_llama.BASE, "layer_types": 4})


@pytest.mark.parametrize("key", REFUSED)
def test_unsupported_config_is_refused_by_key(key: str) -> None:
    value = REFUSED[key]
    change = value if isinstance(value, dict) else {key: value}
    with pytest.raises(ConfigError, match=key):
        llama.read_config({**hf_llama.BASE, **change})


@pytest.mark.parametrize(
    ("module", "change", "says"),
    [
        (
            mistral,
            {"sliding_window": 64},
            "sliding_window=64 is not .* max_position_embeddings from 128 to 64",
        ),
        (mistral, {"max_position_embeddings": 8192}, "sliding_window=4096"),  # transformers' default
        (mistral, {"attention_bias": True}, "attention_bias"),
        (mistral, {"sliding_window": "wide"}, "sliding_window"),
        (qwen2, {"use_sliding_window": True}, "use_sliding_window"),
        (qwen2, {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
    ],
)
def test_what_makes_llamas_kin_another_model_is_refused(module: Any, change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        module.read_config({**hf_llama.BASE, **change})


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2"])
def test_defaults_are_transformers_own(kind: str) -> None:
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    minimal = {k: hf_llama.BASE[k] for k in keys} | {"num_attention_heads": 32, "hidden_size": 512}
    hf = getattr(transformers, f"{kind}Config")(**minimal)
    found = models.load({"model_type": kind.lower()}).read_config({**minimal, "sliding_window": None})
    assert found.num_kv_heads == hf.num_key_value_heads and found.rms_norm_eps == hf.rms_norm_eps
    assert found.max_position_embeddings == hf.max_position_embeddings
    assert found.tie_word_embeddings == hf.tie_word_embeddings
    assert found.rope.theta == hf.rope_parameters["rope_theta"]


def test_unknown_model_type_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model_type 'mamba' is not supported; supported are .*llama"):
        models.load({"model_type": "mamba"})


def test_every_model_type_has_a_module_that_emits() -> None:
    for kind in models.model_types():
        module = models.load({"model_type": kind})
        assert callable(module.emit) and callable(module.read_config)


def test_more_positions_than_the_model_has_are_refused(tmp_path: Path) -> None:
    hf_llama.make(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="max_position_embeddings 128"):
        llama.emit(llama.read_config(checkpoint.config), checkpoint, Bf16(), "bfloat16", max_positions=129)


def test_config_without_optional_keys_has_transformers_defaults() -> None:
    minimal = {k: hf_llama.BASE[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    config = llama.read_config(json.loads(json.dumps({**minimal, "num_attention_heads": 4})))
    assert (config.num_kv_heads, config.head_dim, config.rope.theta, config.rms_norm_eps) == (4, 16, 10000.0, 1e-6)
