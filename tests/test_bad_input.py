"""Bad input through the command lines: a non-zero status, one clear error line, nothing half-written."""

from __future__ import annotations

import dataclasses
import errno
import functools
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import hf_llama
import pytest
import tiny_checkpoint
import tiny_engine
import torch
from safetensors.torch import load_file, save_file

from fp8.builder import engine as engine_format
from fp8.builder.engine import EngineError
from fp8.runtime import compiled

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
Damage = Callable[[Path], object]


class Refusal:
    """Runs a command line that must fail, and checks how it does."""

    def __init__(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        self.capsys = capsys
        self.tmp_path = tmp_path

    def __call__(self, command: str, *arguments: object, says: tuple[str, ...], status: int | None = None) -> None:
        before = self.files()
        try:
            found = importlib.import_module(f"fp8.scripts.{command}").main([str(a) for a in arguments])
        except SystemExit as exit:  # argparse
            found = exit.code
        printed = self.capsys.readouterr()
        assert found == status if status is not None else found, f"status {found}"
        assert_one_error(printed.err, *says)
        assert not printed.out
        assert self.files() == before

    def files(self) -> dict[str, int]:
        return {str(p): p.stat().st_mtime_ns for p in self.tmp_path.rglob("*") if p.is_file()}


def assert_one_error(stderr: str, *says: str) -> None:
    lines = [line for line in stderr.splitlines() if line.startswith("fp8-")]
    assert len(lines) == 1, stderr
    assert "Traceback" not in stderr
    for word in says:
        assert word in lines[0]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refusal:
    return Refusal(capsys, tmp_path)


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """A model as Hugging Face stores it."""
    return tiny_checkpoint.write(tmp_path / "model", tiny_checkpoint.qformat("bf16"))


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    return tiny_checkpoint.write(tmp_path / "checkpoint", tiny_checkpoint.qformat("fp8", "fp8"))


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return tiny_engine.write(tmp_path / "engine")


def quantize_arguments(model: Path, **changes: object) -> list[object]:
    flags = {"model_dir": model, "qformat": "fp8_rowwise", "output_dir": model.parent / "out", **changes}
    return [part for name, value in flags.items() for part in (f"--{name}", value)]


def build_arguments(checkpoint: Path, **changes: object) -> list[object]:
    flags = {
        "checkpoint_dir": checkpoint, "output_dir": checkpoint.parent / "out", "target": "cpu", "max_batch_size": 2,
        "max_seq_len": 64, "max_num_tokens": 64, **changes,
    }  # fmt: skip
    return [part for name, value in flags.items() for part in (f"--{name}", value)]


# --- safetensors files ---


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def truncate_header(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:60])


def oversize_header(file: Path) -> None:
    file.write_bytes((1 << 62).to_bytes(8, "little") + file.read_bytes()[8:])


