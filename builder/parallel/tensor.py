"""Tensor parallelism: the emitted graph of a model becomes the graph of one rank, which computes a part and exchanges.

The strategy is `split.AXES`: by the logical axes of a weight, which of its dimensions are divided and how. From the
weights the parts spread through the operators (`rules.RULES`). Where a contraction runs over a divided dimension, each
rank has a part of the sum: it is rounded to the model's dtype, as the whole would be, and an all-reduce adds the parts.
A row whose largest magnitude is wanted gets an all-reduce of the maximum, so its scale is that of the whole row. What
the graph yields is whole again: logits are gathered. KV caches stay divided.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from fp8.builder.dtypes import dtype_name
from fp8.builder.engine import ModelInfo
from fp8.builder.graph import Graph
from fp8.builder.parallel.layout import Layout, Shape, box, is_split, local_shape
from fp8.builder.parallel.rules import RULES
from fp8.builder.parallel.split import AXES, UNIT, Range, SplitError, divide
from fp8.builder.rewrite import DOMAIN, module, remove_dead
from fp8.builder.weights import sliced

HALF = ("bfloat16", "float16")


@dataclass(frozen=True)
class TensorParallel:
    """One of `size` ranks that share a model's layers."""

    model: ModelInfo
    rank: int
    size: int
    unit: int = UNIT  # columns of an MLP that stay together

    def divide(self, axis: str, size: int) -> list[Range]:
        return divide(axis, size, self.model, self.size, self.unit)


def split(graph: Graph, parallel: TensorParallel) -> int:
    """Rewrites the graph; returns how many collectives it has then. Raises SplitError, naming the node or weight."""
    return _Rewrite(graph, parallel).run()


