"""lower_attention: attention over cache slots becomes the `attention` plugin over a paged cache, written in place."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from fp8.builder import pattern
from fp8.builder.passes.fuse import attempt, record, replace
from fp8.builder.pattern import Match
from fp8.builder.rewrite import remove_dead, sort, variable
from fp8.builder.target import Target
from fp8.plugins.base import BLOCK_SIZE, Tensor


def lower_attention(graph: gs.Graph, target: Target) -> int:
    """Returns how many attentions it lowered. The graph's inputs become those of an engine."""
    paged = _paged_inputs(target)
    constants: dict[str, gs.Constant] = {}
    count = 0
    for variant in pattern.load("attention"):
        for node in [n for n in graph.nodes if n.op == variant.root]:
            outputs = target.kept.union(t.name for t in graph.outputs)
            match = attempt(variant, node, outputs, lambda m: _page(m, paged)) if node.outputs else None
            if match is not None:
                record(variant, node, match, target)
            if match:
                _forget_slots(graph, match)
                replace(graph, match, constants, target)
                graph.inputs += [match.tensors[name] for name in ("key_cache", "value_cache")]
                count += 1
    if count:
        remove_dead(graph)
        graph.inputs += list(paged.values())
        graph.inputs = [t for t in graph.inputs if t.outputs]
    sort(graph)
    return count


def _paged_inputs(target: Target) -> dict[str, gs.Variable]:
    pages = -(-target.limits.max_seq_len // BLOCK_SIZE)
    shapes = {"query_start": ("B+1",), "sequence_lengths": ("B",), "block_tables": ("B", pages)}
    return {name: variable(name, Tensor("int32", shape)) for name, shape in shapes.items()}


def _page(match: Match, paged: dict[str, gs.Variable]) -> None:
    """Binds what only the paged form has: block tables, and caches of codes in place of slots of values."""
    qkv_dtype = match.tensors["qkv"].dtype
    dtype = "float8_e4m3fn" if match.variant.choices["fp8_cache"] else qkv_dtype.name
    match.tensors.update(paged)
    for name in ("key_cache", "value_cache"):
        slots = match.tensors[name]
        shape = ("blocks", BLOCK_SIZE, *slots.shape[1:])
        match.tensors[name] = variable(slots.name, Tensor(dtype, shape))


def _forget_slots(graph: gs.Graph, match: Match) -> None:
    """The caches after the step are no outputs any more, and the slots no inputs."""
    gone = {t.name for t in match.outputs[1:]} | {match.tensors[n].name for n in ("key_cache", "value_cache")}
    graph.outputs = [t for t in graph.outputs if t.name not in gone]
    graph.inputs = [t for t in graph.inputs if t.name not in gone]
