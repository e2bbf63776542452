"""Calibration: amaxes against transformers' own activations, text readers, resumption, NaN."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hf_llama
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers.models.llama import modeling_llama

from fp8.builder.calibrate import BATCH_TOKENS, STATE, NonFiniteError, State, calibrate
from fp8.builder.calibration_text import CalibrationError, load_encoder, read_samples
from fp8.builder.checkpoint import Checkpoint
from fp8.builder.formats.bf16 import Bf16
from fp8.builder.formats.fp8 import Fp8
from fp8.builder.graph import Graph
from fp8.models import llama

SAMPLES = hf_llama.sequences(40, 7, 100, 1, 64)


class Emitter:
    """Emits slices of a checkpoint and counts them; may raise at one."""

    def __init__(self, directory: Path, fail_at: int | None = None):
        self.checkpoint = Checkpoint(directory)
        self.config = llama.read_config(self.checkpoint.config)
        self.fail_at = fail_at
        self.layers: list[int] = []

    def __call__(self, layers: range) -> Graph:
        if layers.start == self.fail_at:
            raise KeyboardInterrupt
        self.layers.append(layers.start)
        return llama.emit(self.config, self.checkpoint, Bf16(), "float32", layers=layers)


def amaxes(directory: Path, work: Path, emit: Emitter | None = None, fingerprint: str = "f") -> dict[str, float]:
    emit = emit or Emitter(directory)
    work.mkdir(exist_ok=True)
    state = State.open(work, fingerprint)
    return calibrate(
        emit, emit.config.num_layers, SAMPLES, Fp8("fp8").calibrated, state, "cpu", lambda done, total: None
    )


def transformers_amaxes(model: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The largest magnitude of every linear's input, of q and k after RoPE and of v, seen in transformers itself."""
    found: dict[str, float] = {}

    def note(name: str, x: torch.Tensor) -> None:
        found[name] = max(found.get(name, 0.0), x.abs().max().item())

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(lambda m, args, name=name: note(f"{name}.input_scale", args[0]))
        if name.endswith("v_proj"):
            scale = name.replace("v_proj", "v_scale")
            module.register_forward_hook(lambda m, args, out, name=scale: note(name, out))
    rotate, calls = modeling_llama.apply_rotary_pos_emb, [0]

    def rotary(*args: Any, **kwargs: Any) -> Any:
        q, k = rotate(*args, **kwargs)
        layer = calls[0] % model.config.num_hidden_layers
        calls[0] += 1
        note(f"model.layers.{layer}.self_attn.q_scale", q)
        note(f"model.layers.{layer}.self_attn.k_scale", k)
        return q, k

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotary)
    hf_llama.logits(model, SAMPLES)
    return found


def test_amaxes_are_those_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf_llama.make(tmp_path / "model")
    expected = transformers_amaxes(model, monkeypatch)
    found = amaxes(tmp_path / "model", tmp_path / "work")
    assert found.keys() == expected.keys() and len(found) == 2 * (7 + 3)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name


def test_packing_of_samples_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf_llama.make(tmp_path / "model")
    packed = amaxes(tmp_path / "model", tmp_path / "a")
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 1)
    assert amaxes(tmp_path / "model", tmp_path / "b") == pytest.approx(packed, rel=1e-5)


