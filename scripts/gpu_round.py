"""One round of every kernel on the GPU at hand: all cases of all plugins against their references, and their times.

    python -m fp8.scripts.gpu_round --output round.json            everything
    python -m fp8.scripts.gpu_round --plugin gemm --case 4096      the cases of gemm whose names contain 4096
    compute-sanitizer --report-api-errors no python -m fp8.scripts.gpu_round --small --no-bench

Each case draws fresh inputs, fills the outputs with NaN codes (0xFF), runs every tactic that the plugin offers through
its public interface, twice over one workspace, and asks for: the reference's values within the case's tolerance, the
same bits in both runs, and untouched memory behind the outputs. Exits with 1 if any case fails.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from fp8.plugins import compile
from fp8.plugins.base import Case
from fp8.plugins.timing import BRIEF, compare
from fp8.scripts.benchmarks.case_buffers import CaseBuffers, Functions, all_cases
from fp8.scripts.provenance import add_argument, provenance

if TYPE_CHECKING:
    import torch

    from fp8.plugins.cuda import Function

SMALL = 16 << 20  # bytes of traffic of the cases that `--small` keeps


@dataclass
class Row:
    """What became of one tactic of one case. Times are the median over graph replays, in microseconds a launch."""

    plugin: str
    case: str
    tactic: dict[str, Any]
    error: float | None = None
    tolerance: float = 0.0
    us: float | None = None
    gbps: float | None = None
    tflops: float | None = None
    failure: str = ""


class CheckedCase(CaseBuffers):
    """A case whose tactics are held against the reference."""

    def check(self, tactic: Any, functions: Sequence[Function]) -> float:
        """The largest relative error over the outputs. Raises AssertionError with what is wrong."""
        import torch

        workspace, runs = self.workspace(tactic), []
        for _ in range(2):
            inputs = self.fresh_inputs()
            outputs, guards = self.outputs()
            self.plugin.bind(tactic, functions, [*inputs, *outputs], workspace)(self.case.step)
            torch.cuda.synchronize()
            assert all(bool((g == 255).all()) for g in guards), "memory behind an output was written"
            if self.places:
                outputs += self.plugin.unpack_cache(*(inputs[i] for i in self.places))
            runs.append(outputs)
        for i, (first, second) in enumerate(zip(*runs, strict=True)):
            same = torch.equal(first.view(torch.uint8), second.view(torch.uint8))
            assert same, f"output {i} differs between two runs on the same inputs"
        errors = [error(got, want) for got, want in zip(runs[0], self.expected, strict=True)]
        for i, found in enumerate(errors):
            assert found <= self.case.tolerance, f"output {i}: error {found:.3g} exceeds {self.case.tolerance:.3g}"
        return max(errors)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected|| in float64; infinite where they differ in NaN or, for integers, at all."""
    import torch

    assert found.shape == expected.shape and found.dtype == expected.dtype, (found.dtype, expected.dtype, found.shape)
    if not found.dtype.is_floating_point:
        return 0.0 if torch.equal(found, expected) else float("inf")
    found, expected = found.float().double(), expected.float().double()
    if not torch.equal(found.isnan(), expected.isnan()) or not torch.equal(found.isinf(), expected.isinf()):
        return float("inf")
    difference = (found - expected).nan_to_num(0.0, 0.0, 0.0).norm()
    if difference == 0:
        return 0.0
    return float(difference / expected.nan_to_num(0.0, 0.0, 0.0).norm())


class Round:
    """Runs cases, keeps rows, and loads each cubin once."""

    def __init__(self, seed: int, bench: bool, tactics: int, device: str = "cuda") -> None:
        self.seed, self.bench, self.most, self.device = seed, bench, tactics, device
        self.rows: list[Row] = []
        self.functions = Functions()

    def run(self, name: str, case: Case) -> None:
        """All tactics of a case, the plugin's favourites first, at most `tactics` of them."""
        try:
            bench = CheckedCase(case, self.seed, self.device)
            tactics = case.plugin.tactics(bench.types, case.step.tokens)[: self.most]
            compile.compile_all(k for t in tactics for k in case.plugin.kernels(t, bench.types))
        except Exception as failed:
            self.rows.append(Row(name, case.name, {}, failure=_sentence(failed)))
            return
        for tactic in tactics:
            row = Row(name, case.name, asdict(tactic), tolerance=case.tolerance)
            self.rows.append(row)
            self._run_tactic(bench, tactic, row)

    def _run_tactic(self, bench: CheckedCase, tactic: Any, row: Row) -> None:
        try:
            functions = self.functions.of(bench.plugin.kernels(tactic, bench.types))
            row.error = bench.check(tactic, functions)
            if self.bench:
                (row.us,) = compare([bench.captured(tactic, functions)], BRIEF)
                row.gbps = bench.case.bytes / row.us / 1e3 if bench.case.bytes else None
                row.tflops = bench.case.flops / row.us / 1e6 if bench.case.flops else None
        except Exception as failed:
            row.failure = _sentence(failed)
            self._check_context()

    @staticmethod
    def _check_context() -> None:
        """After an illegal access every later call fails too: end the round there."""
        import torch

        try:
            torch.cuda.synchronize()
        except Exception as broken:
            raise SystemExit(f"gpu_round: the CUDA context is lost ({_sentence(broken)}); see the last row") from None


def _sentence(failed: BaseException) -> str:
    text = str(failed).strip() or repr(failed)
    place = traceback.extract_tb(failed.__traceback__)[-1]
    return f"{type(failed).__name__}: {text.splitlines()[0][:300]} ({Path(place.filename).name}:{place.lineno})"


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


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plugin", default="", help="only this plugin")
    parser.add_argument("--case", default="", help="only cases whose names contain this")
    parser.add_argument("--small", action="store_true", help="only cases of little work, for compute-sanitizer")
    parser.add_argument("--no-bench", action="store_true", help="check values, time nothing")
    parser.add_argument("--tactics", type=int, default=8, help="at most so many tactics a case (8)")
    parser.add_argument("--every-tactic", action="store_true", help="print a line for each tactic")
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
    alone = [(n, c) for n, c in all_cases(args.plugin, args.case) if not c.plugin.collective]  # those need several GPUs
    cases = [(n, c) for n, c in alone if not args.small or _is_small(c)]
    seed = int(time.time()) % 2**31 if args.seed is None else args.seed
    run = Round(seed, not args.no_bench, args.tactics)
    try:
        for name, case in cases:
            run.run(name, case)
            torch.cuda.empty_cache()
    finally:
        Console(width=200).print(table(run.rows, args.every_tactic))
        if args.output:
            rows = [asdict(r) for r in run.rows]
            args.output.write_text(
                json.dumps({**provenance("gpu_round", argv, args.commit), "seed": seed, "rows": rows}, indent=1)
            )
    failed = [r for r in run.rows if r.failure]
    print(f"gpu_round: {len(cases)} cases, {len(run.rows)} runs, {len(failed)} failed (seed {seed})")
    return 1 if failed or not cases else 0


def _is_small(case: Case) -> bool:
    return case.bytes <= SMALL and case.flops <= 10**10


if __name__ == "__main__":
    sys.exit(main())
