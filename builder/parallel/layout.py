"""Which part of a tensor a rank holds: a box, one range per dimension. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fp8.builder.parallel.split import Range, SplitError

Dim = int | str
Shape = Sequence[Dim]
Layout = tuple[Range | None, ...]  # None: the whole dimension


def box(shape: Shape, found: Sequence[Range | None]) -> Layout:
    """A range that covers its dimension is no split."""
    return tuple(None if r == (0, d) else r for r, d in zip(found, shape, strict=True))


def local_shape(shape: Shape, layout: Layout) -> tuple[Dim, ...]:
    return tuple(d if r is None else r[1] - r[0] for d, r in zip(shape, layout, strict=True))


def is_split(layout: Layout) -> bool:
    return any(layout)


def broadcast(operands: Sequence[tuple[Shape, Layout]], rank: int) -> Layout:
    """Layout of an elementwise result of that rank. An operand that is whole where another is split does not count: the
    caller cuts it, or refuses. Raises SplitError if two are cut at different places."""
    found: list[Range | None] = [None] * rank
    for _, layout in operands:
        for i, part in enumerate(layout, rank - len(layout)):
            if part and found[i] and part != found[i]:
                raise SplitError(f"an operand holds {_text(part)} of dimension {i} and another {_text(found[i])}")
            found[i] = part or found[i]
    return tuple(found)


def needed(shape: Shape, layout: Layout, result: Layout) -> Layout:
    """What an operand of an elementwise operator must hold so that the result holds `result`."""
    tail = result[len(result) - len(shape) :]
    return tuple(r if d != 1 else None for d, r in zip(shape, tail, strict=True))


def reshaped(before: Shape, layout: Layout, after: Shape) -> Layout:
    """Layout after a reshape. Raises SplitError if the part is no box any more."""
    found: list[Range | None] = []
    i = j = 0
    while i < len(before) or j < len(after):
        a, b = before[i : i + 1], after[j : j + 1]
        if a and a[0] == 1 and a != b:
            i += 1
        elif b and b[0] == 1 and a != b:
            found.append(None)
            j += 1
        elif a == b:
            found.append(layout[i])
            i, j = i + 1, j + 1
        else:
            m, n = _group(before[i:], after[j:])
            found += _unflatten(_flatten(before[i : i + m], layout[i : i + m]), after[j : j + n])
            i, j = i + m, j + n
    return tuple(found)


def _group(before: Shape, after: Shape) -> tuple[int, int]:
    """How many dimensions of each side have one product."""
    m = n = 1
    while True:
        a, b = before[:m], after[:n]
        if len(a) < m or len(b) < n or not all(isinstance(d, int) for d in (*a, *b)):
            raise SplitError(f"a reshape of {list(before)} to {list(after)} cannot be followed")
        left, right = math.prod(map(int, a)), math.prod(map(int, b))
        if left == right:
            return m, n
        m, n = (m + 1, n) if left < right else (m, n + 1)


def _flatten(shape: Shape, layout: Layout) -> Range:
    start, stop = 0, 1
    for size, part in zip(shape, layout, strict=True):
        low, high = part or (0, int(size))
        if stop - start > 1 and part:
            raise SplitError(f"parts {_text(part)} of {size} of several rows are not contiguous")
        start, stop = start * int(size) + low, (stop - 1) * int(size) + high
    return start, stop


def _unflatten(flat: Range, shape: Shape) -> list[Range | None]:
    if not shape:
        return []
    first, *rest = map(int, shape)
    inner = math.prod(rest)
    start, stop = flat
    if start % inner == 0 and stop % inner == 0:
        return [*box([first], [(start // inner, stop // inner)]), *[None] * len(rest)]
    row = start // inner
    if stop > (row + 1) * inner:
        raise SplitError(f"{_text(flat)} of {first * inner} values is no box of [{', '.join(map(str, shape))}]")
    return [*box([first], [(row, row + 1)]), *_unflatten((start - row * inner, stop - row * inner), rest)]


def _text(part: Range | None) -> str:
    return f"[{part[0]}, {part[1]})" if part else "all"
