"""fold: a stored weight in another float type than the model's becomes a constant of the model's; dead nodes go."""

from __future__ import annotations

import onnx_graphsurgeon as gs
import torch

from fp8.builder.dtypes import dtype_name
from fp8.builder.rewrite import remove_dead
from fp8.builder.target import Target
from fp8.builder.weights import prepared

HALF = ("bfloat16", "float16")


def fold(graph: gs.Graph, target: Target) -> int:
    """Returns how many nodes it removed."""
    for node in graph.nodes:
        if node.op == "Cast" and isinstance(node.inputs[0], gs.Constant) and dtype_name(node.attrs["to"]) in HALF:
            fold_conversion(node, getattr(torch, dtype_name(node.attrs["to"])))
    return remove_dead(graph)


def fold_conversion(node: gs.Node, dtype: torch.dtype) -> None:
    """Gives the readers of a converted constant that constant in `dtype`."""
    stored, converted = node.inputs[0], node.outputs[0]
    constant = prepared(stored.name, [stored], lambda weight: weight.to(dtype))
    for reader in list(converted.outputs):
        reader.inputs = [constant if t is converted else t for t in reader.inputs]
