"""fp8-quantize from end to end: files that transformers loads, and failures that leave nothing half-written."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import hf_llama
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fp8.builder import shards
from fp8.builder.checkpoint import Checkpoint, CheckpointError, read_header
from fp8.builder.interpret import Interpreter, empty_caches, step_inputs, to_torch
from fp8.builder.quantization_config import read_format
from fp8.builder.workplace import alone
from fp8.models import llama
from fp8.scripts import quantize

FORMATS = [(name, kv) for name in ("bf16", "fp16", "fp8", "fp8_channel", "fp8_rowwise") for kv in ("auto", "fp8")]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    hf_llama.make(directory / "model", torch.bfloat16)
    hf_llama.add_tokenizer(directory / "model")
    (directory / "text.txt").write_text("def f(x):\n    return x + 1\n" * 60)
    return directory


def arguments(source: Path, output: Path, *more: str) -> list[str]:
    text = source / "text.txt"
    return [
        "--model_dir", str(source / "model"), "--output_dir", str(output), "--calib_dataset", str(text),
        "--calib_size", "4", "--calib_max_seq_length", "48", *more,
    ]  # fmt: skip


def run(source: Path, output: Path, *more: str) -> int:
    return quantize.main(arguments(source, output, *more))


def refused(source: Path, output: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """The one line that a failing command prints; nothing must be left of the output."""
    before = sorted(p.name for p in output.parent.iterdir())
    assert run(source, output, *more) == 1
    assert sorted(p.name for p in output.parent.iterdir()) == before
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("fp8-quantize: ")][-1]


def graph_of(directory: Path, dtype: str) -> Any:
    checkpoint = Checkpoint(directory)
    return llama.emit(llama.read_config(checkpoint.config), checkpoint, read_format(checkpoint.config), dtype)


def interpreted_logits(directory: Path, sequence: list[int], dtype: str = "float32") -> torch.Tensor:
    graph = graph_of(directory, dtype)
    feeds = step_inputs([(sequence, 0)])
    return Interpreter(graph)({**feeds, **empty_caches(graph, feeds)})["logits"]


@pytest.mark.parametrize(("name", "kv"), FORMATS)
def test_transformers_loads_the_checkpoint_with_the_same_weights(
    name: str, kv: str, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "ckpt"
    assert run(source, output, "--qformat", name, "--kv_cache_dtype", kv) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    sequence = hf_llama.sequences(40)[0]
    expected = hf_llama.logits(model, [sequence])  # decompresses the model
    stored = load_file(output / "model.safetensors")
    for module in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        weight = stored[f"{module}.weight"].float() * stored.get(f"{module}.weight_scale", torch.ones(1))
        assert torch.equal(model.get_submodule(module).weight.float(), weight)
    if kv == "auto":  # transformers quantizes K and V alone, FP8 attention here q and P as well
        assert hf_llama.sqnr(expected, interpreted_logits(output, sequence)) > (80 if name in ("bf16", "fp16") else 45)
    assert (output / "tokenizer.json").read_bytes() == (source / "model/tokenizer.json").read_bytes()


@pytest.mark.parametrize(("name", "kv"), FORMATS)
def test_checkpoint_holds_what_its_format_says(name: str, kv: str, source: Path, tmp_path: Path) -> None:
    assert run(source, tmp_path / "ckpt", "--qformat", name, "--kv_cache_dtype", kv) == 0
    entries = Checkpoint(tmp_path / "ckpt").entries
    module, attention = "model.layers.1.mlp.gate_proj", "model.layers.1.self_attn"
    found = {n: (e.dtype.name, e.shape) for n, e in entries.items()}
    rows = {"fp8": (1,), "fp8_channel": (96, 1), "fp8_rowwise": (96, 1)}.get(name)
    plain = "float16" if name == "fp16" else "bfloat16"
    assert found[f"{module}.weight"] == ("float8_e4m3fn" if rows else plain, (96, 64))
    assert found.get(f"{module}.weight_scale") == (("float32", rows) if rows else None)
    assert found.get(f"{module}.input_scale") == (("float32", (1,)) if name in ("fp8", "fp8_channel") else None)
    for n in "qkv":
        assert found.get(f"{attention}.{n}_scale") == (("float32", (1,)) if kv == "fp8" else None)
    assert found["lm_head.weight"] == (plain, (300, 64))


@pytest.mark.parametrize(
    ("name", "kv", "bound"), [("bf16", "auto", 35), ("fp8", "auto", 15), ("fp8_rowwise", "fp8", 15)]
)
def test_quantized_model_still_is_the_model(name: str, kv: str, bound: float, source: Path, tmp_path: Path) -> None:
    assert run(source, tmp_path / "ckpt", "--qformat", name, "--kv_cache_dtype", kv) == 0
    sequence = list(range(97, 123)) * 2
    expected = hf_llama.logits(hf_llama.load(source / "model"), [sequence])
    assert hf_llama.sqnr(expected, interpreted_logits(tmp_path / "ckpt", sequence, "bfloat16")) > bound


def test_excluded_modules_are_written_unquantized_and_ignored(source: Path, tmp_path: Path) -> None:
    assert run(source, tmp_path / "ckpt", "--exclude_modules", "*.layers.0.*", "*.down_proj") == 0
    stored = load_file(tmp_path / "ckpt/model.safetensors")
    original = load_file(source / "model/model.safetensors")
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        assert torch.equal(stored[f"{name}.weight"], original[f"{name}.weight"])
        assert f"{name}.input_scale" not in stored
    ignore = json.loads((tmp_path / "ckpt/config.json").read_text())["quantization_config"]["ignore"]
    assert "lm_head" in ignore and "model.layers.1.mlp.down_proj" in ignore and len(ignore) == 1 + 7 + 1
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ckpt")


def test_a_second_run_writes_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert run(source, tmp_path / name, "--kv_cache_dtype", "fp8") == 0
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_tied_and_sharded_and_float32_sources(source: Path, tmp_path: Path) -> None:
    tied = tmp_path / "in/model"
    hf_llama.make(tied, shard="60KB", tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    hf_llama.add_tokenizer(tied)
    shutil.copy(source / "text.txt", tmp_path / "in")
    assert run(tmp_path / "in", tmp_path / "ckpt", "--qformat", "fp8_rowwise", "--dtype", "float16") == 0
    config = json.loads((tmp_path / "ckpt/config.json").read_text())
    assert config["dtype"] == "float16" and "lm_head.weight" not in Checkpoint(tmp_path / "ckpt")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ckpt", dtype=torch.float32)
    sequence = hf_llama.sequences(40)[0]
    assert hf_llama.sqnr(hf_llama.logits(model, [sequence]), interpreted_logits(tmp_path / "ckpt", sequence)) > 45


def test_large_checkpoints_are_sharded(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tmp_path / "whole"
    assert run(source, whole) == 0
    write = shards.write_shards
    monkeypatch.setattr("fp8.builder.quantize.write_shards", lambda d, g, p: write(d, g, p, max_bytes=50_000))
    assert run(source, tmp_path / "ckpt") == 0
    files = sorted((tmp_path / "ckpt").glob("model-*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "ckpt/model.safetensors.index.json").read_text())
    expected = load_file(whole / "model.safetensors")
    assert index["weight_map"].keys() == expected.keys()
    for file in files:
        for name, tensor in load_file(file).items():
            assert torch.equal(tensor.float(), expected[name].float())


# Failures


REFUSED = {
    "qformat": (["--qformat", "int4"], "qformat 'int4' does not exist"),
    "kv_cache_dtype": (["--kv_cache_dtype", "int8"], "kv_cache_dtype 'int8' is not one of auto, fp8"),
    "dtype": (["--dtype", "int8"], "--dtype int8 is not one of"),
    "contradiction": (["--qformat", "bf16", "--dtype", "float16"], "--dtype float16 contradicts qformat bf16"),
    "pattern": (["--exclude_modules", "*.gate"], "'*.gate' matches no linear"),
    "bound": (["--qformat", "fp8_rowwise", "--activation_scale_ub", "x"], "neither a number nor none"),
    "misplaced": (["--activation_scale_ub", "3"], "does not apply to qformat fp8"),
    "dataset": (["--calib_dataset", "nowhere.txt"], "nowhere.txt cannot be read"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_bad_flag_values_are_refused(
    kind: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, message = REFUSED[kind]
    assert message in refused(source, tmp_path / "ckpt", capsys, *flags)


def test_missing_calibration_text_is_refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model_dir", str(source / "model"), "--output_dir", str(tmp_path / "ckpt")]
    assert quantize.main(flags) == 1
    assert "give --calib_dataset" in capsys.readouterr().err
    assert quantize.main([*flags, "--qformat", "fp8_rowwise"]) == 0


def damaged(source: Path, directory: Path, name: str, value: Any) -> Path:
    """A copy of the source with one tensor exchanged, or removed if `value` is None."""
    shutil.copytree(source, directory)
    path = directory / "model/model.safetensors"
    tensors = load_file(path)
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value(tensors[name]) if name in tensors else value(None)
    save_file(tensors, path)
    return directory


def poison(value: float) -> Any:
    def put(tensor: torch.Tensor) -> torch.Tensor:
        tensor[3, 5] = value
        return tensor

    return put


DAMAGED = {
    "nan": ("model.layers.0.mlp.up_proj.weight", poison(float("nan")), "contains NaN or Inf"),
    "inf": ("model.layers.1.self_attn.o_proj.weight", poison(float("inf")), "contains NaN or Inf"),
    "nan_embedding": ("model.embed_tokens.weight", poison(float("nan")), "contains NaN or Inf"),
    "missing": ("model.layers.1.mlp.up_proj.weight", None, "is missing"),
    "shape": ("model.layers.1.mlp.up_proj.weight", lambda t: t[:5], r"has shape [5, 64], expected [96, 64]"),
    "dtype": ("model.norm.weight", lambda t: t.to(torch.int8), "has dtype int8"),
    "unread": ("model.layers.0.self_attn.q_norm.weight", lambda t: torch.ones(4), "does not read it"),
}


@pytest.mark.parametrize("qformat", ["fp8", "fp8_rowwise"])
@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_tensor_is_named(
    kind: str, qformat: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, value, message = DAMAGED[kind]
    error = refused(damaged(source, tmp_path / "in", name, value), tmp_path / "ckpt", capsys, "--qformat", qformat)
    assert name in error and message in error


def test_float16_overflow_of_a_weight_is_named(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    bad = damaged(source, tmp_path / "in", name, poison(1e6))
    error = refused(bad, tmp_path / "ckpt", capsys, "--qformat", "fp8_rowwise", "--dtype", "float16")
    assert name in error and "NaN or Inf in torch.float16" in error


def test_quantized_source_is_refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(source, tmp_path / "in/model") == 0
    shutil.copy(source / "text.txt", tmp_path / "in")
    assert "is quantized already" in refused(tmp_path / "in", tmp_path / "ckpt", capsys)


def test_unknown_model_type_is_refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(source, tmp_path / "in")
    config = json.loads((source / "model/config.json").read_text())
    (tmp_path / "in/model/config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    assert "model_type 'mamba' is not supported" in refused(tmp_path / "in", tmp_path / "ckpt", capsys)


def test_existing_output_is_kept_unless_told_otherwise(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "ckpt"
    output.mkdir()
    (output / "precious").write_text("x")
    assert "exists already" in refused(source, output, capsys)
    assert "is not a checkpoint" in refused(source, output, capsys, "--overwrite")
    (output / "config.json").write_text("{}")
    assert run(source, output, "--overwrite") == 0
    assert not (output / "precious").exists() and (output / "model.safetensors").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt"]


def test_the_model_itself_is_never_overwritten(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "is the model to be quantized" in refused(source, source / "model", capsys, "--overwrite")
    (tmp_path / "source").symlink_to(source)
    assert "or holds it" in refused(source, tmp_path / "source", capsys, "--overwrite")
    assert (source / "model/model.safetensors").exists()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").touch()
    assert "is the current directory" in refused(source, tmp_path, capsys, "--overwrite")


def test_a_link_stays_and_leads_to_what_is_new(source: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "config.json").write_text("{}")
    (tmp_path / "ckpt").symlink_to("real")
    assert run(source, tmp_path / "ckpt", "--overwrite", "--qformat", "bf16") == 0
    assert (tmp_path / "ckpt").is_symlink() and (tmp_path / "real" / "model.safetensors").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt", "real"]


def test_what_lies_in_the_way_is_cleared_and_what_another_writes_is_not(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ckpt.partial" / "deeper").mkdir(parents=True)
    with alone(tmp_path / "ckpt.partial"):
        assert "another process is writing it" in refused(source, tmp_path / "ckpt", capsys)
        assert (tmp_path / "ckpt.partial" / "deeper").exists()
    assert run(source, tmp_path / "ckpt", "--qformat", "bf16") == 0
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt"]


def fail_in_write(monkeypatch: pytest.MonkeyPatch, error: BaseException, after: int) -> None:
    real, calls = shards._data, [0]

    def data(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise error
        return real(*arguments)

    monkeypatch.setattr(shards, "_data", data)


def test_full_disk_leaves_only_what_a_second_run_continues_from(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "ckpt"
    with monkeypatch.context() as patched:
        fail_in_write(patched, OSError(errno.ENOSPC, "No space left on device"), after=5)
        assert run(source, output) == 1
    assert "the disk is full" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.partial"]
    assert [p.name for p in (tmp_path / "ckpt.partial").iterdir()] == ["calibration.json"]
    assert run(source, output) == 0
    assert "continuing an earlier calibration" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt"]
    assert sorted(p.name for p in output.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip


def test_full_disk_without_calibration_leaves_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_in_write(monkeypatch, OSError(errno.ENOSPC, "No space left on device"), after=5)
    assert "disk is full" in refused(source, tmp_path / "ckpt", capsys, "--qformat", "fp8_rowwise")


def test_interruption_leaves_no_output(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_in_write(monkeypatch, KeyboardInterrupt(), after=3)
    assert run(source, tmp_path / "ckpt", "--qformat", "bf16") == 130
    assert not list(tmp_path.iterdir())


# Safetensors headers


def header_file(path: Path, header: Any, data: int, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data))
    return path


def f32(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BAD_HEADERS: dict[str, tuple[Any, int, int | None, str]] = {
    "oversized": ({}, 0, 2**40, "header claims 1099511627776 bytes"),
    "truncated_header": ({"a": f32(0, 4, [1])}, 0, 500, "header claims 500 bytes"),
    "truncated_data": ({"a": f32(0, 40, [10])}, 20, None, "truncated or damaged"),
    "trailing_data": ({"a": f32(0, 4, [1])}, 20, None, "truncated or damaged"),
    "overlapping": ({"a": f32(0, 8, [2]), "b": f32(4, 12, [2])}, 12, None, "b overlaps the tensor before it"),
    "gap": ({"a": f32(0, 4, [1]), "b": f32(8, 12, [1])}, 12, None, "b leaves a gap"),
    "size": ({"a": f32(0, 8, [3])}, 8, None, "takes 12 bytes, data_offsets span 8"),
    "dtype": ({"a": f32(0, 8, [2], "F31")}, 8, None, "dtype F31 is unknown"),
    "fnuz": ({"a": f32(0, 8, [8], "F8_E4M3FNUZ")}, 8, None, "FNUZ codes mean other values"),
    "negative": ({"a": f32(0, 4, [-1])}, 4, None, "malformed"),
    "reversed": ({"a": f32(4, 0, [1])}, 4, None, "malformed"),
    "not_json": (b"{abc", 0, None, "not valid JSON"),
    "not_object": (b"[]", 0, None, "not a JSON object"),
    "duplicate": (b'{"a":{},"a":{}}', 0, None, "appears twice"),
    "deep": (b"[" * 100_000, 0, None, "not valid JSON"),
}


@pytest.mark.parametrize("kind", BAD_HEADERS)
def test_bad_header_is_refused_with_its_file(kind: str, tmp_path: Path) -> None:
    header, data, length, message = BAD_HEADERS[kind]
    path = header_file(tmp_path / "model.safetensors", header, data, length)
    with pytest.raises(CheckpointError, match=message) as error:
        read_header(path)
    assert str(path) in str(error.value)


def test_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="the file has 0"):
        read_header(tmp_path / "model.safetensors")


def test_header_reader_agrees_with_the_library(source: Path) -> None:
    path = source / "model/model.safetensors"
    entries, metadata = read_header(path)
    expected = load_file(path)
    assert metadata == {"format": "pt"} and entries.keys() == expected.keys()
    for name, entry in entries.items():
        assert torch.equal(to_torch(entry.array()), expected[name])


def test_missing_shard_and_index_mistakes_are_named(source: Path, tmp_path: Path) -> None:
    hf_llama.make(tmp_path, shard="60KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    moved = shard.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"{shard.name} is missing"):
        _ = Checkpoint(tmp_path).entries
    moved.rename(shard)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = sorted(tmp_path.glob("model-*.safetensors"))[0].name
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"has no tensor model\.norm\.weight"):
        _ = Checkpoint(tmp_path).entries
    index.write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        _ = Checkpoint(tmp_path).entries


def test_directory_without_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a directory"):
        Checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pickled \.bin files are not read"):
        _ = Checkpoint(tmp_path).entries
