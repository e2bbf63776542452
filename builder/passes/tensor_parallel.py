"""tensor_parallel: the model's graph becomes that of one rank (see `fp8.builder.parallel.tensor`)."""

from __future__ import annotations

from fp8.builder.graph import Graph
from fp8.builder.parallel.tensor import split
from fp8.builder.target import Target


def tensor_parallel(graph: Graph, target: Target) -> int:
    """Returns how many collectives it put in."""
    assert target.parallel is not None
    return split(graph, target.parallel)
