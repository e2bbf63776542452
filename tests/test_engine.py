"""The engine format: what is written is what is read, and nothing damaged or foreign is."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import tiny_checkpoint as tiny
from safetensors import safe_open

from fp8.builder import build, engine
from fp8.builder.engine import EngineError, Plan
from fp8.builder.request import Reporter, Request


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("engine")
    source = tiny.source(root / "checkpoint", tiny.qformat("fp8"), num_hidden_layers=1)
    compiled = build.compile(source, Request(4, 128, 64, "cpu"), Reporter())
    compiled.cubins["0123"] = b"\x7fELF of a kernel"
    build.write(compiled, source, root / "engine", Reporter())
    return root / "engine"


@pytest.fixture
def copy(original, tmp_path) -> Path:
    for path in original.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def test_a_plan_survives_its_file(original):
    loaded = engine.load(original)
    assert Plan.from_json(loaded.plan.to_json()) == loaded.plan
    assert loaded.cubins == {"0123": b"\x7fELF of a kernel"}


def test_the_container_is_a_safetensors_file_with_the_plan_as_json(original):
    with safe_open(original / "rank0.engine", "np") as file:
        assert list(file.keys()) == ["cubin/0123"]
        assert json.loads(file.metadata()["plan"])["model"]["format"] == "fp8"


def test_equal_plans_give_equal_bytes(original):
    loaded = engine.load(original)
    assert engine.engine_bytes(loaded.plan, loaded.cubins) == (original / "rank0.engine").read_bytes()


@pytest.mark.parametrize("position", [100, 2000, -1])
def test_a_flipped_byte_in_the_plan_or_a_cubin_is_found(copy, position):
    flip(copy / "rank0.engine", position)
    with pytest.raises(EngineError, match=r"rank0\.engine"):
        engine.load(copy)


def test_a_truncated_plan_is_found(copy):
    path = copy / "rank0.engine"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(EngineError, match="damaged"):
        engine.load(copy)


def test_a_flipped_byte_in_the_weights_is_found(copy):
    flip(copy / "rank0.safetensors", -1)
    with pytest.raises(EngineError, match="is not the weights file"):
        engine.load(copy)
    engine.load(copy, verify_weights=False)


def test_missing_weights_are_told(copy):
    (copy / "rank0.safetensors").unlink()
    with pytest.raises(EngineError, match=r"rank0\.safetensors is missing"):
        engine.load(copy)


def test_another_format_version_is_refused(copy, monkeypatch):
    loaded = engine.load(copy)
    monkeypatch.setattr(engine, "FORMAT_VERSION", 1)
    (copy / "rank0.engine").write_bytes(engine.engine_bytes(loaded.plan, loaded.cubins))
    monkeypatch.undo()
    with pytest.raises(EngineError, match="format version 1, this package reads 3; build it again"):
        engine.load(copy)


def test_a_directory_without_an_engine_is_told(tmp_path):
    with pytest.raises(EngineError, match="is not an engine directory"):
        engine.load(tmp_path)


def test_an_ordinary_safetensors_file_is_no_engine(copy):
    (copy / "rank0.engine").write_bytes((copy / "rank0.safetensors").read_bytes())
    with pytest.raises(EngineError, match="is not an fp8-engine file"):
        engine.load(copy)


@pytest.mark.parametrize("sizes", [[], [1], [5, 0, 3], [16], [16, 16, 1], [7, 40, 9, 100, 3]])
def test_a_digest_is_the_hash_of_the_hashes_of_pieces_however_the_data_comes(sizes, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "PIECE", 16)
    chunks = [bytes(i % 251 for i in range(7 * n, 7 * n + size)) for n, size in enumerate(sizes)]
    data = b"".join(chunks)
    pieces = [hashlib.sha256(data[i : i + 16]).digest() for i in range(0, len(data), 16)]
    expected = hashlib.sha256(b"".join(pieces)).hexdigest()
    assert engine.write_atomically(tmp_path / "file", chunks) == expected
    assert engine.file_digest(tmp_path / "file") == expected


def test_an_atomic_write_that_fails_leaves_nothing(tmp_path):
    def chunks():
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.write_atomically(tmp_path / "file", chunks())
    assert not list(tmp_path.iterdir())
