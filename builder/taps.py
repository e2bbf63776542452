"""Debug taps: which tensors of the emitted graph an engine can show, and at what price.

A tap costs nothing where the fused graph has the tensor in a buffer of its own. Before a fusion is given up for it, the
tap moves to the buffer that holds the same values: from a widened or dequantized copy to what was widened, from a
float32 value that is rounded or quantized at once to the rounded form, from a part of a merged linear to its columns.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from fp8.builder.engine import Tap
from fp8.builder.graph import Graph
from fp8.builder.rewrite import DOMAIN, apart, module

SAME_VALUES = ("Cast", "DequantizeLinear", "Reshape", "Unsqueeze", "Identity")  # the output says what the input says
SHOWN = 4  # names in a message before it counts


class TapError(ValueError):
    """A debug tensor that does not exist, or that no engine can show: names the nearest."""


@dataclass(frozen=True)
class Source:
    """Where a tap is taken: a tensor, or some of its columns. `distance`: how many nodes away from the wanted one."""

    tensor: str
    columns: tuple[int, int] | None = None
    distance: int = 0


@dataclass
class Taps:
    """The taps of a build: what was wanted, where each is taken, what it cost and what cannot be shown."""

    taken: list[Tap] = field(default_factory=list)
    hidden: dict[str, str] = field(default_factory=dict)  # wanted tensor -> plugin node whose inside it is
    disabled: list[str] = field(default_factory=list)  # sentences

    def lines(self) -> list[str]:
        """Lines that the build prints."""
        lines = [f"debug tensors: {len(self.taken)} dumped by fp8-run --debug_mode"]
        lines += self.disabled or ["debug tensors: no fusion disabled"]
        inside: dict[str, list[str]] = {}
        for name, home in self.hidden.items():
            inside.setdefault(home, []).append(name)
        lines += [f"not shown, inside {home}, which has no such buffer: {some(n)}" for home, n in inside.items()]
        return _alike(lines)


def _alike(lines: list[str]) -> list[str]:
    """The sentences, those that differ in the layer alone only once."""
    shapes = {line: re.sub(r"\.\d+(?=[./])", ".*", line) for line in lines}
    counts = Counter(shapes.values())
    named = {shape: line for line, shape in shapes.items()}
    return [f"{shape} ({n} layers)" if n > 1 else named[shape] for shape, n in counts.items()]


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def wanted(graph: Graph, globs: Sequence[str]) -> dict[str, str]:
    """Tap name -> tensor, of the registered tensors and of those that a glob matches, in the order of the graph.

    A glob is held against the tensor's name and against its module's. Raises TapError for one that matches nothing.
    """
    tensors = _activations(graph)
    found = {name: tensor.name for name, tensor in graph.registered.items()}
    for glob in globs:
        matching = [n for n in tensors if fnmatch.fnmatchcase(n, glob) or fnmatch.fnmatchcase(module(n), glob)]
        if not matching and not any(fnmatch.fnmatchcase(n, glob) for n in graph.registered):
            near = ", ".join(_near(glob, list(dict.fromkeys([*tensors, *map(module, tensors)]))))
            raise TapError(f"--debug_tensors {glob!r} matches no tensor of the graph; the nearest are {near}")
        found |= {n: n for n in matching}
    if not found:
        raise TapError(
            "no debug tensor: the model registers none with register_network_output, and --debug_tensors names none; "
            "for example --debug_tensors 'model.layers.*.mlp.*'"
        )
    return found


def _near(name: str, names: Sequence[str]) -> list[str]:
    return difflib.get_close_matches(name, names, 3, 0.3) or list(names[:3])


def _activations(graph: gs.Graph) -> list[str]:
    """Tensors with a row per token, in the order of emission."""
    names = []
    for node in graph.nodes:
        for tensor in node.outputs:
            if tensor.shape and not {"T", "L"}.isdisjoint(tensor.shape) and tensor.dtype.name not in ("bool", "int64"):
                names.append(tensor.name)
    return names


def same_values(graph: gs.Graph) -> dict[str, list[str]]:
    """Per tensor of the emitted graph, the tensors that can stand for it, best first, itself the very first."""
    tensors = graph.tensors()
    return {name: _places(tensors[name]) for name in _activations(graph)}


def _places(tensor: gs.Tensor) -> list[str]:
    places = [tensor.name]
    back = tensor
    while back.inputs and back.inputs[0].op in SAME_VALUES and _keeps_bits(back.inputs[0]):
        back = back.inputs[0].inputs[0]
        places.append(back.name)
    for reader in tensor.outputs:
        if reader.op == "QuantizeLinear" or (reader.op == "Cast" and not _keeps_bits(reader)):
            places.append(reader.outputs[0].name)
    return places


def _keeps_bits(node: gs.Node) -> bool:
    """Casts to float32 lose nothing; others round."""
    return node.op != "Cast" or node.outputs[0].dtype == np.float32


def columns(graph: gs.Graph) -> dict[str, tuple[str, int, int]]:
    """Parts of merged linears: tensor -> (the merged one, first column, end)."""
    found = {}
    for node in graph.nodes:
        if node.op == "Split":
            begin = 0
            for part in node.outputs:
                end = begin + int(part.shape[-1])
                found[part.name] = (node.inputs[0].name, begin, end)
                begin = end
    return found


def locate(
    tensor: str, places: dict[str, list[str]], parts: dict[str, tuple[str, int, int]], buffers: frozenset[str]
) -> Source | None:
    """The nearest place with a buffer."""
    for distance, place in enumerate(places[tensor]):
        if place in buffers:
            return Source(place, None, distance)
        if place in parts and parts[place][0] in buffers:
            packed, begin, end = parts[place]
            return Source(packed, (begin, end), distance)
    return None


def plan(
    emitted: Graph,
    globs: Sequence[str],
    fuse: Callable[[frozenset[str]], tuple[gs.Graph, dict[str, tuple[str, int, int]]]],
) -> tuple[Taps, frozenset[str]]:
    """Chooses the taps. `fuse(kept)` gives the fused graph that keeps these tensors, and the parts of its merged
    linears. Returns the taps and the tensors to keep."""
    names, places = wanted(emitted, globs), same_values(emitted)
    places |= {t.name: [t.name] for t in emitted.registered.values() if t.name not in places}
    plain, parts = fuse(frozenset())
    buffers = _buffers(plain)
    lost = [t for t in names.values() if not locate(t, places, parts, buffers)]
    kept = _kept(lost, places, parts, emitted.tensors())
    graph = plain
    while kept:
        graph, parts = fuse(kept)
        left = {t.name for n in graph.nodes if n.domain != DOMAIN for t in (*n.inputs, *n.outputs)}
        if not left:
            break
        kept = kept - left if kept & left else frozenset()
    if not kept:
        graph, buffers = plain, _buffers(plain)
    taps = Taps(disabled=_disabled(plain, graph, kept))
    sources = {name: locate(t, places, parts, _buffers(graph)) for name, t in names.items()}
    homes = [(n.name, n.op) for n in plain.nodes]
    for name, tensor in names.items():
        if sources[name] is None:
            taps.hidden[name] = _home(tensor, homes)
    taps.taken = _once({name: s for name, s in sources.items() if s}, set(emitted.registered))
    if not taps.taken:
        raise TapError(
            f"none of the wanted debug tensors can be shown: {some(list(taps.hidden))}; no kernel stores them. Buffers "
            f"near them: {', '.join(_near(next(iter(taps.hidden)), sorted(buffers)))}"
        )
    return taps, kept


def _kept(
    lost: Iterable[str],
    places: dict[str, list[str]],
    parts: dict[str, tuple[str, int, int]],
    tensors: dict[str, gs.Tensor],
) -> frozenset[str]:
    """What fusions would have to leave in a buffer: merged linears whole, and no float32, which no kernel stores."""
    stored = (next((p for p in places[t] if tensors[p].dtype != np.float32), None) for t in lost)
    return frozenset(parts[place][0] if place in parts else place for place in stored if place)


def _buffers(graph: gs.Graph) -> frozenset[str]:
    return frozenset(t.name for n in graph.nodes if n.domain == DOMAIN for t in n.outputs if t.name)


def _once(sources: dict[str, Source], registered: set[str]) -> list[Tap]:
    """One tap per place, under the name nearest to it; registered names all."""
    best: dict[tuple, str] = {}
    for name, s in sources.items():
        key = (s.tensor, s.columns)
        if name not in registered and (key not in best or s.distance < sources[best[key]].distance):
            best[key] = name
    chosen = registered | set(best.values())
    return [Tap(name, s.tensor, s.columns) for name, s in sources.items() if name in chosen]


def _disabled(plain: gs.Graph, tapped: gs.Graph, kept: frozenset[str]) -> list[str]:
    """A sentence per plugin node that the taps prevented."""
    before, after = ({(n.name, n.op): n for n in g.nodes} for g in (plain, tapped))
    lost = [key for key in before if key not in after]
    gained = [key for key in after if key not in before]
    lines = []
    for name, op in lost:
        now = [o for n, o in gained if n.startswith(name.split("{")[0].rstrip("."))]
        inside = [k for k in sorted(kept) if k.startswith(name)]
        reason = f" for {some(inside)}" if inside else ""
        lines.append(f"fusion disabled: {op} at {name}{reason}; runs as {', '.join(now)}")
    return lines


def _home(tensor: str, homes: list[tuple[str, str]]) -> str:
    """The plugin node of the longest name that the tensor's begins with."""
    mine = module(tensor)
    fitting = [h for h in homes if any(mine.startswith(p) for p in apart(module(h[0])))]
    fitting = fitting or [h for h in homes if h[0].startswith(f"{mine}.")][:1]
    name, op = max(fitting, key=lambda h: len(h[0]), default=("a fused plugin", ""))
    return f"{op} {name}".strip()
