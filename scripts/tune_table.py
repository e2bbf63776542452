"""Times tactics for the table that ships with the package: Llama's shapes, divided among ranks, on the GPU at hand.

    python -m fp8.scripts.tune_table --output builder/tactics_h200.json --max_seconds 90

The largest shares of an engine's time come first. Entries that the output holds already, measured on this GPU with the
same kernels and favourites, are kept: after a run that was stopped, what is missing is timed, then what has changed. A
tactic that crashes, hangs or computes wrongly is dropped with a warning; the rest goes on.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The processes that compile import this module again: what is heavy is imported where it is used.
if TYPE_CHECKING:
    from rich.console import Console

    from fp8.builder.tune import Compiler


@contextmanager
def compiling(workers: int, console: Console) -> Iterator[Compiler]:
    """Compiles in processes, ahead of the timing; what waits at the end is not begun."""
    from fp8.builder.tune import Compiler

    warn = lambda text: console.print(f"warning: {text[:400]}", markup=False, soft_wrap=True)
    ignored = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches this process too, which ends them
    pool = ProcessPoolExecutor(workers, get_context("spawn"), signal.signal, ignored)
    try:
        for _ in range(workers):
            pool.submit(int)  # starts a process
        yield Compiler(pool, lambda done, total: None, warn)
    finally:
        pool.shutdown(cancel_futures=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    from fp8.scripts import table_sites
    from fp8.scripts.provenance import add_argument
    from fp8.scripts.random_checkpoint import PRESETS

    parser = argparse.ArgumentParser(
        "python -m fp8.scripts.tune_table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="the table; continued if it is there")
    parser.add_argument("--model", nargs="+", choices=PRESETS, default=table_sites.MODELS,
        help=f"({', '.join(table_sites.MODELS)})",
    )  # fmt: skip
    parser.add_argument("--qformat", nargs="+", default=("fp8",), help="such as fp8 fp8_rowwise bf16 (fp8)")
    parser.add_argument("--tp_size", nargs="+", type=int, default=table_sites.TP_SIZES, help="(1 2 4 8)")
    parser.add_argument("--max_num_tokens", type=int, default=8192, help="rows of the last range (8192)")
    parser.add_argument("--max_seconds", type=float, default=600.0, help="stop then, and write what is there (600)")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 2), help="that compile")
    parser.add_argument(
        "--times", type=argparse.FileType("w"), help="write every candidate's time here, as lines of JSON"
    )
    parser.add_argument("--list", action="store_true", help="print what is missing in the output, and time nothing")
    parser.add_argument("--prune", action="store_true", help="drop what is no longer legal, and time nothing")
    add_argument(parser)
    return parser.parse_args(argv)


def _kept(facts: dict[str, Any]) -> dict[str, Any]:
    return {k: facts[k] for k in ("commit", "date", "max_sm_clock", "power_limit")}


def main(argv: Sequence[str] | None = None) -> int:
    begin = time.monotonic()
    options = parse(argv)
    from rich.console import Console
    from rich.progress import Progress

    from fp8.builder.formats.base import FormatError
    from fp8.builder.measure import machine
    from fp8.builder.tactic_table import TableError, read, write
    from fp8.builder.timer import Timer, TuneError
    from fp8.builder.workplace import BuildError
    from fp8.plugins.base import PluginError
    from fp8.scripts import table_sites
    from fp8.scripts.provenance import provenance
    from fp8.scripts.table_tuning import Tuning, opened, prune

    console = Console(stderr=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is timed is written
    shapes = table_sites.shapes(options.model, options.qformat, options.tp_size)
    try:
        if options.workers < 1 or min(options.tp_size) < 1:
            raise BuildError("workers and tp_size must be at least 1")
        if not options.output.parent.is_dir():
            raise BuildError(f"{options.output.parent} is no directory, and the output is to be there")
        if options.prune:
            table = read(options.output)
            print(f"{options.output}: {prune(table)} entries dropped, {len(table)} left")
            write(options.output, table)
            return 0
        if options.list:
            table, sites = opened(options.output, None, console), table_sites.sites(shapes, options.max_num_tokens)
            for site in Tuning(table, sites).missing():
                print(f"{site.op} up to {site.max_tokens} rows")
            return 0
        with Timer() as timer, compiling(options.workers, console) as compiler, Progress(console=console) as progress:
            timer.start()  # which takes seconds
            facts = machine() | _kept(provenance("tune_table", argv, options.commit))
            sites = table_sites.sites(shapes, options.max_num_tokens)
            tuning = Tuning(opened(options.output, facts, console), sites, options.times)
            status = tuning.attempt(timer, compiler, begin + options.max_seconds, progress, options.output)
    except (BuildError, FormatError, OSError, PluginError, TableError, TuneError) as error:
        print(f"tune_table: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}: {tuning.summary()} ({time.monotonic() - begin:.0f} s)")
    return status


if __name__ == "__main__":
    sys.exit(main())