def test_interrupted_calibration_continues_after_the_last_finished_layer(tmp_path: Path) -> None:
    hf_llama.make(tmp_path / "model", num_hidden_layers=4)
    whole = amaxes(tmp_path / "model", tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        amaxes(tmp_path / "model", tmp_path / "work", Emitter(tmp_path / "model", fail_at=2))
    again = Emitter(tmp_path / "model")
    assert amaxes(tmp_path / "model", tmp_path / "work", again) == whole
    assert again.layers == [2, 3]


def test_other_inputs_start_anew(tmp_path: Path) -> None:
    hf_llama.make(tmp_path / "model")
    amaxes(tmp_path / "model", tmp_path / "work", fingerprint="one")
    again = Emitter(tmp_path / "model")
    amaxes(tmp_path / "model", tmp_path / "work", again, fingerprint="other")
    assert again.layers == [0, 1]


def test_only_one_layers_hidden_states_are_kept(tmp_path: Path) -> None:
    hf_llama.make(tmp_path / "model", num_hidden_layers=4)
    with pytest.raises(KeyboardInterrupt):
        amaxes(tmp_path / "model", tmp_path / "work", Emitter(tmp_path / "model", fail_at=3))
    assert sorted(p.name for p in (tmp_path / "work").iterdir()) == [STATE, "hidden.3.bin"]
    assert (tmp_path / "work/hidden.3.bin").stat().st_size == sum(map(len, SAMPLES)) * 64 * 4


def test_damaged_hidden_states_are_noticed(tmp_path: Path) -> None:
    hf_llama.make(tmp_path / "model", num_hidden_layers=3)
    with pytest.raises(KeyboardInterrupt):
        amaxes(tmp_path / "model", tmp_path / "work", Emitter(tmp_path / "model", fail_at=1))
    (tmp_path / "work/hidden.1.bin").write_bytes(b"short")
    with pytest.raises(CalibrationError, match=r"hidden\.1\.bin is damaged"):
        amaxes(tmp_path / "model", tmp_path / "work")


def test_overflowing_activation_is_named(tmp_path: Path) -> None:
    model = hf_llama.make(tmp_path / "model")
    model.model.layers[1].mlp.up_proj.weight.data *= 1e30
    model.model.layers[1].mlp.gate_proj.weight.data *= 1e30
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(NonFiniteError, match=r"activation model\.layers\.1\.mlp/hidden contains NaN or Inf"):
        amaxes(tmp_path / "model", tmp_path / "work")


# Text


def encode(text: str) -> list[int]:
    return list(text.encode())


def read(path: Path, size: int = 100, length: int = 8, seed: int = 0) -> list[list[int]]:
    return read_samples(path, encode, 256, size, length, seed)


def test_rows_are_samples_and_long_ones_are_cut(tmp_path: Path) -> None:
    texts = ["first", "a much longer second one", "", "third"]
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    lines.write_text("\n".join(json.dumps({"text": t, "more": 1}) for t in texts) + "\n\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": [*texts, None]}), table)
    for path in (lines, table):
        assert sorted(bytes(s) for s in read(path)) == [b"a much l", b"first", b"third"]


def test_running_text_is_cut_into_pieces(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("0123456789" * 10)
    samples = read(path)
    assert len(samples) == 4 and all(len(s) <= 8 for s in samples)


def test_samples_are_chosen_by_seed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": str(i)}) for i in range(50)))
    assert read(path, size=5) == read(path, size=5) != read(path, size=5, seed=1)
    assert len(read(path, size=5)) == 5


BAD_TEXT: dict[str, tuple[bytes, str]] = {
    "a.csv": (b"text", "the suffix must be one of .txt, .jsonl, .parquet"),
    "empty.txt": (b"", "has no text"),
    "binary.txt": (b"\xff\xfe\xfd", "is not UTF-8 text"),
    "rows.jsonl": (b'{"text": "a"}\n{"txt": "b"}', "rows.jsonl:2: expected a JSON object with a string `text`"),
    "broken.jsonl": (b"{", "broken.jsonl:1: expected a JSON object"),
    "broken.parquet": (b"PAR1", "is not a parquet file"),
}


@pytest.mark.parametrize("name", BAD_TEXT)
def test_bad_calibration_text_is_one_clear_error(name: str, tmp_path: Path) -> None:
    content, message = BAD_TEXT[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        read(tmp_path / name)


def test_missing_file_and_column_are_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"none\.txt cannot be read: No such file"):
        read(tmp_path / "none.txt")
    with pytest.raises(CalibrationError, match=r"cnn_dailymail: the suffix .* datasets of that name are not fetched"):
        read(Path("cnn_dailymail"))
    with pytest.raises(CalibrationError, match="is a directory; give one file of it"):
        read(tmp_path)
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(CalibrationError, match="has no column `text`; it has content"):
        read(tmp_path / "a.parquet")


def test_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(CalibrationError, match="token 98, the model's vocab_size is 98"):
        read_samples(tmp_path / "a.txt", encode, 98, 4, 8, 0)


def test_directory_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_encoder(tmp_path)
    hf_llama.add_tokenizer(tmp_path)
    assert len(load_encoder(tmp_path)("def f")) == 5
