"""The trial of a site's tactics on a GPU, run in a process of its own (`timer.py`): a tactic may break that.

Each is checked against the reference on random operands, then timed as it runs in a model: in a CUDA graph, a launch
after the other with programmatic dependent launch, over weights that are not in the L2 cache (activations may be).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from fp8.plugins.base import Launcher, Plugin, StepShape, Tensor
from fp8.plugins.timing import Graph, Pace, capture, replays, sets_for

if TYPE_CHECKING:
    import torch

    from fp8.plugins.cuda import Function

# Bytes of weights that launches rotate over: more than twice the L2 cache, as every set costs its launch.
COLD = 120 << 20
CHECKED_ROWS = 64  # spread over all rows, first and last among them
# ||out - reference|| / ||reference||, of codes where the output is quantized. Kernels are within a fourth of these, as
# their cases show; one that is wrong is far off. A single row may have four times as much: it may be of few columns.
TOLERANCES = {"float8_e4m3fn": 6e-2, "bfloat16": 1e-2, "float16": 8e-3, "float32": 8e-3}
ROW_FACTOR = 4
HEAT = 1e-3  # seconds that all run; those near the best then take turns, so that clocks are the same for all
NEAR, FINAL = 1.06, Pace(2, 2e-3)
# Products of many rows meet the power limit, within tens of milliseconds: what is fastest in a burst need not be then.
HEAVY_ROWS, HEAVY = 1024, 50.0  # microseconds of a launch
HEAVY_NEAR, HEAVY_FINAL = 1.12, Pace(2, 0.04)

Tell = Callable[..., None]  # ("begun", index): that one is to blame for whatever follows; ("failed", index, why)


@dataclass(frozen=True)
class Candidate:
    tactic: Any
    kernels: tuple[tuple[bytes, str], ...]  # cubin, entry point


@dataclass(frozen=True)
class Job:
    """One site's candidates. `rows`: what its range ends at."""

    plugin: Plugin
    types: tuple[Tensor | None, ...]
    rows: int
    max_batch: int
    candidates: tuple[Candidate, ...]


class WrongResult(Exception):
    """A tactic that does not compute the reference."""


class Trial:
    """Holds trials on one device."""

    device = "cuda"

    def __init__(self) -> None:
        """Raises RuntimeError where no GPU can run the kernels."""
        import torch

        if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
            raise RuntimeError("torch sees no sm_90 GPU")

    def hold(self, job: Job, tell: Tell) -> dict[int, float]:
        """Seconds of a launch of every candidate that works, by index. What does not work is reported."""
        operands = Operands(job, self.device)
        chains = {}
        for index, candidate in enumerate(job.candidates):
            tell("begun", index)
            try:
                chains[index] = self._chain(job, candidate, operands)
            except Exception as error:
                tell("failed", index, sentence(error))
                self.synchronize()  # raises where the CUDA context is lost: this process ends, another one goes on
        return self._race(job, chains, tell)

    def _chain(self, job: Job, candidate: Candidate, operands: Operands) -> Graph:
        functions = self.functions(candidate)
        size = job.plugin.workspace(candidate.tactic, job.types, job.rows, job.max_batch)
        workspace = operands.zeros(size) if size else None
        launchers = [job.plugin.bind(candidate.tactic, functions, tensors, workspace) for tensors in operands.sets]
        operands.check(launchers[0], self.synchronize)
        return self.capture([partial(launch, operands.step(job.rows)) for launch in launchers])

    def _race(self, job: Job, chains: dict[int, Graph], tell: Tell) -> dict[int, float]:
        """Medians."""
        times: dict[int, list[float]] = {}

        def run(index: int, seconds: float) -> list[float]:
            tell("begun", index)
            return self.replays(chains[index], seconds)

        for index in chains:
            times[index] = run(index, HEAT)
        best = min((min(found) for found in times.values()), default=0.0)
        near, pace = (HEAVY_NEAR, HEAVY_FINAL) if job.rows >= HEAVY_ROWS and best >= HEAVY else (NEAR, FINAL)
        finalists = [i for i, found in times.items() if min(found) <= near * best]
        if len(finalists) > 1:
            times.update({i: [] for i in finalists})
            for turn in range(pace.turns + 1):  # the first is not counted
                for index in finalists:
                    found = run(index, pace.seconds)
                    times[index] += found if turn else []
        return {index: statistics.median(found) / 1e6 for index, found in times.items()}

    def functions(self, candidate: Candidate) -> list[Function]:
        from fp8.plugins.cuda import Module

        return [Module(code).function(entry) for code, entry in candidate.kernels]

    def capture(self, launches: Sequence[Callable[[], None]]) -> Graph:
        return capture(launches)

    def replays(self, chain: Graph, seconds: float) -> list[float]:
        return replays(chain, seconds)

    def synchronize(self) -> None:
        import torch

        torch.cuda.synchronize()


