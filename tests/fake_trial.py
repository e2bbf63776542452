"""A plugin whose tactics fail in every way that kernels do, and trials on the CPU, for processes to import."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from fp8.builder.trial import Trial
from fp8.builder.tune import Site
from fp8.plugins.base import Kernel, Launcher, Plugin, StepShape, Tensor

TYPES = (Tensor("bfloat16", ("T", 64)), Tensor("bfloat16", (64,)))
ROWS = 16
FAULTS = ("raises", "wrong", "one_row", "unwritten", "ragged", "killed", "hangs", "lost")


@dataclass(frozen=True)
class Way:
    kind: str
    microseconds: float = 10.0


@dataclass(frozen=True)
class Scaled(Plugin):
    """y = x * w, in `ways` such as "right:20 hangs:1"."""

    name: ClassVar[str] = "scaled"
    ways: str = "right:10"

    def infer(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        return (Tensor("bfloat16", ("T", 64)),)

    def reference(self, *inputs: Any, step: StepShape) -> tuple[torch.Tensor, ...]:
        return (inputs[0] * inputs[1],)

    def tactics(self, inputs: Sequence[Tensor | None], tokens: int) -> list[Way]:
        pairs = (way.split(":") for way in self.ways.split())
        return [Way(kind, float(microseconds)) for kind, microseconds in pairs]

    def tactic(self, fields: dict[str, Any]) -> Way:
        return Way(**fields)

    def kernels(self, tactic: Way, inputs: Sequence[Tensor | None]) -> tuple[Kernel, ...]:
        return ()

    def bind(self, tactic: Way, functions: Sequence, tensors: Sequence, workspace: None) -> Launcher:
        x, w, y = tensors

        def launch(step: StepShape) -> None:
            fail(tactic.kind)
            rows = step.tokens
            y[: rows - (tactic.kind == "unwritten")] = (x * w)[: rows - (tactic.kind == "unwritten")]
            if tactic.kind == "wrong":
                y[:rows] *= 1.1
            if tactic.kind == "one_row":
                y[rows - 1] *= 1.1
            if tactic.kind == "ragged" and rows < ROWS:
                y[0] = 0

        launch.microseconds = tactic.microseconds  # type: ignore[attr-defined]
        return launch


def fail(kind: str) -> None:
    if kind == "raises":
        raise RuntimeError("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES")
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "hangs":
        time.sleep(600)
    if kind == "lost":
        CpuTrial.lost = True


class CpuTrial(Trial):
    """Reports the microseconds that a tactic asks for."""

    device = "cpu"
    lost = False  # a CUDA context after an illegal access

    def __init__(self) -> None: ...

    def functions(self, candidate: Any) -> list:
        return []

    def capture(self, launches: Sequence[Callable[[], None]]) -> Any:
        return launches[0].func.microseconds  # type: ignore[attr-defined]

    def replays(self, chain: Any, seconds: float) -> list[float]:
        """From 50 us on, those of whole microseconds are 8% slower in a burst than under load."""
        return [chain * (1.08 if seconds < 0.02 and chain >= 50 and chain % 1 == 0 else 1.0)]

    def synchronize(self) -> None:
        if self.lost:
            raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")


class NoGpu(CpuTrial):
    def __init__(self) -> None:
        raise RuntimeError("torch sees no sm_90 GPU")


class SmallGpu(CpuTrial):
    """Has no room for operands."""

    def hold(self, job: Any, tell: Callable[..., None]) -> dict[int, float]:
        if job.rows > ROWS:
            raise torch.OutOfMemoryError("tried to allocate 100 GiB")
        return super().hold(job, tell)


FLOATS = (Tensor("float32", ("T", 64)), Tensor("float32", (64,)))
FAULTY = {"right": 0, "wrong": 1, "illegal_address": 2, "endless": 3, "refused": 4, "too_much_shared": 0}


@dataclass(frozen=True)
class Faulty(Scaled):
    """The same in float32 by kernels, for a GPU."""

    name: ClassVar[str] = "faulty"

    def infer(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        return FLOATS[:1]

    def kernels(self, tactic: Way, inputs: Sequence[Tensor | None]) -> tuple[Kernel, ...]:
        return (Kernel(str(Path(__file__).parent), "faulty.cu", "faulty", (("FAULT", FAULTY[tactic.kind]),)),)

    def bind(self, tactic: Way, functions: Sequence, tensors: Sequence, workspace: None) -> Launcher:
        from fp8.plugins.cuda import Launch

        launch = Launch(functions[0], 64, tensors, 400 * 1024 if tactic.kind == "too_much_shared" else 0)
        return lambda step: launch(step.tokens)


SLOW, FAST = Way("right", 20.0), Way("right", 5.0)
BF16 = (Tensor("bfloat16", ("T", 64)), Tensor("bfloat16", (64, 64)), None, None, None)


def site(*ways: Way, rows: int = ROWS) -> Site:
    return Site(Scaled(" ".join(f"{w.kind}:{w.microseconds}" for w in ways)), TYPES, rows, "model.layers.0")


def ignore(*_: object) -> None: ...