def spoil_header(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[8:12] = b"!!!!"
    file.write_bytes(data)


def edit_header(file: Path, edit: Callable[[dict], None]) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def overlap(file: Path) -> None:
    def move(header: dict) -> None:
        entries = sorted((e for n, e in header.items() if n != "__metadata__"), key=lambda e: e["data_offsets"])
        begin, end = entries[1]["data_offsets"]
        entries[1]["data_offsets"] = [begin - 2, end - 2]

    edit_header(file, move)


def leave_the_file(file: Path) -> None:
    def move(header: dict) -> None:
        last = max((e for n, e in header.items() if n != "__metadata__"), key=lambda e: e["data_offsets"])
        begin, end = last["data_offsets"]
        last["shape"] = [2, *last["shape"]]
        last["data_offsets"] = [begin, begin + 2 * (end - begin)]

    edit_header(file, move)


DAMAGES = [truncate, truncate_header, oversize_header, spoil_header, overlap, leave_the_file]


@pytest.mark.parametrize("damage", DAMAGES)
def test_quantize_refuses_a_damaged_safetensors_file(damage: Damage, original: Path, refused: Refusal) -> None:
    damage(original / "model.safetensors")
    refused("quantize", *quantize_arguments(original), says=("model.safetensors",))


@pytest.mark.parametrize("damage", DAMAGES)
def test_build_refuses_a_damaged_safetensors_file(damage: Damage, quantized: Path, refused: Refusal) -> None:
    damage(quantized / "model.safetensors")
    refused("build", *build_arguments(quantized), says=("model.safetensors",))


def test_a_missing_shard_is_named(original: Path, refused: Refusal) -> None:
    names = list(load_file(original / "model.safetensors"))
    shards = {name: f"model-{1 + i % 2:05}-of-00002.safetensors" for i, name in enumerate(names)}
    (original / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (original / "model.safetensors").rename(original / "model-00001-of-00002.safetensors")
    refused("quantize", *quantize_arguments(original), says=("model-00002-of-00002.safetensors", "missing"))


def test_a_checkpoint_without_weights_is_refused(original: Path, refused: Refusal) -> None:
    (original / "model.safetensors").unlink()
    refused("quantize", *quantize_arguments(original), says=("model.safetensors",))
    refused("build", *build_arguments(original), says=("model.safetensors",))


def test_a_git_lfs_pointer_is_named(original: Path, refused: Refusal) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 11106216\n"
    (original / "model.safetensors").write_text(pointer)
    refused("quantize", *quantize_arguments(original), says=("model.safetensors", "git lfs pull"))


@pytest.mark.parametrize(
    ("file", "config", "says"),
    [("rank0.engine", True, "is an engine directory"), ("rank0.safetensors", True, "TensorRT-LLM checkpoint"),
     ("model.gguf", False, "GGUF"), ("params.json", False, "Meta")],
)  # fmt: skip
def test_a_directory_of_another_kind_is_told(
    file: str, config: bool, says: str, original: Path, refused: Refusal
) -> None:
    (original / file).write_text("{}")
    if not config:
        (original / "config.json").unlink()
    refused("quantize", *quantize_arguments(original), says=(says,))
    refused("build", *build_arguments(original), says=(says,))


def test_weights_that_the_config_does_not_speak_of_are_refused(quantized: Path, refused: Refusal) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    edit_tensor(quantized, name, torch.ones(4))
    refused("build", *build_arguments(quantized), says=(name, "another model"))


# --- tensors ---


def edit_tensor(directory: Path, name: str, value: torch.Tensor | None) -> None:
    tensors = load_file(directory / "model.safetensors")
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -0.5, None], ids=str)
@pytest.mark.parametrize("kind", ["mlp.up_proj.weight_scale", "mlp.up_proj.input_scale", "self_attn.k_scale"])
def test_a_bad_scale_is_named(kind: str, value: float | None, quantized: Path, refused: Refusal) -> None:
    name = f"model.layers.1.{kind}"
    edit_tensor(quantized, name, None if value is None else torch.tensor([value]))
    refused("build", *build_arguments(quantized), says=(name,))


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_weight_of_the_wrong_shape_is_named(name: str, original: Path, refused: Refusal) -> None:
    weight = load_file(original / "model.safetensors")[name]
    edit_tensor(original, name, weight[:-1].contiguous())
    refused("quantize", *quantize_arguments(original), says=(name, str([*weight.shape]), str([*weight[:-1].shape])))
    refused("build", *build_arguments(original), says=(name,))


def test_a_missing_weight_is_named(original: Path, refused: Refusal) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    edit_tensor(original, name, None)
    refused("quantize", *quantize_arguments(original), says=(name,))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e5m2, torch.int32])
def test_a_weight_of_the_wrong_dtype_is_named(dtype: torch.dtype, original: Path, refused: Refusal) -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    edit_tensor(original, name, load_file(original / "model.safetensors")[name].to(dtype))
    refused("quantize", *quantize_arguments(original), says=(name,))