class Operands:
    """Random operands of a job: sets of its weights, which launches rotate over, beside one set of activations."""

    def __init__(self, job: Job, device: str) -> None:
        self.job, self.device = job, device
        self.outputs = [self._random(t) for t in job.plugin.infer(job.types)]
        activations = [None if t is None or _fixed(t) else self._random(t) for t in job.types]
        first = self._weights()
        size = sum(w.nbytes for w in first if w is not None)
        count = sets_for(size, COLD) if size else 1
        weights = [first, *(self._weights() for _ in range(count - 1))]
        self.sets = [
            [*(a if a is not None else w for a, w in zip(activations, one, strict=True)), *self.outputs]
            for one in weights
        ]
        self._expected = self._reference()

    def _weights(self) -> list[torch.Tensor | None]:
        return [self._random(t) if t is not None and _fixed(t) else None for t in self.job.types]

    def step(self, rows: int) -> StepShape:
        return StepShape(rows, 1, 0, rows, rows, rows)

    def zeros(self, size: int) -> torch.Tensor:
        import torch

        return torch.zeros(size, dtype=torch.uint8, device=self.device)

    def _random(self, type_: Tensor) -> torch.Tensor:
        """Power, and so the clock, depends on the data: codes and activations of unit variance, 16-bit weights such
        that outputs are near it, and scales and biases (float32) near 0.1."""
        import torch

        shape = [self.job.rows if isinstance(d, str) else d for d in type_.shape]
        dtype = getattr(torch, type_.dtype)
        if dtype == torch.float32:
            return torch.empty(shape, device=self.device).uniform_(0.05, 0.15)
        values = torch.randn(shape, device=self.device)
        if dtype.itemsize > 1 and _fixed(type_):
            values *= shape[-1] ** -0.5
        return values.to(dtype)

    @cached_property
    def _rows(self) -> torch.Tensor:
        import torch

        return torch.linspace(0, self.job.rows - 1, CHECKED_ROWS, device=self.device).round().long().unique()

    def _reference(self) -> tuple[torch.Tensor, ...]:
        """What the reference gives for the checked rows."""
        inputs = [
            t if t is None or type_ is None or _fixed(type_) else t[self._rows]
            for t, type_ in zip(self.sets[0], self.job.types, strict=False)
        ]
        return self.job.plugin.reference(*inputs, step=self.step(len(self._rows)))

    def check(self, launch: Launcher, synchronize: Callable[[], None]) -> None:
        """Launches over the first set, with all rows and with some. Raises WrongResult."""
        import torch

        rows = self.job.rows
        for live in dict.fromkeys((rows, max(1, rows - rows // 4 - 1))):
            for out in self.outputs:
                out.view(torch.uint8).fill_(255)  # NaN in every float format
            launch(self.step(live))
            synchronize()
            checked = self._rows < live
            for place, (out, wanted) in enumerate(zip(self.outputs, self._expected, strict=True)):
                if out.dtype.is_floating_point and bool(out[:live].float().isnan().any()):
                    raise WrongResult(f"output {place} is not written everywhere, or has NaN, with {live} rows")
                _compare(f"output {place} with {live} rows", out[self._rows[checked]], wanted[checked])


def _fixed(type_: Tensor) -> bool:
    """Whether it has one size for all steps, as weights have."""
    return all(isinstance(d, int) for d in type_.shape)


def _compare(what: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    limit = TOLERANCES.get(str(found.dtype).removeprefix("torch."), 0.0)
    found, wanted = (t.float().double().reshape(len(t), -1) for t in (found, wanted))
    errors, sizes = (found - wanted).norm(dim=1), wanted.norm(dim=1)
    whole = float(errors.norm() / sizes.norm().clamp_min(1e-30))
    worst = float((errors / sizes.clamp_min(1e-30)).max())
    if not (whole <= limit and worst <= ROW_FACTOR * limit):
        raise WrongResult(
            f"{what}: error {whole:.3g} ({worst:.3g} in a row) against the reference, at most {limit:.3g}"
        )


def sentence(error: BaseException) -> str:
    text = str(error).strip() or repr(error)
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}"


def serve(connection: Connection, start: Callable[[], Trial]) -> None:
    """The process: answers every job with reports and ("timed", seconds), until the other end is closed, or with
    ("skipped", why) and ends."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends its children
    tell: Tell = lambda *values: connection.send(values)
    try:
        trial = start()
    except Exception as error:
        return tell("refused", sentence(error))
    tell("ready")
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            tell("timed", trial.hold(job, tell))
        except Exception as error:
            return tell("skipped", sentence(error))
