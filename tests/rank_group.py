"""The graphs of all ranks of a tiny checkpoint, and what they compute together."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_graphsurgeon as gs
import torch

from fp8.builder import pipeline
from fp8.builder.interpret import step_inputs
from fp8.builder.parallel.lockstep import Ranks
from fp8.builder.parallel.pipeline import Place
from fp8.builder.parallel.tensor import split
from fp8.builder.request import Request, Source

Sequences = list[tuple[list[int], int]]  # (new tokens, how many are cached)


def emitted(source: Source, request: Request, place: Place, dtype: str) -> gs.Graph:
    """The unfused graph of one rank."""
    limits = source.limits(request)
    layers = place.layers(source.config.num_layers)
    graph = source.model.emit(
        source.config, source.checkpoint, source.format, dtype, layers=layers, max_positions=limits.max_seq_len
    )
    if place.tp_size > 1:
        split(graph, source.tensor_parallel(place))
    return graph


def fused(source: Source, request: Request, place: Place) -> gs.Graph:
    graph = source.emit(source.limits(request), place)
    return pipeline.run(graph, source.passes_target(request, place))


def run(graphs: Sequence[gs.Graph], tp_size: int, steps: Sequence[Sequences]) -> list[torch.Tensor]:
    """Logits of every step."""
    ranks = Ranks(graphs, tp_size)
    return [ranks(step_inputs(sequences)) for sequences in steps]
