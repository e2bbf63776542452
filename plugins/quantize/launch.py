"""Tactics and launches of the row kernels: how many threads take a row, how many 16-byte units each of them holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fp8.plugins.base import Kernel, Launcher, Plugin, StepShape
from fp8.plugins.quantize.types import ROW_QUANTS, VECTOR

if TYPE_CHECKING:
    import torch

    from fp8.plugins.cuda import Function

DTYPE_CODES = {"bfloat16": 0, "float16": 1}  # convert.cuh
ACTIVATION_CODES = {"": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3}  # quantize.cu
AMAX = "amax"  # quantize.cu finds the row's largest magnitude and stops
FEW_TOKENS = 128  # fewer rows than multiprocessors: latency counts, and a row wants many threads


@dataclass(frozen=True)
class RowTactic:
    """A block of `threads`; each thread holds `held` units of 8 values."""

    threads: int
    held: int


class RowPlugin(Plugin):
    """Base of plugins whose tactic is a RowTactic, another one for few rows than for many."""

    def buckets(self, max_tokens: int) -> list[int]:
        return sorted({min(FEW_TOKENS, max_tokens), max_tokens})

    def tactic(self, fields: dict[str, Any]) -> RowTactic:
        return RowTactic(**fields)


def whole_rows(width: int, tokens: int) -> list[RowTactic]:
    """Tactics for kernels that keep a whole row in one block: up to four units a thread where that is enough."""
    units = -(-width // VECTOR)
    sizes = {held: -(-units // held // 32) * 32 for held in (1, 2, 3, 4)}
    fit = {threads: RowTactic(threads, -(-units // threads)) for threads in sizes.values() if threads <= 1024}
    tactics = list(fit.values()) or [RowTactic(1024, -(-units // 1024))]
    return sorted(tactics, key=lambda t: abs(t.held - (1 if tokens <= FEW_TOKENS else 2)))


def row_parts(width: int, tokens: int) -> list[RowTactic]:
    """Tactics for elementwise kernels, whose blocks take any part of a row."""
    units = -(-width // VECTOR)
    threads = min(256, -(-units // 32) * 32)
    held = [1, 2, 4] if tokens <= FEW_TOKENS else [2, 4, 1]
    return [RowTactic(threads, n) for n in held if threads * n < 2 * units or n == 1]


def quantize_tactics(width: int, quant: str, tokens: int) -> list[RowTactic]:
    return whole_rows(width, tokens) if quant == "per_token" else row_parts(width, tokens)


def quantize_kernel(
    tactic: RowTactic, width: int, dtype: str, activation: str, gated: bool, quant: str, scale_ub: float
) -> Kernel:
    """quantize.cu, specialised; `activation` "" is the identity."""
    constants = (
        ("WIDTH", width),
        ("THREADS", tactic.threads),
        ("HELD", tactic.held),
        ("DTYPE", DTYPE_CODES[dtype]),
        ("ACTIVATION", ACTIVATION_CODES[activation]),
        ("GATED", int(gated)),
        ("QUANT", (*ROW_QUANTS, AMAX).index(quant)),
        ("SCALE_UB", scale_ub),
    )
    return Kernel("quantize", "quantize.cu", "quantize", constants)


def quantize_launch(
    tactic: RowTactic,
    function: Function,
    width: int,
    x: torch.Tensor,
    scale: torch.Tensor | None,
    outputs: Sequence[torch.Tensor | None],
) -> Launcher:
    """quantize.cu over the step's token rows; `outputs` is y, then y_scale if the scales are per token."""
    y, y_scale = (*outputs, None)[:2]
    parts = -(-width // (VECTOR * tactic.threads * tactic.held))
    return row_launch(function, tactic.threads, [x, scale, y, y_scale], lambda step: step.tokens, parts)


def row_launch(
    function: Function,
    threads: int,
    args: Sequence[torch.Tensor | None],
    rows: Callable[[StepShape], int],
    parts: int = 1,
) -> Launcher:
    """A grid of (rows of the step, parts of a row); a step without rows launches nothing."""
    from fp8.plugins.cuda import Launch

    launch = Launch(function, threads, args)

    def run(step: StepShape) -> None:
        if rows(step):
            launch((rows(step), parts, 1))

    return run
