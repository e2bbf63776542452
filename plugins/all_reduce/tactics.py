"""Ways to sum over ranks: NCCL's, and the kernels over peer memory, with the sizes that suit each."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fp8.plugins.all_reduce.region import (
    MOST_BLOCKS,
    MOST_WORLD,
    MULTIPROCESSORS,
    PUSH_SLOT,
    STREAM_SLOT,
    push_constants,
    stream_constants,
)
from fp8.plugins.base import Kernel, Tensor

UNIT = 16  # bytes of a load or store
DTYPE_CODES = {"bfloat16": 0, "float16": 1, "float32": 2}  # values.cuh
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
WAIT_BYTES = 1_400_000  # that go over the wire while one more exchange is waited for: 3.5 us at 400 GB/s
PHASES = {"one_phase": 1, "two_phases": 2}


@dataclass(frozen=True)
class AllReduceTactic:
    """`method`: "nccl" is the library's, "push" push.cu, "one_phase" and "two_phases" stream.cu. At most `blocks` of
    `threads`, each of which moves `units` of 16 bytes at a time; `fp8`: with e4m3 on the wire."""

    method: str = "nccl"
    threads: int = 0
    units: int = 0
    blocks: int = 0
    fp8: bool = False

    @property
    def over_peers(self) -> bool:
        return self.method != "nccl"

    def grid(self, size: int, world: int) -> int:
        """Blocks for `size` bytes."""
        each = self.threads * self.units * UNIT * (2 if self.fp8 else 1) * (world if self.method == "two_phases" else 1)
        return min(-(-size // each), self.blocks)


NCCL = AllReduceTactic()


def row_bytes(x: Tensor) -> int | None:
    """Bytes of a row (all but the first dimension); None if that is not known when the engine is built."""
    sizes = [d for d in x.shape[1:] if isinstance(d, int)]
    return math.prod(sizes) * ITEM_BYTES[x.dtype] if len(sizes) == len(x.shape) - 1 else None


def candidates(x: Tensor, tokens: int, world: int, fp8: bool) -> list[AllReduceTactic]:
    """Tactics for up to `tokens` rows, the favourite first: as two H200s found (`mpirun -n 2 fp8-bench all_reduce`),
    and for more ranks by the bytes on the wire."""
    row = row_bytes(x)
    if row is None or not 2 <= world <= MOST_WORLD:
        return [NCCL]
    streams = [t for method in _methods(world, fp8) for t in _streams(method, world, fp8)] if row % UNIT == 0 else []
    if fp8:
        return [*(_pushes(tokens * row // 2, world, fp8) if world == 2 else ()), *streams]
    pushes = _pushes(tokens * row, world)
    return [*pushes, *streams, NCCL] if pushes and suits_push(tokens * row, world) else [*streams, *pushes, NCCL]


def suits_push(size: int, world: int) -> bool:
    """Whether one exchange of `size` bytes is the fastest: every rank sends world - 1 times the bytes then, and with
    two phases 2 (world - 1) / world times, which takes longer by a wait for the others."""
    return size * (world - 1) * (1 - 2 / world) <= WAIT_BYTES


def _methods(world: int, fp8: bool) -> list[str]:
    """Two phases send no more bytes than one does; among more than two ranks far fewer. In FP8 they round once more, so
    there is only one method."""
    if world > 2:
        return ["two_phases"]
    return ["one_phase"] if fp8 else ["two_phases", "one_phase"]


def _pushes(size: int, world: int, fp8: bool = False) -> list[AllReduceTactic]:
    """Push tactics for `size` bytes on the wire. The smallest blocks that hold it all are the fastest."""
    sizes = ((256, 1), (512, 1), (512, 2), (512, 4))[: 4 if world <= 4 else 3]
    fit = [(t, u) for t, u in sizes if MOST_BLOCKS * t * u * UNIT >= size and t * u * UNIT <= PUSH_SLOT]
    return [AllReduceTactic("push", t, u, MOST_BLOCKS, fp8) for t, u in fit]


def _streams(method: str, world: int, fp8: bool) -> list[AllReduceTactic]:
    """Stream tactics. With many ranks a thread holds a unit of each, and has no registers for a second block beside
    it."""
    sizes = ((512, 2), (512, 1), (256, 2)) if world <= 4 else ((512, 1),)
    assert all(t * u * UNIT <= STREAM_SLOT for t, u in sizes)
    blocks = (MOST_BLOCKS, MULTIPROCESSORS) if world <= 4 else (MULTIPROCESSORS,)
    return [AllReduceTactic(method, t, u, most, fp8) for t, u in sizes for most in blocks]


def kernels(tactic: AllReduceTactic, dtype: str, operation: str, world: int) -> tuple[Kernel, ...]:
    if tactic.method == "nccl":
        return ()
    values: tuple[tuple[str, int | str], ...] = (
        ("THREADS", tactic.threads),
        ("DTYPE", DTYPE_CODES[dtype]),
        ("MAXIMUM", int(operation == "max")),
        ("FP8", int(tactic.fp8)),
        ("RESIDENT", -(-tactic.blocks // MULTIPROCESSORS)),
    )
    if tactic.method == "push":
        layout, source, units = push_constants(world), "push.cu", "HELD"
    else:
        layout, source, units = stream_constants(world, PHASES[tactic.method]), "stream.cu", "UNITS"
    return (Kernel("all_reduce", source, "all_reduce", (*layout, *values, (units, tactic.units))),)
