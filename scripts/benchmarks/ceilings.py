"""What the card sustains in this very run: the yardstick of "fraction of the ceiling", not a data sheet."""

from __future__ import annotations

import ctypes
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fp8.plugins.base import Kernel
from fp8.plugins.timing import SUSTAINED, Graph, capture, compare
from fp8.scripts.benchmarks.case_buffers import Functions
from fp8.scripts.provenance import card

if TYPE_CHECKING:
    import torch

READ = 1 << 32  # bytes: of less, the begin and the end of a launch are more than 1%
COPIED = 1 << 30  # bytes, read once and written once
SIDE = 8192  # of the square product
ROWS, STAGES, BLOCKS = 128, 4, 2  # of read.cu: rows of a piece, pieces on their way, blocks on a multiprocessor
READING = Kernel(str(Path(__file__).parent), "read.cu", "read", (("ROWS", ROWS), ("STAGES", STAGES)))


@dataclass(frozen=True)
class Ceilings:
    """Bytes/s of a pure read and of a copy (read and written), FLOP/s of large products by cuBLASLt on random data,
    sustained."""

    read: float
    copy: float
    float8_e4m3fn: float
    bfloat16: float

    def memory_seconds(self, bytes: float, written: float) -> float:
        """What memory takes at least to move `bytes`, of which so many are written: these, and as many that are read,
        are a copy; what is read beyond them is a pure read."""
        copied = min(bytes, 2 * written)
        return copied / self.copy + (bytes - copied) / self.read

    def product_seconds(self, flops: float, dtype: str) -> float:
        """What the tensor cores take at least, for factors of `dtype`."""
        return flops / (self.float8_e4m3fn if dtype == "float8_e4m3fn" else self.bfloat16)

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


# One H200, measured likewise: what a bound computed without a GPU at hand is computed with.
H200 = Ceilings(4.57e12, 4.3e12, 1300e12, 690e12)


LOADED_SECONDS = 0.6


def measure() -> tuple[Ceilings, dict[str, str | None]]:
    """Some two seconds of work on the current GPU; and its clocks, power and temperature in the middle of it."""
    import torch

    memory = _memory()
    a, b = (torch.randn(SIDE, SIDE, device="cuda") * 100 for _ in range(2))
    a8, b8 = (t.clamp(-448, 448).to(torch.float8_e4m3fn) for t in (a, b))
    a16, b16 = a.bfloat16(), b.bfloat16()
    out, one = torch.empty(SIDE, SIDE, dtype=torch.bfloat16, device="cuda"), torch.ones((), device="cuda")
    fp8 = capture([
        lambda: torch._scaled_mm(a8, b8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True, out=out)
    ])  # fmt: skip
    bf16 = capture([lambda: torch.mm(a16, b16.t(), out=out)])
    fp8_us, bf16_us = (compare([graph], SUSTAINED)[0] for graph in (fp8, bf16))
    flops = 2 * SIDE**3
    found = Ceilings(*memory, flops / fp8_us * 1e6, flops / bf16_us * 1e6)
    for _ in range(int(LOADED_SECONDS / (fp8.count * fp8_us * 1e-6))):
        fp8.graph.replay()  # runs on while the card is asked
    loaded = card()
    torch.cuda.synchronize()
    return found, loaded


def _memory() -> tuple[float, float]:
    """Bytes/s of a pure read and of a copy."""
    import torch

    memory = torch.empty(READ // 4, device="cuda").normal_()
    reading, read = _reading(memory)
    source, target = memory[: COPIED // 4], memory[COPIED // 4 : COPIED // 2]
    # By a kernel: captured, torch's copies are the copy engine's, which is slower than the memory.
    copying = capture([lambda: torch.neg(source, out=target)])
    read_us, copy_us = (compare([graph], SUSTAINED)[0] for graph in (reading, copying))
    return read / read_us * 1e6, 2 * COPIED / copy_us * 1e6


def _reading(memory: torch.Tensor) -> tuple[Graph, int]:
    """Launches of read.cu over `memory`, and the bytes that each reads."""
    import torch

    from fp8.plugins.cuda import Launch, matrix_map

    (function,) = Functions().of([READING])
    rows = memory.view(torch.uint8).view(-1, 128)
    grid = BLOCKS * torch.cuda.get_device_properties(memory.device).multi_processor_count
    pieces = len(rows) // (ROWS * grid)
    args = [matrix_map(rows, 128, ROWS), ctypes.c_int(pieces)]
    launch = Launch(function, 32, args, STAGES * ROWS * 128, grid, pdl=False)
    return capture([launch]), grid * pieces * ROWS * 128