def test_an_unquantized_weight_in_an_fp8_checkpoint_is_named(quantized: Path, refused: Refusal) -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    edit_tensor(quantized, name, load_file(quantized / "model.safetensors")[name].to(torch.bfloat16))
    refused("build", *build_arguments(quantized), says=(name,))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_weight_is_named(value: float, original: Path, refused: Refusal) -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    weight = load_file(original / "model.safetensors")[name]
    weight[3, 5] = value
    edit_tensor(original, name, weight)
    refused("quantize", *quantize_arguments(original), says=(name, "NaN"))


# --- configuration and flags ---


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_linear_that_blocks_do_not_fit_is_refused_before_anything_is_quantized(
    original: Path, refused: Refusal
) -> None:
    says = ("model.layers.0.self_attn.q_proj", "K=192 is not a multiple of 128", "--exclude_modules")
    refused("quantize", *quantize_arguments(original, qformat="fp8_block"), says=says)


def test_an_unknown_model_type_is_refused(original: Path, refused: Refusal) -> None:
    edit_config(original, model_type="megallama")
    refused("quantize", *quantize_arguments(original), says=("model_type", "megallama", "llama"))
    refused("build", *build_arguments(original), says=("model_type", "megallama", "llama"))


def test_a_config_key_that_changes_the_result_is_refused(original: Path, refused: Refusal) -> None:
    edit_config(original, hidden_act="relu")
    refused("quantize", *quantize_arguments(original), says=("hidden_act", "relu"))


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_config_that_is_no_json_object_is_refused(text: str, original: Path, refused: Refusal) -> None:
    (original / "config.json").write_text(text)
    refused("quantize", *quantize_arguments(original), says=("config.json",))


@pytest.mark.parametrize(
    ("flag", "value"),
    [("qformat", "fp7"), ("qformat", ""), ("kv_cache_dtype", "int3"), ("kv_cache_dtype", ""),
     ("dtype", "float64"), ("exclude_modules", "no_such_module"),
     ("calib_size", "0"), ("calib_max_seq_length", "-3"), ("activation_scale_ub", "much"), ("device", "tpu")],
)  # fmt: skip
def test_quantize_refuses_an_unknown_flag_value(flag: str, value: str, original: Path, refused: Refusal) -> None:
    refused("quantize", *quantize_arguments(original, **{flag: value}), says=(flag, value))


@pytest.mark.parametrize(
    ("flag", "value"),
    [("target", "sm_75"), ("max_batch_size", "0"), ("max_seq_len", "-1"), ("max_num_tokens", "1"),
     ("max_num_tokens", "many"), ("max_num_tokens", "9999999999"), ("tp_size", "99999999999"),
     ("pp_size", "2000"), ("workers", "0"),
     ("gpu_memory", "lots"), ("explain", "model.layers.77"), ("log_level", "loud")],
)  # fmt: skip
def test_build_refuses_an_unknown_flag_value(flag: str, value: str, quantized: Path, refused: Refusal) -> None:
    refused(
        "build", *build_arguments(quantized, **{flag: value}), says=(flag if value != "model.layers.77" else value,)
    )


def test_a_flag_that_another_one_must_go_with_is_refused_alone(quantized: Path, refused: Refusal) -> None:
    refused("build", *build_arguments(quantized, rank=1), says=("--rank", "give --explain"), status=2)
    tokens = ("--engine_dir", "engine", "--input_tokens", "5")
    refused("run", *tokens, "--debug_dir", "dumps", says=("--debug_dir needs --debug_mode",), status=2)


def test_layers_that_are_no_numbers_tell_what_is_expected(quantized: Path, refused: Refusal) -> None:
    says = ("--pp_layers: '2,a' is no list of layers per stage such as 20,20,24,16",)
    refused("build", *build_arguments(quantized, pp_layers="2,a"), says=says, status=2)


@pytest.mark.parametrize("command", ["quantize", "build", "run", "evaluate", "bench", "inspect"])
def test_an_unknown_flag_is_refused(command: str, refused: Refusal) -> None:
    refused(command, "--no_such_flag", says=("error",), status=2)


