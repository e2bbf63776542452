"""The layout of the memory that ranks share over NVLink: every rank has a region of it, and writes into all others'."""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import dataclass

MULTIPROCESSORS = 132
MOST_BLOCKS = 2 * MULTIPROCESSORS  # of a launch, all of them running at the same time
MOST_WORLD = 8  # GPUs of a host
SLOTS = 4  # of a block and a rank, where tiles stream: see stream.cu
HEADER = 65536  # bytes: counts of exchanges, then flags
FLAGS = 8192  # where flags begin
PUSH_SLOT, PUSH_SCALES = 32768, 1024  # bytes that a block gets from one rank in an exchange by push.cuh
STREAM_SLOT, STREAM_SCALES = 16384, 512  # bytes of a tile on the wire: values, and in FP8 their scales
SENT_ROWS = 8  # of a step, at most, that linear layers send: sent.cuh
SENT_AREAS = 3
LAYERS_SUMS = 1024  # bytes before the shares that decode_layers exchanges: its count of layers
LAYERS_PLACES = 4  # sums.cuh: of each of two sums of a layer two, used in turn
MOST_HIDDEN = 16384  # values of a row
PATIENCE = 30  # seconds after which a wait for another GPU fails


@dataclass(frozen=True)
class Regions:
    """All ranks' regions by their addresses in this process, where rank `rank` runs."""

    rank: int
    addresses: tuple[int, ...]

    @property
    def argument(self) -> ctypes.Array:
        """The argument of a kernel: peers.cuh's Peers."""
        return (ctypes.c_uint64 * len(self.addresses))(*self.addresses)


def _areas(world: int) -> list[int]:
    """Where each family's slots begin, and where the last ends: push, one phase, two phases, sent, layers."""
    push = 2 * MOST_BLOCKS * world * (PUSH_SLOT + PUSH_SCALES)
    stream = SLOTS * MOST_BLOCKS * world * (STREAM_SLOT + STREAM_SCALES)
    sent = SENT_AREAS * SENT_ROWS * world * (PUSH_SLOT + PUSH_SCALES)
    layers = LAYERS_SUMS + LAYERS_PLACES * world * MOST_HIDDEN * 4
    return list(itertools.accumulate((HEADER, push, stream, stream, sent, layers)))


def region_bytes(world: int) -> int:
    """Bytes of one rank's region, all of which is zero at first."""
    return _areas(world)[-1]


def constants(world: int) -> tuple[tuple[str, int | str], ...]:
    """What kernels need to know of the layout."""
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


def sent_constants(world: int) -> tuple[tuple[str, int | str], ...]:
    return (*constants(world), ("SENT_BYTES", PUSH_SLOT + PUSH_SCALES), ("SENT_BEGUN", PUSH_SLOT))


def layers_area(world: int) -> int:
    """Where decode_layers' count of layers and its shares lie."""
    return _areas(world)[4]


def layers_constants(world: int) -> tuple[tuple[str, int | str], ...]:
    return (*constants(world), ("LAYERS_AREA", f"{layers_area(world)}ull"), ("LAYERS_SUMS", LAYERS_SUMS))


def sent_area(world: int, slot: int) -> ctypes.c_uint64:
    """Where the rows lie that linear layers send in exchange `slot`: an argument of kernels."""
    assert 0 <= slot < SENT_AREAS
    return ctypes.c_uint64(_areas(world)[3] + slot * SENT_ROWS * world * (PUSH_SLOT + PUSH_SCALES))


def sent_slot(exchange: int, count: int) -> int:
    """The area of an exchange, of `count` (2 at least) that follow each other in every step: between any
    two exchanges of one area there is another."""
    return 2 if exchange == count - 1 else exchange % 2


assert HEADER >= FLAGS + 3 * MOST_BLOCKS * MOST_WORLD * 4, "flags of three kinds fit the header"
assert FLAGS >= 3 * MOST_BLOCKS * 4, "counts of three families fit before them"
