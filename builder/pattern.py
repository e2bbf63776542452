"""Declarative fusion: a pattern is an ordinary function over an injected `op`; a failed match is a sentence.

    def quantize(op, x, scale, *, quant=("static",)):
        return op.QuantizeLinear(op.Cast(x, to="float32"), scale, saturate=1)

The positional parameters after `op` are the plugin's inputs in order; a keyword-only one lists the values to try (each
combination is a variant) and, where the plugin has a field of that name, is an attribute; what is returned are the
plugin's outputs. Nothing else may leave the matched nodes, except what is marked `op.shared`.

Beside the function a pattern file may define `complete(inputs, attributes)`, which returns further attributes from the
inputs' types, and `PREPARE`, the functions that turn a stored weight into what the kernels read.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from fp8.builder.dtypes import dtype_name
from fp8.plugins import base

Complete = Callable[[list[base.Tensor | None], dict[str, Any]], dict[str, Any]]
Prepare = Callable[..., Any]  # (stored tensor, rows of the weight) -> tensor, in torch
COMMUTATIVE = {"Add", "Mul", "Max", "Min", "And", "Or", "Equal"}


class Value:
    """A value of a pattern: captured, a scalar constant, or the result of a call."""


@dataclass(frozen=True, eq=False)
class Captured(Value):
    """Whatever tensor stands here; the same parameter must be the same tensor everywhere."""

    name: str
    constant: bool = False


@dataclass(frozen=True, eq=False)
class Anything(Value):
    """A tensor that does not matter: the shape operand of a Reshape whose result's shape is checked by the plugin."""


@dataclass(frozen=True, eq=False)
class GraphInput(Value):
    name: str


@dataclass(frozen=True, eq=False)
class Scalar(Value):
    """A constant with one element: `value`, or any, which then becomes the attribute `name`."""

    value: float | None = None
    name: str = ""


@dataclass(frozen=True, eq=False)
class Result(Value):
    call: Call
    index: int = 0


@dataclass(frozen=True, eq=False)
class Call:
    op: str
    inputs: tuple[Value | None, ...]
    attributes: dict[str, Any]
    shared: bool = False
    module: bool = False


@dataclass(frozen=True)
class Attribute:
    """An attribute of a matched node, which becomes the plugin's attribute `name`; `values` limits it."""

    name: str
    values: tuple[Any, ...] = ()


class Op:
    """The injected tracer: `op.Add(a, b)` records a call. A number as an input is a scalar constant."""

    def __init__(self) -> None:
        self.fixed: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if not name[0].isupper():
            raise AttributeError(f"a pattern's op has no {name!r}; operators begin with a capital letter")

        def record(*inputs: Value | float | None, outputs: int = 1, **attributes: Any) -> Any:
            values = tuple(Scalar(float(i)) if isinstance(i, int | float) else i for i in inputs)
            call = Call(name, values, attributes)
            results = tuple(Result(call, i) for i in range(outputs))
            return results if outputs > 1 else results[0]

        return record

    def attribute(self, name: str, *values: Any) -> Attribute:
        return Attribute(name, values)

    def scalar(self, name: str) -> Scalar:
        """A one-element constant that becomes the plugin's attribute `name`."""
        return Scalar(None, name)

    def anything(self) -> Anything:
        return Anything()

    def input(self, name: str) -> GraphInput:
        """The graph's input of that name."""
        return GraphInput(name)

    def constant(self, value: Captured) -> Captured:
        """A captured tensor that must be a constant."""
        return dataclasses.replace(value, constant=True)

    def shared(self, value: Result) -> Result:
        """A value that other nodes may read as well: cheap to compute again, or computed once for all layers."""
        return Result(dataclasses.replace(value.call, shared=True), value.index)

    def alone(self, value: Result) -> Result:
        """The opposite of `shared`, and the default: for patterns that choose between the two."""
        return value

    def module(self, value: Result) -> Result:
        """The plugin's node takes the module name of the node that yields this value."""
        return Result(dataclasses.replace(value.call, module=True), value.index)

    def set(self, **attributes: Any) -> None:
        """Attributes of the plugin that this variant fixes."""
        self.fixed.update(attributes)


@dataclass(frozen=True)
class Mismatch:
    """Why a pattern does not match here; `nodes` are those that did, and the one that the sentence is about."""

    sentence: str
    nodes: list[gs.Node]
    matched: int

    def __bool__(self) -> Literal[False]:
        return False


