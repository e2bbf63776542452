"""Checkpoints that other tools quantized: every code and scale kept, torch's own logits, or one clear refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hf_llama
import pytest
import quantized_elsewhere as elsewhere
import rank_group
import tiny_checkpoint
import torch
import transformers
from quantized_elsewhere import E4M3, FLOAT8, compressed, edit_config
from safetensors.torch import load_file, save_file

from fp8.builder.checkpoint import Checkpoint
from fp8.builder.graph import stored_array
from fp8.builder.imports.base import names
from fp8.builder.interpret import empty_caches, step_inputs
from fp8.builder.parallel import ranks
from fp8.builder.quantization_config import read_format
from fp8.builder.request import Reporter, Request, Source
from fp8.builder.verify import ExactInterpreter, exact, float64_by_default
from fp8.models import config as models
from fp8.models import llama
from fp8.runtime.llm import LLM
from fp8.runtime.request import SamplingParams
from fp8.scripts import build, quantize

TOOLS = list(elsewhere.CONFIGS)
PRESETS = list(elsewhere.PRESETS)
SEQUENCE = hf_llama.sequences(40)[0]
LINEARS = [f"model.layers.{i}.{m}" for i in range(2) for m in tiny_checkpoint.LINEARS]


def run(source: Path, output: Path, *more: str) -> int:
    return quantize.main(["--model_dir", str(source), "--output_dir", str(output), *more])


def flags(tool: str) -> tuple[str, ...]:
    return ("--qformat", "fp8_block") if tool == "modelopt_block" else ()  # what it says of activations is asked for


def emitted(directory: Path) -> Any:
    checkpoint = Checkpoint(directory)
    model = models.load(checkpoint.config)
    return model.emit(model.read_config(checkpoint.config), checkpoint, read_format(checkpoint.config), "float32")


def logits(directory: Path) -> torch.Tensor:
    """In float64 but for codes and tables."""
    graph = emitted(directory)
    feeds = step_inputs([(SEQUENCE, 0)])
    caches = {name: exact(cache) for name, cache in empty_caches(graph, feeds).items()}
    with float64_by_default():
        return ExactInterpreter(graph)({**feeds, **caches})["logits"]


def assert_kept(source: Path, output: Path) -> None:
    """Codes bit for bit, scales to the last bit whatever type and shape they had, nothing else changed."""
    before, after = (load_file(d / "model.safetensors") for d in (source, output))
    quantized = [n for n, t in before.items() if t.dtype == E4M3]
    for name in quantized:
        module = name.removesuffix(".weight")
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))
        (scale,) = [t for n, t in before.items() if n.startswith(f"{module}.weight_scale")]
        assert torch.equal(
            elsewhere.spread(scale.float(), before[name]),
            elsewhere.spread(after[f"{module}.weight_scale"], before[name]),
        )
        inputs = [t for n, t in before.items() if n in (f"{module}.input_scale", f"{module}.activation_scale")]
        found = [t for n, t in after.items() if n == f"{module}.input_scale"]
        assert [t.float().item() for t in inputs] == [t.item() for t in found]
    plain = {n for n, t in before.items() if n.endswith((".weight", ".bias"))} - set(quantized)
    assert all(torch.equal(before[n], after[n]) for n in plain)
    known = ("weight", "bias", "weight_scale", "input_scale", "q_scale", "k_scale", "v_scale")
    assert all(n.endswith(known) for n in after)


# What is kept


def test_tools_are_the_files_of_the_folder() -> None:
    assert names() == ["autofp8", "compressed_tensors", "fbgemm_fp8", "finegrained_fp8", "modelopt"]


@pytest.mark.parametrize("tool", TOOLS)
def test_codes_and_scales_are_kept_and_logits_are_those_of_torch(tool: str, tmp_path: Path) -> None:
    source = elsewhere.write(tmp_path / "in", tool)
    assert run(source, tmp_path / "ckpt", *flags(tool)) == 0
    assert_kept(source, tmp_path / "ckpt")
    config = json.loads((tmp_path / "ckpt/config.json").read_text())
    format = read_format(config)
    assert format.name == elsewhere.FORMAT[tool] and not format.fp8_kv_cache
    assert config["fp8_engine"]["calibration"] is None and config["fp8_engine"]["quantized_by"]
    assert format.options() in ({}, {"activation_scale_ub": 1200.0 if tool == "fbgemm" else None})
    expected = elsewhere.exact_logits(elsewhere.twin(source, tool), SEQUENCE)
    assert hf_llama.sqnr(expected, logits(tmp_path / "ckpt")) > 100


@pytest.mark.parametrize("preset", PRESETS)
def test_compressed_tensors_own_files_give_transformers_logits(preset: str, tmp_path: Path) -> None:
    source = elsewhere.by_compressed_tensors(tmp_path / "in", preset)
    assert run(source, tmp_path / "ckpt") == 0
    assert_kept(source, tmp_path / "ckpt")
    assert read_format(json.loads((tmp_path / "ckpt/config.json").read_text())).name == elsewhere.PRESETS[preset]
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    hf_llama.logits(model, [SEQUENCE])  # decompresses the model
    model.double()
    for module in LINEARS:
        weight, scale = (load_file(source / "model.safetensors")[f"{module}.{k}"] for k in ("weight", "weight_scale"))
        found = model.get_submodule(module).weight
        unrounded = weight.double() * elsewhere.spread(scale.double(), weight)
        assert torch.equal(found.float(), unrounded.float())
        found.data = unrounded  # without the rounding to float32, which may flip a code
    expected = elsewhere.exact_logits(model, SEQUENCE)
    assert hf_llama.sqnr(expected, logits(tmp_path / "ckpt")) > 100


def test_transformers_dequantizes_finegrained_to_the_same_weights(tmp_path: Path) -> None:
    source = elsewhere.write(tmp_path / "in", "finegrained")
    assert run(source, tmp_path / "ckpt") == 0
    how = transformers.FineGrainedFP8Config(dequantize=True, modules_to_not_convert=["lm_head"])
    model = transformers.LlamaForCausalLM.from_pretrained(source, dtype=torch.float32, quantization_config=how)
    after = load_file(tmp_path / "ckpt/model.safetensors")
    for module in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        weight = after[f"{module}.weight"]
        expected = weight.float() * elsewhere.spread(after[f"{module}.weight_scale"], weight)
        assert torch.equal(model.get_submodule(module).weight.float(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e8m0fnu])
def test_scales_of_other_types_are_exact_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    source = elsewhere.write(tmp_path / "in", "finegrained")
    path = source / "model.safetensors"
    save_file({n: t.to(dtype) if "scale" in n else t for n, t in load_file(path).items()}, path)
    assert run(source, tmp_path / "ckpt") == 0
    assert_kept(source, tmp_path / "ckpt")


def test_parts_of_a_merged_linear_keep_scales_of_their_own(tmp_path: Path) -> None:
    source = elsewhere.write(tmp_path / "in", "modelopt")
    assert run(source, tmp_path / "ckpt") == 0
    after = load_file(tmp_path / "ckpt/model.safetensors")
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
    for group in parts:
        assert len({after[f"model.layers.0.{m}.weight_scale"].item() for m in group}) == len(group)
    checkpoint = Checkpoint(tmp_path / "ckpt")
    request = Request(max_seq_len=64, target="cpu")
    graph = rank_group.fused(Source(llama, checkpoint), request, request.place())
    merged = next(n for n in graph.nodes if n.op == "gemm" and "q_proj" in n.name)
    assert "k_proj" in merged.name


def test_of_differing_scales_of_one_activation_the_largest_is_taken_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = elsewhere.write(tmp_path / "in", "autofp8")
    elsewhere.edit(source, "model.layers.1.self_attn.k_proj.input_scale", torch.tensor(0.02))
    assert run(source, tmp_path / "ckpt") == 0
    assert "1 activations (model.layers.1.input_layernorm/norm) have a scale per linear" in capsys.readouterr().err
    assert_kept(source, tmp_path / "ckpt")
    quantize_node = next(
        n for n in emitted(tmp_path / "ckpt").nodes if n.name == "model.layers.1.self_attn.q_proj/quantize"
    )
    assert stored_array(quantize_node.inputs[1]).item() == torch.tensor(0.02).item()


@pytest.mark.parametrize("tool", TOOLS)
def test_linears_that_were_left_in_bfloat16_stay_so(tool: str, tmp_path: Path) -> None:
    """As in Llama-3.1-405B-Instruct-FP8: no attention, and nothing of the first layer."""
    plain = lambda module: "self_attn" in module or "layers.0." in module
    source = elsewhere.write(tmp_path / "in", tool, plain=plain)
    assert run(source, tmp_path / "ckpt", *flags(tool)) == 0
    assert_kept(source, tmp_path / "ckpt")
    format = read_format(json.loads((tmp_path / "ckpt/config.json").read_text()))
    assert [m for m in LINEARS if not format.quantizes(m)] == [m for m in LINEARS if plain(m)]
    expected = elsewhere.exact_logits(elsewhere.twin(source, tool), SEQUENCE)
    assert hf_llama.sqnr(expected, logits(tmp_path / "ckpt")) > 100


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"torch_dtype": "float16"},
        {"kind": "Qwen2"},
        {"kind": "Mistral", "sliding_window": None},
    ],
    ids=["tied", "biases", "float16", "qwen2", "mistral"],
)
def test_other_llamas(changes: dict[str, Any], tmp_path: Path) -> None:
    dtype = torch.float16 if "torch_dtype" in changes else torch.bfloat16
    more = {k: v for k, v in changes.items() if k != "torch_dtype"}
    source = elsewhere.write(tmp_path / "in", "autofp8", dtype=dtype, **more)
    assert run(source, tmp_path / "ckpt") == 0
    assert_kept(source, tmp_path / "ckpt")
    expected = elsewhere.exact_logits(elsewhere.twin(source, "autofp8"), SEQUENCE)
    assert hf_llama.sqnr(expected, logits(tmp_path / "ckpt")) > 100


def test_one_weight_scale_serves_every_channel_where_activations_have_one_per_token(tmp_path: Path) -> None:
    source = elsewhere.write(tmp_path / "in", "modelopt_rowwise")
    path = source / "model.safetensors"
    save_file({n: t.mean() if n.endswith("weight_scale") else t for n, t in load_file(path).items()}, path)
    (source / "hf_quant_config.json").unlink()
    edit_config(source, quantization_config=compressed("tensor", {**FLOAT8, "strategy": "token", "dynamic": True}))
    assert run(source, tmp_path / "ckpt") == 0
    assert_kept(source, tmp_path / "ckpt")
    expected = elsewhere.exact_logits(elsewhere.twin(source, "modelopt_rowwise"), SEQUENCE)
    assert hf_llama.sqnr(expected, logits(tmp_path / "ckpt")) > 100


def test_a_converted_checkpoint_becomes_an_engine_that_answers(tmp_path: Path) -> None:
    source = elsewhere.write(tmp_path / "in", "modelopt", kv=True)
    assert run(source, tmp_path / "ckpt") == 0
    arguments = ["--checkpoint_dir", str(tmp_path / "ckpt"), "--target", "cpu", "--max_seq_len", "64", "--verify"]
    assert build.main([*arguments, "--output_dir", str(tmp_path / "engine")]) == 0
    (completion,) = LLM(tmp_path / "engine").generate([SEQUENCE[:9]], SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(completion.token_ids) == 4


# Several ranks


@pytest.mark.parametrize("tool", ["autofp8", "fbgemm", "finegrained"])
def test_two_ranks_compute_what_one_does(tool: str, tmp_path: Path) -> None:
    source = elsewhere.write(tmp_path / "in", tool, intermediate_size=512)
    assert run(source, tmp_path / "ckpt") == 0
    opened = Source(llama, Checkpoint(tmp_path / "ckpt"))
    found: list[str] = []
    request = Request(max_batch_size=4, max_seq_len=128, max_num_tokens=64, target="cpu", tp_size=2)
    ranks.verify_ranks(opened, request, Reporter(remark=found.append))
    assert found and all("SQNR" in line for line in found)


def test_blocks_are_parted_whole_or_not_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """384 columns are three blocks: two for one rank, one for the other, too few for four."""
    source = elsewhere.write(tmp_path / "in", "finegrained")
    assert run(source, tmp_path / "ckpt") == 0
    flags = ["--checkpoint_dir", str(tmp_path / "ckpt"), "--target", "cpu", "--max_seq_len", "64", "--dry_run"]
    assert build.main([*flags, "--tp_size", "2"]) == 0
    capsys.readouterr()
    assert build.main([*flags, "--tp_size", "4"]) == 1
    error = capsys.readouterr().err
    assert "tp_size" in error and "Traceback" not in error


def test_older_spellings_of_compressed_tensors_are_read(tmp_path: Path) -> None:
    source = elsewhere.by_compressed_tensors(tmp_path / "in", "FP8_BLOCK")
    config = json.loads((source / "config.json").read_text())
    quantization = config.pop("quantization_config")
    quantization["config_groups"]["group_0"]["weights"]["block_structure"] = "128x128"
    quantization |= {"quantization_status": "frozen", "format": "naive-quantized"}
    (source / "config.json").write_text(json.dumps({**config, "compression_config": quantization}))
    assert build.main(["--checkpoint_dir", str(source), "--target", "cpu", "--dry_run"]) == 1
    assert run(source, tmp_path / "ckpt") == 0
    assert_kept(source, tmp_path / "ckpt")
    assert "compression_config" not in json.loads((tmp_path / "ckpt/config.json").read_text())


@pytest.mark.parametrize("preset", PRESETS)
def test_fp8_build_reads_compressed_tensors_that_need_no_conversion(preset: str, tmp_path: Path) -> None:
    source = elsewhere.by_compressed_tensors(tmp_path / "in", preset)
    assert build.main(["--checkpoint_dir", str(source), "--target", "cpu", "--dry_run"]) == 0
    assert run(source, tmp_path / "ckpt") == 0
    assert torch.equal(logits(source), logits(tmp_path / "ckpt"))
