"""Times tactics for the table that ships with the package: Llama's shapes, divided among ranks, on the GPU at hand.

    python -m fp8.scripts.tune_table --output builder/tactics_h200.json --max_seconds 90

The largest shares of an engine's time come first. Entries that the output holds already, measured on this GPU with the
same kernels and favourites, are kept: after a run that was stopped, what is missing is timed, then what has changed. A
tactic that crashes, hangs or computes wrongly is dropped with a warning; the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

# The processes that compile import this module again: what is heavy is imported where it is used.
if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from fp8.builder.measure import Timed
    from fp8.builder.tactic_table import Entry, Table
    from fp8.builder.timer import Timer
    from fp8.builder.tune import Compiler, Site

WRITE_SECONDS = 5.0  # at least so often the table is written
MAX_BATCH = 64  # sequences, of which no linear's time depends on


@dataclass
class Tuning:
    """A table in the making, for sites in the order of `todo`."""

    table: Table
    todo: list[Site]
    times: TextIO | None = None  # where every candidate's time is written
    timed: list[Timed] = field(default_factory=list)
    begin: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        from fp8.builder.tactic_table import digest_of_kernels, digest_of_tactics

        self._digests = {}
        for site in self.todo:
            kernels = digest_of_kernels(k for t in site.favourites for k in site.kernels(t))
            self._digests[site] = (digest_of_tactics(site.favourites), kernels)

    def _candidates(self, site: Site) -> list[Any]:
        """The favourites, the first of every other kind, and what the table holds of old."""
        favourites = site.favourites
        others = {type(t): t for t in reversed(site.offered) if type(t) not in set(map(type, favourites))}
        old = self._entry(site)
        restored = site.restored(old.tactic) if old else None
        return list(dict.fromkeys([*favourites, *others.values(), *([restored] if restored else [])]))

    def missing(self) -> list[Site]:
        """What the table does not hold, then what has other favourites by now, then what has other kernels."""
        missing: tuple[list[Site], ...] = ([], [], [])
        for site in self.todo:
            entry, (favourites, kernels) = self._entry(site), self._digests[site]
            if entry is None:
                missing[0].append(site)
            elif entry.favourites != favourites:
                missing[1].append(site)
            elif entry.kernels != kernels:
                missing[2].append(site)
        return [*missing[0], *missing[1], *missing[2]]

    def _entry(self, site: Site) -> Entry | None:
        return self.table.entries.get(site.op, {}).get(site.max_tokens)

    def attempt(self, timer: Timer, compiler: Compiler, end: float, progress: Progress, output: Path) -> int:
        """`run`, whose result is written however it ends: 0, or the status of a failure, which is told."""
        from fp8.builder.timer import TuneError

        status = 0
        try:
            self.run(timer, compiler, end, progress, output)
        except (TuneError, BrokenExecutor) as error:
            print(f"tune_table: {error}", file=sys.stderr)
            status = 1
        except KeyboardInterrupt:
            status = 130
        self.write(output)
        return status

    def run(self, timer: Timer, compiler: Compiler, end: float, progress: Progress, output: Path) -> None:
        """Until all is timed, or the clock says `end`. Raises TuneError if nothing can be timed."""
        from fp8.builder.measure import time_site
        from fp8.builder.timer import NothingWorks

        candidates = {site: self._candidates(site) for site in self.missing()}
        task = progress.add_task("tactics", total=len(candidates))
        compiler.submit([k for site, tactics in candidates.items() for t in tactics for k in site.kernels(t)])
        warn = lambda text: progress.console.print(f"warning: {text}", markup=False, soft_wrap=True)
        written = time.monotonic()
        for site, tactics in candidates.items():
            if time.monotonic() > end:
                break
            try:
                self._keep(time_site(site, tactics, timer, compiler, MAX_BATCH, warn))
            except NothingWorks as error:
                warn(str(error))
            progress.advance(task)
            if time.monotonic() > written + WRITE_SECONDS:
                self.write(output)
                written = time.monotonic()

    def _keep(self, timed: Timed) -> None:
        from fp8.builder.tactic_table import Entry
        from fp8.builder.tune import tactic_fields

        site = timed.site
        if timed.seconds:
            us = timed.seconds[timed.best] * 1e6
            self.table.put(site.op, site.max_tokens, Entry(tactic_fields(timed.best), us, *self._digests[site]))
            self.timed.append(timed)
            if self.times:
                seconds = [[tactic_fields(t), took * 1e6] for t, took in timed.seconds.items()]
                record = {"at": round(time.monotonic() - self.begin, 2), "op": site.op, "rows": site.max_tokens}
                print(json.dumps({**record, "us": seconds}), file=self.times, flush=True)

    def write(self, output: Path) -> None:
        from fp8.builder import tactic_table

        tactic_table.write(output, self.table)

    def summary(self) -> str:
        left = len(self.missing())
        text = f"{len(self.timed)} choices timed, {len(self.table)} in the table, {left} left"
        if not self.timed:
            return text
        losses = [favourite / best - 1 for favourite, best in (t.gain for t in self.timed)]
        right = sum(loss <= 0.005 for loss in losses) / len(losses)
        mean = sum(losses) / len(losses)
        return f"{text}; the models' favourites are {mean:.2%} slower on average, {right:.0%} of them within 0.5%"


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


def opened(path: Path, facts: dict[str, Any] | None, console: Console) -> Table:
    """What `path` holds, if that was measured on this GPU; else an empty table, and a line that says why."""
    from fp8.builder.tactic_table import Table, TableError, read

    if not path.exists():
        return Table(facts or {})
    try:
        table = read(path)
    except TableError as error:
        console.print(f"{error}; it is begun anew", markup=False, soft_wrap=True)
        return Table(facts or {})
    if facts is None or table.facts.get("GPU") == facts["GPU"]:
        return Table(facts or table.facts, table.entries)
    console.print(f"{path} is of {table.facts.get('GPU')}, this is {facts['GPU']}: it is begun anew", markup=False)
    return Table(facts)


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


def prune(table: Table) -> int:
    """Drops what is no legal tactic of its op any more; how many these are."""
    from fp8.builder.tactic_table import parse_op
    from fp8.builder.tune import Site
    from fp8.plugins.base import PluginError

    before = len(table)
    for op, ranges in list(table.entries.items()):
        try:
            plugin, types = parse_op(op)
            found = {n: e for n, e in ranges.items() if Site(plugin, types, n).restored(e.tactic) is not None}
        except (ValueError, TypeError, PluginError):  # a plugin or an attribute that is gone
            found = {}
        table.entries[op] = found
        if not found:
            del table.entries[op]
    return before - len(table)


def _kept(facts: dict[str, Any]) -> dict[str, Any]:
    return {k: facts[k] for k in ("commit", "date", "max_sm_clock", "power_limit")}


def main(argv: Sequence[str] | None = None) -> int:
    begin = time.monotonic()
    options = parse(argv)
    from rich.console import Console
    from rich.progress import Progress

    from fp8.builder.build import BuildError
    from fp8.builder.formats.base import FormatError
    from fp8.builder.measure import machine
    from fp8.builder.tactic_table import TableError, read, write
    from fp8.builder.timer import Timer, TuneError
    from fp8.plugins.base import PluginError
    from fp8.scripts import table_sites
    from fp8.scripts.provenance import provenance

    console = Console(stderr=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is timed is written
    shapes = table_sites.shapes(options.model, options.qformat, options.tp_size)
    try:
        if options.workers < 1 or min(options.tp_size) < 1:
            raise BuildError("workers and tp_size must be at least 1")
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
    except (BuildError, FormatError, PluginError, TableError, TuneError) as error:
        print(f"tune_table: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}: {tuning.summary()} ({time.monotonic() - begin:.0f} s)")
    return status


if __name__ == "__main__":
    sys.exit(main())
