"""fold: stored values that are only converted or spread over rows become constants in that form; dead nodes go."""

from __future__ import annotations

import functools
from collections.abc import Callable

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
        elif node.op == "Gather" and all(isinstance(t, gs.Constant) for t in node.inputs):
            _fold(node, functools.partial(_rows, torch.from_numpy(node.inputs[1].values)))
    return remove_dead(graph)


def fold_conversion(node: gs.Node, dtype: torch.dtype) -> None:
    """Gives the readers of a converted constant that constant in `dtype`."""
    _fold(node, lambda stored: stored.to(dtype))


def _rows(rows: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return table.new_empty(len(rows), *table.shape[1:]) if table.is_meta else table[rows]


def _fold(node: gs.Node, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Gives the node's readers `function` of its first input, computed when the weights are written."""
    stored, result = node.inputs[0], node.outputs[0]
    constant = prepared(stored.name, [stored], function)
    for reader in list(result.outputs):
        reader.inputs = [constant if t is result else t for t in reader.inputs]
