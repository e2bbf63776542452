"""What a model is fused to: exactly these steps for every format, no Q/DQ pair left, and reasons on request."""

from __future__ import annotations

import itertools

import pytest
import tiny_checkpoint as tiny

from fp8.builder import build, report
from fp8.builder.request import Reporter, Request
from fp8.builder.target import Journal
from fp8.builder.workplace import BuildError

ATTENTION = {f: ["attention"] for f in ("fp8", "fp8_channel", "bf16", "fp16")} | {
    f: ["attention", "quantize"] for f in ("fp8_rowwise", "fp8_block")
}
MLP = {
    "fp8": ["gemm_swiglu", "gemm"], "fp8_channel": ["gemm_swiglu", "gemm"],
    "fp8_rowwise": ["gemm", "act_quant", "gemm"], "bf16": ["gemm_swiglu", "gemm"],
    "fp8_block": ["gemm", "act_quant", "gemm"], "fp16": ["gemm_swiglu", "gemm"],
}  # fmt: skip
QUANT = {
    "fp8": "static",
    "fp8_channel": "static",
    "fp8_rowwise": "per_token",
    "fp8_block": "block",
    "bf16": "none",
    "fp16": "none",
}
EXCLUDED = [
    (), ("model.layers.0.*",), ("*.o_proj", "*.down_proj"), ("*.self_attn.q_proj",), ("*.k_proj",), ("*.up_proj",),
    ("*.v_proj", "*.gate_proj"), ("*.mlp.*",),
]  # fmt: skip
FORMATS = list(itertools.product(QUANT, ("auto", "fp8")))


def fused(tmp_path, format, kv="auto", exclude=(), request=Request(target="cpu"), **changes):  # noqa: B008 (frozen)
    source = tiny.source(tmp_path, tiny.qformat(format, kv, exclude), **changes)
    graph, journal, pairs = build.fuse(source, request, Reporter())
    return graph, report.report(pairs, journal)


@pytest.mark.parametrize(("format", "kv"), FORMATS)
def test_a_layer_is_exactly_these_steps(tmp_path, format, kv):
    graph, _ = fused(tmp_path, format, kv)
    layer = ["norm_quant", "gemm", *ATTENTION[format], "gemm", "norm_quant", *MLP[format]]
    assert [n.op for n in graph.nodes] == ["embedding", *layer, *layer, "norm_quant", "gemm"]
    assert [n.attrs["quant"] for n in graph.nodes if n.op == "norm_quant"] == [QUANT[format]] * 4 + ["none"]
    assert [n.attrs["residual"] for n in graph.nodes if n.op == "norm_quant"] == [False, True, True, True, True]
    assert all(n.attrs["quant_out"] == (QUANT[format] == "static") for n in graph.nodes if n.op == "attention")


@pytest.mark.parametrize(
    ("format", "kv"), [("fp8", "auto"), ("fp8_channel", "auto"), ("fp8_rowwise", "fp8"), ("fp8_block", "fp8")]
)
@pytest.mark.parametrize("exclude", EXCLUDED)
def test_no_pair_is_left_whatever_is_excluded(tmp_path, format, kv, exclude):
    graph, entries = fused(tmp_path, format, kv, exclude, num_hidden_layers=1)
    assert {n.domain for n in graph.nodes} == {"fp8"}
    assert all(e["folded"] for e in entries)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True}, {"head_dim": 128, "num_attention_heads": 2}, tiny.ODD,
    ],
)  # fmt: skip
@pytest.mark.parametrize("format", ["fp8", "fp8_rowwise"])
def test_no_pair_is_left_whatever_the_shape(tmp_path, format, changes):
    graph, entries = fused(tmp_path, format, "fp8", num_hidden_layers=1, **changes)
    assert {n.domain for n in graph.nodes} == {"fp8"}
    assert all(e["folded"] for e in entries)


def test_an_excluded_part_of_a_group_costs_a_concat_and_a_norm(tmp_path):
    graph, _ = fused(tmp_path, "fp8", exclude=("*.0.self_attn.q_proj",))
    names = [n.name for n in graph.nodes if n.name.startswith("model.layers.0.self_attn") or "0.input" in n.name]
    assert sorted(names) == sorted([
        "model.layers.0.input_layernorm", "model.layers.0.input_layernorm/norm_quant",
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.{k_proj,v_proj}", "model.layers.0.self_attn.{q_proj,k_proj,v_proj}",
        "model.layers.0.self_attn", "model.layers.0.self_attn.o_proj",
    ])  # fmt: skip


def test_the_report_names_who_took_each_pair(tmp_path):
    _, entries = fused(tmp_path, "fp8", "fp8")
    taken = {e["dequantize"]: (e["quantize_in"], e["dequantize_in"]) for e in entries}
    layer = "model.layers.0"
    qkv = f"{layer}.self_attn.{{q_proj,k_proj,v_proj}}"
    assert taken[f"{layer}.self_attn.k_proj/dequantize"] == (f"{layer}.input_layernorm", qkv)
    assert taken[f"{layer}.self_attn.k_proj/dequantize_weight"] == ("", qkv)
    assert taken[f"{layer}.self_attn/p_dequantize"] == (f"{layer}.self_attn",) * 2
    assert taken[f"{layer}.self_attn.o_proj/dequantize"] == (f"{layer}.self_attn", f"{layer}.self_attn.o_proj")
    assert len(entries) == 36


def test_a_pair_that_nobody_took_is_reported_with_the_reason(tmp_path):
    _, entries = fused(tmp_path, "fp8")
    assert "fp8-build --explain" in report.report(entries, Journal())[0]["reason"]


def test_explain_tells_for_each_pattern_why(tmp_path):
    source = tiny.source(tmp_path, tiny.qformat("fp8_rowwise"))
    lines = build.explain(source, Request(target="cpu", explain="model.layers.0.mlp.down_proj/quantize"))
    told = dict(line.split(": ", 1) for line in lines)
    assert set(told) >= {"act_quant", "attention", "embedding", "gemm", "gemm_swiglu", "norm_quant", "quantize"}
    assert "matched" in told["act_quant"] and "matched" not in told["gemm_swiglu"]
    assert told["taken by"].startswith("model.layers.0.mlp ")


def test_explain_refuses_an_unknown_node_and_names_near_ones(tmp_path):
    source = tiny.source(tmp_path, tiny.qformat("fp8"))
    with pytest.raises(BuildError, match=r"no node is named .*model\.layers\.0"):
        build.explain(source, Request(target="cpu", explain="model.layers.0.mlp.down_prj/gemm"))
