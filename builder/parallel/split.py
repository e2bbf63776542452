"""How a size is divided among the ranks of tensor parallelism: pure arithmetic.

Heads go by whole KV groups where there are enough of them; else a group's query heads are divided over several ranks,
each of which keeps a copy of its KV head. Columns of the MLP and of the vocabulary go in units of 16, which is what the
kernels read at once (TMA rows of FP8) and interleave (gate and up), or of as many as share a scale.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from fp8.builder.engine import ModelInfo

Range = tuple[int, int]  # [start, stop)
UNIT = 16


class SplitError(ValueError):
    """A size that cannot be divided among so many ranks, or an operator that cannot run on a part of its operand."""


def evenly(count: int, parts: int) -> list[int]:
    """Shares of `count` things that differ by at most one, the larger first."""
    base, more = divmod(count, parts)
    return [base + (i < more) for i in range(parts)]


def ranges(sizes: list[int]) -> list[Range]:
    return list(itertools.pairwise(itertools.accumulate(sizes, initial=0)))


def columns(size: int, ranks: int, unit: int = UNIT) -> list[Range]:
    """Shares in whole units, except that the last rank takes the remainder. Raises SplitError if a rank would get
    none."""
    sizes = [unit * n for n in evenly(size // unit, ranks)]
    sizes[-1] += size % unit
    if 0 in sizes:
        raise SplitError(f"{size} columns in units of {unit} are too few for {ranks} ranks; choose a smaller tp_size")
    return ranges(sizes)


def head_ranges(num_heads: int, num_kv_heads: int, ranks: int) -> list[tuple[Range, Range]]:
    """(query heads, KV heads) of every rank. Raises SplitError if there are more ranks than query heads."""
    if ranks > num_heads:
        raise SplitError(f"{num_heads} heads are too few for {ranks} ranks; choose a tp_size of at most {num_heads}")
    group = num_heads // num_kv_heads
    if ranks <= num_kv_heads:
        return [((a * group, b * group), (a, b)) for a, b in ranges(evenly(num_kv_heads, ranks))]
    found = []
    for kv, sharers in enumerate(evenly(ranks, num_kv_heads)):
        shares = ranges(evenly(group, sharers))
        found += [((kv * group + a, kv * group + b), (kv, kv + 1)) for a, b in shares]
    return found


def _heads(size: int, model: ModelInfo, ranks: int, unit: int) -> list[Range]:
    shares = head_ranges(model.num_heads, model.num_kv_heads, ranks)
    return [_scaled(q, size, model.num_heads) for q, _ in shares]


def _kv_heads(size: int, model: ModelInfo, ranks: int, unit: int) -> list[Range]:
    shares = head_ranges(model.num_heads, model.num_kv_heads, ranks)
    return [_scaled(kv, size, model.num_kv_heads) for _, kv in shares]


def _scaled(heads: Range, size: int, count: int) -> Range:
    if size % count:
        raise SplitError(f"{size} columns are not {count} whole heads")
    return heads[0] * (size // count), heads[1] * (size // count)


def _inner(size: int, model: ModelInfo, ranks: int, unit: int) -> list[Range]:
    return columns(size, ranks, unit)


def _vocabulary(size: int, model: ModelInfo, ranks: int, unit: int) -> list[Range]:
    return columns(size, ranks)  # never quantized


def _whole(size: int, model: ModelInfo, ranks: int, unit: int) -> list[Range]:
    return [(0, size)] * ranks


# The strategy: how each logical axis of a weight is divided. (Where a table is looked up by row, it stays whole.)
AXES: dict[str, Callable[[int, ModelInfo, int, int], list[Range]]] = {
    "heads": _heads,
    "kv_heads": _kv_heads,
    "mlp": _inner,
    "vocab": _vocabulary,
    "embed": _whole,
}


def divide(axis: str, size: int, model: ModelInfo, ranks: int, unit: int = UNIT) -> list[Range]:
    """Every rank's part of an axis of that size; `unit` columns of an MLP stay together. Raises SplitError for an axis
    that no rule knows."""
    if axis not in AXES:
        raise SplitError(f"no rule divides the axis {axis!r}; there are {', '.join(AXES)}")
    return AXES[axis](size, model, ranks, unit)
