"""fp8-bench kernel: every plugin's time on a case, by the tactic that an engine would hold, and its peers' in turn.

Cases are timed in a process of their own, started again when a case ends it or leaves the GPU unusable: that case's row
says so, and the others are measured all the same.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from fp8.runtime.request import RequestError
from fp8.scripts.benchmarks.isolated import Isolated, Lost
from fp8.scripts.benchmarks.kernel_cases import Timed
from fp8.scripts.benchmarks.kernel_rows import CEILINGS, Chosen, Row, answers

STARTING = 120.0  # seconds: imports, ceilings, the first kernels
SILENT = 60.0  # seconds after which a case is given up
SAVED = 10  # rows at a time
MOST_LOST = 8  # processes: that many say that something is wrong beside the cases
DESCRIPTION = """Times kernels on a Hopper GPU: random data, CUDA graphs over buffers that rotate through more memory
than the L2 cache holds, peers in turn, sustained load where a case is large, else bursts after pauses. Ceilings (read,
copy, FP8 and BF16 products) are measured first, and "fraction" is of what they allow: bytes that are written, and as
many that are read, at the rate of the copy, what is read beyond them at that of the read. Without --own, the cases are
those of the record."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plugin", default="", help="only this plugin")
    parser.add_argument(
        "--case", nargs="+", default=[""], help="only cases whose names contain one of these (default: all)"
    )
    parser.add_argument("--own", action="store_true", help="time the cases of every plugin's cases.py instead")
    parser.add_argument(
        "--tactics", type=int, default=1, help="report the best of so many tactics (1: the one that fp8-build takes)"
    )
    parser.add_argument("--no-peers", action="store_true", help="time our own kernels alone")
    parser.add_argument("--max_seconds", type=float, default=600.0, help="start no further case after so many seconds")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs")


def run(args: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """A row per case and the ceilings. Raises RequestError without a Hopper GPU."""
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise RequestError("fp8-bench kernel times kernels; it needs a Hopper GPU (sm_90)")
    begin = time.monotonic()
    chosen = Chosen(args.plugin, tuple(args.case), args.own, args.seed, args.tactics, not args.no_peers)
    measuring = Measuring(chosen)
    facts: dict[str, Any] = {**measuring.ceilings(), "startup_seconds": time.monotonic() - begin}
    rows: list[Row] = []
    for place, timed in enumerate(chosen.cases()):
        in_time = time.monotonic() - begin <= args.max_seconds
        rows.append(measuring.row(place, timed) if in_time else _failed(timed, "not measured: out of time"))
        if len(rows) % SAVED == 0:
            args.save(rows, facts)
    measuring.close()
    return rows, {**facts, "seconds": time.monotonic() - begin}


def _failed(timed: Timed, why: str) -> Row:
    return {"name": timed.name, "plugin": timed.plugin, "failure": why}


class Measuring:
    """The process that times cases, and those that follow it where it is lost."""

    def __init__(self, chosen: Chosen) -> None:
        self._chosen = chosen
        self._process: Isolated | None = None
        self._lost = 0

    def ceilings(self) -> dict[str, Any]:
        """And the card's state under load. Raises RequestError where they cannot be measured."""
        try:
            return self._ask(CEILINGS, 0)
        except Lost as lost:
            raise RequestError(
                f"the ceilings (a read, a copy, FP8 and BF16 products) cannot be measured: {lost}"
            ) from lost

    def row(self, place: int, timed: Timed) -> Row:
        if self._lost >= MOST_LOST:
            return _failed(timed, f"not measured: {MOST_LOST} processes were lost before")
        try:
            return self._ask(place, place)
        except Lost as lost:
            self._lost += 1
            return _failed(timed, str(lost))

    def close(self) -> None:
        if self._process is not None:
            self._process.close()

    def _ask(self, question: int, first: int) -> Any:
        """`first`: the case that a new process is to begin with."""
        fresh = self._process is None or not self._process.usable
        if self._process is None or fresh:
            self.close()
            self._process = Isolated(answers, self._chosen, first)
        return self._process.ask(question, STARTING if fresh else SILENT)
