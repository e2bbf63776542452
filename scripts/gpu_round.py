"""One round of every kernel on the GPU at hand: all cases of all plugins against their references, and their times.

    python -m fp8.scripts.gpu_round --output round.json            everything
    python -m fp8.scripts.gpu_round --plugin gemm --case 4096      the cases of gemm whose names contain 4096
    python -m fp8.scripts.gpu_round --no-bench                     is everything right? Within a minute, on an H200
    compute-sanitizer --report-api-errors no python -m fp8.scripts.gpu_round --small --no-bench

Each case draws fresh inputs, fills the outputs with NaN codes (0xFF), runs every tactic that the plugin offers through
its public interface, twice over one workspace (a linear once more, as in a step), and asks for: the reference's values
within the case's tolerance, the same bits in all runs, and untouched memory after the outputs. Cases are checked by
several processes side by side, then timed by one alone. A process that a case takes down, or whose GPU context it
breaks, is that case's failure; the others go on. Exits with 1 if any case fails.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fp8.plugins.base import Case
from fp8.scripts.argument_types import positive
from fp8.scripts.benchmarks.checks import Chosen, Round, Row, checking
from fp8.scripts.benchmarks.isolated import Answers, Lost, ask_all
from fp8.scripts.progress import stages
from fp8.scripts.provenance import add_argument, save_results

SILENT = 300.0  # seconds after which a case is given up: its kernels may have to be compiled, beside those of others
MEMORY = 10 << 30  # bytes of the GPU's for each process
UNFIT = "OutOfMemoryError"  # where other processes held the memory: such a case runs again, alone
Answering = Callable[[Chosen], Answers]
Progress = Callable[[str, int, int], None]
Cases = Sequence[tuple[str, Case]]


def in_turn(chosen: Chosen, cases: Cases, bench: bool, show: Progress, *, end: float) -> Iterator[list[Row]]:
    """Each case's rows, all by this process, as compute-sanitizer wants it; ends where the GPU is lost to it, and
    begins no case after `end`, of time.monotonic()."""
    import torch

    run = Round(chosen.seed, chosen.tactics)
    for done, (name, case) in enumerate(cases, 1):
        rows = run.check(name, case)
        if bench and not run.lost:
            run.time(case, rows)
        yield rows
        show("cases", done, len(cases))
        if run.lost or time.monotonic() > end:
            return
        torch.cuda.empty_cache()


def side_by_side(
    chosen: Chosen, cases: Cases, bench: bool, show: Progress, *, workers: int, make: Answering = checking
) -> list[list[Row]]:
    """Each case's rows: checked by `workers` processes, those of most traffic first; then timed by one."""
    found: list[list[Row]] = [[] for _ in cases]

    def ask(stage: str, places: Sequence[int], workers: int, timed: bool) -> None:
        questions = [(place, found[place] if timed else None) for place in places]
        answers = ask_all(make, (chosen,), questions, workers, SILENT)
        for done, (place, answer) in enumerate(zip(places, answers, strict=True), 1):
            found[place] = _rows(cases[place], found[place], answer)
            show(stage, done, len(places))

    ask("checks", sorted(range(len(cases)), key=lambda place: -cases[place][1].bytes), workers, False)
    if unfit := [place for place, rows in enumerate(found) if any(r.failure.startswith(UNFIT) for r in rows)]:
        ask("alone", unfit, 1, False)
    if bench and (right := [place for place, rows in enumerate(found) if not all(r.failure for r in rows)]):
        ask("times", right, 1, True)
    return found


def _rows(of: tuple[str, Case], before: list[Row], answer: list[Row] | Lost) -> list[Row]:
    """Where a process was lost, its case failed, whatever was right of it before."""
    if isinstance(answer, Lost):
        return [*before, Row(of[0], of[1].name, {}, failure=f"Lost: {answer}")]
    return answer


