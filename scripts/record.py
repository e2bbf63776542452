"""Makes the record from results files: what was measured beside what is aimed at and what others reach.

    python -m fp8.scripts.record --input OUT_DIR --output h200.json     a row per target, met or missed
    python -m fp8.scripts.record --gpus 2 --input OUT_DIR --output h200x2.json      of scripts/gpu_ranks.sh
    python -m fp8.scripts.record --compare A.json B.json                the spread between two runs

A row is {name, figure, unit, anchor, whose, target, at_least, met, section, us, of_the_ceiling}; figure is null where
nothing was measured, the last two are a kernel's: its time, and the fraction of what memory or tensor cores gave in the
same run.

Two runs are compared by their figures. Some are the card's as much as ours: such a row has {own, own_unit}, and where
the figures are apart and these agree, --compare says that it is the card. Of a ratio to a peer, where memory bounds the
kernel, that is our time: cuBLASLt's is up to 10% apart between two cards, or two minutes. Of what a whole model does it
is the SM clocks that it takes (of rank 0's card): how many a second has is up to the card's power. Part of a run waits
for memory, which has a clock of its own, for fewer SM clocks where these are slower. So of the same software the slower
run takes more time and not more clocks; where it takes more of both, the clocks say how far the runs are apart.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fp8.builder.engine import EngineError, write_atomically
from fp8.scripts.argument_types import positive
from fp8.scripts.benchmarks import rank_targets
from fp8.scripts.benchmarks.figures import Document, engines, figures, losses, read
from fp8.scripts.benchmarks.targets import Target, targets

HEADER = (
    "device", "driver", "torch", "max_sm_clock", "sm_clock", "memory_clock", "power_limit", "power_draw", "temperature",
)  # fmt: skip
KERNELS, WHOLE = 0.05, 0.03  # how far two runs of the same commit may be apart
CLOCKS = "million clocks"  # of the multiprocessors
COUNTS = ("cases", "failures", "runs", "steps")  # units
ALLOWED = {
    **dict.fromkeys(("gemm", "gemm shapes", "blockwise", "prompts", "decodes", "norms", "all-reduce"), KERNELS),
    **dict.fromkeys(("llama-7b", "llama-3.1-8b", "llama-7b bf16", "first token", "throughput", "ranks: models"), WHOLE),
}  # times of builds and starts are the host's and its disk's


def record(documents: dict[str, Document], gpus: int = 1) -> dict[str, Any]:
    """What the files say of their runs, a row per target, where the time of a step goes, and how right engines are."""
    found = figures(documents)
    sources = {
        name: {key: document.get(key) for key in ("command", "commit", "date", *HEADER)}
        for name, document in documents.items()
    }
    rows = [_row(target, found) for target in (targets() if gpus == 1 else rank_targets.targets(gpus))]
    header = {key: sorted({str(s[key]) for s in sources.values() if s[key]}) for key in ("commit", "date", *HEADER)}
    return {
        "command": "python -m fp8.scripts.record",
        **header,
        "under_load": next((d["under_load"] for d in documents.values() if "under_load" in d), {}),
        "sources": sources,
        "rows": rows,
        "losses": losses(documents),
        "engines": engines(documents),
    }


def _row(target: Target, found: dict[str, float]) -> dict[str, Any]:
    figure, kernel = target.figure(found), target.name.rpartition(": ")[0]
    return {
        "name": target.name, "figure": figure, "unit": target.unit, "anchor": target.anchor, "whose": target.whose,
        "target": target.target, "at_least": target.at_least, "met": target.met(figure), "section": target.section,
        "us": found.get(f"{kernel}: us"), "of_the_ceiling": found.get(f"{kernel}: of the ceiling"),
        **_own(target, found),
    }  # fmt: skip


def _own(target: Target, found: dict[str, float]) -> dict[str, Any]:
    """What two runs are to agree on, where it is not the figure."""
    kernel, _, what = target.name.rpartition(": ")
    mhz, us = found.get(f"{target.name}, MHz"), found.get(f"{kernel}: us, bound by memory")
    if mhz and target.unit == "ms":
        return {"own": found[target.name] * mhz / 1e3, "own_unit": CLOCKS}
    if mhz:
        return {"own": found[target.name] / mhz, "own_unit": f"per {CLOCKS}"}
    return {"own": us, "own_unit": "us"} if what.startswith("ratio to") and us else {}


def state(row: dict[str, Any]) -> str:
    if row["figure"] is None:
        return "not measured"
    return "no target" if row["met"] is None else "met" if row["met"] else "missed"


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


@dataclass(frozen=True)
class Spread:
    """How far a row of one record is from the same row of another, as a fraction of the first. `own`: of both, what of
    the figure is the software's, where the rest is the card's."""

    name: str
    section: str
    first: float
    second: float
    own: tuple[float, float] | None = None
    own_unit: str = ""

    @property
    def fraction(self) -> float:
        return abs(self.second / self.first - 1)

    @property
    def own_fraction(self) -> float:
        """As `fraction` where all of it is the software's; 0 where the slower run takes no more clocks."""
        if self.own is None:
            return self.fraction
        apart = self.own[1] / self.own[0] - 1
        by_clocks = self.own_unit.endswith(CLOCKS) and apart * (self.second - self.first) <= 0
        return 0.0 if by_clocks else abs(apart)

    @property
    def most(self) -> float | None:
        return ALLOWED.get(self.section)

    @property
    def too_far(self) -> bool:
        return self.most is not None and min(self.fraction, self.own_fraction) > self.most

    @property
    def by_the_card(self) -> bool:
        """The figures are too far apart, and ours is not."""
        return self.most is not None and self.own_fraction <= self.most < self.fraction


