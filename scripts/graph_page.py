"""fp8-inspect graph: the precision flow of one layer, before and after fusion, as a page with inline SVG."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import onnx_graphsurgeon as gs

from fp8.builder import build, engine
from fp8.builder.checkpoint import Checkpoint
from fp8.builder.dtypes import BYTES, dtype_name
from fp8.builder.engine import EngineError, Plan, write_atomically
from fp8.builder.request import Reporter, Request, Source
from fp8.builder.rewrite import DOMAIN
from fp8.models import config as models
from fp8.scripts.argument_types import new_file
from fp8.scripts.build import ERRORS
from fp8.scripts.layout import place
from fp8.scripts.moved_flags import CommandParser
from fp8.scripts.teaching import Teaching

SHORT = {"float8_e4m3fn": "e4m3", "bfloat16": "bf16", "float16": "f16", "float32": "f32"}  # what is drawn
HEIGHT, CHARACTER, SMALL = 40, 7.4, 5.8  # pixels: of a box, and of a character of its title and of other text
STYLE = """
  svg { font: 12px ui-sans-serif, system-ui, sans-serif; }
  .box rect { fill: #f4f4f5; stroke: #a1a1aa; rx: 5px; }
  .box.plugin rect { fill: #dbeafe; stroke: #1d4ed8; stroke-width: 1.5px; }
  .box.port rect { fill: none; stroke-dasharray: 4 3; }
  .box text { text-anchor: middle; fill: #18181b; }
  .box .small, .label { font-size: 9.5px; fill: #3f3f46; }
  .edge { fill: none; stroke-width: 2px; }
  .edge.fp8 { stroke: #15803d; }
  .edge.high { stroke: #dc2626; }
  .label { text-anchor: middle; paint-order: stroke; stroke: #fff; stroke-width: 4px; }
  .label.fp8 { fill: #15803d; }
  .label.high { fill: #b91c1c; }
"""


Route = list[tuple[float, float]]


class GraphError(ValueError):
    """A layer or a directory that cannot be drawn: says what there is."""


@dataclass(frozen=True)
class Type:
    dtype: str
    shape: tuple[int | str, ...]
    stored: bool  # a weight or another constant

    @property
    def fp8(self) -> bool:
        return self.dtype == "float8_e4m3fn"

    @property
    def text(self) -> str:
        return f"{SHORT.get(self.dtype, self.dtype)} [{','.join(map(str, self.shape))}]"

    @property
    def traffic(self) -> str:
        """Bytes per token; where there are slots of the KV cache, per slot, or per token and slot."""
        count = BYTES[self.dtype]
        for dim in self.shape:
            count *= dim if isinstance(dim, int) else 1
        symbols = {"T": "token", "L": "token", "S": "slot", "blocks": "block"}
        per = dict.fromkeys(symbols[d] for d in self.shape if d in symbols)
        return f"{count} B" + "".join(f"/{p}" for p in per)


@dataclass(frozen=True)
class Node:
    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    plugin: bool


@dataclass(frozen=True)
class Flow:
    """A whole graph, of which one layer is drawn."""

    nodes: list[Node]
    types: dict[str, Type]


def flow_of_graph(graph: gs.Graph) -> Flow:
    nodes = [
        Node(
            n.name, n.op, tuple(t.name for t in n.inputs), tuple(t.name for t in n.outputs if t.name),
            n.domain == DOMAIN,
        )
        for n in graph.nodes
    ]  # fmt: skip
    types = {
        t.name: Type(dtype_name(t.dtype), tuple(t.shape), isinstance(t, gs.Constant))
        for n in graph.nodes
        for t in (*n.inputs, *n.outputs)
        if t.name
    }
    return Flow(nodes, types)


def flow_of_plan(plan: Plan) -> Flow:
    nodes = [Node(s.name, s.plugin, s.inputs, tuple(filter(None, s.outputs)), True) for s in plan.steps]
    return Flow(nodes, {b.name: Type(b.dtype, tuple(b.shape), b.kind == "weight") for b in plan.buffers})


@dataclass(frozen=True)
class Box:
    name: str
    title: str
    lines: tuple[str, ...]
    kind: str  # plugin | op | port

    @property
    def width(self) -> float:
        return max(110.0, len(self.title) * CHARACTER + 16, *(len(line) * SMALL + 16 for line in self.lines))


@dataclass(frozen=True)
class Edge:
    source: str
    target: str
    tensor: str
    type: Type

    @property
    def label(self) -> str:
        return f"{self.type.text} {self.type.traffic}"


@dataclass(frozen=True)
class Drawing:
    title: str
    boxes: list[Box]
    edges: list[Edge]


def draw(flow: Flow, layer: int, title: str) -> Drawing:
    """The nodes of a layer, what flows between them, and ports to where it comes from and goes. Raises GraphError."""
    layers = {index: prefix for n in flow.nodes for prefix, index in _layer(n.name)}
    if layer not in layers:
        raise GraphError(f"layer {layer} does not exist; the model has layers 0 to {len(layers) - 1}")
    prefix = layers[layer]
    inside = [n for n in flow.nodes if (prefix, layer) in _layer(n.name) and _computes(n, flow)]
    names = {n.name for n in inside}
    home = {t: n.name for n in flow.nodes for t in n.outputs}
    boxes = {n.name: _box(n, flow, prefix) for n in inside}
    edges = []
    for node in inside:
        for tensor in dict.fromkeys(t for t in node.inputs if _flows(t, flow)):
            source = home.get(tensor, "")
            if source not in names:
                source = f"from {tensor}"
                boxes.setdefault(source, Box(source, "from", (source[5:],), "port"))
            edges.append(Edge(source, node.name, tensor, flow.types[tensor]))
        edges += _leaving(node, flow, names, boxes)
    return Drawing(title, list(boxes.values()), edges)


def _layer(name: str) -> list[tuple[str, int]]:
    """(`model.layers.3`, 3) for `model.layers.3.mlp/silu`; nothing for a node outside the layers."""
    found = re.match(r"((?:[A-Za-z_]\w*\.)+(\d+))[./]", name)
    return [(found[1], int(found[2]))] if found else []


def _leaving(node: Node, flow: Flow, names: set[str], boxes: dict[str, Box]) -> list[Edge]:
    """Edges to readers outside the layer, and to outputs that nobody reads."""
    edges = []
    for tensor in (t for t in node.outputs if _flows(t, flow)):
        readers = [n.name for n in flow.nodes if tensor in n.inputs]
        outside = [r for r in readers if r not in names] or ([] if readers else [tensor])
        for reader in outside[:1]:
            port = f"to {reader}"
            boxes.setdefault(port, Box(port, "to", (reader,), "port"))
            edges.append(Edge(node.name, port, tensor, flow.types[tensor]))
    return edges


def _flows(tensor: str, flow: Flow) -> bool:
    """Activations and caches, no weights, masks and indices."""
    found = flow.types.get(tensor)
    symbolic = found is not None and any(isinstance(d, str) for d in found.shape)
    return found is not None and symbolic and not found.stored and found.dtype in SHORT


def _computes(node: Node, flow: Flow) -> bool:
    return any(_flows(t, flow) for t in node.outputs)


def _box(node: Node, flow: Flow, prefix: str) -> Box:
    weights = [flow.types[_stored(t, flow)].text for t in node.inputs if _is_weight(t, flow)]
    name = node.name.removeprefix(prefix).lstrip("./")
    return Box(node.name, node.op, (f"{name}  w {weights[0]}" if weights else name,), "plugin" if node.plugin else "op")


def _stored(tensor: str, flow: Flow) -> str:
    """What a widened or dequantized weight is read from."""
    producer = next((n for n in flow.nodes if tensor in n.outputs), None)
    return _stored(producer.inputs[0], flow) if producer else tensor


def _is_weight(tensor: str, flow: Flow) -> bool:
    """A matrix that does not depend on the step."""
    found = flow.types.get(tensor)
    if tensor.startswith("rotary."):  # a table of positions
        return False
    return found is not None and len(found.shape) == 2 and all(isinstance(d, int) for d in found.shape)


def svg(drawing: Drawing) -> str:
    """A self-contained <svg> element. Boxes carry `data-node`, edges `data-tensor`, `data-source` and `data-target`."""
    lane = max((len(e.type.text) * SMALL for e in drawing.edges), default=0.0)
    degree = Counter(name for e in drawing.edges for name in {f"<{e.source}", f">{e.target}"})
    widths = {b.name: max(b.width, lane * max(degree[f"<{b.name}"], degree[f">{b.name}"])) for b in drawing.boxes}
    placed = place(widths, [(e.source, e.target) for e in drawing.edges], lane)
    routes = _docked(drawing, widths, placed.routes)
    parts = [_edge(e, route) for e, route in zip(drawing.edges, routes, strict=True)]
    parts += [_shape(b, widths[b.name], *placed.centers[b.name]) for b in drawing.boxes]
    parts += [_label(e, route) for e, route in zip(drawing.edges, routes, strict=True)]
    w, h = round(placed.width), round(placed.height)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img">\n'
        f"<title>{escape(drawing.title)}</title>\n<style>{STYLE}</style>\n" + "\n".join(parts) + "\n</svg>"
    )


def _docked(drawing: Drawing, widths: dict[str, float], routes: list[Route]) -> list[Route]:
    """The routes with their ends spread over the sides of the boxes, in the order from which they come."""
    docked = [list(route) for route in routes]
    for end, near, side in ((0, 1, HEIGHT / 2), (-1, -2, -HEIGHT / 2 - 2)):
        ends: dict[str, list[int]] = {}
        for i, edge in enumerate(drawing.edges):
            ends.setdefault(edge.source if end == 0 else edge.target, []).append(i)
        for name, indices in ends.items():
            indices.sort(key=lambda i: routes[i][near][0])
            for place_, i in enumerate(indices):
                x, y = routes[i][end]
                docked[i][end] = (x + widths[name] * ((place_ + 0.5) / len(indices) - 0.5), y + side)
    return docked


def _kind(edge: Edge) -> str:
    return "fp8" if edge.type.fp8 else "high"


def _edge(edge: Edge, points: Route) -> str:
    """A smooth line with an arrow head."""
    path = f"M{points[0][0]:.1f},{points[0][1]:.1f}"
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        middle = (y0 + y1) / 2
        path += f"C{x0:.1f},{middle:.1f} {x1:.1f},{middle:.1f} {x1:.1f},{y1:.1f}"
    x, y = points[-1]
    path += f"M{x - 4:.1f},{y - 6:.1f}L{x:.1f},{y:.1f}L{x + 4:.1f},{y - 6:.1f}"
    names = f'data-tensor="{escape(edge.tensor)}" data-source="{escape(edge.source)}"'
    title = f"<title>{escape(edge.tensor)}: {escape(edge.label)}</title>"
    return f'<path class="edge {_kind(edge)}" {names} data-target="{escape(edge.target)}" d="{path}">{title}</path>'


def _label(edge: Edge, route: Route) -> str:
    """Two lines near the target, where edges that leave one box have parted."""
    (x0, y0), (x1, y1) = route[-2], route[-1]
    x, y = x0 + (x1 - x0) * 0.6, y0 + (y1 - y0) * 0.5
    second = f'<tspan x="{x:.1f}" dy="11">{escape(edge.type.traffic)}</tspan>'
    return f'<text class="label {_kind(edge)}" x="{x:.1f}" y="{y - 3:.1f}">{escape(edge.type.text)}{second}</text>'


def _shape(box: Box, width: float, x: float, y: float) -> str:
    lines = "".join(
        f'<text class="small" x="{x:.1f}" y="{y + 12 + 11 * i:.1f}">{escape(line)}</text>'
        for i, line in enumerate(box.lines)
    )
    return (
        f'<g class="box {box.kind}" data-node="{escape(box.name)}"><title>{escape(box.name)}</title>'
        f'<rect x="{x - width / 2:.1f}" y="{y - HEIGHT / 2:.1f}" width="{width:.1f}" height="{HEIGHT}"/>'
        f'<text x="{x:.1f}" y="{y - 3:.1f}">{escape(box.title)}</text>{lines}</g>'
    )


def page(title: str, drawings: Iterable[Drawing], note: str = "") -> str:
    """One HTML document that loads nothing."""
    figures = "\n".join(
        f"<figure><figcaption>{escape(d.title)}: {_count(d)}</figcaption>\n{svg(d)}\n</figure>" for d in drawings
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{escape(title)}</title>
<style>
  body {{ font: 14px ui-sans-serif, system-ui, sans-serif; color: #18181b; background: #fff; margin: 24px; }}
  main {{ display: flex; gap: 32px; align-items: flex-start; overflow-x: auto; }}
  figure {{ margin: 0; }}
  figcaption {{ font-weight: 600; margin-bottom: 8px; }}
  .key {{ display: inline-block; width: 28px; height: 0; border-top: 3px solid; vertical-align: middle; }}
</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p><span class="key" style="color:#15803d"></span> FP8 (e4m3)
<span class="key" style="color:#dc2626"></span> higher precision; blue boxes are plugins, one kernel launch or
a few each; on an edge: type, shape, and bytes per token. {escape(note)}</p>
<main>
{figures}
</main>
</body>
</html>
"""


def _count(drawing: Drawing) -> str:
    boxes = sum(b.kind != "port" for b in drawing.boxes)
    green = sum(e.type.fp8 for e in drawing.edges)
    return f"{boxes} nodes, {green} FP8 edges, {len(drawing.edges) - green} of higher precision"


def drawings(directory: Path, layer: int, rank: int = 0) -> list[Drawing]:
    """Before and after fusion of a checkpoint; after fusion alone of an engine's rank, which holds no other graph."""
    if (directory / "rank0.engine").is_file():
        plan = engine.load(directory, rank, verify_weights=False).plan
        return [draw(flow_of_plan(plan), layer, f"layer {layer} after fusion")]
    checkpoint = Checkpoint(directory)
    source = Source(models.load(checkpoint.config), checkpoint)
    request = Request(target="cpu")
    before = draw(flow_of_graph(source.emit(source.limits(request))), layer, f"layer {layer} before fusion")
    fused = build.fuse(source, request, Reporter())[0]
    return [before, draw(flow_of_graph(fused), layer, f"layer {layer} after fusion")]


def beside(found: Sequence[Drawing]) -> str:
    """All drawings in one SVG file, from left to right."""
    x, height, parts = 0, 0, []
    for drawing in found:
        text = svg(drawing)
        width, tall = (int(text.split(f' {side}="', 1)[1].split('"', 1)[0]) for side in ("width", "height"))
        parts.append(text.replace("<svg ", f'<svg x="{x}" ', 1))
        x, height = x + width + 40, max(height, tall)
    size = f'viewBox="0 0 {x} {height}" width="{x}" height="{height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n' + "\n".join(parts) + "\n</svg>\n"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    p = CommandParser("fp8-inspect graph", description=__doc__, formatter_class=Teaching)
    p.add_argument("directory", type=Path, help="checkpoint (before and after fusion) or engine (after fusion)")
    p.add_argument("--layer", type=int, default=0, help="which layer")
    p.add_argument("--rank", type=int, default=0, help="which rank's engine")
    p.add_argument("--output", type=new_file, metavar="PAGE.html", help="the page")
    p.add_argument("--svg", type=new_file, metavar="FILE.svg", help="the drawings alone, as one SVG")
    options = p.parse_args(arguments)
    if not (options.output or options.svg):
        p.error("nothing to write: give --output PAGE.html, --svg FILE.svg, or both")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        found = drawings(options.directory, options.layer, options.rank)
        title = f"{options.directory.resolve().name}: precision flow of layer {options.layer}"
        note = "" if len(found) > 1 else "An engine holds the fused graph alone; give a checkpoint to see both."
        if options.output:
            write_atomically(options.output, [page(title, found, note).encode()])
        if options.svg:
            write_atomically(options.svg, [beside(found).encode()])
    except (GraphError, EngineError, OSError, *ERRORS) as error:
        print(f"fp8-inspect graph: {error}", file=sys.stderr)
        return 1
    for path in filter(None, (options.output, options.svg)):
        print(path)
    return 0
