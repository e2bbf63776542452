"""Which tactics the shipped table is to hold: for Llama's shapes, divided among ranks, the largest shares first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fp8.builder import build, measure, plan
from fp8.builder.dtypes import BYTES
from fp8.builder.formats.base import load as load_format
from fp8.builder.request import Reporter, Request
from fp8.builder.tune import Site
from fp8.scripts.random_checkpoint import PRESETS
from fp8.scripts.random_engine import imagine

MODELS = ("llama-7b", "llama-2-13b", "llama-2-70b", "llama-3.1-8b", "llama-3.1-70b")
TP_SIZES = (1, 2, 4, 8)
BYTES_PER_SECOND, FLOPS = 4.55e12, 1.3e15  # of an H200 in FP8: only the order depends on them


@dataclass(frozen=True)
class Shape:
    """An engine whose tactics are wanted."""

    model: str
    qformat: str
    tp_size: int


def shapes(models: Sequence[str], qformats: Sequence[str], tp_sizes: Sequence[int]) -> list[Shape]:
    return [Shape(m, q, n) for q in qformats for n in tp_sizes for m in models]


def sites(wanted: Iterable[Shape], max_num_tokens: int) -> list[Site]:
    """Every place with a choice, once: first where most of an engine's time goes, of all engines together. Large ones
    and those of many ranks count less."""
    shares: dict[Site, float] = {}
    for shape in wanted:
        for site, share in _shares(shape, max_num_tokens):
            shares[site.timed] = shares.get(site.timed, 0.0) + share / (
                shape.tp_size * PRESETS[shape.model]["hidden_size"]
            )
    return sorted(filter(measure.has_choice, shares), key=lambda site: -shares[site])


def _shares(shape: Shape, max_num_tokens: int) -> Iterator[tuple[Site, float]]:
    """Shares of the time of a step with as many rows as the range has, by the bytes and products that it needs."""
    layers = PRESETS[shape.model]["num_hidden_layers"]
    tactics = _tactics(shape, max_num_tokens)
    times: dict[int, list[tuple[Site, float]]] = {}
    for node in tactics.nodes:
        times_each = layers if ".layers." in node.name else 1
        for site in tactics.sites[node.name]:
            times.setdefault(site.max_tokens, []).append((site, times_each * _seconds(site)))
    for found in times.values():
        whole = sum(seconds for _, seconds in found)
        yield from ((site, seconds / whole) for site, seconds in found)


def _tactics(shape: Shape, max_num_tokens: int) -> plan.Tactics:
    """Tactics of one layer; all are alike."""
    format = load_format(shape.qformat)(kv_cache_dtype="auto" if shape.qformat == "bf16" else "fp8")
    config = {**PRESETS[shape.model], "num_hidden_layers": 1}
    source = imagine(config, format)
    request = Request(1, 2048, max_num_tokens, tp_size=shape.tp_size)
    graph, _, _ = build.fuse(source, request, Reporter())
    return plan.Tactics(plan.nodes(graph), source.limits(request))


def _seconds(site: Site) -> float:
    """Least time of a launch: its tensors once (a KV cache and tables left out), and the products of a linear."""
    rows = site.max_tokens
    tensors = [t for t in (*site.types, *site.plugin.infer(site.types)) if t and not _is_table(site, t)]
    moved = sum(math.prod(rows if isinstance(d, str) else d for d in t.shape) * BYTES[t.dtype] for t in tensors)
    w = site.types[1] if len(site.types) > 1 else None
    linear = w is not None and len(w.shape) == 2 and all(isinstance(d, int) for d in w.shape) and not _is_table(site, w)
    flops = 2.0 * rows * math.prod(int(d) for d in w.shape) * BYTES[w.dtype] if linear and w else 0.0
    return max(moved / BYTES_PER_SECOND, flops / FLOPS)


def _is_table(site: Site, tensor: Any) -> bool:
    return site.plugin.name in ("embedding", "attention") and not any(d in ("T", "L") for d in tensor.shape)
