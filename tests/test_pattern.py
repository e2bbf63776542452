"""Patterns: what they match, and the sentence that tells why they do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import tiny_checkpoint as tiny

from fp8.builder import pattern
from fp8.builder.dtypes import ONNX
from fp8.builder.passes.lower_attention import lower_attention
from fp8.builder.passes.merge_linears import merge_linears
from fp8.builder.pattern import Match, Mismatch
from fp8.builder.request import Request
from fp8.builder.target import Target

F32 = np.dtype(np.float32)


def scaled_sum(op, x, y, *, bias=(True, False)):
    s = op.Mul(op.Add(x, y), 2)
    return op.Sub(s, op.scalar("shift")) if bias else s


def graph_of(*nodes: tuple[str, str, list[gs.Tensor], dict]) -> dict[str, gs.Tensor]:
    """Nodes (op, output, inputs, attributes) -> their output tensors by name."""
    made: dict[str, gs.Tensor] = {}
    for op, name, inputs, attributes in nodes:
        out = made[name] = gs.Variable(name, F32, ["T", 4])
        gs.Node(op, name, attributes, [made.get(i, i) if isinstance(i, str) else i for i in inputs], [out])
    return made


def number(value: float) -> gs.Constant:
    return gs.Constant(f"constant/{value}", np.array(value, np.float32))


def first_match(function, tensor: gs.Tensor) -> Match | Mismatch:
    """Of the variants that begin with the tensor's operator."""
    node = tensor.inputs[0]
    found = [v.match(node) for v in pattern.trace(function) if v.root == node.op]
    return next((m for m in found if m), found[0])


@pytest.fixture
def x() -> gs.Variable:
    return gs.Variable("x", F32, ["T", 4])


@pytest.fixture
def y() -> gs.Variable:
    return gs.Variable("y", F32, ["T", 4])


def test_parameters_become_inputs_and_scalars_attributes(x, y):
    made = graph_of(
        ("Add", "sum", [x, y], {}), ("Mul", "m", ["sum", number(2)], {}), ("Sub", "s", ["m", number(0.5)], {})
    )
    found = first_match(scaled_sum, made["s"])
    assert found and found.inputs == [x, y] and found.attributes == {"shift": 0.5} and len(found.nodes) == 3


def test_commutative_operands_match_in_either_order(x, y):
    made = graph_of(("Add", "sum", [x, y], {}), ("Mul", "m", [number(2), "sum"], {}))
    assert first_match(scaled_sum, made["m"])


def test_another_constant_is_told(x, y):
    made = graph_of(("Add", "sum", [x, y], {}), ("Mul", "m", ["sum", number(3)], {}))
    assert first_match(scaled_sum, made["m"]).sentence == "m: expected the constant 2, found 3"


def test_another_operator_is_told(x, y):
    made = graph_of(("Max", "sum", [x, y], {}), ("Mul", "m", ["sum", number(2)], {}))
    assert first_match(scaled_sum, made["m"]).sentence == "sum: expected Add, found Max"


def test_a_second_reader_of_an_inner_value_is_told(x, y):
    made = graph_of(("Add", "sum", [x, y], {}), ("Mul", "m", ["sum", number(2)], {}), ("Abs", "other", ["sum"], {}))
    assert first_match(scaled_sum, made["m"]).sentence == "sum: 'sum' is read by 'other' (Abs) as well"


def test_a_graph_output_among_the_inner_values_is_told(x, y):
    made = graph_of(("Add", "sum", [x, y], {}), ("Mul", "m", ["sum", number(2)], {}))
    (variant,) = (v for v in pattern.trace(scaled_sum) if v.root == "Mul")
    found = variant.match(made["m"].inputs[0], frozenset({"sum"}))
    assert "is an output of the graph" in found.sentence


def test_shared_values_may_have_other_readers(x, y):
    made = graph_of(("Add", "sum", [x, y], {}), ("Mul", "m", ["sum", number(2)], {}), ("Abs", "other", ["sum"], {}))
    assert first_match(lambda op, x, y: op.Mul(op.shared(op.Add(x, y)), 2), made["m"])


def test_declared_outputs_may_have_other_readers(x, y):
    def both(op, x, y):
        s = op.Add(x, y)
        return op.Mul(s, 2), s

    made = graph_of(("Add", "sum", [x, y], {}), ("Mul", "m", ["sum", number(2)], {}), ("Abs", "other", ["sum"], {}))
    found = first_match(both, made["m"])
    assert found and found.outputs == [made["m"], made["sum"]]