def spreads(first: dict[str, Any], second: dict[str, Any]) -> list[Spread]:
    """The spread of every row that both hold, the widest first; counts of checks are no measurements."""
    others = {row["name"]: row for row in second["rows"] if row["figure"]}
    measured = (row for row in first["rows"] if row["figure"] and row.get("unit") not in COUNTS)
    found = [_spread(row, others[row["name"]]) for row in measured if row["name"] in others]
    return sorted(found, key=lambda spread: -spread.fraction)


def _spread(row: dict[str, Any], other: dict[str, Any]) -> Spread:
    figures = row["name"], row["section"], row["figure"], other["figure"]
    if "own" not in row or "own" not in other:  # as in records of before
        return Spread(*figures)
    return Spread(*figures, (row["own"], other["own"]), row["own_unit"])


def compare(found: Sequence[Spread]) -> Table:
    out = Table("name", "first", "second", "spread", "of ours", "", box=None)
    for s in found:
        verdict = f"more than {s.most:.0%}" if s.too_far else "the card's" if s.by_the_card else ""
        ours = f"{s.own_fraction:.1%}: {number(s.own[0])} and {number(s.own[1])} {s.own_unit}" if s.own else ""
        out.add_row(s.name, number(s.first), number(s.second), f"{s.fraction:.1%}", ours, verdict)
    return out


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--input", type=Path, help="a folder of results files, as scripts/gpu.sh leaves it")
    what.add_argument("--compare", type=Path, nargs=2, metavar="RECORD", help="two records; exits with 1 if far apart")
    parser.add_argument("--gpus", type=positive, default=1, help="that the files are of: scripts/gpu_ranks.sh's (1)")
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
            found = spreads(*map(load, args.compare))
            console.print(compare(found))
            apart, cards = sum(s.too_far for s in found), sum(s.by_the_card for s in found)
            print(
                f"{apart} of {len(found)} rows further apart than {KERNELS:.0%} (kernels) or {WHOLE:.0%} (whole model)"
                f"; {cards} more by the card alone, as our own time or clocks agree"
            )
            return 1 if apart else 0
        made = record(read(args.input), args.gpus)
        if args.output:
            write_atomically(args.output, [json.dumps(made, indent=1).encode() + b"\n"])
    except (EngineError, OSError) as error:
        print(f"record: {error}", file=sys.stderr)
        return 1
    console.print(as_table(made["rows"]))
    states = [state(row) for row in made["rows"]]
    print(", ".join(f"{states.count(kind)} {kind}" for kind in ("met", "missed", "not measured")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
