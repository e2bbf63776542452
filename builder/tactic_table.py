"""The tactics that ship with the package, timed on an H200 by `python -m fp8.scripts.tune_table`.

A file of them is JSON: what they were measured with, and for every op (`op_name`) and range of rows a tactic, its
microseconds there, and digests of the plugin's favourites that it won against and of their kernels. Builds take an
entry while its tactic is legal: what was measured goes before what a model expects. Where favourites or kernels have
changed since, it is to be timed again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fp8.builder.engine import write_atomically
from fp8.plugins.base import Kernel, Plugin, Tensor, load
from fp8.plugins.compile import key

FORMAT = 2
SHIPPED = Path(__file__).with_name("tactics_h200.json")

FAVOURITES = 6  # of a plugin, in its order, that an entry is to have won against

Fields = dict[str, Any]


class TableError(ValueError):
    """A file that holds no tactics, or damaged ones."""


@dataclass(frozen=True)
class Entry:
    tactic: Fields
    us: float
    favourites: str  # digests
    kernels: str


@dataclass
class Table:
    """`entries` by op, then by the rows up to which the tactic was timed."""

    facts: dict[str, Any] = field(default_factory=dict)
    entries: dict[str, dict[int, Entry]] = field(default_factory=dict)

    def nearest(self, op: str, rows: int) -> Entry | None:
        """The entry of the op, or else of one like it, for the range that ends at `rows`, or the nearest range: less
        than a factor of two away, as an engine's last range may end anywhere."""
        ranges = self.entries.get(op)
        if ranges is None:
            ranges = next((found for other, found in self.entries.items() if alike(op, other)), {})
        ratio = lambda end: max(end, rows) / min(end, rows)
        near = [end for end in ranges if ratio(end) < 2]
        return ranges[min(near, key=lambda end: (ratio(end), end))] if near else None

    def put(self, op: str, rows: int, entry: Entry) -> None:
        self.entries.setdefault(op, {})[rows] = entry

    def __len__(self) -> int:
        return sum(map(len, self.entries.values()))


def op_name(plugin: Plugin, types: Sequence[Tensor | None]) -> str:
    """`gemm rows=L|bfloat16 L,4096|...|-`: the attributes that are not their defaults, the inputs."""
    given = _set_fields(plugin).items()
    words = [f"{k}={v if isinstance(v, str) else json.dumps(v, separators=(',', ':'))}" for k, v in given]
    inputs = [f"{t.dtype} {','.join(map(str, t.shape))}" if t else "-" for t in types]
    return "|".join([" ".join([plugin.name, *words]), *inputs])


def alike(one: str, other: str) -> bool:
    """Whether ops differ in the number of x's scales alone, one or one per row: what is fast is the same for both."""
    return _one_scale(one) == _one_scale(other)


def _one_scale(op: str) -> str:
    return re.sub(r"(\|float32) [TL](?=\||$)", r"\1 1", op)


def parse_op(name: str) -> tuple[Plugin, tuple[Tensor | None, ...]]:
    """The inverse of `op_name`. Raises ValueError, TypeError or PluginError for a name that no op has (any more)."""
    head, *inputs = name.split("|")
    plugin, *words = head.split(" ")
    pairs = (word.partition("=") for word in words)
    return load(plugin)(**{k: _value(v) for k, _, v in pairs}), tuple(map(_tensor, inputs))


def _value(text: str) -> Any:
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return tuple(found) if isinstance(found, list) else found


def _tensor(text: str) -> Tensor | None:
    if text == "-":
        return None
    dtype, dims = text.split(" ")
    return Tensor(dtype, tuple(int(d) if d.isdigit() else d for d in dims.split(",")))


def digest_of_tactics(tactics: Iterable[Any]) -> str:
    """A digest of tactics. Fields at their defaults do not count, so a new field does not change the digest of tactics
    that were there before."""
    return _digest(f"{type(t).__name__} {_set_fields(t)}" for t in tactics)


def _set_fields(record: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not at their defaults."""
    fields = dataclasses.fields(record)
    return {f.name: getattr(record, f.name) for f in fields if getattr(record, f.name) != f.default}


def digest_of_kernels(kernels: Iterable[Kernel]) -> str:
    """A digest of the content of kernels, and of all that they are compiled with."""
    return _digest(map(key, kernels))


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("|".join(texts).encode()).hexdigest()[:8]


def read(path: Path) -> Table:
    """Raises TableError."""
    try:
        data = json.loads(path.read_bytes())
        if data["format"] != FORMAT:
            raise TableError(f"{path} has format {data['format']}, expected {FORMAT}")
        entries = {
            op: {int(rows): Entry(dict(tactic), float(us), *map(str, of)) for rows, (tactic, us, *of) in ranges.items()}
            for op, ranges in data["tactics"].items()
        }
        return Table(dict(data["measured"]), entries)
    except OSError as error:
        raise TableError(f"{path} cannot be read: {error.strerror}") from error
    except TableError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise TableError(f"{path} is no table of tactics, or damaged ({type(error).__name__}: {error})") from error


def write(path: Path, table: Table) -> None:
    """Writes a line for each op."""
    head = json.dumps({"format": FORMAT, "measured": table.facts})[:-1]
    lines = []
    for op, ranges in sorted(table.entries.items()):
        found = {str(n): [e.tactic, round(e.us, 3), e.favourites, e.kernels] for n, e in sorted(ranges.items())}
        lines.append(f"{json.dumps(op)}:{json.dumps(found, separators=(',', ':'))}")
    write_atomically(path, [f'{head},\n"tactics":{{\n'.encode(), ",\n".join(lines).encode(), b"\n}}\n"])


@functools.cache
def shipped() -> Table:
    """The table that ships with the package; empty if there is none."""
    return read(SHIPPED) if SHIPPED.is_file() else Table()