def default_workers(small: bool) -> int:
    """1 for the small cases: these are compute-sanitizer's. Else as cores and the GPU's memory allow."""
    import torch

    if small:
        return 1
    memory = torch.cuda.get_device_properties(0).total_memory
    return max(1, min(len(os.sched_getaffinity(0)), memory // MEMORY))


def table(rows: Sequence[Row], every: bool) -> Table:
    """A line for each case: its fastest tactic and its largest error; or (`every`) a line for each tactic."""
    out = Table("plugin", "case", "tactics", "error", "us", "GB/s", "TFLOP/s", "tactic", box=None)
    number: Callable[[float | None, str], str] = lambda x, form: "" if x is None else format(x, form)
    for _, group in itertools.groupby(enumerate(rows), lambda p: p[0] if every else (p[1].plugin, p[1].case)):
        same = [row for _, row in group]
        failed = [row for row in same if row.failure]
        best = failed[0] if failed else min(same, key=lambda r: r.us or 0.0)
        worst = max((r.error for r in same if r.error is not None), default=None)
        fields = best.failure or ",".join(f"{k}={v}" for k, v in best.tactic.items())
        figures = number(worst, ".1e"), number(best.us, ".2f"), number(best.gbps, ".0f"), number(best.tflops, ".0f")
        out.add_row(best.plugin, best.case, str(len(same)), *figures, fields, style="red" if failed else None)
    return out


def share(text: str) -> tuple[int, int]:
    """`3/16`: every sixteenth case from the third on, as Chosen has it."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text} is not I/N with I from 1 to N")
    return int(found[1]) - 1, int(found[2])


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plugin", default="", help="only this plugin")
    parser.add_argument("--case", default="", help="only cases whose names contain this")
    parser.add_argument("--small", action="store_true", help="only cases of little work, for compute-sanitizer")
    parser.add_argument("--no-bench", action="store_true", help="check values, time nothing")
    parser.add_argument(
        "--workers", type=positive, default=None,
        help="processes that check side by side (by cores and GPU memory; 1, which is this one, with --small)",
    )  # fmt: skip
    parser.add_argument("--tactics", type=positive, default=8, help="at most so many tactics a case (8)")
    parser.add_argument("--every-tactic", action="store_true", help="print a line for each tactic")
    parser.add_argument(
        "--share", type=share, default=(0, 1), metavar="I/N", help="only every N-th case, from the I-th on"
    )
    parser.add_argument(
        "--max_seconds", type=float, default=math.inf, help="of a round by one process: begin no case after so many"
    )
    parser.add_argument("--seed", type=int, default=None, help="of the inputs; the time by default")
    parser.add_argument("--output", type=Path, help="write the rows as JSON here")
    add_argument(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        found = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
        print(f"gpu_round: needs a Hopper GPU (sm_90), found {found}; run it on a machine with an H100 or H200.")
        return 2
    seed = int(time.time()) % 2**31 if args.seed is None else args.seed
    chosen = Chosen(args.plugin, args.case, args.small, args.tactics, seed, args.share)
    cases, workers = chosen.cases(), args.workers or default_workers(args.small)
    rows: list[Row] = []
    begin = time.monotonic()
    try:
        with stages(Console(stderr=True), disable=not sys.stderr.isatty()) as (show, _):
            one: Callable[..., Iterable[list[Row]]] = partial(in_turn, end=begin + args.max_seconds)
            do = one if workers == 1 else partial(side_by_side, workers=workers)
            for of_case in do(chosen, cases, not args.no_bench, show):
                rows += of_case
    finally:  # what was found until an interrupt, too
        status = tell(args, argv, seed, rows, len(cases), time.monotonic() - begin)
    return status


def tell(
    args: argparse.Namespace, argv: Sequence[str] | None, seed: int, rows: Sequence[Row], cases: int, seconds: float
) -> int:
    Console(width=200).print(table(rows, args.every_tactic))
    ran = len({(row.plugin, row.case) for row in rows})
    if args.output:
        facts = {"seed": seed, "cases": cases, "seconds": seconds, "rows": [asdict(row) for row in rows]}
        save_results(args.output, "gpu_round", argv, args.commit, facts)
    failed = sum(bool(row.failure) for row in rows)
    print(f"gpu_round: {ran} of {cases} cases, {len(rows)} runs, {failed} failed (seed {seed}, {seconds:.0f} s)")
    return 1 if failed or not cases or ran < cases else 0


if __name__ == "__main__":
    sys.exit(main())
