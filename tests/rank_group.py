"""All ranks of a checkpoint in one process: their graphs interpreted in lockstep, stage after stage."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_graphsurgeon as gs
import torch

from fp8.builder import pipeline
from fp8.builder.build import Request, Source
from fp8.builder.interpret import Interpreter, empty_caches, next_caches, step_inputs
from fp8.builder.parallel import lockstep
from fp8.builder.parallel.pipeline import Place
from fp8.builder.parallel.tensor import TensorParallel, split

Sequences = list[tuple[list[int], int]]  # (new tokens, how many are cached)


def emitted(source: Source, request: Request, place: Place, dtype: str) -> gs.Graph:
    """The unfused graph of one rank."""
    limits = source.limits(request)
    layers = place.layers(source.config.num_layers)
    graph = source.model.emit(
        source.config, source.checkpoint, source.format, dtype, layers=layers, max_positions=limits.max_seq_len
    )
    if place.tp_size > 1:
        split(graph, TensorParallel(source.info(), place.tp_rank, place.tp_size))
    return graph


def fused(source: Source, request: Request, place: Place) -> gs.Graph:
    graph = source.emit(source.limits(request), place)
    return pipeline.run(graph, source.passes_target(request, place))


def run(graphs: Sequence[gs.Graph], places: Sequence[Place], steps: Sequence[Sequences]) -> list[torch.Tensor]:
    """Logits of every step; `graphs` are those of all ranks. All ranks of the last stage must agree bit for bit."""
    tp = places[0].tp_size
    caches: list[dict | None] = [None] * len(graphs)
    interpreters = [Interpreter(graph) for graph in graphs]
    logits = []
    for sequences in steps:
        feeds = step_inputs(sequences)
        for stage in range(places[0].pp_size):
            here = range(stage * tp, (stage + 1) * tp)

            def member(rank, feeds=feeds):
                def function(comm):
                    interpreters[rank].comm = comm
                    own = caches[rank] or empty_caches(graphs[rank], feeds)
                    results = interpreters[rank]({**feeds, **own})
                    caches[rank] = next_caches(own, results)
                    return next(v for k, v in results.items() if not k.startswith("kv_cache."))

                return function

            results = lockstep.run([member(rank) for rank in here])
            assert all(torch.equal(results[0], r) for r in results[1:])
            feeds = {**feeds, "hidden_states": results[0]}
        logits.append(results[0])
    return logits
