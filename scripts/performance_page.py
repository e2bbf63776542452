"""Makes the tables of docs/performance.md from the record, and leaves its prose as it is.

    python -m fp8.scripts.performance_page --record docs/performance/h200.json --page docs/performance.md

What stands between `<!-- table NAME -->` and `<!-- end -->` is replaced. NAME is a section of the record, or one of
`headlines`, `summary`, `losses`, `engines`, and `spread` (between the record and `--again`, the record of another run).
Where a section has missed targets, the page must say why, after `<!-- why NAME -->`.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fp8.builder.engine import EngineError, write_atomically
from fp8.scripts.benchmarks.kernel_cases import BURSTS, PRODUCTS
from fp8.scripts.benchmarks.targets import BATCHES, HEADLINES
from fp8.scripts.record import Spread, load, number, spreads, state

WHY = re.compile(r"<!-- why (?P<name>[^>]+?) -->\n+(?=[^<#\s])")
MARKED = re.compile(r"(<!-- table (?P<name>[^>]+?) -->\n).*?(<!-- end -->)", re.DOTALL)
Rows = Sequence[dict[str, Any]]
CASES = {"prompts": "attention prompt ", "blockwise": "gemm fp8 blockwise "}  # how names begin, by section
VARIANTS = (PRODUCTS, BURSTS)  # of a case: columns of its line


def render(page: str, record: dict[str, Any], again: dict[str, Any] | None = None) -> str:
    """The page with its tables made again. Raises EngineError for a table that the record has no rows of, and for
    missed targets of which the page does not say why."""
    told, shown = ({found["name"] for found in pattern.finditer(page)} for pattern in (WHY, MARKED))
    missed = {row["section"] for row in record["rows"] if state(row) == "missed"}
    if untold := (missed & shown) - told:
        lines = ", ".join(f"<!-- why {name} -->" for name in sorted(untold))
        raise EngineError(f"targets are missed, and the page has no {lines} with the reasons after it")
    return MARKED.sub(lambda found: f"{found[1]}{_table(found['name'], record, again)}{found[3]}", page)


def _table(name: str, record: dict[str, Any], again: dict[str, Any] | None) -> str:
    if name in WHOLE:
        return WHOLE[name](record)
    if name == "spread":
        return "Not measured yet.\n" if again is None else _spread(spreads(record, again))
    rows = [row for row in record["rows"] if row["section"] == name]
    if not rows:
        sections = sorted({row["section"] for row in record["rows"]})
        raise EngineError(f"the page has a table {name!r}; the record has {', '.join((*WHOLE, 'spread', *sections))}")
    if all(f"batch {BATCHES[0]}: of the bound" in row["name"] for row in rows[1:2]):
        return _by_batch(rows)
    if name == "gemm shapes":
        return _by_rows(rows)
    if name in CASES:
        return _by_cases(rows, CASES[name])
    head = ["", "measured", "target", "peer", "unit", "of the ceiling", ""]
    return _markdown(*_filled(head, [_cells(row) for row in rows]))


def _summary(record: dict[str, Any]) -> str:
    rows = []
    for section in dict.fromkeys(row["section"] for row in record["rows"]):
        states = [state(row) for row in record["rows"] if row["section"] == section]
        rows.append([section, *(str(states.count(kind) or "") for kind in ("met", "missed", "not measured"))])
    facts = [
        f"{key.replace('_', ' ')} {', '.join(record[key])}" for key in ("device", "driver", "torch") if record[key]
    ]
    load = [record.get("under_load", {}).get(key) for key in ("sm_clock", "memory_clock", "power_draw", "power_limit")]
    if all(load):
        facts.append(f"under load SM {load[0]}, memory {load[1]}, {load[2]} of {load[3]}")
    head = f"{'; '.join(facts)}; commit {', '.join(c[:12] for c in record['commit'])}.\n\n"
    return head + _markdown(["section", "met", "missed", "not measured"], rows)


def _headlines(record: dict[str, Any]) -> str:
    """A few rows beside their peers, as a multiple of these."""
    found = {row["name"]: row for row in record["rows"]}
    rows = []
    for row in (found[name] for name in HEADLINES if name in found):
        name, figure, target, peer, _, _, last = _cells(row)
        times = "" if row["figure"] is None else f"{number(row['figure'] / row['anchor'])} x"
        rows.append([name, figure, peer, times, target, last])
    return _markdown(["", "measured", "peer", "measured / peer", "target", ""], rows)


def _losses(record: dict[str, Any]) -> str:
    rows = [
        [row["engine"], row["step"], f"`{row['kernel']}`", number(row["us"]), number(row["bound_us"]),
         "" if row["fraction"] is None else f"{row['fraction']:.0%}", number(row["loss_us"])]
        for row in record["losses"]
    ]  # fmt: skip
    head = ["engine", "step", "kernel", "us", "bound, us", "of the bound", "lost, us"]
    return _markdown(head, rows) if rows else "Not measured yet.\n"


def _engines(record: dict[str, Any]) -> str:
    decibels, perplexities = ("prefill_db", "decode_db", "own_db"), ("perplexity_cpu", "perplexity_gpu")
    rows = [
        [row["engine"], *(number(row[key]) for key in decibels), *(f"{row[key]:.4f}" for key in perplexities)]
        for row in record.get("engines", ())
    ]
    head = ["engine", "prefill, SQNR dB", "decode, dB", "cost of FP8, dB", "perplexity, CPU", "perplexity, GPU"]
    return _markdown(head, rows) if rows else "Not measured yet.\n"


# Tables that are not of one section's targets.
WHOLE = {"headlines": _headlines, "summary": _summary, "losses": _losses, "engines": _engines}


def _spread(found: Sequence[Spread]) -> str:
    rows = []
    for section in dict.fromkeys(s.section for s in found):
        here = [s for s in found if s.section == section]
        begins = {"".join(s.name.rpartition(", ")[:2]) for s in here}
        shared = begins.pop() if len(begins) == 1 else ""
        shares = [f"{share:.1%}" for share in (statistics.median(s.fraction for s in here), here[0].fraction)]
        apart, cards = (
            "; ".join(s.name.removeprefix(shared) for s in here if far(s))
            for far in (lambda s: s.too_far, lambda s: s.by_the_card)
        )
        allowed = "" if here[0].most is None else f"{here[0].most:.0%}"
        rows.append([section, str(len(here)), *shares, allowed, apart, cards])
    head = ["section", "rows", "median spread", "largest", "allowed", "further apart", "by the card alone"]
    return _markdown(head, sorted(rows))


def _by_batch(rows: Rows) -> str:
    """A line per batch of a model's rows."""
    found = {row["name"].split(", batch ")[1]: row for row in rows}
    head = ["batch", "tokens/s", "of the bound", "target", "vLLM", "ratio", "first token, ms", "vLLM"]
    lines = []
    for batch in BATCHES:
        rate, share, first, each = (
            found[f"{batch}: {kind}"] for kind in ("tokens/s", "of the bound", "first token ms", "time per token ms")
        )
        ratio = rate["figure"] and rate["figure"] / rate["anchor"]
        of_bound = "" if share["figure"] is None else f"{share['figure']:.0%}"
        rates = [_figure(rate), of_bound, number(rate["target"]), number(rate["anchor"]), number(ratio)]
        times = [_figure(first), number(first["anchor"]), _figure(each), number(each["anchor"])]
        lines.append([str(batch), *rates, *times, state(rate)])
    return _markdown([*head, "time per token, ms", "vLLM", ""], lines)


