"""fp8-inspect: layers, types, sizes and the fusion report of an engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_checkpoint as tiny

from fp8.builder import build
from fp8.builder.request import Reporter, Request
from fp8.scripts import inspect


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("inspect")
    source = tiny.source(root / "checkpoint", tiny.qformat("fp8", "fp8"), num_hidden_layers=3)
    compiled = build.compile(source, Request(4, 128, 64, "cpu"), Reporter())
    build.write(compiled, source, root / "engine", Reporter())
    return root / "engine"


def shown(directory: Path, capsys, *flags: str) -> str:
    assert inspect.main([str(directory), *flags]) == 0
    return capsys.readouterr().out


def test_everything_is_shown_by_default(directory, capsys):
    text = shown(directory, capsys)
    assert "llama, 3 layers" in text and "54, 0 left unfolded" in text
    assert "model.layers.0-2.self_attn" in text and "no tactics: built for target cpu" in text
    assert "quantize/dequantize pairs" in text


@pytest.mark.parametrize("accumulation", ["fast", "precise"])
def test_how_fp8_linears_sum_is_told(tmp_path, capsys, accumulation):
    source = tiny.source(tmp_path / "checkpoint", tiny.qformat("fp8", "fp8"))
    request = Request(4, 128, 64, "cpu", fp8_accumulation=accumulation)
    compiled = build.compile(source, request, Reporter())
    build.write(compiled, source, tmp_path / "engine", Reporter())
    linears = {s.name: s.attributes["accumulation"] for s in compiled.plan.steps if "accumulation" in s.attributes}
    assert linears.pop("lm_head") == "fast"  # in 16 bits
    assert set(linears.values()) == {accumulation} and len(linears) == 8
    assert f"FP8 accumulation │ {accumulation}" in shown(tmp_path / "engine", capsys)


def test_a_section_is_shown_alone(directory, capsys):
    text = shown(directory, capsys, "--layers")
    assert "gemm_swiglu" in text and "e4m3[T,192]" in text and "quantize/dequantize pairs" not in text


def test_layers_that_differ_are_shown_apart(directory, capsys):
    text = shown(directory, capsys, "--layers")
    assert "model.layers.0.input_layernorm" in text and "model.layers.1-2.input_layernorm" in text


def test_pairs_that_differ_by_their_layer_only_share_a_line(directory, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    facts = json.loads(shown(directory, capsys, "--json"))
    lines = [line.split("│") for line in shown(directory, capsys, "--fusion").splitlines() if "folded" in line]
    pairs = {line[1].strip(): int(line[4]) for line in lines if len(line) > 5}
    assert sum(pairs.values()) == len(facts["fusion_report"]) == 54
    assert pairs["model.layers.0-2.mlp.down_proj.weight"] == 3


def test_json_holds_the_plan_and_the_sizes(directory, capsys):
    facts = json.loads(shown(directory, capsys, "--json"))
    assert len(facts["steps"]) == 24 and facts["files"]["rank0.safetensors"] > 0
    assert all(p["folded"] for p in facts["fusion_report"])


def test_what_is_no_engine_is_refused(tmp_path, capsys):
    assert inspect.main([str(tmp_path)]) == 1
    assert "is not an engine directory" in capsys.readouterr().err
