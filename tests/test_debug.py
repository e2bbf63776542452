"""Debug outputs: taps by glob or registered by the model, what they cost, what a dump holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_checkpoint as tiny
import torch
from safetensors.torch import load_file

from fp8.builder import build
from fp8.builder.request import Reporter, Request
from fp8.builder.taps import TapError
from fp8.runtime.llm import LLM
from fp8.runtime.request import SamplingParams
from fp8.scripts import build as build_script
from fp8.scripts import run

LAYER = "model.layers.0"
PROMPTS = [[5, 9, 200, 31, 7, 8], [17, 3]]


def compiled(directory: Path, *globs: str, format: str = "fp8", kv: str = "fp8") -> build.Compiled:
    source = tiny.source(directory, tiny.qformat(format, kv))
    return build.compile(source, Request(4, 128, 64, "cpu", debug_tensors=globs or None), Reporter())


def engine(directory: Path, *globs: str, format: str = "fp8") -> Path:
    source = tiny.source(directory / "checkpoint", tiny.qformat(format, "fp8"))
    made = build.compile(source, Request(4, 128, 64, "cpu", debug_tensors=globs or None), Reporter())
    build.write(made, source, directory / "engine", Reporter())
    return directory / "engine"


def steps(made: build.Compiled) -> list[tuple[str, str]]:
    return [(s.name, s.plugin) for s in made.plan.steps]


@pytest.mark.parametrize(
    ("glob", "buffer", "columns"),
    [
        (f"{LAYER}.mlp.down_proj/quantize", f"{LAYER}.mlp.down_proj/quantize", None),
        (f"{LAYER}.mlp/hidden", f"{LAYER}.mlp.down_proj/quantize", None),
        (f"{LAYER}.input_layernorm/norm", f"{LAYER}.self_attn.q_proj/quantize", None),
        (f"{LAYER}.self_attn.k_proj/output", f"{LAYER}.self_attn.{{q_proj,k_proj,v_proj}}/output", (256, 384)),
        (f"{LAYER}/attention_residual", f"{LAYER}/attention_residual", None),
    ],
)
def test_a_tap_at_what_a_plugin_stores_disables_no_fusion(tmp_path, glob, buffer, columns):
    made = compiled(tmp_path / "a", glob)
    assert [(t.buffer, t.columns) for t in made.plan.taps] == [(buffer, columns)]
    assert steps(made) == steps(compiled(tmp_path / "b")) and not made.taps.disabled


def test_a_tap_inside_gemm_swiglu_disables_that_one_and_says_so(tmp_path):
    made = compiled(tmp_path, f"{LAYER}.mlp.gate_proj/output")
    (line,) = made.taps.disabled
    assert line.startswith(f"fusion disabled: gemm_swiglu at {LAYER}.mlp") and line.endswith("gemm, act_quant")
    assert [p for _, p in steps(made)].count("gemm_swiglu") == 1  # the other layer's


def test_what_no_kernel_stores_is_said_to_be_hidden(tmp_path):
    made = compiled(tmp_path, f"{LAYER}.*")
    assert f"{LAYER}.self_attn/exponentials" in made.taps.hidden
    assert any("inside attention" in line for line in made.taps.lines())


def test_an_unknown_glob_names_near_tensors(tmp_path):
    with pytest.raises(TapError, match=r"matches no tensor.*model\.layers\.0\.mlp\.down_proj"):
        compiled(tmp_path, "model.layers.0.mlp.dwn_proj/output")


def test_only_what_is_hidden_is_refused(tmp_path):
    with pytest.raises(TapError, match="none of the wanted debug tensors can be shown"):
        compiled(tmp_path, f"{LAYER}.self_attn/exponentials")


def test_a_model_registers_a_tensor(tmp_path, monkeypatch):
    from fp8.models import blocks

    plain = blocks.swiglu_mlp

    def registering(b, x, hidden, inner, bias, module):
        y = plain(b, x, hidden, inner, bias, module)
        b.register_network_output("mlp_output", y)
        return y

    monkeypatch.setattr(blocks, "swiglu_mlp", registering)
    source = tiny.source(tmp_path, tiny.qformat("fp8"))
    made = build.compile(source, Request(4, 128, 64, "cpu", debug_tensors=()), Reporter())
    assert [(t.name, t.buffer) for t in made.plan.taps] == [
        (f"model.layers.{i}.mlp.down_proj/mlp_output", f"model.layers.{i}.mlp.down_proj/output") for i in range(2)
    ]


def test_the_build_tells_which_fusions_the_taps_disabled(tmp_path, capsys):
    tiny.write(tmp_path / "c", tiny.qformat("fp8"))
    flags = ["--checkpoint_dir", str(tmp_path / "c"), "--dry_run", "--target", "cpu", "--enable_debug_output"]
    assert build_script.main([*flags, "--debug_tensors", "model.layers.*.mlp.*"]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "debug tensors: 10 dumped by fp8-run --debug_mode" in told
    assert "fusion disabled: gemm_swiglu at model.layers.*.mlp" in told and "runs as gemm, act_quant (2 layers)" in told
    assert build_script.main([*flags, "--debug_tensors", "*.o_proj/output"]) == 0
    assert "debug tensors: no fusion disabled" in capsys.readouterr().err


def test_nothing_to_tap_is_refused(tmp_path, capsys):
    tiny.write(tmp_path / "c", tiny.qformat("fp8"))
    flags = ["--checkpoint_dir", str(tmp_path / "c"), "--output_dir", str(tmp_path / "e"), "--target", "cpu"]
    assert build_script.main([*flags, "--enable_debug_output"]) == 1
    assert "register_network_output" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        build_script.main([*flags, "--debug_tensors", "*"])


@pytest.mark.parametrize("format", ["fp8", "fp8_rowwise", "bf16"])
def test_a_tapped_engine_gives_what_the_untapped_one_gives(tmp_path, format):
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    made = [engine(tmp_path / n, *globs, format=format) for n, globs in (("a", ()), ("b", ("model.layers.*.mlp.*",)))]
    texts = [[c.token_ids for c in LLM(e, "cpu", 8).generate(PROMPTS, params)] for e in made]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("format", ["fp8", "fp8_rowwise"])
def test_a_dump_holds_raw_bytes_scale_and_values(tmp_path, format, capsys):
    made = engine(tmp_path, "model.layers.*.mlp.*", format=format)
    flags = ["--engine_dir", str(made), "--device", "cpu", "--max_kv_blocks", "4", "--max_output_len", "3"]
    dumps = tmp_path / "dumps"
    flags += ["--ignore_eos", "--input_tokens", "5,9,200,31"]
    assert run.main([*flags, "--debug_mode", "--debug_dir", str(dumps)]) == 0, capsys.readouterr().err
    files = sorted(dumps.iterdir())
    assert [f.name for f in files] == [f"step_{i:06d}.safetensors" for i in range(3)]
    first, second = load_file(files[0]), load_file(files[1])
    name = "model.layers.1.mlp.down_proj/quantize"
    raw, scale = first[name], first[f"{name}.scale"]
    assert (
        raw.dtype == torch.float8_e4m3fn
        and raw.shape == (4, 320)
        and scale.shape == ((4,) if "row" in format else (1,))
    )
    assert torch.equal(raw.float() * scale.reshape(-1, 1), first[f"{name}.dequantized"])
    assert first["input_ids"].tolist() == [5, 9, 200, 31] and second["position_ids"].tolist() == [4]
    assert first["model.layers.0.mlp.gate_proj/output"].dtype == torch.bfloat16


def test_an_engine_without_taps_refuses_debug_mode(tmp_path, capsys):
    made = engine(tmp_path)
    assert run.main(["--engine_dir", str(made), "--device", "cpu", "--input_tokens", "5", "--debug_mode"]) == 1
    assert "--enable_debug_output" in capsys.readouterr().err
