"""A table of tactics in the making: what is to be timed, what is kept, and what becomes of it when it ends."""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import Progress

from fp8.builder import tactic_table
from fp8.builder.measure import Timed, time_site
from fp8.builder.tactic_table import (
    Entry,
    Table,
    TableError,
    digest_of_kernels,
    digest_of_tactics,
    parse_op,
    read,
)
from fp8.builder.timer import NothingWorks, Timer, TuneError
from fp8.builder.tune import Compiler, Site, tactic_fields
from fp8.plugins.base import PluginError

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
        """`run`, whose result is written however it ends: 0, or the status of a failure, which is reported."""
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


def opened(path: Path, facts: dict[str, Any] | None, console: Console) -> Table:
    """What `path` holds, if that was measured on this GPU; else an empty table, and a line that says why."""
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


def prune(table: Table) -> int:
    """Drops what is no legal tactic of its op any more; how many these are."""
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
