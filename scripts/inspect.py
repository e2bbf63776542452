"""fp8-inspect: what is in an engine: layers, types, tactics, kernels, sizes, where every Q/DQ pair went."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fp8.builder import engine
from fp8.builder.engine import Engine, EngineError, Join, Plan, Step, Sum
from fp8.scripts.moved_flags import CommandParser
from fp8.scripts.printing import printing

SECTIONS = ("layers", "tactics", "fusion")
SHORT = {"float8_e4m3fn": "e4m3", "bfloat16": "bf16", "float16": "f16", "float32": "f32", "int32": "i32"}
COMMANDS = {"compare": "fp8.scripts.compare", "graph": "fp8.scripts.graph_page"}  # each with a help of its own
WIDTH = 180  # where the output is no terminal


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(
        "fp8-inspect", description=__doc__,
        epilog="Without flags: an overview and the fusion report. See also fp8-inspect compare --help (tensors of two "
        "engines) and fp8-inspect graph --help (a drawing of one layer).",
    )  # fmt: skip
    parser.add_argument("engine_dir", type=Path, help="as fp8-build writes it")
    parser.add_argument("--rank", type=int, default=0, help="which rank's engine (default: 0)")
    parser.add_argument("--layers", action="store_true", help="every step with its types and shapes")
    parser.add_argument("--tactics", action="store_true", help="every step's tactics, and the kernels with registers")
    parser.add_argument(
        "--fusion", action="store_true", help="the quantize/dequantize pairs, and which plugin took each"
    )
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    return parser.parse_args(arguments)


def facts(loaded: Engine) -> dict[str, Any]:
    """What --json prints: the plan, and the sizes of the files."""
    sizes = {p.name: p.stat().st_size for p in sorted(loaded.directory.iterdir()) if p.is_file()}
    plan = dataclasses.asdict(loaded.plan)
    return {**plan, "files": sizes, "cubin_bytes": {k: len(v) for k, v in sorted(loaded.cubins.items())}}


def overview(loaded: Engine, console: Console) -> None:
    plan = loaded.plan
    model, limits, c = plan.model, plan.limits, plan.compatibility
    pairs = plan.fusion_report
    rows = {
        "model": f"{model.architecture}, {model.num_layers} layers, {model.num_heads} heads of {model.head_dim}, "
        f"{model.num_kv_heads} KV heads, hidden {model.hidden_size}, vocabulary {model.vocab_size}",
        "types": f"{model.format}, activations {model.dtype}, KV cache {model.kv_cache_dtype}",
        **_sums(plan),
        "limits": f"{limits.max_batch_size} sequences of {limits.max_seq_len}, {limits.max_num_tokens} tokens a step",
        "target": f"{c.target}, format version {c.format_version}, package {c.package_version}",
        **_rank(plan),
        "steps": ", ".join(f"{n} {p}" for p, n in Counter(s.plugin for s in plan.steps).most_common()),
        **_merged(plan),
        "Q/DQ pairs": f"{len(pairs)}, {sum(not p['folded'] for p in pairs)} left unfolded",
        "kernels": f"{len(plan.kernels)}, {sum(map(len, loaded.cubins.values())) / 1024:.0f} KiB",
        "arena": f"{plan.arena_bytes / 2**20:.2f} MiB, workspace {plan.workspace_bytes / 2**20:.2f} MiB",
        "debug tensors": f"{len(plan.taps)}",
        "weights": f"{loaded.weights_path.stat().st_size / 2**20:.2f} MiB, digest {plan.weights_digest[:16]}",
    }
    table = Table(title=escape(str(loaded.directory)), show_header=False)
    for row in rows.items():
        table.add_row(*row)
    console.print(table)


def _rank(plan: Plan) -> dict[str, str]:
    """What of the model this rank has, if there are others."""
    c, share = plan.compatibility, plan.share
    if share is None:
        return {}
    parts = ", ".join(
        f"{axis} {start}-{stop - 1}" for axis, (start, stop) in {"layers": share.layers, **share.axes}.items()
    )
    return {f"rank {c.rank} of {c.world_size}": f"{parts} (tp_size {c.tp_size}, pp_size {c.pp_size})"}


def _merged(plan: Plan) -> dict[str, str]:
    """What a step of one token launches, in an engine for a GPU."""
    if plan.merged is not None:
        m = plan.merged
        return {"a step of one token": f"one launch for {m.count} steps, in contexts of up to {m.max_context}"}
    return {"a step of one token": f"a launch for each step: {plan.unmerged}"} if plan.unmerged else {}


def _sums(plan: Plan) -> dict[str, str]:
    """How FP8 linears add up, if there are any."""
    steps = [s for s in plan.steps if "accumulation" in s.attributes]
    kinds = {str(s.attributes["accumulation"]) for s in steps if plan.buffer(s.inputs[0]).dtype == "float8_e4m3fn"}
    return {"FP8 accumulation": ", ".join(sorted(kinds))} if kinds else {}


def layers(plan: Plan, console: Console) -> None:
    table = _table("layers", "step", "plugin", "reads", "weight", "writes", "attributes")
    for names, step in _alike(plan):
        activations = [n for n in step.inputs if n and plan.buffer(n).kind in ("activation", "input")]
        weights = [n for n in step.inputs if n and plan.buffer(n).kind == "weight" and len(plan.buffer(n).shape) == 2]
        attributes = " ".join(f"{k}={v}" for k, v in step.attributes.items() if v not in (0, False, ""))
        sides = [_types(plan, names) for names in (activations[:1], weights[:1], step.outputs)]
        table.add_row(_joined(names), step.plugin, *sides, attributes)
    console.print(table)


def _alike(plan: Plan) -> list[tuple[list[str], Step]]:
    """Steps that differ by their layer only, together."""
    groups: dict[str, tuple[list[str], Step]] = {}
    for step in plan.steps:
        types = [_types(plan, names) for names in (step.inputs, step.outputs)]
        key = json.dumps([_shape(step.name)[0], step.plugin, step.attributes, types, _tactics(step)])
        groups.setdefault(key, ([], step))[0].append(step.name)
    return list(groups.values())


def _shape(name: str) -> tuple[str, int]:
    """`model.layers.3.mlp` -> (`model.layers.*.mlp`, 3)."""
    found = re.search(r"\.(\d+)(\.|$)", name)
    return (name[: found.start(1)] + "*" + name[found.end(1) :], int(found[1])) if found else (name, -1)


def _joined(names: list[str]) -> str:
    """`model.layers.0-31.mlp` for the names of 32 layers."""
    shape, first = _shape(names[0])
    indices = [_shape(n)[1] for n in names]
    if len(names) == 1:
        return names[0]
    whole = indices == list(range(first, first + len(names)))
    return shape.replace("*", f"{first}-{indices[-1]}" if whole else ",".join(map(str, indices)), 1)


def _types(plan: Plan, names: Sequence[str]) -> str:
    found = (plan.buffer(n) for n in names if n)
    return "\n".join(f"{SHORT.get(b.dtype, b.dtype)}\\[{','.join(map(str, b.shape))}]" for b in found)


def tactics(plan: Plan, console: Console) -> None:
    if not plan.kernels:
        console.print("no tactics: built for target cpu")
        return
    table = _table("tactics", "step", "rows", "tactic", "kernels", "workspace")
    for names, step in _alike(plan):
        for i, row in enumerate(_tactics(step)):
            table.add_row(_joined(names) if i == 0 else "", *row)
    console.print(table)
    for title, found in (
        ("with the first part of attention, for prompts", plan.joins),
        ("with the residual of the norm after it added", plan.sums),
    ):
        if found:
            console.print(_replaced(plan, title, found))
    table = _table("kernels", "kernel", "plugin", "source", "registers", "spilled bytes", "constants")
    for key, kernel in sorted(plan.kernels.items(), key=lambda item: (item[1]["plugin"], item[0])):
        constants = " ".join(f"{k}={v}" for k, v in kernel["constants"].items())
        numbers = str(kernel["registers"]), str(kernel["spill_bytes"])
        table.add_row(key[:8], kernel["plugin"], kernel["source"], *numbers, constants)
    console.print(table)


def _replaced(plan: Plan, title: str, found: Sequence[Join | Sum]) -> Table:
    """Linear layers in whose place some steps run another kernel."""
    groups: dict[tuple[str, str], list[str]] = {}
    for one in found:
        step = plan.steps[one.linear]
        ends = (f"<= {t.max_tokens} {k[:8]}" for t, k in zip(step.tactics, one.kernels, strict=True) if k)
        groups.setdefault((_shape(step.name)[0], ", ".join(ends)), []).append(step.name)
    table = _table(title, "step", "rows, kernels")
    for (_, kernels), names in groups.items():
        table.add_row(_joined(names), kernels)
    return table


def _tactics(step: Step) -> list[tuple[str, ...]]:
    return [
        (
            f"<= {t.max_tokens}", " ".join(f"{k}={v}" for k, v in t.tactic.items()), " ".join(k[:8] for k in t.kernels),
            f"{t.workspace / 1024:.0f} KiB" if t.workspace else "",
        )
        for t in step.tactics
    ]  # fmt: skip


def fusion(plan: Plan, console: Console) -> None:
    if not plan.fusion_report:
        console.print("no quantize/dequantize pairs")
        return
    groups: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for pair in plan.fusion_report:
        quantized = pair["quantize_in"] or ("(stored)" if not pair["quantize"] else "nobody")
        ends = (pair["tensor"], quantized, pair["dequantize_in"] or "nobody")
        groups.setdefault((*(_shape(end)[0] for end in ends), pair.get("reason", "folded")), []).append(ends)
    table = _table("quantize/dequantize pairs", "tensor", "quantized by", "dequantized by", "pairs", "")
    for (*_, became), pairs in groups.items():
        columns = (_joined(list(dict.fromkeys(names))) for names in zip(*pairs, strict=True))
        table.add_row(*columns, str(len(pairs)), became)
    console.print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


@printing("fp8-inspect")
def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        return importlib.import_module(COMMANDS[arguments[0]]).main(arguments[1:])
    options = parse(arguments)
    try:
        loaded = engine.load(options.engine_dir, options.rank)
    except EngineError as error:
        print(f"fp8-inspect: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(facts(loaded), indent=2))
        return 0
    chosen = [s for s in SECTIONS if getattr(options, s)] or list(SECTIONS)
    console = Console() if sys.stdout and sys.stdout.isatty() else Console(width=WIDTH)
    overview(loaded, console)
    for name in chosen:
        {"layers": layers, "tactics": tactics, "fusion": fusion}[name](loaded.plan, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
