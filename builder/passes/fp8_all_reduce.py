"""fp8_all_reduce: the ranks' parts of a sum travel as e4m3 where there are many bytes of them. It changes numbers."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from fp8.builder.interpret import plugin_of
from fp8.builder.rewrite import DOMAIN, tensor_type
from fp8.builder.target import Target
from fp8.plugins.base import PluginError

ITEM_BYTES = 2  # of a 16-bit activation, whatever the engine's type: the same rows in an engine of references


def fp8_all_reduce(graph: gs.Graph, target: Target) -> int:
    """Returns how many all-reduces it told from how many rows on: `target.fp8_all_reduce` KiB. Raises PluginError, by
    the node's name, for rows that scales of 128 channels do not divide."""
    assert target.fp8_all_reduce
    count = 0
    for node in graph.nodes:
        if node.domain != DOMAIN or node.op != "all_reduce" or node.attrs["operation"] != "sum":
            continue
        x = tensor_type(node.inputs[0])
        assert x is not None and isinstance(x.shape[-1], int)
        node.attrs["fp8_tokens"] = max(1, -(-target.fp8_all_reduce * 1024 // (x.shape[-1] * ITEM_BYTES)))
        try:
            plugin_of(node).infer([x])
        except PluginError as error:
            raise PluginError(f"{node.name}: {error}") from error
        count += 1
    return count