def _cells(row: dict[str, Any]) -> list[str]:
    peer = f"{_value(row['anchor'], row['unit'])} ({row['whose']})" if row["anchor"] is not None else ""
    target = "" if row["target"] is None else f"{_sign(row)} {_value(row['target'], row['unit'])}"
    share = "" if row["of_the_ceiling"] is None else f"{row['of_the_ceiling']:.0%}"
    return [row["name"], _figure(row), target, peer, row["unit"], share, state(row)]


def _by_rows(rows: Rows) -> str:
    """Ratio and microseconds: a line per mode and N x K, a column per M; what is missed is bold."""
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        mode, size = row["name"].removeprefix("gemm fp8 ").split(":")[0].split()
        m, _, shape = size.partition("x")
        us = "" if row["us"] is None else f" ({number(row['us'])})"
        lines.setdefault(f"{mode} {shape}", {})[f"M = {m}"] = f"{_marked(row)}{us}"
    return _grid("NxK", lines)


def _by_cases(rows: Rows, prefix: str) -> str:
    """A line per case, a column per figure; what is missed is bold."""
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        case, _, what = row["name"].removeprefix(prefix).partition(": ")
        variant = next((v for v in VARIANTS if case.endswith(v)), "")
        line = lines.setdefault(case.removesuffix(variant), {})
        wanted = f" ({_sign(row)} {number(row['target'])})" if row["target"] is not None else ""
        line[what + variant] = _marked(row) + wanted
        if not what.startswith("ratio"):
            line[f"peer, {what}{variant}"] = f"{number(row['anchor'])} ({row['whose']})"
            if row["of_the_ceiling"] is not None:
                line["of the ceiling" + variant] = f"{row['of_the_ceiling']:.0%}"
    return _grid("", lines)


def _sign(row: dict[str, Any]) -> str:
    return "at least" if row["at_least"] else "at most"


def _marked(row: dict[str, Any]) -> str:
    figure = _figure(row)
    return f"**{figure}**" if state(row) == "missed" else figure


def _grid(corner: str, lines: dict[str, dict[str, str]]) -> str:
    columns = list(dict.fromkeys(column for line in lines.values() for column in line))
    return _markdown([corner, *columns], [[name, *(line.get(c, "") for c in columns)] for name, line in lines.items()])


def _figure(row: dict[str, Any]) -> str:
    return _value(row["figure"], row["unit"]) or "-"


def _value(value: float | None, unit: str) -> str:
    """Shares without a unit in per cent."""
    return f"{value:.2%}" if value is not None and not unit else number(value)


def _filled(head: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Without the columns in which no row has anything."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    return [head[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |").replace("|  |", "| |") for line in lines)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    docs = Path(__file__).resolve().parent.parent / "docs"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, default=docs / "performance" / "h200.json")
    parser.add_argument(
        "--again", type=Path, default=docs / "performance" / "h200-again.json", help="of another run, if it is there"
    )
    parser.add_argument("--page", type=Path, default=docs / "performance.md", help="rewritten in place")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    try:
        again = load(args.again) if args.again.exists() else None
        page = render(args.page.read_text(), load(args.record), again)
        write_atomically(args.page, [page.encode()])
    except (EngineError, OSError) as error:
        print(f"performance_page: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
