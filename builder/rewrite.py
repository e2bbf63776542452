"""What the passes share: types of tensors, a match becomes a plugin node, order, dead nodes."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable

import onnx_graphsurgeon as gs

from fp8.builder.dtypes import dtype_name, numpy_dtype
from fp8.plugins import base

DOMAIN = "fp8"  # of plugin nodes


def tensor_type(tensor: gs.Tensor | None) -> base.Tensor | None:
    """None for an absent optional input."""
    if tensor is None or tensor.name == "":
        return None
    return base.Tensor(dtype_name(tensor.dtype), tuple(tensor.shape))


def variable(name: str, type_: base.Tensor) -> gs.Variable:
    return gs.Variable(name, numpy_dtype(type_.dtype), list(type_.shape))


def module(node_name: str) -> str:
    """`model.layers.0.mlp.up_proj/gemm` -> `model.layers.0.mlp.up_proj`."""
    return node_name.split("/", 1)[0]


def together(names: Iterable[str]) -> str:
    """One name for several: `a.{q_proj,k_proj}.weight` for `a.q_proj.weight` and `a.k_proj.weight`."""
    parts = [name.split(".") for name in names]
    head = 0
    while all(len(p) > head + 1 and p[head] == parts[0][head] for p in parts):
        head += 1
    tail = 0
    while all(len(p) > head + 1 + tail and p[-1 - tail] == parts[0][-1 - tail] for p in parts):
        tail += 1
    middle = ",".join(".".join(p[head : len(p) - tail]) for p in parts)
    return ".".join([*parts[0][:head], f"{{{middle}}}", *parts[0][len(parts[0]) - tail :]])


def apart(name: str) -> list[str]:
    """The names that `together` joined."""
    found = re.fullmatch(r"(.*)\{(.*)\}(.*)", name)
    return [found[1] + part + found[3] for part in found[2].split(",")] if found else [name]


def substitute(graph: gs.Graph, old: list[gs.Node], new: list[gs.Node], outputs: list[gs.Tensor]) -> None:
    """Puts the `new` nodes, the last of which is to yield `outputs`, in the place of `old` ones; those of them that
    others still read stay."""
    for tensor in outputs:
        for producer in list(tensor.inputs):
            producer.outputs = [gs.Variable.empty() if t is tensor else t for t in producer.outputs]
    new[-1].outputs = outputs
    keep = {id(t) for t in graph.outputs}
    gone: set[int] = set()
    changed = True
    while changed:
        changed = False
        for node in old:
            if id(node) not in gone and not any(t.outputs or id(t) in keep for t in node.outputs):
                gone.add(id(node))
                node.inputs.clear()
                node.outputs.clear()
                changed = True
    graph.nodes = [n for n in graph.nodes if id(n) not in gone] + new


def sort(graph: gs.Graph) -> None:
    """Topological order, otherwise as written. (graphsurgeon's own compares nodes by value: quadratic.)"""
    waiting = {id(n): sum(bool(t.inputs) for t in n.inputs) for n in graph.nodes}
    position = {id(n): i for i, n in enumerate(graph.nodes)}
    ready = deque(n for n in graph.nodes if waiting[id(n)] == 0)
    ordered: list[gs.Node] = []
    while ready:
        node = ready.popleft()
        ordered.append(node)
        freed = []
        for tensor in node.outputs:
            for consumer in tensor.outputs:
                waiting[id(consumer)] -= 1
                if waiting[id(consumer)] == 0:
                    freed.append(consumer)
        ready.extendleft(sorted(freed, key=lambda n: -position[id(n)]))
    assert len(ordered) == len(graph.nodes), "the graph has a cycle"
    graph.nodes = ordered


def remove_dead(graph: gs.Graph) -> int:
    """Removes nodes that no output of the graph depends on; returns how many."""
    alive: set[int] = set()
    stack = [n for t in graph.outputs for n in t.inputs]
    while stack:
        node = stack.pop()
        if id(node) not in alive:
            alive.add(id(node))
            stack.extend(p for t in node.inputs for p in t.inputs)
    dead = [n for n in graph.nodes if id(n) not in alive]
    graph.nodes = [n for n in graph.nodes if id(n) in alive]
    for node in dead:
        node.inputs.clear()
        node.outputs.clear()
    return len(dead)
