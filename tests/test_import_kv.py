"""The KV cache of models that other tools quantized: scales that are there are kept, the others made or calibrated."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import hf_llama
import pytest
import quantized_elsewhere as elsewhere
import torch
from safetensors.torch import load_file, save_file
from test_import import assert_kept, emitted, run
from tokenizers import Tokenizer

from fp8.builder.interpret import Interpreter, empty_caches, step_inputs
from fp8.builder.quantization_config import read_format


@pytest.mark.parametrize("tool", ["autofp8", "modelopt", "fbgemm"])
def test_scales_of_k_and_v_are_kept(tool: str, tmp_path: Path) -> None:
    source = elsewhere.write(tmp_path / "in", tool, kv=True)
    assert run(source, tmp_path / "ckpt") == 0
    after = load_file(tmp_path / "ckpt/model.safetensors")
    for i in range(2):
        found = [after[f"model.layers.{i}.self_attn.{n}_scale"].item() for n in "kv"]
        assert found == [torch.tensor(0.013).item(), torch.tensor(0.017).item()]
    assert read_format(json.loads((tmp_path / "ckpt/config.json").read_text())).fp8_kv_cache
    assert run(source, tmp_path / "plain", "--kv_cache_dtype", "auto") == 0
    assert not any("k_scale" in n for n in load_file(tmp_path / "plain/model.safetensors"))


def test_scales_of_k_and_v_by_compressed_tensors(tmp_path: Path) -> None:
    source = elsewhere.by_compressed_tensors(tmp_path / "in", "FP8", kv=True)
    assert run(source, tmp_path / "ckpt") == 0
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("in", "ckpt"))
    name = "model.layers.1.self_attn.k_scale"
    assert before[name].dtype == torch.bfloat16 and after[name].item() == before[name].item()


def test_a_scale_of_q_that_is_there_is_kept(tmp_path: Path) -> None:
    """vLLM reads such files; compressed-tensors writes them where it quantizes attention."""
    source = elsewhere.write(tmp_path / "in", "autofp8", kv=True)
    for i in range(2):
        elsewhere.edit(source, f"model.layers.{i}.self_attn.q_scale", torch.tensor(0.25))
    assert run(source, tmp_path / "ckpt") == 0
    assert load_file(tmp_path / "ckpt/model.safetensors")["model.layers.1.self_attn.q_scale"].item() == 0.25


def test_old_names_of_scales_are_known(tmp_path: Path) -> None:
    """AutoFP8 began with `act_scale` and one `kv_scale` a layer."""
    source = elsewhere.write(tmp_path / "in", "autofp8", kv=True)
    path = source / "model.safetensors"
    tensors = {n: t for n, t in load_file(path).items() if not n.endswith(".v_scale")}
    renamed = {n.replace("input_scale", "act_scale").replace(".k_scale", ".kv_scale"): t for n, t in tensors.items()}
    save_file(renamed, path)
    assert run(source, tmp_path / "ckpt") == 0
    after = load_file(tmp_path / "ckpt/model.safetensors")
    attention = "model.layers.0.self_attn"
    assert after[f"{attention}.k_scale"] == after[f"{attention}.v_scale"] == tensors[f"{attention}.k_scale"]
    assert after[f"{attention}.q_proj.input_scale"].item() == torch.tensor(elsewhere.STATIC).item()


@pytest.mark.parametrize(
    ("changes", "growth", "bias"),
    [({}, 1.0, 0), ({"attention_bias": True}, 1.0, 4), (hf_llama.KIN["qwen2_yarn"], 1 + 0.1 * math.log(4), 4)],
    ids=["plain", "bias", "yarn"],
)
def test_no_query_saturates_by_the_scale_that_is_made(
    changes: dict[str, Any], growth: float, bias: float, tmp_path: Path
) -> None:
    source = elsewhere.write(tmp_path / "in", "autofp8", kv=True, **changes)
    assert run(source, tmp_path / "ckpt") == 0
    graph = emitted(tmp_path / "ckpt")
    feeds = step_inputs([(hf_llama.sequences(100)[0], 0)])
    after = load_file(tmp_path / "ckpt/model.safetensors")
    names = [f"model.layers.{i}.self_attn/q_heads" for i in range(2)]
    found = Interpreter(graph)({**feeds, **empty_caches(graph, feeds)}, outputs=names)
    for i, name in enumerate(names):
        largest, limit = found[name].abs().max(), 448 * after[f"model.layers.{i}.self_attn.q_scale"].item()
        assert limit / 32 < largest <= limit
        worst = growth * query_bound(after, f"model.layers.{i}")
        assert worst < limit < 1.2 * worst + bias


@pytest.mark.parametrize("stored", [False, True])
def test_scales_of_attention_that_are_missing_can_be_calibrated(stored: bool, tmp_path: Path) -> None:
    source = elsewhere.write(tmp_path / "in", "autofp8", kv=stored)
    hf_llama.add_tokenizer(source)
    text = "def power(x, n):\n    return x if n == 1 else x * power(x, n - 1)\n"
    (tmp_path / "text.txt").write_text(text)
    more = ("--kv_cache_dtype", "fp8", "--calib_dataset", str(tmp_path / "text.txt"), "--calib_size", "1")
    assert run(source, tmp_path / "ckpt", *more) == 0
    assert_kept(source, tmp_path / "ckpt")
    after = load_file(tmp_path / "ckpt/model.safetensors")
    config = json.loads((tmp_path / "ckpt/config.json").read_text())
    assert config["fp8_engine"]["calibration"]["samples"] == 1
    tokens = Tokenizer.from_file(str(source / "tokenizer.json")).encode(text).ids
    cache = elsewhere.twin(source, "autofp8").float()(torch.tensor([tokens]), use_cache=True).past_key_values
    for i, layer in enumerate(cache.layers):  # transformers keeps K after RoPE
        for name, x in (("k", layer.keys), ("v", layer.values)):
            found = after[f"model.layers.{i}.self_attn.{name}_scale"].item()
            expected = torch.tensor(0.013 if name == "k" else 0.017) if stored else x.abs().max() / 448
            torch.testing.assert_close(torch.tensor(found), expected, rtol=0 if stored else 0.05, atol=0)
        bound = query_bound(after, f"model.layers.{i}")
        assert bound / 64 < after[f"model.layers.{i}.self_attn.q_scale"].item() * 448 < bound


def query_bound(tensors: dict[str, torch.Tensor], layer: str) -> float:
    """sqrt(2) times the largest element of a query before RoPE: of an input in the direction of a row of the weight."""
    module = f"{layer}.self_attn.q_proj"
    weight = tensors[f"{module}.weight"].float() * tensors[f"{module}.weight_scale"]
    gained = weight * tensors[f"{layer}.input_layernorm.weight"].float()
    return (gained.norm(dim=1).max() * (2 * weight.shape[1]) ** 0.5).item()
