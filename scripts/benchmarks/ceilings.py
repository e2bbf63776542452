"""What the card sustains in this very run: the yardstick of "fraction of the ceiling", not a data sheet."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from fp8.plugins.timing import SUSTAINED, capture, compare
from fp8.scripts.provenance import card

COPIED = 1 << 30  # bytes, read once and written once
SIDE = 8192  # of the square product


@dataclass(frozen=True)
class Ceilings:
    """Bytes/s of a copy (read and written), FLOP/s of large products by cuBLASLt on random data, sustained."""

    copy: float
    float8_e4m3fn: float
    bfloat16: float

    def seconds(self, bytes: float, flops: float, dtype: str) -> float:
        """What an operation takes at least whose factors are of `dtype`."""
        rate = self.float8_e4m3fn if dtype == "float8_e4m3fn" else self.bfloat16
        return max(bytes / self.copy, flops / rate)

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


# One H200, measured likewise: what a bound computed without a GPU at hand is computed with.
H200 = Ceilings(4.3e12, 1300e12, 690e12)


LOADED_SECONDS = 0.6


def measure() -> tuple[Ceilings, dict[str, str | None]]:
    """Some two seconds of work on the current GPU; and its clocks, power and temperature in the middle of it."""
    import torch

    source = torch.randn(COPIED // 4, device="cuda")
    target = torch.empty_like(source)
    # By a kernel: captured, torch's copies are the copy engine's, which is slower than the memory.
    (copy,) = compare([capture([lambda: torch.neg(source, out=target)])], SUSTAINED)
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
    found = Ceilings(2 * COPIED / copy * 1e6, flops / fp8_us * 1e6, flops / bf16_us * 1e6)
    for _ in range(int(LOADED_SECONDS / (fp8.count * fp8_us * 1e-6))):
        fp8.graph.replay()  # runs on while the card is asked
    loaded = card()
    torch.cuda.synchronize()
    return found, loaded
