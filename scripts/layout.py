"""Layered drawing of a directed graph: ranks by longest path, order by barycenters, long edges through dummies.

Sugiyama's method in its plainest form (K. Sugiyama, S. Tagawa, M. Toda, 1981), for graphs of up to some hundred nodes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

GAP, RANK = 24.0, 88.0  # pixels between neighbours, and from rank to rank
SWEEPS = 8


@dataclass(frozen=True)
class Placement:
    """Centres of the boxes, and for every edge the points that it passes."""

    centers: dict[str, tuple[float, float]]
    routes: list[list[tuple[float, float]]]
    width: float
    height: float


def place(widths: Mapping[str, float], edges: Sequence[tuple[str, str]], lane: float) -> Placement:
    """Boxes by name with their widths, edges as (source, target) without cycles; `lane` is the width that an edge gets
    where it passes a rank."""
    ranks = _ranks(list(widths), edges)
    sizes, chains = dict(widths), []
    for index, (source, target) in enumerate(edges):
        chain = [source]
        for rank in range(ranks[source] + 1, ranks[target]):
            dummy = f"{index}|{rank}"
            ranks[dummy], sizes[dummy] = rank, lane
            chain.append(dummy)
        chains.append([*chain, target])
    rows: list[list[str]] = [[] for _ in range(max(ranks.values(), default=0) + 1)]
    for name, rank in ranks.items():
        rows[rank].append(name)
    links = [(a, b) for chain in chains for a, b in itertools.pairwise(chain)]
    above, below = _neighbours(links, True), _neighbours(links, False)
    _order(rows, above, below)
    x = _columns(rows, sizes, above, below)
    left = min((x[n] - sizes[n] / 2 for n in sizes), default=0.0) - GAP
    right = max((x[n] + sizes[n] / 2 for n in sizes), default=0.0) + GAP
    points = {n: (x[n] - left, RANK * (ranks[n] + 0.5)) for n in sizes}
    return Placement(
        {n: points[n] for n in widths}, [[points[n] for n in c] for c in chains], right - left, RANK * len(rows)
    )


def _ranks(names: list[str], edges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Longest path from a source; sources right above their first reader."""
    ranks = dict.fromkeys(names, 0)
    for _ in names:
        changed = False
        for source, target in edges:
            if ranks[target] <= ranks[source]:
                ranks[target], changed = ranks[source] + 1, True
        if not changed:
            break
    targets = {target for _, target in edges}
    for name in names:
        readers = [ranks[t] for s, t in edges if s == name]
        if name not in targets and readers:
            ranks[name] = min(readers) - 1
    return ranks


def _neighbours(links: list[tuple[str, str]], upward: bool) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for source, target in links:
        key, value = (target, source) if upward else (source, target)
        found.setdefault(key, []).append(value)
    return found


def _order(rows: list[list[str]], above: dict[str, list[str]], below: dict[str, list[str]]) -> None:
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        position = {n: i for row in rows for i, n in enumerate(row)}
        for row in rows if down else rows[::-1]:
            near = above if down else below
            row.sort(key=lambda n: _mean([position[m] for m in near.get(n, [])], position[n]))
            position.update((n, i) for i, n in enumerate(row))


def _columns(
    rows: list[list[str]], sizes: Mapping[str, float], above: dict[str, list[str]], below: dict[str, list[str]]
) -> dict[str, float]:
    """Centres: each near the mean of its neighbours, in the row's order, without overlap."""
    x: dict[str, float] = {}
    for row in rows:
        x |= _spread(row, [0.0] * len(row), sizes)
    for sweep in range(2 * SWEEPS):
        for row in rows if sweep % 2 == 0 else rows[::-1]:
            near = (above, below) if sweep == 2 * SWEEPS - 1 else (above,) if sweep % 2 == 0 else (below,)
            wanted = [_mean([x[m] for side in near for m in side.get(n, [])], x[n]) for n in row]
            x |= _spread(row, wanted, sizes)
    return x


def _spread(row: list[str], wanted: list[float], sizes: Mapping[str, float]) -> dict[str, float]:
    """The wanted centres pushed apart, half from the left and half from the right."""
    forward, backward = list(wanted), list(wanted)
    for i in range(1, len(row)):
        forward[i] = max(forward[i], forward[i - 1] + (sizes[row[i - 1]] + sizes[row[i]]) / 2 + GAP)
    for i in range(len(row) - 2, -1, -1):
        backward[i] = min(backward[i], backward[i + 1] - (sizes[row[i + 1]] + sizes[row[i]]) / 2 - GAP)
    return {n: (f + b) / 2 for n, f, b in zip(row, forward, backward, strict=True)}


def _mean(values: list[float] | list[int], default: float) -> float:
    return sum(values) / len(values) if values else default
