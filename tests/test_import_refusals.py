"""Checkpoints of other tools that are damaged, or hold what no format here keeps: one sentence, and nothing is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hf_llama
import pytest
import quantized_elsewhere as elsewhere
import tiny_checkpoint
import torch
from quantized_elsewhere import E4M3, FLOAT8, compressed, edit, edit_config
from safetensors.torch import load_file, save_file
from test_import import assert_kept, run

from fp8.scripts import build


def refused(source: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """The one line that a refusal prints; nothing is left of the output."""
    capsys.readouterr()
    assert run(source, source.parent / "refused", *more) == 1
    assert not [p for p in source.parent.iterdir() if p.name.startswith("refused")]
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("fp8-quantize: ")]
    return line


UP = "model.layers.1.mlp.up_proj"
TENSORS: dict[str, tuple[str, str, Any, tuple[str, ...]]] = {  # tool, tensor, what becomes of it, what is said
    "no weight scale": ("autofp8", f"{UP}.weight_scale", None, (f"{UP}.weight_scale is missing", "AutoFP8")),
    "no block scale": ("finegrained", f"{UP}.weight_scale_inv", None, (f"{UP}.weight_scale_inv is missing",)),
    "no input scale": ("mistral", f"{UP}.activation_scale", None, (f"{UP}.activation_scale is missing",)),
    "no k scale": ("autofp8", "model.layers.0.self_attn.k_scale", None, ("self_attn.k_scale is missing",)),
    "no v scale": ("modelopt", "model.layers.0.self_attn.v_proj.v_scale", None, ("v_proj.v_scale is missing",)),
    "scale per row": ("autofp8", f"{UP}.weight_scale", torch.ones(384), (f"{UP}.weight_scale", "[384]", "[1]")),
    "one scale": ("fbgemm", f"{UP}.weight_scale", torch.ones(1), (f"{UP}.weight_scale", "[1]", "[384, 1]")),
    "fewer blocks": ("finegrained", f"{UP}.weight_scale_inv", torch.ones(3, 1), ("[3, 1]", "[3, 2]")),
    "nan": ("fbgemm", f"{UP}.weight_scale", torch.full((384, 1), torch.nan), (f"{UP}.weight_scale", "nan")),
    "zero": ("modelopt", f"{UP}.weight_scale", torch.tensor(0.0), (f"{UP}.weight_scale", "scale 0.0")),
    "negative": ("autofp8", f"{UP}.input_scale", torch.tensor(-0.1), (f"{UP}.input_scale", "-0.1")),
    "infinite": ("autofp8", "model.layers.0.self_attn.v_scale", torch.tensor(torch.inf), ("v_scale", "inf")),
    "integer scale": ("autofp8", f"{UP}.weight_scale", torch.tensor(1), (f"{UP}.weight_scale", "int64")),
    "nan code": ("autofp8", f"{UP}.weight", torch.full((384, 256), 127, dtype=torch.uint8).view(E4M3), ("NaN",)),
    "shape": ("autofp8", f"{UP}.weight", torch.ones(383, 256).to(E4M3), (f"{UP}.weight", "[383, 256]", "[384, 256]")),
    "no weight": ("autofp8", f"{UP}.weight", None, (f"{UP}.weight is missing",)),
    "int8": ("modelopt", f"{UP}.weight", torch.ones(384, 256, dtype=torch.int8), (f"{UP}.weight", "int8")),
    "lm_head": ("modelopt", "lm_head.weight", torch.ones(300, 256).to(E4M3), ("lm_head.weight", "model's type")),
    "a scale too many": ("fbgemm", f"{UP}.pre_quant_scale", torch.ones(256), (f"{UP}.pre_quant_scale", "another")),
    "zero point": ("autofp8", f"{UP}.weight_zero_point", torch.zeros(1), (f"{UP}.weight_zero_point",)),
}  # fmt: skip


@pytest.mark.parametrize("kind", TENSORS)
def test_a_bad_tensor_is_named(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool, name, value, says = TENSORS[kind]
    source = elsewhere.write(tmp_path / "in", tool, kv=tool in ("autofp8", "modelopt"))
    edit(source, name, value)
    error = refused(source, capsys)
    for word in says:
        assert word in error


HF_BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq' is not read; FP8 of autofp8, compressed"),
    "awq": ({"quant_method": "awq", "bits": 4}, "'awq' is not read"),
    "none": ({"bits": 8}, "quant_method None is not read"),
    "no scheme": ({"quant_method": "fp8"}, "activation_scheme is None, expected 'static' or 'dynamic'"),
    "scheme": ({"quant_method": "fp8", "activation_scheme": "magic"}, "activation_scheme is 'magic'"),
    "kv scheme": ({"quant_method": "fp8", "activation_scheme": "static", "kv_cache_scheme": "dynamic"}, "'dynamic'"),
    "dynamic": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "--qformat fp8_rowwise takes the weights as"),
    "64 x 64": ({**HF_BLOCKS, "weight_block_size": [64, 64]}, "weight_block_size is [64, 64], expected [128, 128]"),
    "static blocks": ({**HF_BLOCKS, "activation_scheme": "static"}, "'static', expected 'dynamic'"),
    "fnuz": ({**HF_BLOCKS, "fmt": "e4m3fnuz"}, "fmt is 'e4m3fnuz', expected 'e4m3'"),
    "ue8m0": ({**HF_BLOCKS, "scale_fmt": "ue8m0"}, "--qformat fp8_block takes the weights as they are"),
    "bound": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": "high"}, "activation_scale_ub is 'high'"),
    "zero bound": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 0}, "activation_scale_ub 0.0 must be"),
    "nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo 'NVFP4' is not read"),
    "nvfp4 kv": ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "NVFP4"}, "'NVFP4'"),
    "weights alone": ({"quant_method": "modelopt", "quant_algo": "fp8_pb_wo"}, "--qformat fp8_block takes the weights"),
    "list": ({"quant_method": "fbgemm_fp8", "modules_to_not_convert": "lm_head"}, "expected a list of module names"),
    "regex": (compressed("tensor", FLOAT8, ignore=["re:("]), "no regular expression"),
    "no algorithm": ({"quant_method": "modelopt"}, "quant_algo 'absent' is not read"),
    "int8": (compressed("channel", {**FLOAT8, "type": "int"}), "input_activations: int of 8 bits"),
    "int4": (compressed("group", None) | {"config_groups": {"a": {"weights": {**FLOAT8, "num_bits": 4}}}}, "4 bits"),
    "group": (compressed("group", None), "config_groups.group_0.weights: strategy 'group'"),
    "weight only": (compressed("channel", None), "quantize weights alone; fp8_rowwise quantizes activations too"),
    "dynamic tensor": (compressed("tensor", {**FLOAT8, "dynamic": True}), "--qformat fp8_rowwise takes the weights"),
    "static token": (compressed("channel", {**FLOAT8, "strategy": "token"}), "static activations of strategy token"),
    "asymmetric": (compressed("tensor", {**FLOAT8, "symmetric": False}), "symmetric False, is not read"),
    "local": (compressed("tensor", {**FLOAT8, "dynamic": "local"}), "dynamic is 'local', expected true or false"),
    "kv heads": (compressed("tensor", FLOAT8, kv_cache_scheme={**FLOAT8, "strategy": "attn_head"}), "kv_cache_scheme"),
    "sparse": (compressed("tensor", FLOAT8, sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24-bitmask"),
    "no strategy": (compressed("tensor", {**FLOAT8, "strategy": ["token"]}), "strategy is ['token'], expected str"),
    "no size": (compressed("tensor", {**FLOAT8, "group_size": [128]}), "group_size is [128], expected int"),
    "no activations": (compressed("tensor", "fp8"), "input_activations is 'fp8', expected an object"),
    "no nested object": ({"quant_method": "modelopt", "quantization": "FP8"}, "quantization is 'FP8', expected"),
    "rotated": (compressed("tensor", FLOAT8, transform_config={"a": {}}), "activations are rotated"),
    "outputs": (
        {"quant_method": "compressed-tensors", "config_groups": {
            "a": {"weights": FLOAT8, "input_activations": FLOAT8, "output_activations": FLOAT8}}},
        "output_activations is not read",
    ),
    "two schemes": (
        {"quant_method": "compressed-tensors", "config_groups": {
            "a": {"weights": FLOAT8, "input_activations": FLOAT8}, "b": {"weights": FLOAT8}}},
        "has 2 schemes; one is read",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_no_format_keeps_is_refused_by_its_key(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantization, says = CONFIGS[kind]
    source = tiny_checkpoint.write(tmp_path / "in", tiny_checkpoint.qformat("bf16"))
    config = json.loads((source / "config.json").read_text())
    del config["fp8_engine"]
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    assert says in refused(source, capsys)
    assert build.main(["--checkpoint_dir", str(source), "--target", "cpu", "--dry_run"]) == 1
    assert capsys.readouterr().err.count("fp8-build: ") == 1


def test_what_departs_from_the_checkpoint_is_taken_when_asked_for(tmp_path: Path) -> None:
    source = elsewhere.write(tmp_path / "in", "autofp8")
    path = source / "model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if not n.endswith("input_scale")}, path)
    edit_config(source, quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic"})
    assert run(source, tmp_path / "ckpt", "--qformat", "fp8_rowwise") == 0
    assert_kept(source, tmp_path / "ckpt")


@pytest.mark.parametrize(
    ("more", "says"),
    [(("--qformat", "fp8_rowwise"), "is qformat fp8, not fp8_rowwise"),
     (("--exclude_modules", "*.q_proj"), "has quantized"),
     (("--kv_cache_dtype", ""), "kv_cache_dtype '' is not one of auto, fp8"),
     (("--kv_cache_dtype", "fp8"), "has no scales of K and V, which --kv_cache_dtype fp8 needs; give --calib_dataset"),
     (("--qformat", "fp8_rowwise", "--activation_scale_ub", "7"), "--activation_scale_ub does not apply")],
)  # fmt: skip
def test_flags_that_would_quantize_anew_are_refused(
    more: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused(elsewhere.write(tmp_path / "in", "autofp8"), capsys, *more)


def test_a_configuration_that_its_tensors_contradict_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = elsewhere.write(tmp_path / "in", "fbgemm")
    ignored = {**elsewhere.CONFIGS["fbgemm"], "modules_to_not_convert": ["lm_head", UP]}
    edit_config(source, quantization_config=ignored)
    error = refused(source, capsys)
    assert f"{UP}.weight is float8_e4m3fn" in error and "leaves it unquantized" in error


def test_a_damaged_weight_explains_a_calibration_that_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = elsewhere.write(tmp_path / "in", "autofp8")
    edit(source, f"{UP}.weight", torch.full((384, 256), 127, dtype=torch.uint8).view(E4M3))
    hf_llama.add_tokenizer(source)
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 9)
    more = ("--kv_cache_dtype", "fp8", "--calib_dataset", str(tmp_path / "text.txt"))
    assert f"{UP}.weight contains NaN" in refused(source, capsys, *more)


def test_sizes_that_blocks_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = elsewhere.write(tmp_path / "in", "finegrained")
    edit(source, f"{UP}.weight", torch.ones(384, 200).to(E4M3))
    assert f"{UP}.weight is [384, 200]" in refused(source, capsys)


def test_files_that_are_cut_off_or_missing_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = elsewhere.write(tmp_path / "in", "autofp8")
    file = source / "model.safetensors"
    tensors = load_file(file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    assert "model.safetensors" in refused(source, capsys)
    file.unlink()
    shards = {name: f"model-{1 + i % 2:05}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for shard in sorted(set(shards.values())):
        save_file({n: t for n, t in tensors.items() if shards[n] == shard}, source / shard)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert run(source, tmp_path / "ckpt") == 0
    after = load_file(tmp_path / "ckpt/model.safetensors")
    assert all(
        torch.equal(after[n].view(torch.uint8), t.view(torch.uint8)) for n, t in tensors.items() if t.dtype == E4M3
    )
    (source / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors is missing" in refused(source, capsys)


@pytest.mark.parametrize("tool", ["autofp8", "finegrained", "modelopt"])
def test_fp8_build_says_what_to_do_first(tool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = elsewhere.write(tmp_path / "in", tool)
    assert build.main(["--checkpoint_dir", str(source), "--target", "cpu", "--dry_run"]) == 1
    error = capsys.readouterr().err
    assert f"fp8-quantize --model_dir {source} --output_dir" in error and "Traceback" not in error
