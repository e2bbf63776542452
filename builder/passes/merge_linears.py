"""merge_linears: linears that read the same activation become one, and their outputs parts of one tensor.

Like is merged with like only (same operand types, bias or none), each part keeping its own weight scale in a vector per
output channel. Where some part is of another kind (an excluded q_proj), the pieces are concatenated: one copy more, and
the readers still see one tensor [q | k | v] or [gate | up].
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import onnx_graphsurgeon as gs
import torch

from fp8.builder import pattern
from fp8.builder.dtypes import ONNX, dtype_name, numpy_dtype
from fp8.builder.graph import Graph
from fp8.builder.pattern import Match
from fp8.builder.rewrite import sort, substitute, together
from fp8.builder.target import Target
from fp8.builder.weights import concatenate, prepared
from fp8.plugins.base import SCALE_BLOCK

F32 = np.dtype(np.float32)


def merge_linears(graph: Graph, target: Target) -> int:
    """Returns how many linears went into merged ones."""
    count = 0
    for siblings in _siblings(graph, target):
        runs = [list(run) for _, run in itertools.groupby(siblings, key=_kind)]
        pieces = [_merge(graph, run) if len(run) > 1 else run[0].outputs[0] for run in runs]
        _pack(graph, pieces, runs)
        count += len(siblings)
    sort(graph)
    return count


def _siblings(graph: Graph, target: Target) -> list[list[Match]]:
    """Linears, in the order of the model, by the float32 tensor whose rounded or quantized form they read."""
    variants = [v for v in pattern.load("gemm") if v.choices["rounded"]]
    outputs = target.kept.union(t.name for t in graph.outputs)
    found: dict[int, list[Match]] = {}
    for node in graph.nodes:
        if node.op != "Cast":
            continue
        match = next((m for v in variants if (m := v.match(node, outputs))), None)
        if match:
            x = match.tensors["x"]
            source = x.inputs[0].inputs[0] if x.inputs else x
            found.setdefault(id(source), []).append(match)
    order = {scale.removesuffix(".input_scale"): i for i, scale in enumerate(graph.activations)}  # as the model has it
    return [sorted(g, key=lambda m: order.get(m.module, 0)) for g in found.values() if len(g) > 1]


def _kind(match: Match) -> tuple:
    """Linears of one kind can be one."""
    types = tuple(t and dtype_name(t.dtype) for t in match.inputs)
    return id(match.tensors["x"]), types, match.attributes["out_dtype"]


def _merge(graph: gs.Graph, run: list[Match]) -> gs.Tensor:
    """One linear in the place of several of a kind, its output split to theirs; returns the output."""
    name = together(m.module for m in run)
    first = run[0]
    w = _joined(f"{name}.weight", [m.tensors["w"] for m in run])
    x = first.tensors["x"]
    rows, n, dtype = x.shape[0], w.shape[0], first.outputs[0].dtype
    if "x_scale" in first.tensors:
        x_scale, scale = first.tensors["x_scale"], _scales(f"{name}.weight_scale", run)
        wide_x = _dequantize(graph, f"{name}/dequantize", x, x_scale)
        wide_w = _dequantize(graph, f"{name}/dequantize_weight", w, scale)
    else:
        wide_x = _node(graph, "Cast", f"{name}/widen", [x], F32, x.shape, to=ONNX["float32"])
        wide_w = _node(graph, "Cast", f"{name}/widen_weight", [w], F32, w.shape, to=ONNX["float32"])
    operands = [wide_x, wide_w]
    if "bias" in first.tensors:
        bias = _joined(f"{name}.bias", [m.tensors["bias"] for m in run])
        operands.append(_node(graph, "Cast", f"{name}/widen_bias", [bias], F32, bias.shape, to=ONNX["float32"]))
    y = _node(graph, "Gemm", f"{name}/gemm", operands, F32, [rows, n], transB=1)
    y = _node(graph, "Cast", f"{name}/output", [y], dtype, [rows, n], to=ONNX[dtype_name(dtype)])
    return y


def _pack(graph: gs.Graph, pieces: list[gs.Tensor], runs: list[list[Match]]) -> None:
    """Gives the linears' outputs as parts of one tensor."""
    matches = [m for run in runs for m in run]
    outputs = [m.outputs[0] for m in matches]
    packed = pieces[0]
    name = together(m.module for m in matches)
    if len(pieces) > 1:
        pieces = [_moved(graph, p, r[0]) if len(r) == 1 else p for p, r in zip(pieces, runs, strict=True)]
        width = sum(t.shape[1] for t in outputs)
        shape = [packed.shape[0], width]
        packed = _node(graph, "Concat", f"{name}/concat", pieces, packed.dtype, shape, axis=1)
    sizes = gs.Constant(f"{name}/sizes", np.array([t.shape[1] for t in outputs], np.int64))
    split = gs.Node("Split", f"{name}/split", {"axis": 1}, [packed, sizes], [])
    old = [node for run in runs if len(run) > 1 for m in run for node in m.nodes]
    substitute(graph, old, [split], outputs)


def _moved(graph: gs.Graph, output: gs.Tensor, match: Match) -> gs.Tensor:
    """A linear that stays apart yields a tensor of a new name, since the split yields the old one."""
    own = gs.Variable(f"{output.name}.own", output.dtype, output.shape)
    match.nodes[0].outputs = [own]
    return own


def _joined(name: str, parts: list[gs.Constant]) -> gs.Constant:
    return prepared(name, parts, concatenate)


def _scales(name: str, run: list[Match]) -> gs.Constant:
    """Each part's scale, repeated for its own output channels; scales per row and block of K are so already."""
    if len(run[0].tensors["w_scale"].shape) == 2:
        return _joined(name, [m.tensors["w_scale"] for m in run])
    rows = [m.tensors["w"].shape[0] for m in run]
    return prepared(name, [m.tensors["w_scale"] for m in run], functools.partial(_expand, rows))


def _expand(rows: list[int], *scales: torch.Tensor) -> torch.Tensor:
    return concatenate(*(s.reshape(-1).expand(n) for s, n in zip(scales, rows, strict=True)))


def _dequantize(graph: gs.Graph, name: str, codes: gs.Tensor, scale: gs.Tensor) -> gs.Variable:
    along = ({}, {"axis": 0}, {"axis": 1, "block_size": SCALE_BLOCK})[len(scale.shape)]
    return _node(graph, "DequantizeLinear", name, [codes, scale], F32, codes.shape, **along)


def _node(graph: gs.Graph, op: str, name: str, inputs: list, dtype: np.dtype, shape: list, **attrs) -> gs.Variable:
    out = gs.Variable(name, numpy_dtype(dtype_name(dtype)), list(shape))
    graph.nodes.append(gs.Node(op, name, attrs, inputs, [out]))
    return out