@dataclass
class Match:
    """Tensors by parameter name, the nodes of the pattern, its outputs and the plugin's attributes."""

    variant: Variant
    nodes: list[gs.Node] = field(default_factory=list)
    tensors: dict[str, gs.Tensor] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    results: dict[int, gs.Node] = field(default_factory=dict)  # id(Call) -> node

    def copy(self) -> Match:
        return Match(self.variant, [*self.nodes], {**self.tensors}, {**self.attributes}, {**self.results})

    @property
    def inputs(self) -> list[gs.Tensor | None]:
        """Tensors in the order of the parameters, None where the variant has no such input."""
        return [self.tensors.get(name) for name in self.variant.parameters]

    @property
    def module(self) -> str:
        """Hugging Face path of the module that the plugin computes."""
        calls = _calls(self.variant.outputs)
        named = next((c for c in calls if c.module), self.variant.outputs[0].call)
        return self.results[id(named)].name.split("/", 1)[0]

    @property
    def outputs(self) -> list[gs.Tensor]:
        return [self.results[id(v.call)].outputs[v.index] for v in self.variant.outputs]


@dataclass(frozen=True, eq=False)
class Variant:
    """One traced combination of a pattern's choices."""

    pattern: str
    parameters: tuple[str, ...]
    choices: dict[str, Any]
    attributes: dict[str, Any]
    outputs: tuple[Result, ...]
    complete: Complete | None = None
    prepare: Mapping[str, Prepare] = field(default_factory=dict)

    @property
    def root(self) -> str:
        """The operator of the first output, where a match starts."""
        return self.outputs[0].call.op

    @functools.cached_property
    def size(self) -> int:
        return len(set(_calls(self.outputs)))

    def __str__(self) -> str:
        return f"({', '.join(f'{k}={v}' for k, v in self.choices.items())})"

    def match(self, root: gs.Node, graph_outputs: frozenset[str] = frozenset()) -> Match | Mismatch:
        """Matches backwards from the node that yields the first output."""
        found = _match_call(self.outputs[0].call, root, Match(self))
        if not found:
            return found
        for output in self.outputs:
            if id(output.call) not in found.results:
                raise ValueError(f"pattern {self.pattern} {self}: an output is not reached from the first one")
        return _closed(found, graph_outputs)


def load(name: str) -> list[Variant]:
    """The variants of `plugins/<name>/pattern.py`, function `<name>`, in the order of their choices."""
    module = importlib.import_module(f"fp8.plugins.{name}.pattern")
    return trace(getattr(module, name), getattr(module, "complete", None), getattr(module, "PREPARE", {}))


def load_all() -> list[Variant]:
    """Every plugin's patterns, the largest first: who replaces more nodes leaves fewer kernels."""
    found = []
    for name in base.names():
        try:
            found += load(name)
        except ModuleNotFoundError as error:
            if error.name != f"fp8.plugins.{name}.pattern":  # a plugin without a pattern is used by the runtime alone
                raise
    return sorted(found, key=lambda v: -v.size)


def trace(
    function: Callable[..., Any], complete: Complete | None = None, prepare: Mapping[str, Prepare] | None = None
) -> list[Variant]:
    """Runs a pattern function once per combination of its choices; a combination for which it returns None is none."""
    parameters = list(inspect.signature(function).parameters.values())
    names = tuple(p.name for p in parameters[1:] if p.kind is not p.KEYWORD_ONLY)
    options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    variants = []
    for values in itertools.product(*options.values()):
        choices = dict(zip(options, values, strict=True))
        op = Op()
        outputs = function(op, *(Captured(n) for n in names), **choices)
        if outputs is not None:
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            name = function.__name__
            variants.append(Variant(name, names, choices, {**choices, **op.fixed}, outputs, complete, prepare or {}))
    return variants


def _calls(values: tuple[Value | None, ...]) -> Iterator[Call]:
    for value in values:
        if isinstance(value, Result):
            yield value.call
            yield from _calls(value.call.inputs)


def _match_call(call: Call, node: gs.Node, state: Match) -> Match | Mismatch:
    seen = state.results.get(id(call))
    if seen is not None:
        return state if seen is node else _fail(state, node, f"expected the same {call.op} as {seen.name!r}")
    if node.op != call.op or node.domain:
        return _fail(state, node, f"expected {call.op}, found {node.op}")
    state = state.copy()
    state.nodes.append(node)
    state.results[id(call)] = node
    for name, expected in call.attributes.items():
        sentence = _match_attribute(name, expected, _attribute(node, name), state)
        if sentence:
            return _fail(state, node, sentence)
    return _match_inputs(call, node, state)


def _match_inputs(call: Call, node: gs.Node, state: Match) -> Match | Mismatch:
    """Matches inputs in order, and for a commutative operator in the other order, too; reports the better of two
    failures."""
    inputs = [t for t in node.inputs]
    while inputs and inputs[-1].name == "":
        inputs.pop()
    if len(inputs) != len(call.inputs):
        return _fail(state, node, f"expected {len(call.inputs)} inputs of {call.op}, found {len(inputs)}")
    first = _match_all(call.inputs, inputs, node, state)
    if first or call.op not in COMMUTATIVE:
        return first
    second = _match_all(call.inputs, inputs[::-1], node, state)
    return second if second or second.matched > first.matched else first