class _Rewrite:
    """State of one rewrite; what rules see of it is `rules.Parts`."""

    def __init__(self, graph: Graph, parallel: TensorParallel) -> None:
        self.graph, self.parallel, self.rank = graph, parallel, parallel.rank
        self._tensors = graph.tensors()
        self._shapes: dict[str, Shape] = {n: tuple(t.shape or ()) for n, t in self._tensors.items()}
        self._layouts: dict[str, Layout] = {}
        self._cut: dict[tuple[str, Layout], gs.Constant] = {}
        self._integers: dict[str, gs.Constant] = {}
        self._shares: dict[str, str] = {}  # tensors of which this rank has a share -> operation
        self._outputs = {t.name for t in graph.outputs}
        self._collectives = 0

    def run(self) -> int:
        for name in list(self.graph.axes):
            self._cut_weight(name)
        nodes: list[gs.Node] = []
        for node in list(self.graph.nodes):
            nodes += [node, *self._rewrite(node)]
        nodes += [node for tensor in self.graph.outputs for node in self._gathered(tensor)]
        self.graph.nodes = nodes
        remove_dead(self.graph)
        self.graph.tensors(check_duplicates=True)  # no constant is there whole and in parts under one name
        return self._collectives

    # What rules ask for

    def shape(self, tensor: gs.Tensor) -> Shape:
        return self._shapes[tensor.name]

    def layout(self, tensor: gs.Tensor) -> Layout:
        return self._layouts.get(tensor.name) or (None,) * len(self.shape(tensor))

    def require(self, node: gs.Node, index: int, layout: Layout) -> None:
        tensor = node.inputs[index]
        if self.layout(tensor) == layout:
            return
        if isinstance(tensor, gs.Constant) and not is_split(self.layout(tensor)):
            node.inputs[index] = self._part(tensor, layout, tensor.name)
        elif not tensor.inputs and not isinstance(tensor, gs.Constant) and len(tensor.outputs) == 1:
            self._set(tensor, layout)  # an input that this node alone reads: a cache
        elif _is_lookup(tensor):
            gather, rank = tensor.inputs[0], len(self.shape(tensor.inputs[0].inputs[1]))
            self.require(gather, 0, (None, *layout[rank:]))
            self.require(gather, 1, layout[:rank])
            self._set(tensor, layout)
        else:
            raise SplitError(f"its operand {tensor.name} is not split as the others are")

    def integers(self, *values: int) -> gs.Constant:
        name = "constant/" + "_".join(map(str, values))
        if name not in self._integers:
            known = self._tensors.get(name)
            self._integers[name] = known or gs.Constant(name, np.array(values, np.int64))
            self._shapes.setdefault(name, (len(values),))
        return self._integers[name]

    # Weights

    def _cut_weight(self, name: str) -> None:
        """Cuts a weight by its axes, for all readers but those that look rows up."""
        weight = self._tensors[name]
        layout = self._weight_layout(name, weight)
        if not is_split(layout):
            return
        lookups = [n for n in weight.outputs if self._looks_up(n, weight)]
        readers = [r for n in list(weight.outputs) for r in self._untied(n, weight)]
        for node in readers:
            own = f"{module(node.name)}.weight" if lookups else name  # tied: a part of its own beside the table
            if not self._looks_up(node, weight):
                part = self._part(weight, layout, own)
                node.inputs = [part if t is weight else t for t in node.inputs]

    def _weight_layout(self, name: str, weight: gs.Constant) -> Layout:
        axes, shape = self.graph.axes[name], self._shapes[name]
        try:
            parts = [self.parallel.divide(a, int(d))[self.rank] for a, d in zip(axes, shape, strict=True)]
        except SplitError as error:
            raise SplitError(f"{name}: {error}") from error
        return box(shape, parts)

    def _looks_up(self, node: gs.Node, table: gs.Tensor) -> bool:
        """Whether the node reads rows of the table by index, a conversion in between allowed."""
        if node.op == "Cast":
            return any(self._looks_up(n, node.outputs[0]) for n in node.outputs[0].outputs)
        return node.op == "Gather" and node.inputs[0] is table

    def _untied(self, node: gs.Node, weight: gs.Tensor) -> list[gs.Node]:
        """The node; a conversion that feeds lookups and others is doubled."""
        if node.op != "Cast" or not self._looks_up(node, weight):
            return [node]
        others = [n for n in node.outputs[0].outputs if not self._looks_up(n, node.outputs[0])]
        if not others:
            return [node]
        converted = node.outputs[0]
        own = gs.Variable(f"{module(others[0].name)}.weight/convert", converted.dtype, list(converted.shape))
        self._shapes[own.name] = self._shapes[converted.name]
        twin = gs.Node("Cast", own.name, dict(node.attrs), [weight], [own])
        for reader in others:
            reader.inputs = [own if t is converted else t for t in reader.inputs]
        self.graph.nodes.insert(0, twin)
        return [node, twin]

    def _part(self, constant: gs.Constant, layout: Layout, name: str) -> gs.Constant:
        key = (name, layout)
        if key not in self._cut:
            part = self._cut[key] = sliced(name, constant, layout)
            self._shapes[name] = self._shapes[constant.name]
            self._layouts[name] = layout
            assert tuple(part.shape) == local_shape(self._shapes[name], layout)
        return self._cut[key]

    # Nodes

    def _rewrite(self, node: gs.Node) -> list[gs.Node]:
        """Makes a node compute the rank's part; returns the collectives that follow it."""
        share = self._shares.pop(node.inputs[0].name, None) if node.inputs else None
        if not share and not any(is_split(self.layout(t)) for t in node.inputs if t.name):
            return []
        if node.op not in RULES:
            operand = next(t.name for t in node.inputs if is_split(self.layout(t)))
            raise SplitError(
                f"{node.name}: tensor parallelism has no rule for the operator {node.op} of a part of {operand}"
            )
        try:
            layout, operation = RULES[node.op](self, node)
        except SplitError as error:
            raise SplitError(f"{node.name} ({node.op}): {error}") from error
        self._set(node.outputs[0], layout)
        operation = operation or share
        return self._reduced(node, operation) if operation else []

    def _set(self, tensor: gs.Tensor, layout: Layout) -> None:
        self._layouts[tensor.name] = layout
        tensor.shape = list(local_shape(self.shape(tensor), layout))

    def _reduced(self, node: gs.Node, operation: str) -> list[gs.Node]:
        """An all-reduce of what the node yields; where that is a sum which is rounded next, after the rounding."""
        tensor = node.outputs[0]
        readers = tensor.outputs
        rounds = len(readers) == 1 and readers[0].op == "Cast" and dtype_name(readers[0].attrs["to"]) in HALF
        if operation == "sum" and rounds and tensor.name not in self._outputs:
            self._shares[tensor.name] = operation
            return []
        role = "all_reduce" if operation == "sum" else f"all_reduce_{operation}"
        return [self._collective("all_reduce", role, node, {"operation": operation, "world": self.parallel.size})]

    def _gathered(self, tensor: gs.Tensor) -> list[gs.Node]:
        """An all-gather of a split output of the graph."""
        layout = self.layout(tensor)
        if not is_split(layout) or tensor.name.startswith("kv_cache."):
            return []
        *others, last = layout
        parts = self.parallel.divide("vocab", int(self.shape(tensor)[-1]))
        if any(others) or last != parts[self.rank]:
            raise SplitError(f"{tensor.name}: an output is gathered over its last dimension, split as a vocabulary is")
        sizes = [stop - start for start, stop in parts]
        whole = self.shape(tensor)
        gather = self._collective("all_gather", "all_gather", tensor.inputs[0], {"parts": sizes})
        tensor.shape = list(whole)
        return [gather]

    def _collective(self, plugin: str, role: str, node: gs.Node, attributes: dict) -> gs.Node:
        """A node that yields what `node` did, of what `node` yields now under the name `<its name>.part`."""
        whole = node.outputs[0]
        part = gs.Variable(f"{whole.name}.part", whole.dtype, list(whole.shape))
        self._shapes[part.name] = self._shapes[whole.name]
        node.outputs = [part]
        self._collectives += 1
        return gs.Node(plugin, f"{module(node.name)}/{role}", attributes, [part], [whole], domain=DOMAIN)


def _is_lookup(tensor: gs.Tensor) -> bool:
    """Whether it is stored rows of a stored table, for one reader: scales of blocks, spread over a weight's rows."""
    producer = tensor.inputs[0] if tensor.inputs else None
    stored = producer and producer.op == "Gather" and all(isinstance(t, gs.Constant) for t in producer.inputs)
    return bool(stored) and len(tensor.outputs) == 1


def shares(columns: Mapping[str, int], parallel: TensorParallel) -> dict[str, Range]:
    """What of each divided axis the rank holds: heads counted, other axes in columns."""
    model = parallel.model
    sizes = {**columns, "heads": model.num_heads, "kv_heads": model.num_kv_heads}
    divided = [axis for axis in AXES if axis in columns and axis != "embed"]
    return {axis: parallel.divide(axis, sizes[axis])[parallel.rank] for axis in divided}
