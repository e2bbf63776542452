"""Passes: each leaves the meaning of the graph as it was, and makes the form that the next one takes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tiny_checkpoint as tiny
import torch

from fp8.builder import build, pipeline
from fp8.builder.passes.fold import fold
from fp8.builder.passes.lower_attention import lower_attention
from fp8.builder.passes.merge_linears import merge_linears
from fp8.builder.request import Reporter, Request
from fp8.builder.rewrite import apart, tensor_type, together
from fp8.builder.target import Target
from fp8.builder.verify import PLAIN_SQNR, QUANTIZED_SQNR, VerificationError, Verifier, sqnr
from fp8.builder.weights import to_torch

SHAPES = {
    "MHA": {"num_key_value_heads": 4}, "GQA": {}, "MQA": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True}, "tied": {"tie_word_embeddings": True}, "odd": tiny.ODD,
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        }
    },
}  # fmt: skip
FORMATS = list(itertools.product(("fp8", "fp8_channel", "fp8_rowwise", "fp8_block", "bf16", "fp16"), ("auto", "fp8")))


def emitted(tmp_path, format="fp8", kv="fp8", exclude=(), **changes):
    source = tiny.source(tmp_path, tiny.qformat(format, kv, exclude), **changes)
    limits = source.limits(Request(max_seq_len=128))
    return source, source.emit(limits), Target("cpu", limits)


def sqnrs(tmp_path, format, kv, exclude=(), **changes) -> dict[str, float]:
    """Of every pass."""
    source, graph, target = emitted(tmp_path, format, kv, exclude, **changes)
    quantized = format.startswith("fp8") or kv == "fp8"
    verifier = Verifier(graph, source.config.vocab_size, target.limits, quantized)
    found: dict[str, float] = {}
    pipeline.run(graph, target, lambda name, _, g: found.update({name: verifier.check(name, g)}))
    return found


@pytest.mark.parametrize(("format", "kv"), FORMATS)
def test_every_pass_keeps_the_logits_in_every_format(tmp_path, format, kv):
    bound = QUANTIZED_SQNR if format.startswith("fp8") or kv == "fp8" else PLAIN_SQNR
    found = sqnrs(tmp_path, format, kv)
    assert set(found) == {p.__name__ for p in pipeline.PASSES}
    assert min(found.values()) >= bound


@pytest.mark.parametrize("format", ["fp8_rowwise", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_pass_keeps_the_logits_of_every_shape(tmp_path, format, shape):
    found = sqnrs(tmp_path, format, "auto", num_hidden_layers=1, **SHAPES[shape])
    assert min(found.values()) >= PLAIN_SQNR


@pytest.mark.parametrize("exclude", [("*.q_proj",), ("*.k_proj", "*.up_proj"), ("*.o_proj",), ("*.mlp.*",)])
@pytest.mark.parametrize("format", ["fp8"])
def test_every_pass_keeps_the_logits_with_excluded_linears(tmp_path, format, exclude):
    assert min(sqnrs(tmp_path, format, "fp8", exclude, num_hidden_layers=1).values()) >= PLAIN_SQNR


def test_a_pass_that_changes_the_result_is_caught(tmp_path):
    source, graph, target = emitted(tmp_path)
    verifier = Verifier(graph, source.config.vocab_size, target.limits, quantized=True)
    norm = next(n for n in graph.nodes if n.op == "RMSNormalization")
    norm.attrs["epsilon"] = 0.1
    with pytest.raises(VerificationError, match=r"pass broken changed the result: SQNR .* dB, expected at least 45 dB"):
        verifier.check("broken", graph)


def test_a_pass_after_which_nothing_is_a_number_is_caught(tmp_path):
    """NaN is no noise that is not above zero."""
    source, graph, target = emitted(tmp_path)
    verifier = Verifier(graph, source.config.vocab_size, target.limits, quantized=True)
    norm = next(n for n in graph.nodes if n.op == "RMSNormalization")
    norm.attrs["epsilon"] = float("nan")
    with pytest.raises(VerificationError, match="pass broken changed the result: SQNR -inf dB"):
        verifier.check("broken", graph)
    with pytest.raises(VerificationError, match="the model's logits are not finite before any pass"):
        Verifier(graph, source.config.vocab_size, target.limits, quantized=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_near(value):
    x = torch.ones(3)
    broken = torch.tensor([1.0, value, 1.0])
    assert sqnr(x, x) == float("inf") and sqnr(x, 2 * x) == pytest.approx(10 * np.log10(4))
    assert sqnr(broken, x) == sqnr(x, broken) == sqnr(broken, broken) == float("-inf")


def test_the_verifier_does_not_change_the_default_dtype(tmp_path):
    source, graph, target = emitted(tmp_path)
    Verifier(graph, source.config.vocab_size, target.limits, quantized=True)
    assert torch.get_default_dtype() == torch.float32


def test_merged_linears_keep_each_parts_own_weight_scale(tmp_path):
    source, graph, target = emitted(tmp_path)
    merge_linears(graph, target)
    name = "model.layers.0.self_attn.{q_proj,k_proj,v_proj}"
    scale = next(n for n in graph.nodes if n.name == f"{name}/dequantize_weight").inputs[1]
    parts = [source.checkpoint.scale(n) for n in apart(f"{name}.weight_scale")]
    assert torch.equal(to_torch(scale), torch.from_numpy(np.repeat(np.concatenate(parts), [256, 128, 128])))
    assert len(set(np.concatenate(parts).tolist())) == 3


def test_merged_weights_are_the_parts_in_the_order_of_the_model(tmp_path):
    source, graph, target = emitted(tmp_path, exclude=("*.q_proj",))
    merge_linears(graph, target)
    name = "model.layers.0.self_attn.{k_proj,v_proj}"
    weight = next(n for n in graph.nodes if n.name == f"{name}/dequantize_weight").inputs[0]
    parts = [source.checkpoint.entry(n).array() for n in apart(f"{name}.weight")]
    assert to_torch(weight).view(torch.uint8).numpy().tobytes() == np.concatenate(parts).tobytes()
    split = next(n for n in graph.nodes if n.name == "model.layers.0.self_attn.{q_proj,k_proj,v_proj}/split")
    assert [t.name.rsplit(".", 1)[1] for t in split.outputs] == ["q_proj/output", "k_proj/output", "v_proj/output"]
    assert split.inputs[0].inputs[0].op == "Concat"


def test_lowering_replaces_slots_by_pages(tmp_path):
    _, graph, target = emitted(tmp_path)
    merge_linears(graph, target)
    assert lower_attention(graph, target) == 2
    inputs = {t.name: tensor_type(t) for t in graph.inputs}
    assert not {"sequence_ids", "slot_sequence_ids", "slot_position_ids"} & set(inputs)
    assert inputs["block_tables"].shape == ("B", 2) and inputs["query_start"].shape == ("B+1",)
    assert inputs["kv_cache.1.value"].shape == ("blocks", 64, 2, 64)
    assert inputs["kv_cache.1.value"].dtype == "float8_e4m3fn"
    assert [t.name for t in graph.outputs] == ["logits"]


def test_fold_converts_weights_stored_in_another_type(tmp_path):
    _, graph, target = emitted(tmp_path, "fp8", "auto", torch_dtype="float32")
    assert fold(graph, target) > 0
    assert not [n for n in graph.nodes if n.name.endswith("/convert")]
    weight = next(n for n in graph.nodes if n.op == "Gather").inputs[0]
    assert weight.name == "model.embed_tokens.weight" and tensor_type(weight).dtype == "bfloat16"


def test_names_of_several_are_one_name_and_back():
    names = ["model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"]
    assert together(names) == "model.layers.0.mlp.{gate_proj,up_proj}.weight"
    assert apart(together(names)) == names
    assert apart("lm_head") == ["lm_head"]


def test_dumps_are_written_after_every_pass(tmp_path):
    source = tiny.source(tmp_path / "checkpoint", tiny.qformat("fp8"))
    request = Request(max_seq_len=128, target="cpu", dump_passes=tmp_path / "dump")
    build.fuse(source, request, Reporter())
    names = sorted(p.name for p in (tmp_path / "dump").iterdir())
    assert names == ["0_emit.txt", "1_fold.txt", "2_merge_linears.txt", "3_lower_attention.txt", "4_fuse.txt"]
    line = (tmp_path / "dump" / "4_fuse.txt").read_text().splitlines()[-1]
    assert line.startswith("lm_head: gemm(lm_head/round bfloat16[L,192], lm_head.weight bfloat16[320,192]")
