"""The interpreter against onnxruntime, and its own contract: pruning, observation, plugins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
import tiny_checkpoint
import torch
from hf_llama import sequences, sqnr

from fp8.builder.checkpoint import Checkpoint
from fp8.builder.e4m3 import quantize
from fp8.builder.graph import Graph, serialize
from fp8.builder.interpret import (
    Interpreter,
    InterpreterError,
    empty_caches,
    next_caches,
    step_inputs,
    step_shape,
    to_torch,
)
from fp8.models import llama
from fp8.plugins.base import StepShape

FORMATS = [
    (name, kv) for name in ("bf16", "fp16", "fp8", "fp8_channel", "fp8_rowwise", "fp8_block") for kv in ("auto", "fp8")
]


def emit(directory: Path, name: str, kv: str, dtype: str = "float32", **config: Any) -> Graph:
    format = tiny_checkpoint.qformat(name, kv)
    tiny_checkpoint.write(directory, format, torch_dtype="float16" if name == "fp16" else "bfloat16", **config)
    checkpoint = Checkpoint(directory)
    return llama.emit(llama.read_config(checkpoint.config), checkpoint, format, dtype)


def onnxruntime_session(graph: Graph) -> onnxruntime.InferenceSession:
    """Without graph optimizations: they fuse e4m3 Q/DQ pairs wrongly."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    model = serialize(graph).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def steps(graph: Graph) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """A prefill and a decode step of two sequences, and empty caches."""
    texts = sequences(9, 40)
    prefill = step_inputs([(s[:-1], 0) for s in texts])
    return [prefill, step_inputs([(s[-1:], len(s) - 1) for s in texts])], empty_caches(graph, prefill)


def run_onnxruntime(
    session: onnxruntime.InferenceSession, feeds: dict[str, torch.Tensor], outputs: list[str]
) -> dict[str, torch.Tensor]:
    values = session.run(outputs, {i.name: feeds[i.name].numpy() for i in session.get_inputs()})
    return dict(zip(outputs, map(torch.from_numpy, values), strict=True))


@pytest.mark.parametrize(("name", "kv"), FORMATS)
def test_onnxruntime_agrees_over_prefill_and_decode(name: str, kv: str, tmp_path: Path) -> None:
    """One layer: a last-bit difference may flip an e4m3 code, and every further layer multiplies what it changed."""
    graph = emit(tmp_path, name, kv, num_hidden_layers=1)
    session, interpreter = onnxruntime_session(graph), Interpreter(graph)
    bound = 80 if name in ("bf16", "fp16") and kv == "auto" else 45
    batches, caches = steps(graph)
    for feeds in batches:
        expected = run_onnxruntime(session, {**feeds, **caches}, [t.name for t in graph.outputs])
        found = interpreter({**feeds, **caches})
        for output, value in expected.items():
            assert sqnr(value, found[output]) >= bound, output
        caches = next_caches(caches, found)


@pytest.mark.parametrize(("name", "kv"), FORMATS)
def test_onnxruntime_agrees_between_quantizers_and_has_the_same_codes(name: str, kv: str, tmp_path: Path) -> None:
    """Given onnxruntime's codes, everything up to the next quantizer is the same; given its input, so are the codes."""
    graph = emit(tmp_path, name, kv)
    quantizers = [node for node in graph.nodes if node.op == "QuantizeLinear"]
    probed = graph.copy()
    tensors = probed.tensors()
    inner = {t.name for q in quantizers for t in q.inputs if not isinstance(t, gs.Constant)}
    inner |= {reader.outputs[0].name for q in quantizers for reader in q.outputs[0].outputs}
    probed.outputs += [tensors[n] for n in sorted(inner)]
    session, interpreter = onnxruntime_session(probed), Interpreter(graph)
    batches, caches = steps(graph)
    for feeds in batches:
        expected = run_onnxruntime(session, {**feeds, **caches}, [t.name for t in probed.outputs])
        forced = {}
        for q in quantizers:
            x, scale = expected[q.inputs[0].name], q.inputs[1]
            s = torch.as_tensor(scale.values) if isinstance(scale, gs.Constant) else expected[scale.name]
            s = s.repeat_interleave(128, 1) if s.ndim == 2 else s[:, None] if s.ndim else s
            for reader in q.outputs[0].outputs:
                forced[reader.outputs[0].name] = expected[reader.outputs[0].name]
                assert torch.equal(quantize(x, s).float() * s, expected[reader.outputs[0].name]), q.name
        wanted = [n for n in expected if n not in forced]
        found = interpreter({**feeds, **caches, **forced}, outputs=wanted)
        for output in wanted:
            assert sqnr(expected[output], found[output]) >= 80, output
        caches = next_caches(caches, found)


