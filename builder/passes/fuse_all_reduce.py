"""fuse_all_reduce: a sum over ranks that a norm alone reads becomes one plugin with it, and the linear layer whose rows
are summed up becomes one that sends them."""

from __future__ import annotations

import itertools

import onnx_graphsurgeon as gs

from fp8.builder.rewrite import DOMAIN, tensor_type
from fp8.builder.target import Target
from fp8.plugins.all_reduce.region import MOST_WORLD, SENT_ROWS, sent_slot
from fp8.plugins.base import PluginError
from fp8.plugins.gemm_send.plugin import GemmSend


def fuse_all_reduce(graph: gs.Graph, target: Target) -> int:
    """Returns how many norms took the sum that they read."""
    kept = target.kept.union(t.name for t in graph.outputs)
    count = 0
    for node in graph.nodes:
        if node.domain == DOMAIN and node.op == "norm_quant" and node.attrs["residual"] and not node.attrs["gather"]:
            place = next((i for i in (0, 1) if _is_sum(node.inputs[i], kept)), None)
            if place is not None:
                _join(node, place)
                count += 1
    graph.nodes[:] = [n for n in graph.nodes if n.outputs]
    _send(graph, kept)
    return count


def _is_sum(tensor: gs.Tensor, kept: frozenset[str]) -> bool:
    """Whether it is an all-reduce's and has only one reader."""
    producer = tensor.inputs[0] if tensor.inputs else None
    if producer is None or producer.domain != DOMAIN or producer.op != "all_reduce":
        return False
    return producer.attrs["operation"] == "sum" and len(tensor.outputs) == 1 and tensor.name not in kept


def _join(norm: gs.Node, place: int) -> None:
    """`place`: of the sum among the norm's two addends; the plugin's is the first."""
    total, residual = norm.inputs[place], norm.inputs[1 - place]
    reduce = total.inputs[0]
    norm.op = "all_reduce_norm_quant"
    norm.attrs |= {name: reduce.attrs[name] for name in ("world", "fp8_tokens") if name in reduce.attrs}
    norm.inputs = [reduce.inputs[0], residual, *norm.inputs[2:]]
    reduce.inputs, reduce.outputs = [], []


def _send(graph: gs.Graph, kept: frozenset[str]) -> None:
    """Lets linear layers send the rows that such norms alone read. A layer sends after the norm of the layer that sent
    before it, whose area of the peers' memory would else be filled again too soon."""
    pairs = [(i, j) for j, node in enumerate(graph.nodes) if (i := _sender(graph, node, kept)) is not None]
    in_turn = all(before < i for (_, before), (i, _) in itertools.pairwise(pairs))
    if len(pairs) < 2 or not in_turn:
        return
    for exchange, (i, j) in enumerate(pairs):
        slot = sent_slot(exchange, len(pairs))
        graph.nodes[i].op = "gemm_send"
        graph.nodes[i].attrs |= {"world": graph.nodes[j].attrs["world"], "slot": slot}
        graph.nodes[j].attrs["slot"] = slot


def _sender(graph: gs.Graph, norm: gs.Node, kept: frozenset[str]) -> int | None:
    """The place of the linear layer that could send what `norm` sums up."""
    if norm.domain != DOMAIN or norm.op != "all_reduce_norm_quant" or not 2 <= norm.attrs.get("world", 0) <= MOST_WORLD:
        return None
    if 0 < norm.attrs.get("fp8_tokens", 0) <= SENT_ROWS:
        return None
    part = norm.inputs[0]
    linear = part.inputs[0] if part.inputs else None
    if linear is None or linear.domain != DOMAIN or linear.op != "gemm" or len(part.outputs) > 1 or part.name in kept:
        return None
    try:
        GemmSend(**linear.attrs).infer([tensor_type(t) for t in linear.inputs])
    except PluginError:
        return None
    return graph.nodes.index(linear)
