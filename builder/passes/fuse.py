"""fuse: what a plugin's pattern matches becomes that plugin's node, the largest pattern first."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Container
from typing import Any

import onnx_graphsurgeon as gs
import torch

from fp8.builder import pattern
from fp8.builder.pattern import Match, Mismatch, Variant
from fp8.builder.rewrite import DOMAIN, apart, sort, substitute, tensor_type
from fp8.builder.target import Target
from fp8.builder.weights import prepared
from fp8.plugins import base


def fuse(graph: gs.Graph, target: Target) -> int:
    """Returns how many plugin nodes it made."""
    constants: dict[str, gs.Constant] = {}
    tensors = frozenset(graph.tensors())
    outputs = target.kept.union(t.name for t in graph.outputs)
    variants = pattern.load_all()
    if target.journal.explain:
        explain(graph, variants, outputs, target)
    count = 0
    for variant in variants:
        for node in [n for n in graph.nodes if n.op == variant.root and not n.domain]:
            match = node.outputs and attempt(variant, node, outputs)  # without outputs: replaced since
            if match:
                replace(graph, match, constants, target, tensors)
                count += 1
    sort(graph)
    return count


def explain(graph: gs.Graph, variants: list[Variant], outputs: frozenset[str], target: Target) -> None:
    """Tries every pattern everywhere and records the outcomes at the explained node, before anything is replaced."""
    for variant in variants:
        for node in graph.nodes:
            if node.op == variant.root:
                record(variant, node, attempt(variant, node, outputs), target)


def attempt(
    variant: Variant,
    node: gs.Node,
    graph_outputs: frozenset[str],
    adapt: Callable[[Match], None] = lambda match: None,
) -> Match | Mismatch:
    """A match, after `adapt`, whose types the plugin takes and yields."""
    found = variant.match(node, graph_outputs)
    if found:
        adapt(found)
        try:
            _check_types(found, operator(found))
        except base.PluginError as error:
            found = Mismatch(f"{node.name}: {error}", found.nodes, len(found.nodes))
    return found


def record(variant: Variant, root: gs.Node, found: Match | Mismatch, target: Target) -> None:
    """Notes the outcome if it concerns the node to explain."""
    wanted = target.journal.explain
    if wanted is None:
        return
    names = [name for n in (root, *found.nodes) for name in apart(n.name)]
    if any(name == wanted or name.startswith((wanted + "/", wanted + ".")) for name in names):
        outcome = found if isinstance(found, Mismatch) else f"matched {len(found.nodes)} nodes"
        target.journal.record(variant, root.name, outcome)


def operator(match: Match) -> base.Plugin:
    """The plugin with the attributes that the pattern found."""
    kind = base.load(match.variant.pattern)
    types = [tensor_type(t) for t in prepared_inputs(match, {})]
    attributes: dict[str, Any] = {**match.variant.attributes, **match.attributes}
    if match.variant.complete:
        attributes |= match.variant.complete(types, attributes)
    fields = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{k: v for k, v in attributes.items() if k in fields})


def _check_types(match: Match, plugin: base.Plugin) -> None:
    inferred = plugin.infer([tensor_type(t) for t in prepared_inputs(match, {})])
    expected = tuple(tensor_type(t) for t in match.outputs[: len(inferred)])
    if inferred != expected:
        raise base.PluginError(f"{plugin.name} yields {_text(inferred)}, the graph has {_text(expected)} there")


def _text(types: tuple[base.Tensor | None, ...]) -> str:
    return ", ".join(f"{t.dtype} [{', '.join(map(str, t.shape))}]" if t else "nothing" for t in types)


def prepared_inputs(match: Match, made: dict[str, gs.Constant]) -> list[gs.Tensor | None]:
    """The plugin's inputs, its stored ones in the layout that it reads; `made` holds the constants by name."""
    functions = match.variant.prepare
    rows = match.tensors["w"].shape[0] if "w" in match.tensors else 0
    inputs: list[gs.Tensor | None] = []
    for name, tensor in zip(match.variant.parameters, match.inputs, strict=True):
        if isinstance(tensor, gs.Constant):
            function: Callable | None = functools.partial(functions[name], rows=rows) if name in functions else None
            if function is None and not tensor.shape:
                function = _vector
            if function:
                tensor = made.setdefault(tensor.name, prepared(tensor.name, [tensor], function))
        inputs.append(tensor)
    return inputs


def _name(graph: gs.Graph, match: Match, tensors: Container[str]) -> str:
    """The module's, which is that of the node that reads the module's weight, if it has one; what else is computed for
    the module bears the plugin's name too. So names depend on no other pattern's size, such as that of a rank's linear
    whose bias another rank adds."""
    weight, plugin = f"{match.module}.weight", match.variant.pattern
    anothers = weight in tensors and all(t is None or t.name != weight for t in match.inputs)
    taken = any(n.name == match.module for n in graph.nodes if n.domain == DOMAIN)
    return f"{match.module}/{plugin}" if anothers or taken else match.module


def _vector(scalar: torch.Tensor) -> torch.Tensor:
    return scalar.reshape(1)


def replace(
    graph: gs.Graph, match: Match, constants: dict[str, gs.Constant], target: Target, tensors: Container[str] = ()
) -> None:
    """Puts the plugin's node in the place of the matched ones. `tensors`: names of those that the graph had before."""
    plugin = operator(match)
    inputs = [gs.Variable.empty() if t is None else t for t in prepared_inputs(match, constants)]
    for stored, tensor in zip(match.inputs, inputs, strict=True):
        if isinstance(stored, gs.Constant) and stored is not tensor:  # one constant of a name in the graph
            for reader in list(stored.outputs):
                reader.inputs = [tensor if t is stored else t for t in reader.inputs]
    name = _name(graph, match, tensors)
    node = gs.Node(plugin.name, name, plugin.attributes(), inputs, [], domain=DOMAIN)
    target.journal.replaced[name] = [original for n in match.nodes for original in apart(n.name)]
    yielded = len(plugin.infer([tensor_type(t) for t in inputs]))
    substitute(graph, match.nodes, [node], match.outputs[:yielded])