def test_only_what_is_wanted_is_computed(tmp_path: Path) -> None:
    graph = emit(tmp_path, "bf16", "auto", "bfloat16")
    feeds = step_inputs([([1, 2, 3], 0)])
    seen: list[str] = []
    wanted = "model.layers.0.input_layernorm/norm"
    results = Interpreter(graph)(feeds, observe=lambda name, value: seen.append(name), outputs=[wanted])
    assert list(results) == [wanted] and results[wanted].shape == (3, 192)
    assert seen == ["model.embed_tokens/gather", "model.layers.0.input_layernorm/widen", wanted]


def test_every_value_is_observed(tmp_path: Path) -> None:
    graph = emit(tmp_path, "fp8", "fp8", "bfloat16")
    feeds = step_inputs([([1, 2, 3], 0)])
    seen: dict[str, torch.Tensor] = {}
    Interpreter(graph)({**feeds, **empty_caches(graph, feeds)}, observe=seen.__setitem__)
    assert set(graph.activations.values()) <= set(seen)
    codes = seen["model.layers.0.self_attn.q_proj/quantize"]
    assert codes.dtype == torch.float8_e4m3fn
    for tensor in graph.tensors().values():
        if tensor.name in seen:
            assert str(seen[tensor.name].dtype) == f"torch.{np.dtype(tensor.dtype).name}", tensor.name


def test_constants_are_computed_once(tmp_path: Path) -> None:
    graph = emit(tmp_path, "fp8", "auto", "bfloat16")
    feeds = step_inputs([([1, 2, 3], 0)])
    seen: list[str] = []
    interpreter = Interpreter(graph)
    for _ in range(2):
        interpreter({**feeds, **empty_caches(graph, feeds)}, observe=lambda name, value: seen.append(name))
    assert not [name for name in seen if name.endswith("weight")]


def test_plugin_nodes_run_their_reference() -> None:
    x = gs.Variable("x", np.dtype(np.float32), ["T", 32])
    scale = gs.Constant("scale", np.array([0.02], np.float32))
    y = gs.Variable("y", None, None)
    node = gs.Node("Quantize", "q", {"quant": "static"}, [x, scale], [y], domain="fp8")
    graph = gs.Graph([node], [x], [y])
    feed = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = Interpreter(graph)({"x": feed})["y"]
    expected = (feed.float() / torch.tensor(0.02)).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_unknown_operator_and_missing_feed_are_named() -> None:
    x, y = gs.Variable("x", np.dtype(np.float32), ["T"]), gs.Variable("y", np.dtype(np.float32), ["T"])
    graph = gs.Graph([gs.Node("Erf", "some/node", {}, [x], [y])], [x], [y])
    with pytest.raises(InterpreterError, match="some/node: operator Erf"):
        Interpreter(graph)({"x": torch.zeros(3)})
    with pytest.raises(InterpreterError, match="x is neither fed"):
        Interpreter(graph)({})
    with pytest.raises(InterpreterError, match="no tensor z"):
        Interpreter(graph)({"x": torch.zeros(3)}, outputs=["z"])


def test_step_inputs_are_consistent_in_both_forms() -> None:
    feeds = step_inputs([([7], 70), ([8, 9], 3), ([5], 0)], max_context=128)
    slots, tables = feeds["slot_mapping"], feeds["block_tables"]
    for token, slot in enumerate(slots.tolist()):
        sequence, position = feeds["sequence_ids"][token], feeds["position_ids"][token]
        assert slot == tables[sequence, position // 64] * 64 + position % 64
        assert feeds["slot_sequence_ids"][slot] == sequence and feeds["slot_position_ids"][slot] == position
    assert (feeds["slot_sequence_ids"] >= 0).sum() == feeds["sequence_lengths"].sum() == 71 + 5 + 1
    assert step_shape(feeds) == StepShape(4, 3, 1, 2, 71, 4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_arrays_of_foreign_dtypes_reach_torch_bit_by_bit(dtype: str) -> None:
    expected = torch.arange(-8, 8).to(getattr(torch, dtype)).reshape(2, 8)
    import ml_dtypes

    array = expected.view(torch.uint8).numpy().view(getattr(ml_dtypes, dtype))
    assert torch.equal(to_torch(array).view(torch.uint8), expected.view(torch.uint8))
