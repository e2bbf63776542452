"""fp8-bench: how fast kernels and engines are.

  fp8-bench kernel
  fp8-bench latency --engine_dir E --batch_size 1 8 64 --input_len 1024 --output_len 128
  fp8-bench throughput --engine_dir E --input_len 128 1000 --output_len 128 1000 --max_seconds 10
  fp8-bench roofline --engine_dir E --batch_size 1 64
  fp8-bench startup --checkpoint_dir C
  fp8-bench host
  mpirun -n 2 fp8-bench all_reduce

fp8-bench MODE --help says what each measures, and its flags.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from fp8.builder.engine import write_atomically
from fp8.scripts.argument_types import new_file
from fp8.scripts.benchmarks import all_reduce, host, kernel, latency, roofline, startup, throughput
from fp8.scripts.moved_flags import CommandParser
from fp8.scripts.printing import printing
from fp8.scripts.provenance import add_argument, provenance
from fp8.scripts.ranks import among_peers, on_all_ranks
from fp8.scripts.run import ERRORS
from fp8.scripts.teaching import Teaching

MODES = {
    "kernel": (kernel, "plugins' kernels against cuBLASLt, cuDNN and torch (GPU only)"),
    "latency": (latency, "batches of random prompts, started together and run to the end"),
    "throughput": (throughput, "tokens per second of a full queue"),
    "startup": (
        startup,
        "fp8-build with a cold and a warm kernel cache, and an engine from its start to its first token",
    ),
    "host": (host, "the host's work in a step: scheduling, packing, taking tokens in (needs no engine and no GPU)"),
    "all_reduce": (all_reduce, "the sum over several GPUs, checked, stressed and timed beside NCCL (under mpirun)"),
    "roofline": (roofline, "where the time of a step goes, against what memory and tensor cores allow"),
}


def parser() -> argparse.ArgumentParser:
    p = CommandParser("fp8-bench", description=__doc__, formatter_class=Teaching)
    modes = p.add_subparsers(dest="mode", required=True)
    for name, (module, title) in MODES.items():
        mode = modes.add_parser(
            name, help=title, description=getattr(module, "DESCRIPTION", title), formatter_class=Teaching
        )
        module.add_arguments(mode)
        mode.add_argument("--output", type=new_file, help="write the result as JSON")
        add_argument(mode)
    return p


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as aligned text, their keys as the head; lists and records are left out."""
    keys = list({k: None for row in rows for k, v in row.items() if not isinstance(v, (list, dict))})
    cells = [keys, *([_cell(row.get(key)) for key in keys] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(keys))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells)


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    args.world = None
    if args.mode == "all_reduce":
        return among_peers("fp8-bench", args, lambda args, _: command(argv, args))
    if "engine_dir" not in args or args.mode == "startup":
        return command(argv, args)
    return on_all_ranks("fp8-bench", args, partial(command, argv))


@printing("fp8-bench")
def command(argv: Sequence[str] | None, args: argparse.Namespace) -> int:
    def origin() -> dict[str, Any]:
        return provenance("fp8-bench", argv, args.commit)

    def save(rows: Sequence[dict[str, Any]], facts: dict[str, Any], of: dict[str, Any] | None = None) -> None:
        """Modes that take long call it with the rows so far: what is known is not lost with what is not."""
        if args.output:
            result = {"mode": args.mode, **(of or before), **facts, "results": rows}
            write_atomically(args.output, [json.dumps(result, indent=2).encode() + b"\n"])

    before = origin()
    args.save = save
    try:
        rows, facts = MODES[args.mode][0].run(args)
        if args.world is not None and args.world.rank:
            return 1 if facts.get("failed") else 0  # rank 0 has the same
        save(rows, facts, origin())
    except ERRORS as error:
        print(f"fp8-bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fp8-bench: interrupted", file=sys.stderr)
        return 130
    print(table(rows))
    return 1 if facts.get("failed") else 0


if __name__ == "__main__":
    sys.exit(main())