@pytest.mark.parametrize(
    ("command", "flag", "value"),
    [("run", "max_kv_blocks", "0"), ("run", "rank_timeout", "nan"), ("run", "kv_cache_free_gpu_memory_fraction", "2"),
     ("evaluate", "max_tokens", "-1"), ("evaluate", "window", "0"), ("evaluate", "stride", "0"),
     ("evaluate", "max_items", "0"), ("evaluate", "output", "no/such/dir.json"), ("evaluate", "output", "/tmp"),
     ("serve", "port", "65536"), ("serve", "body_seconds", "-1"),
     ("serve", "stall_seconds", "nan"), ("serve", "request_seconds", "0"), ("serve", "drain_seconds", "inf"),
     ("serve", "max_requests", "0"), ("serve", "max_body_bytes", "much"), ("serve", "policy", "none")],
)  # fmt: skip
def test_a_number_that_makes_no_sense_is_refused(command: str, flag: str, value: str, refused: Refusal) -> None:
    needed = {"run": ("--input_tokens", "5"), "evaluate": ("--data", "text.txt")}.get(command, ())
    refused(command, "--engine_dir", "engine", *needed, f"--{flag}={value}", says=(f"--{flag}", value), status=2)


def test_a_taken_port_is_refused_before_the_engine_is_loaded(refused: Refusal) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused(
            "serve", "--engine_dir", "none", "--port", port, says=(f"--port {port}", "in use", "--port 0"), status=1
        )


def test_debug_tensors_that_match_nothing_name_the_nearest(quantized: Path, refused: Refusal) -> None:
    flags = ["--enable_debug_output", "--debug_tensors", "model.layers.0.mlp.dwn_proj/output"]
    says = ("'model.layers.0.mlp.dwn_proj/output' matches no tensor", "model.layers.0.mlp.down_proj/output")
    refused("build", *build_arguments(quantized), *flags, says=says)


def test_a_missing_calibration_text_is_named(original: Path, refused: Refusal) -> None:
    refused("quantize", *quantize_arguments(original, qformat="fp8"), says=("--calib_dataset",))


def test_an_existing_output_is_not_overwritten(original: Path, refused: Refusal) -> None:
    other = original.parent / "out"
    other.mkdir()
    (other / "thesis.txt").write_text("the only copy")
    refused("quantize", *quantize_arguments(original), says=("out", "exists"))
    refused("build", *build_arguments(original), says=("out", "exists"))


@pytest.mark.parametrize(
    ("changes", "module"),
    [({"intermediate_size": 312}, "mlp.down_proj"), ({"hidden_size": 200}, "self_attn"), ({"head_dim": 48}, "attn")],
    ids=str,
)
def test_sizes_that_no_kernel_takes_are_refused_before_compiling(
    changes: dict, module: str, tmp_path: Path, refused: Refusal
) -> None:
    checkpoint = tiny_checkpoint.write(tmp_path / "odd", tiny_checkpoint.qformat("fp8", "fp8"), **changes)
    refused("build", *build_arguments(checkpoint, target="sm_90a"), says=("model.layers.0", module))
    refused("build", *build_arguments(checkpoint, target="sm_90a"), "--dry_run", says=("model.layers.0", module))


def test_max_seq_len_beyond_the_models_is_refused(quantized: Path, refused: Refusal) -> None:
    refused("build", *build_arguments(quantized, max_seq_len=257), says=("max_seq_len", "257", "256"))


# --- engines ---


def rewrite_plan(engine: Path, **compatibility: object) -> None:
    loaded = engine_format.load(engine)
    record = dataclasses.replace(loaded.plan.compatibility, **compatibility)
    plan = dataclasses.replace(loaded.plan, compatibility=record)
    (engine / "rank0.engine").write_bytes(engine_format.engine_bytes(plan, loaded.cubins))


def run_arguments(engine: Path, *more: object) -> list[object]:
    return ["--engine_dir", engine, "--input_tokens", "1,2,3", "--device", "cpu", *more]


