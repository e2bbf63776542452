"""Makes the record from results files: what was measured beside what is aimed at and what others reach.

    python -m fp8.scripts.record --input OUT_DIR --output h200.json     a row per target, met or missed
    python -m fp8.scripts.record --compare A.json B.json                the spread between two runs

A row is {name, figure, unit, anchor, whose, target, at_least, met, section, us, of_the_ceiling}; figure is null where
nothing was measured, the last two are a kernel's: its time, and the fraction of what memory or tensor cores gave in the
same run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fp8.builder.engine import EngineError, write_atomically
from fp8.scripts.benchmarks.figures import Document, figures, losses, read
from fp8.scripts.benchmarks.targets import Target, targets

HEADER = (
    "device", "driver", "torch", "max_sm_clock", "sm_clock", "memory_clock", "power_limit", "power_draw", "temperature",
)  # fmt: skip
KERNELS, WHOLE = 0.05, 0.03  # how far two runs of the same commit may be apart
KERNEL_SECTIONS = ("gemm", "gemm shapes", "blockwise", "prompts", "decodes", "norms")


def record(documents: dict[str, Document]) -> dict[str, Any]:
    """What the files say of their runs, a row per target, and where the time of a step goes."""
    found = figures(documents)
    sources = {
        name: {key: document.get(key) for key in ("command", "commit", "date", *HEADER)}
        for name, document in documents.items()
    }
    rows = [_row(target, found) for target in targets()]
    header = {key: sorted({str(s[key]) for s in sources.values() if s[key]}) for key in ("commit", "date", *HEADER)}
    return {
        "command": "python -m fp8.scripts.record",
        **header,
        "under_load": next((d["under_load"] for d in documents.values() if "under_load" in d), {}),
        "sources": sources,
        "rows": rows,
        "losses": losses(documents),
    }


def _row(target: Target, found: dict[str, float]) -> dict[str, Any]:
    figure, (kernel, _, _) = target.figure(found), target.name.rpartition(": ")
    return {
        "name": target.name, "figure": figure, "unit": target.unit, "anchor": target.anchor, "whose": target.whose,
        "target": target.target, "at_least": target.at_least, "met": target.met(figure), "section": target.section,
        "us": found.get(f"{kernel}: us"), "of_the_ceiling": found.get(f"{kernel}: of the ceiling"),
    }  # fmt: skip


def state(row: dict[str, Any]) -> str:
    return "not measured" if row["figure"] is None else "met" if row["met"] else "missed"


def as_table(rows: Sequence[dict[str, Any]]) -> Table:
    out = Table("name", "figure", "unit", "target", "anchor", "whose", "", box=None)
    for row in rows:
        sign = ">=" if row["at_least"] else "<="
        style = {"met": "green", "missed": "red"}.get(state(row))
        cells = number(row["figure"]), row["unit"], f"{sign} {number(row['target'])}", number(row["anchor"])
        out.add_row(row["name"], *cells, row["whose"], state(row), style=style)
    return out


def number(value: float | None) -> str:
    """Four digits, or nothing."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.4g}"


def compare(first: dict[str, Any], second: dict[str, Any]) -> tuple[Table, list[str]]:
    """The spread of every row that both hold, the widest first, and the names of those that are too far apart."""
    others = {row["name"]: row for row in second["rows"]}
    pairs = []
    for row in first["rows"]:
        other = others.get(row["name"])
        if other and row["figure"] and other["figure"]:
            pairs.append((abs(other["figure"] / row["figure"] - 1), row, other))
    out, apart = Table("name", "first", "second", "spread", "", box=None), []
    for spread, row, other in sorted(pairs, key=lambda pair: -pair[0]):
        most = KERNELS if row["section"] in KERNEL_SECTIONS else WHOLE
        if spread > most:
            apart.append(row["name"])
        verdict = f"more than {most:.0%}" if spread > most else ""
        out.add_row(row["name"], number(row["figure"]), number(other["figure"]), f"{spread:.1%}", verdict)
    return out, apart


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--input", type=Path, help="a folder of results files, as scripts/gpu.sh leaves it")
    what.add_argument("--compare", type=Path, nargs=2, metavar="RECORD", help="two records; exits with 1 if far apart")
    parser.add_argument("--output", type=Path, help="write the record here")
    return parser.parse_args(argv)


def load(path: Path) -> dict[str, Any]:
    """A record. Raises EngineError for a file that is none."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise EngineError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict) or "rows" not in found or "sources" not in found:
        raise EngineError(f"{path} is not a record (python -m fp8.scripts.record --input ... --output ... makes one)")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    console = Console(width=160)
    try:
        if args.compare:
            spread, apart = compare(*map(load, args.compare))
            console.print(spread)
            print(f"{len(apart)} rows further apart than {KERNELS:.0%} (kernels) or {WHOLE:.0%} (whole model)")
            return 1 if apart else 0
        found = record(read(args.input))
        if args.output:
            write_atomically(args.output, [json.dumps(found, indent=1).encode() + b"\n"])
    except (EngineError, OSError) as error:
        print(f"record: {error}", file=sys.stderr)
        return 1
    console.print(as_table(found["rows"]))
    states = [state(row) for row in found["rows"]]
    print(", ".join(f"{states.count(kind)} {kind}" for kind in ("met", "missed", "not measured")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
