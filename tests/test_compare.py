"""fp8-inspect compare: a planted fault is named, and an engine is held against its Hugging Face model."""

from __future__ import annotations

import json
from pathlib import Path

import hf_llama
import pytest
import tiny_checkpoint as tiny
import torch
from safetensors.torch import load_file, save_file

from fp8.builder import build
from fp8.builder.checkpoint import Checkpoint
from fp8.builder.request import Reporter, Request, Source
from fp8.models import config as models
from fp8.scripts import compare, inspect

FLAGS = ["--max_kv_blocks", "4", "--json"]


def built(checkpoint: Path, output: Path, taps: tuple[str, ...] | None = None) -> Path:
    found = Checkpoint(checkpoint)
    source = Source(models.load(found.config), found)
    compiled = build.compile(source, Request(4, 128, 64, "cpu", debug_tensors=taps), Reporter())
    build.write(compiled, source, output, Reporter())
    return output


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("compare") / "checkpoint", tiny.qformat("fp8", "fp8"))


@pytest.fixture(scope="module")
def sound(checkpoint) -> Path:
    return built(checkpoint, checkpoint.parent / "engine")


def faulty(checkpoint: Path, directory: Path, tensor: str) -> Path:
    """An engine of the same checkpoint with one weight scale doubled."""
    directory.mkdir()
    (directory / "config.json").write_text((checkpoint / "config.json").read_text())
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[tensor] = tensors[tensor] * 2
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return built(directory, directory / "engine")


def facts(capsys, *arguments: object) -> dict:
    code = inspect.main(["compare", *map(str, arguments), *FLAGS])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


@pytest.mark.parametrize("module", ["self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_a_doubled_weight_scale_is_the_first_tensor_named(checkpoint, sound, tmp_path, capsys, module):
    wrong = faulty(checkpoint, tmp_path / "wrong", f"model.layers.1.{module}.weight_scale")
    found = facts(capsys, wrong, sound)
    assert found["first_under"] == f"model.layers.1.{module}.output"
    names = [t["tensor"] for t in found["tensors"]]
    before = found["tensors"][: names.index(found["first_under"])]
    assert len(before) > 10 and all(t["equal"] for t in before)


def test_a_fault_inside_a_fused_mlp_is_named_at_what_it_stores(checkpoint, sound, tmp_path, capsys):
    wrong = faulty(checkpoint, tmp_path / "wrong", "model.layers.0.mlp.up_proj.weight_scale")
    assert facts(capsys, wrong, sound)["first_under"] == "model.layers.0.mlp.down_proj.input"


def test_taps_show_the_fault_inside_the_fused_mlp(checkpoint, tmp_path, capsys):
    faulty(checkpoint, tmp_path / "wrong", "model.layers.0.mlp.up_proj.weight_scale")
    taps = ("*.mlp.up_proj/output",)
    a, b = built(tmp_path / "wrong", tmp_path / "a", taps), built(checkpoint, tmp_path / "b", taps)
    assert facts(capsys, a, b)["first_under"] == "model.layers.0.mlp.up_proj.output"


def test_the_same_engine_is_equal_to_itself(sound, capsys):
    found = facts(capsys, sound, sound, "--input_tokens", "5,9,31,77", "8,8")
    assert found["first_under"] is None and all(t["equal"] for t in found["tensors"])
    codes = next(t for t in found["tensors"] if t["tensor"] == "model.layers.0.self_attn.q_proj.input")
    assert 0 <= codes["saturation"]["a"] <= 1 and codes["amax"]["a"] == codes["amax"]["b"] > 0
    assert inspect.main(["compare", str(sound), str(sound), "--max_kv_blocks", "4"]) == 0
    assert "no tensor is under 15 dB" in capsys.readouterr().out


def test_an_engine_is_held_against_its_hugging_face_model(tmp_path, capsys):
    hf_llama.make(tmp_path / "model", torch.bfloat16)
    engine = built(tmp_path / "model", tmp_path / "engine")
    found = facts(capsys, engine, tmp_path / "model", "--threshold", "25")
    names = [t["tensor"] for t in found["tensors"]]
    assert found["first_under"] is None, found
    assert names[0] == "model.embed_tokens.output" and names[-1] == "lm_head.output" and len(names) >= 18
    assert {"model.layers.1.self_attn.v_proj.output", "model.layers.0.output"} <= set(names)
    turned = facts(capsys, tmp_path / "model", engine)
    assert [t["tensor"] for t in turned["tensors"]] == names


def test_saturation_counts_codes_at_the_end_of_the_range():
    codes = torch.tensor([[448.0, -448.0, 1.0, 416.0]]).to(torch.float8_e4m3fn)
    assert compare._saturated(compare.Recorded(codes, torch.ones(1))) == 0.5


def test_what_cannot_be_compared_is_refused(sound, tmp_path, capsys):
    assert inspect.main(["compare", str(sound), str(tmp_path)]) == 1
    assert "neither an engine directory nor" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fbgemm_fp8"}}))
    assert inspect.main(["compare", str(sound), str(tmp_path)]) == 1
    assert "is quantized (fbgemm_fp8), which transformers does not" in capsys.readouterr().err
    assert inspect.main(["compare", str(sound), str(sound), "--input_tokens", "5,99999", *FLAGS]) == 1
    assert "token 99999 at position 1 is outside the vocabulary" in capsys.readouterr().err
    assert inspect.main(["compare", str(sound), str(sound), "--input_text", "def", *FLAGS]) == 1
    assert "neither A nor B has a tokenizer" in capsys.readouterr().err


def test_models_of_other_shapes_are_refused(sound, tmp_path, capsys):
    other = built(tiny.write(tmp_path / "c", tiny.qformat("fp8", "fp8"), hidden_size=128), tmp_path / "other")
    assert inspect.main(["compare", str(sound), str(other), *FLAGS]) == 1
    assert "model.embed_tokens.output is [64, 192] in A, [64, 128] in B" in capsys.readouterr().err