def test_an_engine_of_another_format_version_is_refused(engine: Path, refused: Refusal) -> None:
    def age(header: dict) -> None:
        header["__metadata__"]["version"] = "999"

    edit_header(engine / "rank0.engine", age)
    for command, arguments in (("run", run_arguments(engine)), ("inspect", [engine])):
        refused(command, *arguments, says=("rank0.engine", "999", str(engine_format.FORMAT_VERSION)))


def test_an_engine_for_another_gpu_is_refused(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite_plan(engine, target="sm_90a")
    plan = engine_format.load(engine).plan
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(EngineError, match=r"sm_90a.*A100.*sm_80"):
        compiled.check_device(plan, torch.device("cuda"))


def test_an_engine_for_the_cpu_is_refused_on_a_gpu(engine: Path) -> None:
    with pytest.raises(EngineError, match="target cpu"):
        compiled.check_device(engine_format.load(engine).plan, torch.device("cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(engine: Path, refused: Refusal) -> None:
    refused("run", "--engine_dir", engine, "--input_tokens", "1", "--device", "cuda", says=("cuda", "--device cpu"))


def flip(file: Path, position: float) -> None:
    data = bytearray(file.read_bytes())
    data[int(position * (len(data) - 1))] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("position", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("file", ["rank0.engine", "rank0.safetensors"])
def test_a_flipped_byte_in_an_engine_is_found(file: str, position: float, engine: Path, refused: Refusal) -> None:
    flip(engine / file, position)
    refused("run", *run_arguments(engine), says=(file,))


@pytest.mark.parametrize("file", ["rank0.engine", "rank0.safetensors"])
def test_a_truncated_or_missing_engine_file_is_named(file: str, engine: Path, refused: Refusal) -> None:
    truncate(engine / file)
    refused("run", *run_arguments(engine), says=(file,))
    (engine / file).unlink()
    refused("run", *run_arguments(engine), says=(file,))


def test_a_directory_that_is_no_engine_is_refused(tmp_path: Path, refused: Refusal) -> None:
    for command in ("run", "inspect"):
        refused(command, *(run_arguments(tmp_path) if command == "run" else [tmp_path]), says=("not an engine",))


# --- requests ---


@pytest.mark.parametrize("prompt", ["", ",", " "])
def test_an_empty_prompt_is_refused(prompt: str, engine: Path, refused: Refusal) -> None:
    refused("run", "--engine_dir", engine, "--device", "cpu", "--input_tokens", "1,2", prompt, says=("1", "empty"))


def test_a_prompt_that_is_too_long_is_refused(engine: Path, refused: Refusal) -> None:
    prompt = ",".join(["5"] * 256)
    refused("run", "--engine_dir", engine, "--device", "cpu", "--input_tokens", prompt, says=("256", "max_seq_len"))


@pytest.mark.parametrize("token", [tiny_engine.VOCAB, 10**12])
def test_a_token_outside_the_vocabulary_is_refused(token: int, engine: Path, refused: Refusal) -> None:
    arguments = ["--engine_dir", engine, "--device", "cpu", "--input_tokens", f"1,{token}"]
    refused("run", *arguments, says=(str(token), f"0 to {tiny_engine.VOCAB - 1}"))


@pytest.mark.parametrize(("flag", "value"), [("max_output_len", "0"), ("temperature", "-1"), ("temperature", "nan")])
def test_a_sampling_parameter_out_of_range_is_refused(flag: str, value: str, engine: Path, refused: Refusal) -> None:
    refused("run", *run_arguments(engine, f"--{flag}", value), says=(value,))


def test_a_kv_pool_too_small_for_one_request_is_refused(engine: Path, refused: Refusal) -> None:
    arguments = run_arguments(engine, "--max_kv_blocks", 1, "--max_output_len", 100)
    refused("run", *arguments, says=("2 KV blocks", "the pool has 1"))


@pytest.mark.parametrize("blocks", [10**10, 10**20])
def test_a_kv_pool_larger_than_the_machine_is_refused(blocks: int, engine: Path, refused: Refusal) -> None:
    refused("run", *run_arguments(engine, "--max_kv_blocks", blocks), says=(f"max_kv_blocks is {blocks}", "GiB of mem"))


def test_text_for_an_engine_without_a_tokenizer_is_refused(engine: Path, refused: Refusal) -> None:
    refused("run", "--engine_dir", engine, "--device", "cpu", "--input_text", "x = 1", says=("tokenizer",))


@pytest.mark.parametrize("content", [None, b"\xff\xfe\xff", b""])
def test_an_unreadable_text_to_evaluate_is_refused(
    content: bytes | None, engine: Path, tmp_path: Path, refused: Refusal
) -> None:
    (engine / "tokenizer.json").write_bytes((EXAMPLES / "tiny-python-llama" / "tokenizer.json").read_bytes())
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    arguments = ["--engine_dir", engine, "--device", "cpu", "--data", text, "--output", tmp_path / "result.json"]
    refused("evaluate", *arguments, says=("text.txt",))


@pytest.mark.parametrize("damage", ["an engine", "weights", "config.json"])
def test_a_reference_that_transformers_cannot_read_is_named(
    damage: str, engine: Path, original: Path, tmp_path: Path, refused: Refusal
) -> None:
    (tmp_path / "text.txt").write_text("ABABAB")
    hf_llama.add_tokenizer(engine)
    if damage == "an engine":
        (original / "config.json").write_text('{"model": {}, "limits": {}}')
    elif damage == "weights":
        truncate_header(original / "model.safetensors")
    else:
        edit_config(original, hidden_size=128)
    arguments = ["--engine_dir", engine, "--device", "cpu", "--data", tmp_path / "text.txt", "--reference", original]
    refused("evaluate", *arguments, says=("--reference", str(original), "cannot be read by transformers"))
    refused("inspect", "compare", engine, original, "--device", "cpu", says=("cannot be read by transformers",))


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model"])
def test_a_tokenizer_that_cannot_be_read_is_named(
    file: str, original: Path, engine: Path, tmp_path: Path, refused: Refusal
) -> None:
    (tmp_path / "text.txt").write_text("a text")
    for directory in (original, engine):
        (directory / file).write_text('{"model":')
    changes = {"qformat": "fp8", "calib_dataset": tmp_path / "text.txt"}
    refused("quantize", *quantize_arguments(original, **changes), says=(file, "cannot be read"))
    refused("run", "--engine_dir", engine, "--device", "cpu", "--input_text", "a", says=("engine", "cannot be read"))


# --- a full disk, and Ctrl-C ---


def fail_on_write(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """The first file that is flushed to the disk raises `error`, in the middle of the output."""

    def fsync(handle: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("command", ["quantize", "build"])
def test_a_full_disk_leaves_nothing_behind(
    command: str, original: Path, refused: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_on_write(monkeypatch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    arguments = quantize_arguments(original) if command == "quantize" else build_arguments(original)
    refused(command, *arguments, says=("out", "No space left", "disk is full"))
    assert sorted(p.name for p in original.parent.iterdir()) == ["model"]


def test_what_cannot_be_written_beside_the_output_is_named(
    quantized: Path, engine: Path, tmp_path: Path, refused: Refusal
) -> None:
    taken = tmp_path / "taken"
    taken.touch()
    refused(
        "build", *build_arguments(quantized), "--dump_passes", taken / "passes", says=("passes", "cannot be written")
    )
    assert not (quantized.parent / "out").exists()


def test_a_page_for_a_folder_that_is_not_there_is_refused(quantized: Path, refused: Refusal) -> None:
    refused("inspect", "graph", quantized, "--output", "no/such/page.html", says=("no directory no/such",), status=2)


def test_a_key_s_file_that_is_not_there_is_named(engine: Path, refused: Refusal) -> None:
    refused("serve", "--engine_dir", engine, "--api_key_file", "no.key", says=("no.key cannot be read",))


def test_a_text_of_prompts_that_is_not_there_is_named(engine: Path, refused: Refusal) -> None:
    refused("run", "--engine_dir", engine, "--device", "cpu", "--input_file", "no.txt", says=("no.txt cannot be read",))


@pytest.mark.parametrize("output", ["a pipe that nobody reads", "a full disk", "none"])
def test_an_output_that_cannot_be_written_is_no_traceback(output: str, engine: Path) -> None:
    """`fp8-inspect engine --json | head`, with more to print than a pipe holds."""
    command = f"{sys.executable} -m fp8.scripts.inspect {engine} --json "
    ends = {"a pipe that nobody reads": "| true; exit ${PIPESTATUS[0]}", "a full disk": "> /dev/full", "none": ">&-"}
    done = subprocess.run(["bash", "-c", command + ends[output]], stderr=subprocess.PIPE, text=True)
    said = "fp8-inspect: the output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (output != "none", said if output == "a full disk" else "")


@pytest.mark.parametrize("command", ["quantize", "build"])
def test_an_interrupt_while_writing_leaves_nothing_behind(
    command: str, original: Path, refused: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_on_write(monkeypatch, KeyboardInterrupt())
    arguments = quantize_arguments(original) if command == "quantize" else build_arguments(original)
    refused(command, *arguments, says=("interrupted",), status=130)
    assert sorted(p.name for p in original.parent.iterdir()) == ["model"]


def test_an_interrupted_build_leaves_the_older_engine_whole(
    original: Path, refused: Refusal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fp8.scripts import build

    assert build.main([str(a) for a in build_arguments(original)]) == 0
    capsys.readouterr()
    fail_on_write(monkeypatch, KeyboardInterrupt())
    refused("build", *build_arguments(original), says=("interrupted",), status=130)
    engine_format.load(original.parent / "out")


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
from fp8.scripts.{command} import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["quantize", "build"])
def test_a_write_that_the_system_refuses_leaves_nothing_behind(command: str, original: Path) -> None:
    """The real thing: the kernel stops the weights in the middle of the file."""
    arguments = quantize_arguments(original) if command == "quantize" else build_arguments(original)
    line = [sys.executable, "-c", LIMITED.format(command=command, limit=200_000), *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 1
    assert_one_error(done.stderr, "out", "cannot be written")
    assert sorted(p.name for p in original.parent.iterdir()) == ["model"]


def test_a_full_disk_is_told_by_a_rank_that_is_built_beside_others(original: Path) -> None:
    arguments = build_arguments(original, tp_size=2, workers=2)
    line = [sys.executable, "-c", LIMITED.format(command="build", limit=200_000), *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 1
    assert_one_error(done.stderr, "rank ", "out.partial cannot be written: File too large")
    assert sorted(p.name for p in original.parent.iterdir()) == ["model"]


@pytest.mark.parametrize("command", ["quantize", "build"])
def test_a_name_that_no_directory_may_have_is_refused(command: str, original: Path, refused: Refusal) -> None:
    arguments = {"quantize": quantize_arguments, "build": build_arguments}[command]
    refused(command, *arguments(original, output_dir="a" * 300), says=("cannot be written: File name too long",))


def test_ctrl_c_in_a_calibration_ends_it_and_the_same_command_continues(tmp_path: Path) -> None:
    model, out = EXAMPLES / "tiny-python-llama", tmp_path / "out"
    line = [
        sys.executable, "-m", "fp8.scripts.quantize", "--model_dir", str(model), "--qformat", "fp8", "--calib_dataset",
        str(EXAMPLES / "calibration.txt"), "--calib_size", "48", "--output_dir", str(out), "--device", "cpu",
    ]  # fmt: skip
    # A shell that starts the tests in the background lets them inherit that Ctrl-C is ignored.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    until = time.monotonic() + 120
    while not list(tmp_path.glob("out.partial/*")) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert_one_error(stderr, "interrupted")
    assert not out.exists()
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
