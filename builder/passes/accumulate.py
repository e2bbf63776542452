"""accumulate: the products of e4m3 operands are summed as the target asks, "precise" where that is not the default."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from fp8.builder.rewrite import DOMAIN, tensor_type
from fp8.builder.target import Target


def accumulate(graph: gs.Graph, target: Target) -> int:
    """Returns how many plugin nodes it told."""
    count = 0
    for node in graph.nodes:
        x = tensor_type(node.inputs[0]) if node.domain == DOMAIN and "accumulation" in node.attrs else None
        if x and x.dtype == "float8_e4m3fn":
            node.attrs["accumulation"] = target.fp8_accumulation
            count += 1
    return count
