"""Every tactic of a plugin's case against the plugin's reference, and its time."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8.plugins import compile
from fp8.plugins.base import Case
from fp8.plugins.timing import BRIEF, compare
from fp8.scripts.benchmarks.case_buffers import CaseBuffers, Functions, all_cases
from fp8.scripts.benchmarks.isolated import Answers
from fp8.scripts.benchmarks.lone_rank import runs_alone

if TYPE_CHECKING:
    import torch

    from fp8.plugins.cuda import Function

SMALL = 16 << 20  # bytes of traffic of the cases that `small` keeps


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


@dataclass(frozen=True)
class Chosen:
    """Which cases; `tactics`: at most so many of each, the plugin's favourites first; `seed`: of the inputs; `share`:
    the first of them and how many further the next one is."""

    plugin: str = ""
    part: str = ""
    small: bool = False
    tactics: int = 8
    seed: int = 0
    share: tuple[int, int] = (0, 1)

    def cases(self) -> list[tuple[str, Case]]:
        """(plugin name, case); without those that need several GPUs."""
        alone = [(name, case) for name, case in all_cases(self.plugin, self.part) if runs_alone(case.plugin)]
        fit = [(name, case) for name, case in alone if not self.small or _is_small(case)]
        return fit[self.share[0] :: self.share[1]]


def _is_small(case: Case) -> bool:
    return case.bytes <= SMALL and case.flops <= 10**10


class CheckedCase(CaseBuffers):
    """A case whose tactics are held against the reference."""

    def check(self, tactic: Any, functions: Sequence[Function]) -> float:
        """The largest relative error over the outputs; a linear is launched as in a step, too. Raises AssertionError
        with what is wrong."""
        import torch

        workspace, runs = self.workspace(tactic), []
        in_step = {"early": True, "windowed": True} if self.plugin.hands_over and self.comm is None else {}
        for further in ({}, {}, in_step) if in_step else ({}, {}):
            inputs = self.fresh_inputs()
            outputs, guards = self.outputs()
            self.bind(tactic, functions, [*inputs, *outputs], workspace, **further)(self.case.step)
            torch.cuda.synchronize()
            assert all(bool((g == 255).all()) for g in guards), "memory after an output was written"
            for pair in self.places:
                outputs += self.plugin.unpack_cache(*(inputs[i] for i in pair))
            outputs += [inputs[i] for i in self.plugin.updates]
            runs.append(outputs)
        for i, (first, *others) in enumerate(zip(*runs, strict=True)):
            same = all(torch.equal(first.view(torch.uint8), other.view(torch.uint8)) for other in others)
            assert same, f"output {i} differs between runs on the same inputs"
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
    """Checks and times cases, loads each cubin once. `lost`: after an illegal access every later call would fail."""

    def __init__(self, seed: int, tactics: int, device: str = "cuda") -> None:
        self.seed, self.most, self.device = seed, tactics, device
        self.lost = ""
        self.functions = Functions()

    def check(self, name: str, case: Case) -> list[Row]:
        """A row for each tactic; the last one says so where the GPU is lost to this process."""
        try:
            buffers = CheckedCase(case, self.seed, self.device)
            tactics = case.plugin.tactics(buffers.types, case.step.tokens)[: self.most]
            compile.compile_all(k for t in tactics for k in case.plugin.kernels(t, buffers.types))
        except Exception as failed:
            return [Row(name, case.name, {}, failure=sentence(failed))]
        rows: list[Row] = []
        for tactic in tactics:
            rows.append(Row(name, case.name, asdict(tactic), tolerance=case.tolerance))
            try:
                rows[-1].error = buffers.check(tactic, self._functions(buffers, tactic))
            except Exception as failed:
                self._fail(rows[-1], failed)
            if self.lost:
                break
        return rows

    def time(self, case: Case, rows: Sequence[Row]) -> None:
        """Times the tactics that were right; not where others would be waited for."""
        if case.plugin.collective:
            return
        buffers = CheckedCase(case, self.seed, self.device)
        for row in rows:
            if row.failure or self.lost:
                continue
            tactic = case.plugin.tactic(row.tactic)
            try:
                (row.us,) = compare([buffers.captured(tactic, self._functions(buffers, tactic))], BRIEF)
                row.gbps = case.bytes / row.us / 1e3 if case.bytes else None
                row.tflops = case.flops / row.us / 1e6 if case.flops else None
            except Exception as failed:
                self._fail(row, failed)

    def _functions(self, buffers: CaseBuffers, tactic: Any) -> list[Function]:
        return self.functions.of(buffers.plugin.kernels(tactic, buffers.types))

    def _fail(self, row: Row, failed: Exception) -> None:
        import torch

        row.failure = sentence(failed)
        try:
            torch.cuda.synchronize()
        except Exception as broken:
            self.lost = sentence(broken)
            row.failure += f"; the CUDA context is lost ({self.lost}), what came after it was not run"


def sentence(failed: BaseException) -> str:
    text = str(failed).strip() or repr(failed)
    place = traceback.extract_tb(failed.__traceback__)[-1]
    return f"{type(failed).__name__}: {text.splitlines()[0][:300]} ({Path(place.filename).name}:{place.lineno})"


def checking(chosen: Chosen) -> Answers:
    """Answers, in a process of its own, the place of a case among the chosen ones with its rows, or, if its rows are
    given, with these and their times."""
    import torch

    torch.set_num_threads(1)  # as many processes as cores
    cases, run = chosen.cases(), Round(chosen.seed, chosen.tactics)

    def answer(question: tuple[int, Sequence[Row] | None]) -> tuple[Sequence[Row], bool]:
        place, rows = question
        name, case = cases[place]
        if rows is None:
            rows = run.check(name, case)
        else:
            run.time(case, rows)
        if not run.lost:
            torch.cuda.empty_cache()  # others want the memory
        return rows, not run.lost

    return answer
