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
import importlib
import itertools
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from fp8.plugins import base, compile
from fp8.plugins.base import Case, Plugin, Tensor
from fp8.scripts.provenance import add_argument, provenance

if TYPE_CHECKING:
    import torch

    from fp8.plugins.cuda import Function

GUARD = 4096  # bytes behind every output that must stay as they are
COLD = 200 << 20  # timed launches rotate over at least this many bytes, four times the L2 cache
SMALL = 16 << 20  # bytes of traffic of the cases that `--small` keeps
LAUNCHES = 24  # per graph replay


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


def all_cases(plugin: str = "", part: str = "") -> list[tuple[str, Case]]:
    """(plugin name, case) of `cases.py` and `*_cases.py` in a plugin's folder: `CASES`, or what `cases()` returns."""
    found = []
    for name in base.names():
        if plugin and name != plugin:
            continue
        folder = Path(importlib.import_module(f"fp8.plugins.{name}").__path__[0])
        for path in sorted(folder.glob("*cases.py")):
            module = importlib.import_module(f"fp8.plugins.{name}.{path.stem}")
            cases = module.CASES if hasattr(module, "CASES") else module.cases()
            found += [(name, case) for case in cases if part in case.name]
    return found


def types(tensors: Sequence[torch.Tensor | None]) -> list[Tensor | None]:
    return [t if t is None else Tensor(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for t in tensors]


def caches(plugin: Plugin) -> tuple[int, int] | None:
    """Places of the key and value cache among the inputs of a plugin that has them in a layout of its own."""
    if not hasattr(plugin, "pack_cache"):
        return None
    names = importlib.import_module(type(plugin).__module__).INPUTS
    return names.index("key_cache"), names.index("value_cache")


class Bench:
    """The buffers of one case: inputs in the kernels' layout, poisoned outputs, the reference's results."""

    def __init__(self, case: Case, seed: int, device: str) -> None:
        import torch

        self.case, self.plugin, self.device = case, case.plugin, device
        generator = torch.Generator(device).manual_seed(seed)
        given = case.make(generator, device)
        self.types = types(given)
        self.plugin.check(self.types)
        self.output_types = self.plugin.infer(self.types)
        self.places = caches(self.plugin)
        self.inputs = self._packed(given)
        copies = [t if t is None else t.clone() for t in given]
        self.expected = list(self.plugin.reference(*copies, step=case.step))
        if self.places:  # the reference wrote its caches in place
            self.expected += [copies[i] for i in self.places]

    def _packed(self, given: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        inputs = list(given)
        if self.places:
            key, value = self.places
            inputs[key], inputs[value] = self.plugin.pack_cache(given[key], given[value])
        return inputs

    def fresh_inputs(self) -> list[torch.Tensor | None]:
        return [t if t is None else t.clone() for t in self.inputs]

    def outputs(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Outputs full of 0xFF (NaN in every float format), and the guards behind them."""
        import torch

        values, guards = [], []
        for t in self.output_types:
            dtype = getattr(torch, t.dtype)
            size = torch.Size(t.shape).numel() * dtype.itemsize
            memory = torch.full((size + GUARD,), 255, dtype=torch.uint8, device=self.device)
            values.append(memory[:size].view(dtype).view(t.shape))
            guards.append(memory[size:])
        return values, guards

    def workspace(self, tactic: Any) -> torch.Tensor | None:
        import torch

        step = self.case.step
        size = self.plugin.workspace(tactic, self.types, max(step.tokens, step.logits_rows), step.sequences)
        return torch.zeros(size, dtype=torch.uint8, device=self.device) if size else None

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

    def time(self, tactic: Any, functions: Sequence[Function]) -> float:
        """Microseconds a launch: a CUDA graph of launches over rotating buffers, the median of its replays."""
        import torch

        workspace = self.workspace(tactic)
        size = sum(t.nbytes for t in [*self.inputs, *self.outputs()[0]] if t is not None)
        sets = [[*self.fresh_inputs(), *self.outputs()[0]] for _ in range(max(2, min(32, -(-COLD // size))))]
        launches = [self.plugin.bind(tactic, functions, tensors, workspace) for tensors in sets]
        count = max(LAUNCHES, len(launches))
        launches[0](self.case.step)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for launch in itertools.islice(itertools.cycle(launches), count):
                launch(self.case.step)
        return 1000 * replay_time(graph) / count


def replay_time(graph: torch.cuda.CUDAGraph, budget: float = 0.08) -> float:
    """Median milliseconds of a replay, after warming up, within about `budget` seconds."""
    import torch

    def timed() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    timed()
    repeats = max(5, min(100, int(1000 * budget / max(timed(), 1e-3))))
    return statistics.median(timed() for _ in range(repeats))


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
        self._functions: dict[str, Function] = {}

    def run(self, name: str, case: Case) -> None:
        """All tactics of a case, the plugin's favourites first, at most `tactics` of them."""
        try:
            bench = Bench(case, self.seed, self.device)
            tactics = case.plugin.tactics(bench.types, case.step.tokens)[: self.most]
            compile.compile_all(k for t in tactics for k in case.plugin.kernels(t, bench.types))
        except Exception as failed:
            self.rows.append(Row(name, case.name, {}, failure=_sentence(failed)))
            return
        for tactic in tactics:
            row = Row(name, case.name, asdict(tactic), tolerance=case.tolerance)
            self.rows.append(row)
            self._run_tactic(bench, tactic, row)

    def _run_tactic(self, bench: Bench, tactic: Any, row: Row) -> None:
        try:
            functions = [self.function(k) for k in bench.plugin.kernels(tactic, bench.types)]
            row.error = bench.check(tactic, functions)
            if self.bench:
                row.us = bench.time(tactic, functions)
                row.gbps = bench.case.bytes / row.us / 1e3 if bench.case.bytes else None
                row.tflops = bench.case.flops / row.us / 1e6 if bench.case.flops else None
        except Exception as failed:
            row.failure = _sentence(failed)
            self._check_context()

    def function(self, kernel: base.Kernel) -> Function:
        from fp8.plugins.cuda import Module

        cubin = compile.compile_kernel(kernel)
        if cubin.key not in self._functions:
            self._functions[cubin.key] = Module(cubin.code).function(kernel.entry)
        return self._functions[cubin.key]

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
    found = [(n, c) for n, c in all_cases(args.plugin, args.case) if not c.plugin.collective]  # those need several GPUs
    cases = [(n, c) for n, c in found if not args.small or _is_small(c)]
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
