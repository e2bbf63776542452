"""A scale for the queries of FP8 attention where a checkpoint has scales of K and V alone, as most tools write.

The input of q_proj is an RMSNorm's output, g * u with |u| <= sqrt(H). So by Cauchy and Schwarz no element of q exceeds
sqrt(H) * |g * row of the weight| + |bias|, and none sqrt(2) times that once RoPE has turned pairs of them (times what
YaRN lets them grow by). This bound, over 448, saturates no query. It is some times larger than what calibration finds,
which costs next to nothing: E4M3 is as precise at a hundredth of its range as at its end.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from fp8.builder.checkpoint import CheckpointError
from fp8.builder.graph import Graph, stored_array
from fp8.builder.interpret import to_torch
from fp8.plugins.base import E4M3_MAX

ROUNDING = 1.125  # what rounding the norm's output to E4M3 (1/16) and q to 16 bits can add, and room


def query_scale(graph: Graph, attention: str, dequantized: Callable[[str], torch.Tensor]) -> float:
    """For the attention module of a graph; `dequantized` gives the weight [N, H] of a linear in float32.

    Raises CheckpointError if what q_proj reads is not bounded: no RMSNorm.
    """
    module = f"{attention}.q_proj"
    read = graph.activations[f"{module}.input_scale"]
    norm = next((n for n in graph.nodes if n.op == "RMSNormalization" and n.outputs[0].name == read), None)
    if norm is None:
        raise CheckpointError(
            f"{attention}.q_scale is missing, and {module} does not read an RMSNorm, whose output is bounded; keep the "
            "KV cache in 16 bits with --kv_cache_dtype auto"
        )
    gain = _constant(norm.inputs[1])
    rows = (dequantized(module) * gain).norm(dim=1) * math.sqrt(gain.numel())
    bias = next((c for n in graph.nodes if n.name == f"{module}/gemm" for c in n.inputs[2:]), None)
    if bias is not None:
        rows = rows + _constant(bias).abs()
    rotary = next(n for n in graph.nodes if n.op == "RotaryEmbedding")
    cos, sin = map(_constant, rotary.inputs[1:3])
    growth = (cos.square() + sin.square()).max().sqrt().item()
    return rows.max().item() * math.sqrt(2) * growth * ROUNDING / E4M3_MAX


def _constant(tensor: object) -> torch.Tensor:
    """Values of a constant under its casts, in float32."""
    while not hasattr(tensor, "_values"):
        tensor = tensor.inputs[0].inputs[0]  # type: ignore[attr-defined]
    return to_torch(np.asarray(stored_array(tensor))).float()  # type: ignore[arg-type]