def test_the_same_parameter_must_be_the_same_tensor(x, y):
    square = lambda op, x: op.Mul(x, x)
    same, other = graph_of(("Mul", "m", [x, x], {})), graph_of(("Mul", "n", [x, y], {}))
    assert first_match(square, same["m"])
    assert "expected x = 'x' again, found 'y'" in first_match(square, other["n"]).sentence


def test_attributes_are_compared_with_their_defaults_and_captured(x):
    def narrowed(op, x):
        return op.Cast(op.Concat(x, x, axis=1), to=op.attribute("dtype", "bfloat16"))

    made = graph_of(("Concat", "c", [x, x], {"axis": 1}), ("Cast", "d", ["c"], {"to": ONNX["bfloat16"]}))
    wrong = graph_of(("Concat", "c", [x, x], {"axis": 1}), ("Cast", "d", ["c"], {"to": ONNX["float16"]}))
    assert first_match(narrowed, made["d"]).attributes == {"dtype": "bfloat16"}
    assert first_match(narrowed, wrong["d"]).sentence == "d: expected to among bfloat16, found float16"


def test_every_plugin_with_a_pattern_has_variants_the_largest_first():
    found = pattern.load_all()
    assert {v.pattern for v in found} >= {"norm_quant", "gemm", "gemm_swiglu", "act_quant", "quantize", "attention"}
    assert [v.size for v in found] == sorted((v.size for v in found), reverse=True)


# Each plugin's pattern against a graph in which one thing is not as it wants


def rewritten(tmp_path: Path, passes, format: str = "fp8", kv: str = "fp8"):
    source = tiny.source(tmp_path, tiny.qformat(format, kv))
    limits = source.limits(Request())
    graph = source.emit(limits)
    for rewrite in passes:
        rewrite(graph, Target("cpu", limits))
    return graph


def node(graph: gs.Graph, name: str) -> gs.Node:
    return next(n for n in graph.nodes if n.name == name)


def outcome(graph: gs.Graph, plugin: str, name: str) -> str:
    """ "matched", or the sentence of the variant that got farthest."""
    root = node(graph, name)
    outputs = frozenset(t.name for t in graph.outputs)
    found = [v.match(root, outputs) for v in pattern.load(plugin) if v.root == root.op]
    return "matched" if any(found) else max(found, key=lambda m: m.matched).sentence


LAYER = "model.layers.0"


@pytest.mark.parametrize(
    ("plugin", "root", "changed", "attribute", "value", "says"),
    [
        ("norm_quant", "self_attn.q_proj/quantize", "input_layernorm/norm", "axis", 0, "expected axis=-1, found 0"),
        ("gemm", "self_attn.o_proj/output", "self_attn.o_proj/gemm", "transB", 0, "expected transB=1, found 0"),
        (
            "gemm_swiglu",
            "mlp.down_proj/quantize",
            "mlp.{gate_proj,up_proj}/split",
            "axis",
            0,
            "expected axis=1, found 0",
        ),
        ("act_quant", "mlp.down_proj/quantize", "mlp.{gate_proj,up_proj}/split", "axis", 0, "expected axis=1"),
        ("attention", "self_attn.o_proj/quantize", "self_attn/q_rotary", "interleaved", 1, "expected interleaved=0"),
        (
            "attention",
            "self_attn.o_proj/quantize",
            "self_attn/v_quantize",
            "saturate",
            0,
            "expected saturate=1, found 0",
        ),
    ],
)
def test_a_pattern_matches_the_model_and_tells_what_is_changed(tmp_path, plugin, root, changed, attribute, value, says):
    graph = rewritten(tmp_path, [merge_linears])
    assert outcome(graph, plugin, f"{LAYER}.{root}") == "matched"
    node(graph, f"{LAYER}.{changed}").attrs[attribute] = value
    sentence = outcome(graph, plugin, f"{LAYER}.{root}")
    assert f"{LAYER}.{changed}" in sentence and says in sentence


def test_quantize_matches_what_follows_attention_in_rowwise(tmp_path):
    graph = rewritten(tmp_path, [merge_linears, lower_attention], "fp8_rowwise")
    name = f"{LAYER}.self_attn.o_proj"
    assert outcome(graph, "quantize", f"{name}/quantize") == "matched"
    node(graph, f"{name}/scaled_amax").inputs[1] = number(127)
    assert "expected the constant 448, found 127" in outcome(graph, "quantize", f"{name}/quantize")


def test_embedding_wants_a_stored_table(tmp_path):
    graph = rewritten(tmp_path, [])
    assert outcome(graph, "embedding", "model.embed_tokens/gather") == "matched"
    assert "expected a constant as table" in outcome(graph, "embedding", "model.norm/rows")