def _match_all(values: tuple[Value | None, ...], tensors: list[gs.Tensor], node: gs.Node, state: Match) -> Any:
    for value, tensor in zip(values, tensors, strict=True):
        found = _match_value(value, tensor, node, state)
        if not found:
            return found
        state = found
    return state


def _match_value(value: Value | None, tensor: gs.Tensor, node: gs.Node, state: Match) -> Match | Mismatch:
    if value is None:
        return state if tensor.name == "" else _fail(state, node, f"expected no input there, found {tensor.name!r}")
    if isinstance(value, Anything):
        return state
    if isinstance(value, GraphInput):
        found = not tensor.inputs and not isinstance(tensor, gs.Constant) and tensor.name == value.name
        return state if found else _fail(state, node, f"expected graph input {value.name!r}, found {tensor.name!r}")
    if isinstance(value, Captured):
        if value.constant and not isinstance(tensor, gs.Constant):
            return _fail(state, node, f"expected a constant as {value.name}, found {tensor.name!r}")
        bound = state.tensors.get(value.name)
        if bound is not None and bound is not tensor:
            return _fail(state, node, f"expected {value.name} = {bound.name!r} again, found {tensor.name!r}")
        if bound is None:
            state = state.copy()
            state.tensors[value.name] = tensor
        return state
    if isinstance(value, Scalar):
        return _match_scalar(value, tensor, node, state)
    assert isinstance(value, Result)
    if not tensor.inputs:
        return _fail(state, node, f"expected the result of {value.call.op}, found {_what(tensor)} {tensor.name!r}")
    producer = tensor.inputs[0]
    if len(producer.outputs) <= value.index or producer.outputs[value.index] is not tensor:
        return _fail(state, producer, f"expected output {value.index} of {value.call.op}, found {tensor.name!r}")
    return _match_call(value.call, producer, state)


def _match_scalar(value: Scalar, tensor: gs.Tensor, node: gs.Node, state: Match) -> Match | Mismatch:
    found = scalar_value(tensor)
    wanted = "a scalar constant" if value.value is None else f"the constant {value.value:g}"
    if found is None:
        return _fail(state, node, f"expected {wanted}, found {_what(tensor)} {tensor.name!r}")
    if value.value is not None and np.float32(found) != np.float32(value.value):
        return _fail(state, node, f"expected {wanted}, found {found:g}")
    if value.name:
        state = state.copy()
        state.attributes[value.name] = found
    return state


def scalar_value(tensor: gs.Tensor) -> float | None:
    """The element of a one-element constant, else None."""
    if not isinstance(tensor, gs.Constant) or int(np.prod(tensor.shape)) != 1:
        return None
    return float(np.asarray(tensor.values).astype(np.float64).reshape(-1)[0])


def _match_attribute(name: str, expected: Any, found: Any, state: Match) -> str | None:
    if name in ("to", "output_dtype"):
        found = dtype_name(found)
    if isinstance(expected, Attribute):
        if expected.values and found not in expected.values:
            return f"expected {name} among {', '.join(map(str, expected.values))}, found {found}"
        state.attributes[expected.name] = found
        return None
    return None if found == expected else f"expected {name}={expected}, found {found}"


def _attribute(node: gs.Node, name: str) -> Any:
    """The attribute as written, else ONNX's default."""
    if name in node.attrs:
        return node.attrs[name]
    declared = onnx.defs.get_schema(node.op).attributes.get(name)
    return onnx.helper.get_attribute_value(declared.default_value) if declared and declared.default_value.name else None


def _closed(match: Match, graph_outputs: frozenset[str]) -> Match | Mismatch:
    """Fails where an inner value is read by a node outside, since the plugin does not yield it."""
    inside = {id(n) for n in match.nodes}
    outputs = {id(t) for t in match.outputs}
    shared = {id(match.results[id(c)]) for c in _calls(match.variant.outputs) if c.shared}
    for node in match.nodes:
        for tensor in node.outputs:
            if id(tensor) in outputs or id(node) in shared:
                continue
            if tensor.name in graph_outputs:
                return _fail(match, node, f"{tensor.name!r} is an output of the graph, which the plugin does not yield")
            other = next((c for c in tensor.outputs if id(c) not in inside), None)
            if other is not None:
                return _fail(match, node, f"{tensor.name!r} is read by {other.name!r} ({other.op}) as well")
    return match


def _fail(state: Match, node: gs.Node, sentence: str) -> Mismatch:
    return Mismatch(f"{node.name or node.op}: {sentence}", [*state.nodes, node], len(state.nodes))


def _what(tensor: gs.Tensor) -> str:
    return "constant" if isinstance(tensor, gs.Constant) else "graph input"
