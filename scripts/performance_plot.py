"""Draws tokens/s against the bound, and a decode step's time split by kernel. Needs `fp8-engine[plot]`.

python -m fp8.scripts.performance_plot --input docs/performance/h200 --output docs/performance
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fp8.builder.engine import EngineError
from fp8.scripts.benchmarks.figures import Document, read, shape

INCHES, DOTS = (8.0, 4.5), 110
OTHERS = 0.02  # kernels of a smaller share of a step are drawn as one


def latencies(documents: dict[str, Document]) -> dict[str, list[dict[str, Any]]]:
    """Rows of the whole-model files with 1024 tokens in and 128 out, by engine."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for name, document in documents.items():
        if document.get("mode") == "latency":
            found[shape(name, document)] += [r for r in document["results"] if r["output_len"] > 1]
    return {name: rows for name, rows in found.items() if rows}


def splits(documents: dict[str, Document]) -> dict[str, dict[str, float]]:
    """Microseconds by kernel of every decode step that a roofline file holds; what is small together."""
    found: dict[str, dict[str, float]] = {}
    for name, document in documents.items():
        if document.get("mode") != "roofline":
            continue
        for row in document["results"]:
            if row["step"].startswith("decode") and row["kernel"] != "whole step":
                key = row["kernel"].removeprefix("model.layers.*.") if row["share"] >= OTHERS else "others"
                step = found.setdefault(f"{shape(name, document)}\n{row['step']}", defaultdict(float))
                step[key] += row["us"]
    return found


def draw_latencies(by_engine: dict[str, list[dict[str, Any]]], path: Path) -> None:
    figure, axes = _figure()
    for i, (name, rows) in enumerate(by_engine.items()):
        batches = [row["batch_size"] for row in rows]
        axes.plot(batches, [row["tokens_per_second"] for row in rows], "o-", color=f"C{i}", label=name)
        if all(row["bound_tokens_per_second"] for row in rows):
            bounds = [row["bound_tokens_per_second"] for row in rows]
            axes.plot(batches, bounds, "--", color=f"C{i}", label=f"{name}: bound")
    axes.set(xscale="log", yscale="log", xlabel="batch size", ylabel="tokens/s", title="1024 tokens in, 128 out")
    axes.set_xticks(batches, [str(b) for b in batches])
    axes.legend(fontsize="small")
    axes.grid(True, which="both", alpha=0.3)
    figure.savefig(path, dpi=DOTS, metadata={"Software": None})


def draw_splits(by_step: dict[str, dict[str, float]], path: Path) -> None:
    figure, axes = _figure()
    kernels = sorted({k for step in by_step.values() for k in step}, key=lambda k: (k == "others", k))
    places, lefts = range(len(by_step)), [0.0] * len(by_step)
    wholes = [sum(step.values()) for step in by_step.values()]
    for kernel in kernels:
        widths = [step.get(kernel, 0.0) / whole * 100 for step, whole in zip(by_step.values(), wholes, strict=True)]
        axes.barh(places, widths, left=lefts, label=kernel)
        lefts = [a + b for a, b in zip(lefts, widths, strict=True)]
    axes.set_yticks(places, [f"{name}: {us / 1e3:.1f} ms" for name, us in zip(by_step, wholes, strict=True)])
    axes.set(xlabel="% of the time per token, every kernel by itself", title="Where a decode step's time goes")
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=DOTS, metadata={"Software": None})


def _figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="a folder of results files")
    parser.add_argument("--output", type=Path, required=True, help="the folder for tokens.png and step.png")
    args = parser.parse_args(argv)
    try:
        documents = read(args.input)
        args.output.mkdir(parents=True, exist_ok=True)
        if by_engine := latencies(documents):
            draw_latencies(by_engine, args.output / "tokens.png")
        if by_step := splits(documents):
            draw_splits(by_step, args.output / "step.png")
    except ImportError:
        print("performance_plot: matplotlib is missing; pip install 'fp8-engine[plot]'", file=sys.stderr)
        return 1
    except (EngineError, OSError) as error:
        print(f"performance_plot: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
