"""TensorRT-LLM's unified checkpoints of one and of several ranks: the same tensors as in Hugging Face's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import quantized_elsewhere as elsewhere
import torch
from quantized_elsewhere import E4M3
from safetensors.torch import load_file, save_file
from test_import import run

from fp8.scripts import build

VOCAB = 301  # ranks hold padded parts
ALGORITHMS = {"modelopt": "FP8", "modelopt_rowwise": "FP8_PER_CHANNEL_PER_TOKEN"}
Tensors = dict[str, torch.Tensor]


def made(directory: Path, tool: str, **changes: Any) -> Path:
    """A Hugging Face checkpoint of ModelOpt, with one scale for q, k and v, as TensorRT-LLM's layout has them."""
    source = elsewhere.write(directory, tool, kv=True, vocab_size=VOCAB, **changes)
    path = source / "model.safetensors"
    tensors = load_file(path)
    if tool == "modelopt":
        for i in range(2):
            for part in "kv":
                name = f"model.layers.{i}.self_attn.{part}_proj.weight_scale"
                tensors[name] = tensors[f"model.layers.{i}.self_attn.q_proj.weight_scale"].clone()
    save_file(tensors, path)
    return source


def unified(source: Path, directory: Path, ranks: int) -> Path:
    """The checkpoint in the layout of ModelOpt 0.47's export_tensorrt_llm_checkpoint."""
    directory.mkdir()
    c, tensors = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    quantization = json.loads((source / "hf_quant_config.json").read_text())["quantization"]
    config = {
        "architecture": "LlamaForCausalLM", "dtype": "bfloat16", "vocab_size": VOCAB, "hidden_size": c["hidden_size"],
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_size": 64,
        "hidden_act": "silu",
        "intermediate_size": c["intermediate_size"], "norm_epsilon": c["rms_norm_eps"], "rotary_base": 10000.0,
        "max_position_embeddings": 128, "position_embedding_type": "rope_gpt_neox", "attn_bias": c["attention_bias"],
        "share_embedding_table": c["tie_word_embeddings"], "quantization": quantization,
        "mapping": {"world_size": ranks, "tp_size": ranks, "pp_size": 1},
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    for rank in range(ranks):
        save_file(rank_tensors(tensors, ranks, rank), directory / f"rank{rank}.safetensors")
    return directory


def rank_tensors(tensors: Tensors, ranks: int, rank: int) -> Tensors:
    found: Tensors = {"transformer.ln_f.weight": tensors["model.norm.weight"]}
    rows = -(-VOCAB // ranks)
    for ours, theirs in (("model.embed_tokens", "transformer.vocab_embedding"), ("lm_head", "lm_head")):
        if f"{ours}.weight" in tensors:
            padded = torch.nn.functional.pad(tensors[f"{ours}.weight"], (0, 0, 0, rows * ranks - VOCAB))
            found[f"{theirs}.weight"] = padded[rank * rows : (rank + 1) * rows]
    part = lambda t, axis=0: t.chunk(ranks, axis)[rank]
    for i in range(2):
        ours, theirs = f"model.layers.{i}", f"transformer.layers.{i}"
        found[f"{theirs}.input_layernorm.weight"] = tensors[f"{ours}.input_layernorm.weight"]
        found[f"{theirs}.post_layernorm.weight"] = tensors[f"{ours}.post_attention_layernorm.weight"]
        qkv, names = f"{theirs}.attention.qkv", [f"{ours}.self_attn.{n}_proj" for n in "qkv"]
        joined = lambda kind, names=names: torch.cat([bits(part(tensors[f"{n}.{kind}"])) for n in names])
        found[f"{qkv}.weight"] = joined("weight").view(E4M3)
        linears = {"attention.dense": ("self_attn.o_proj", 1), "mlp.fc": ("mlp.gate_proj", 0),
                   "mlp.gate": ("mlp.up_proj", 0), "mlp.proj": ("mlp.down_proj", 1)}  # fmt: skip
        for module, (name, axis) in linears.items():
            weight = bits(tensors[f"{ours}.{name}.weight"])
            found[f"{theirs}.{module}.weight"] = part(weight, axis).contiguous().view(E4M3)
        if f"{names[0]}.bias" in tensors:
            found[f"{qkv}.bias"] = torch.cat([part(tensors[f"{n}.bias"]) for n in names])
            found[f"{theirs}.attention.dense.bias"] = tensors[f"{ours}.self_attn.o_proj.bias"]
        modules = {"attention.qkv": ("self_attn.q_proj", 0), **linears}
        for module, (name, axis) in modules.items():
            scale = tensors[f"{ours}.{name}.weight_scale"]
            if scale.numel() > 1:
                rows_of = joined("weight_scale") if "qkv" in module else scale if axis else part(scale)
                found[f"{theirs}.{module}.per_channel_scale"] = rows_of.contiguous()
            else:
                found[f"{theirs}.{module}.weights_scaling_factor"] = scale.reshape(1)
                found[f"{theirs}.{module}.activation_scaling_factor"] = tensors[f"{ours}.{name}.input_scale"].reshape(1)
        for n in "kv":
            scale = tensors[f"{ours}.self_attn.{n}_proj.{n}_scale"].reshape(1)
            found[f"{theirs}.attention.{n}_cache_scaling_factor"] = scale
        found[f"{theirs}.attention.kv_cache_scaling_factor"] = torch.ones(1)
    return {name: t.clone().contiguous() for name, t in found.items()}


def bits(t: torch.Tensor) -> torch.Tensor:
    """Codes as bytes: torch joins and cuts those."""
    return t.view(torch.uint8) if t.dtype == E4M3 else t


def assert_same(a: Path, b: Path) -> None:
    x, y = (load_file(d / "model.safetensors") for d in (a, b))
    assert x.keys() == y.keys()
    for name in x:
        assert x[name].dtype == y[name].dtype and torch.equal(bits(x[name]), bits(y[name])), name


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("tool", ALGORITHMS)
def test_ranks_are_joined_to_the_same_checkpoint(tool: str, ranks: int, tmp_path: Path) -> None:
    source = made(tmp_path / "hf", tool)
    assert run(source, tmp_path / "expected") == 0
    assert run(unified(source, tmp_path / "in", ranks), tmp_path / "found") == 0
    assert_same(tmp_path / "expected", tmp_path / "found")
    arguments = ["--checkpoint_dir", str(tmp_path / "found"), "--target", "cpu", "--dry_run"]
    assert build.main(arguments) == 0


@pytest.mark.parametrize("changes", [{"attention_bias": True}, {"tie_word_embeddings": True}], ids=str)
def test_biases_and_tied_embeddings(changes: dict[str, Any], tmp_path: Path) -> None:
    source = made(tmp_path / "hf", "modelopt", **changes)
    assert run(source, tmp_path / "expected") == 0
    assert run(unified(source, tmp_path / "in", 2), tmp_path / "found") == 0
    assert_same(tmp_path / "expected", tmp_path / "found")


def test_codes_stored_as_int8_are_codes(tmp_path: Path) -> None:
    source = made(tmp_path / "hf", "modelopt")
    directory = unified(source, tmp_path / "in", 1)
    path = directory / "rank0.safetensors"
    save_file({n: t.view(torch.int8) if t.dtype == E4M3 else t for n, t in load_file(path).items()}, path)
    assert run(source, tmp_path / "expected") == 0 and run(directory, tmp_path / "found") == 0
    assert_same(tmp_path / "expected", tmp_path / "found")


def test_a_clamp_is_the_bound_of_a_token(tmp_path: Path) -> None:
    directory = unified(made(tmp_path / "hf", "modelopt_rowwise"), tmp_path / "in", 1)
    edit_config(directory, quantization={"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "clamp_val": [-1200.0, 1200.0]})
    assert run(directory, tmp_path / "found") == 0
    section = json.loads((tmp_path / "found/config.json").read_text())["fp8_engine"]
    assert section["activation_scale_ub"] == 1200.0 and section["format"] == "fp8_rowwise"


def edit_config(directory: Path, **changes: Any) -> None:
    config = {**json.loads((directory / "config.json").read_text()), **changes}
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_rank(directory: Path, name: str, value: torch.Tensor) -> None:
    path = directory / "rank1.safetensors"
    save_file({**load_file(path), name: value}, path)


FC = "transformer.layers.0.mlp.fc"
REFUSED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "rotary": (lambda d: edit_config(d, rotary_base=None), ("rotary_base is missing", "rope_theta")),
    "architecture": (lambda d: edit_config(d, architecture="GPTForCausalLM"), ("'GPTForCausalLM' of this",)),
    "positions": (lambda d: edit_config(d, position_embedding_type="alibi"), ("position_embedding_type 'alibi'",)),
    "pipeline": (lambda d: edit_config(d, mapping={"world_size": 2, "tp_size": 1}), ("mapping is", "tp_size")),
    "algorithm": (lambda d: edit_config(d, quantization={"quant_algo": "W4A16_AWQ"}), ("'W4A16_AWQ' is not read",)),
    "KV heads": (lambda d: edit_config(d, num_key_value_heads=1), ("1 KV heads on 2 ranks",)),
    "no rank": (lambda d: (d / "rank1.safetensors").unlink(), ("rank1.safetensors",)),
    "copies": (lambda d: edit_rank(d, f"{FC}.weights_scaling_factor", torch.ones(1)), (FC, "differs between ranks")),
    "parts": (lambda d: edit_rank(d, f"{FC}.weight", torch.ones(3, 256).to(E4M3)), (FC, "[3, 256]", "equal parts")),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_joined_is_refused(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = unified(made(tmp_path / "hf", "modelopt"), tmp_path / "in", 2)
    damage, says = REFUSED[kind]
    damage(directory)
    assert run(directory, tmp_path / "found") == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error and all(word in error for word in says), error
    assert not (tmp_path / "found").exists()


def test_a_tensor_that_is_not_known_is_refused_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = unified(made(tmp_path / "hf", "modelopt"), tmp_path / "in", 1)
    path = directory / "rank0.safetensors"
    save_file({**load_file(path), f"{FC}.prequant_scaling_factor": torch.ones(256)}, path)
    assert run(directory, tmp_path / "found") == 1
    assert f"{FC}.prequant_scaling_factor is in" in capsys.readouterr().err
