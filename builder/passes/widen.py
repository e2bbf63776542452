"""widen: activations and unquantized weights in float32, for an engine that rounds nothing but to FP8.

Rounding to the model's dtype becomes a Cast from float32 to float32: the graph keeps its form, and patterns match it.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import torch

from fp8.builder.dtypes import ONNX, dtype_name
from fp8.builder.passes.fold import HALF, fold_conversion
from fp8.builder.rewrite import remove_dead
from fp8.builder.target import Target
from fp8.builder.weights import prepared


def widen(graph: gs.Graph, target: Target) -> int:
    """Returns how many tensors it widened."""
    for node in graph.nodes:
        if node.op == "Cast" and dtype_name(node.attrs["to"]) in HALF:
            node.attrs["to"] = ONNX["float32"]
            if isinstance(node.inputs[0], gs.Constant):
                fold_conversion(node, torch.float32)
    remove_dead(graph)
    count = 0
    for tensor in graph.tensors().values():
        if dtype_name(tensor.dtype) in HALF:
            count += 1
            if isinstance(tensor, gs.Constant):
                wide = prepared(tensor.name, [tensor], torch.Tensor.float)
                for reader in list(tensor.outputs):
                    reader.inputs = [wide if t is tensor else t for t in reader.inputs]
            else:
                tensor.dtype = np.dtype(np.float32)
    return count
