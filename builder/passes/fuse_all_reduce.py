"""fuse_all_reduce: a sum over ranks that a norm alone reads becomes one plugin with it."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from fp8.builder.rewrite import DOMAIN
from fp8.builder.target import Target


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
    return count


def _is_sum(tensor: gs.Tensor, kept: frozenset[str]) -> bool:
    """Whether it is an all-reduce's and has but one reader."""
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
