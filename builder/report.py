"""The fusion report: every quantize/dequantize pair of the emitted graph, and the plugin nodes that took it."""

from __future__ import annotations

from typing import Any

import onnx_graphsurgeon as gs

from fp8.builder.target import Journal

Pair = dict[str, Any]


def pairs(graph: gs.Graph) -> list[Pair]:
    """The pairs before any pass: `quantize` is "" for a weight, which is stored quantized."""
    found = []
    for node in graph.nodes:
        if node.op == "DequantizeLinear":
            tensor = node.inputs[0]
            quantize = tensor.inputs[0].name if tensor.inputs else ""
            found.append({"tensor": tensor.name, "quantize": quantize, "dequantize": node.name})
    return found


def report(found: list[Pair], journal: Journal) -> list[Pair]:
    """Adds to each pair where its halves went: `quantize_in`, `dequantize_in` (plugin nodes, "" if left), `folded` and,
    if it is not, `reason`."""
    home = {original: plugin for plugin, originals in journal.replaced.items() for original in originals}
    entries = []
    for pair in found:
        halves = {f"{k}_in": home.get(pair[k], "") for k in ("quantize", "dequantize")}
        left = [pair[k] for k in ("quantize", "dequantize") if pair[k] and not halves[f"{k}_in"]]
        entry = {**pair, **halves, "folded": not left}
        if left:
            entry["reason"] = f"no plugin's pattern took {' and '.join(left)}; fp8-build --explain {left[0]} says why"
        entries.append(entry)
    return entries
