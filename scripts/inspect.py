"""fp8-inspect: what is in an engine: layers, types, tactics, kernels, sizes, where every Q/DQ pair went."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fp8.builder import engine
from fp8.builder.engine import Engine, EngineError, Plan, Step

SECTIONS = ("layers", "tactics", "fusion")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("fp8-inspect", description=__doc__)
    parser.add_argument("engine_dir", type=Path)
    parser.add_argument("--layers", action="store_true", help="every step with its types and shapes")
    parser.add_argument("--tactics", action="store_true", help="every step's tactics, and the kernels with registers")
    parser.add_argument("--fusion", action="store_true", help="every quantize/dequantize pair and who took it")
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
        "limits": f"{limits.max_batch_size} sequences of {limits.max_seq_len}, {limits.max_num_tokens} tokens a step",
        "target": f"{c.target}, format version {c.format_version}, package {c.package_version}",
        "steps": ", ".join(f"{n} {p}" for p, n in Counter(s.plugin for s in plan.steps).most_common()),
        "Q/DQ pairs": f"{len(pairs)}, {sum(not p['folded'] for p in pairs)} left unfolded",
        "kernels": f"{len(plan.kernels)}, {sum(map(len, loaded.cubins.values())) / 1024:.0f} KiB",
        "arena": f"{plan.arena_bytes / 2**20:.2f} MiB, workspace {plan.workspace_bytes / 2**20:.2f} MiB",
        "weights": f"{loaded.weights_path.stat().st_size / 2**20:.2f} MiB, sha256 {plan.weights_sha256[:16]}",
    }
    table = Table(title=str(loaded.directory), show_header=False)
    for row in rows.items():
        table.add_row(*row)
    console.print(table)


def layers(plan: Plan, console: Console) -> None:
    table = Table("step", "plugin", "inputs", "outputs", title="layers")
    for step in plan.steps:
        table.add_row(step.name, step.plugin, _types(plan, step.inputs), _types(plan, step.outputs))
    console.print(table)


def _types(plan: Plan, names: Sequence[str]) -> str:
    found = (plan.buffer(n) for n in names if n)
    return "\n".join(f"{b.name} {b.dtype}\\[{','.join(map(str, b.shape))}]" for b in found)


def tactics(plan: Plan, console: Console) -> None:
    table = Table("step", "rows", "tactic", "kernels", "workspace", title="tactics")
    for step in plan.steps:
        for row in _tactics(plan, step):
            table.add_row(*row)
    console.print(table)
    table = Table("kernel", "plugin", "source", "registers", "spilled bytes", "constants", title="kernels")
    for key, kernel in sorted(plan.kernels.items(), key=lambda item: (item[1]["plugin"], item[0])):
        constants = " ".join(f"{k}={v}" for k, v in kernel["constants"].items())
        numbers = str(kernel["registers"]), str(kernel["spill_bytes"])
        table.add_row(key[:8], kernel["plugin"], kernel["source"], *numbers, constants)
    console.print(table)


def _tactics(plan: Plan, step: Step) -> list[tuple[str, ...]]:
    return [
        (
            step.name if i == 0 else "", f"<= {t.max_tokens}", " ".join(f"{k}={v}" for k, v in t.tactic.items()),
            " ".join(k[:8] for k in t.kernels), f"{t.workspace / 1024:.0f} KiB" if t.workspace else "",
        )
        for i, t in enumerate(step.tactics)
    ]  # fmt: skip


def fusion(plan: Plan, console: Console) -> None:
    table = Table("tensor", "quantized by", "dequantized by", "", title="quantize/dequantize pairs")
    for pair in plan.fusion_report:
        quantized = pair["quantize_in"] or ("(stored)" if not pair["quantize"] else f"{pair['quantize']} itself")
        table.add_row(pair["tensor"], quantized, pair["dequantize_in"], pair.get("reason", "folded"))
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        loaded = engine.load(options.engine_dir)
    except EngineError as error:
        print(f"fp8-inspect: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(facts(loaded), indent=2))
        return 0
    chosen = [s for s in SECTIONS if getattr(options, s)] or list(SECTIONS)
    console = Console()
    overview(loaded, console)
    for name in chosen:
        {"layers": layers, "tactics": tactics, "fusion": fusion}[name](loaded.plan, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
