"""The layout of the memory that ranks share over NVLink: every rank has a region of it, and writes into all others'."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

MULTIPROCESSORS = 132
MOST_BLOCKS = 2 * MULTIPROCESSORS  # of a launch, all of them running at the same time
MOST_WORLD = 8  # GPUs of a host
SLOTS = 4  # of a block and a rank, where tiles stream: see stream.cu
HEADER = 65536  # bytes: counts of exchanges, then flags
FLAGS = 8192  # where flags begin
PUSH_SLOT, PUSH_SCALES = 32768, 1024  # bytes that a block gets from one rank in an exchange by push.cuh
STREAM_SLOT, STREAM_SCALES = 16384, 512  # bytes of a tile on the wire: values, and in FP8 their scales
PATIENCE = 30  # seconds after which a wait for another GPU fails


@dataclass(frozen=True)
class Regions:
    """All ranks' regions by their addresses in this process, where rank `rank` runs."""

    rank: int
    addresses: tuple[int, ...]

    @property
    def argument(self) -> ctypes.Array:
        """Of a kernel: peers.cuh's Peers."""
        return (ctypes.c_uint64 * len(self.addresses))(*self.addresses)


def _areas(world: int) -> list[int]:
    """Where each family's slots begin, and where the last ends: push, one phase, two phases."""
    push = 2 * MOST_BLOCKS * world * (PUSH_SLOT + PUSH_SCALES)
    stream = SLOTS * MOST_BLOCKS * world * (STREAM_SLOT + STREAM_SCALES)
    return [HEADER, HEADER + push, HEADER + push + stream, HEADER + push + 2 * stream]


def region_bytes(world: int) -> int:
    """Of one rank's region; all of it is zero at first."""
    return _areas(world)[-1]


def constants(world: int) -> tuple[tuple[str, int | str], ...]:
    """What kernels are told of the layout."""
    return (
        ("WORLD", world),
        ("MOST_BLOCKS", MOST_BLOCKS),
        ("EPOCHS", 0),
        ("FLAGS", FLAGS),
        ("PATIENCE", f"{PATIENCE * 10**9}ull"),
    )


def push_constants(world: int) -> tuple[tuple[str, int | str], ...]:
    sizes = (("PUSH_AREA", _areas(world)[0]), ("PUSH_SLOT", PUSH_SLOT), ("PUSH_SCALES", PUSH_SCALES))
    return (*constants(world), *sizes)


def stream_constants(world: int, phases: int) -> tuple[tuple[str, int | str], ...]:
    area = f"{_areas(world)[phases]}ull"
    sizes = (("STREAM_AREA", area), ("STREAM_SLOT", STREAM_SLOT), ("STREAM_SCALES", STREAM_SCALES))
    return (*constants(world), ("PHASES", phases), ("SLOTS", SLOTS // phases), *sizes)


assert HEADER >= FLAGS + 3 * MOST_BLOCKS * MOST_WORLD * 4, "flags of three kinds fit the header"
assert FLAGS >= 3 * MOST_BLOCKS * 4, "counts of three families fit before them"
