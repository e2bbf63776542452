"""Cases of gemm: ragged sizes for correctness, Llama-7B's linears for speed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fp8.plugins.base import SCALE_BLOCK, Case, StepShape, Tensor
from fp8.plugins.gemm.plugin import Gemm
from fp8.plugins.gemm.types import BYTES, GROUP_ROWS

E4M3 = torch.float8_e4m3fn
OPERANDS = 5  # inputs of a linear
Types = Sequence[Tensor | None]
FAST = (
    "the tensor cores add e4m3 products with about 14 bits of fraction (||error|| near 1e-3 of the result at "
    "K = 4096), and the output is rounded once (bfloat16 unit roundoff 2^-9, rms 1.6e-3; float16 an eighth of it)"
)
PRECISE = (
    "the tensor cores add 128 products at most before float32 takes over: an eighth to a tenth of FAST's error, beside "
    "the output's rounding (none to speak of in float32; bfloat16 rms 1.6e-3)"
)
EXACT = "exact 16-bit products, float32 sums in another order, one rounding (bfloat16 unit roundoff 2^-9, rms 1.6e-3)"


def fp8_normal(shape: tuple[int, int], generator: torch.Generator, device: str) -> torch.Tensor:
    """Gaussian codes over most of e4m3's range, as amax / 448 quantization leaves them, with a few at the ends."""
    t = torch.randn(shape, device=device, generator=generator) * 100
    return t.clamp(-448, 448).to(E4M3)


def scales(n: int, parts: int, generator: torch.Generator, device: str) -> torch.Tensor:
    """[n]: one scale per part of a merged linear, or (parts = n) one per row."""
    s = 0.5 + torch.rand(parts, device=device, generator=generator)
    return (s * 2e-4).repeat_interleave(-(-n // parts))[:n].contiguous()


def operands(
    rows: int, n: int, k: int, dtype: str, mode: str, bias: bool, generator: torch.Generator, device: str
) -> list[torch.Tensor | None]:
    """x, w, x_scale, w_scale, bias; `mode` is "static" (scalar x, three parts), "rowwise", "block", "block8" (scales
    per 8 rows of w, not 128) or "none"."""
    kind = getattr(torch, dtype)
    if dtype == "float8_e4m3fn":
        x, w = fp8_normal((rows, k), generator, device), fp8_normal((n, k), generator, device)
    else:
        x = torch.randn(rows, k, device=device, generator=generator).to(kind)
        w = (torch.randn(n, k, device=device, generator=generator) * k**-0.5).to(kind)
    x_scale = w_scale = b = None
    if mode == "rowwise":
        x_scale, w_scale = scales(rows, rows, generator, device) * 10, scales(n, n, generator, device)
    elif mode in ("block", "block8"):
        x_scale = scales(rows * k // SCALE_BLOCK, rows * k // SCALE_BLOCK, generator, device).view(rows, -1) * 10
        groups = -(-n // (GROUP_ROWS if mode == "block8" else SCALE_BLOCK)) * k // SCALE_BLOCK
        w_scale = scales(groups, groups, generator, device).view(-1, k // SCALE_BLOCK)
    elif mode == "static":
        x_scale, w_scale = torch.tensor([0.0021], device=device), scales(n, min(3, n), generator, device)
    if bias:
        b = torch.randn(n, device=device, generator=generator)
    return [x, w, x_scale, w_scale, b]


def apart(linear: Gemm, inputs: Types) -> tuple[Types, Types]:
    """Splits inputs of a linear and of what takes its y first: the linear's, and the other's."""
    return inputs[:OPERANDS], [*linear.infer(inputs[:OPERANDS]), *inputs[OPERANDS:]]


def exact_operands(
    kind: str, rows: int, n: int, k: int, generator: torch.Generator, device: str
) -> list[torch.Tensor | None]:
    """x, w, x_scale, w_scale and bias, small whole numbers times powers of two, whose sums are exact in any order. At
    k = 512 they have a variance near 1. `kind` is "fp8", "rowwise" or "16 bits"."""
    x, w = (torch.randint(-1, 2, (count, k), generator=generator, device=device) for count in (rows, n))
    unit = 2.0**-4  # k * 4 / 9 such products have a standard deviation of 15
    if kind == "16 bits":
        return [x.to(torch.bfloat16), (w * unit).to(torch.bfloat16), None, None, None]
    x, w = x.to(E4M3), w.to(E4M3)
    x_scale = torch.ones(rows if kind == "rowwise" else 1, device=device)
    return [x, w, x_scale, torch.full((n,), unit, device=device), None]


def case(
    rows: int,
    n: int,
    k: int,
    mode: str = "static",
    dtype: str = "float8_e4m3fn",
    out: str = "bfloat16",
    bias: bool = False,
    logits: bool = False,
    accumulation: str = "fast",
) -> Case:
    def make(generator: torch.Generator, device: str) -> list[torch.Tensor | None]:
        return operands(rows, n, k, dtype, mode, bias, generator, device)

    step = StepShape(rows, 1, 0, rows, rows, rows if logits else 1)
    moved = (rows * k + n * k) * BYTES[dtype] + rows * n * BYTES[out]
    fp8 = dtype == "float8_e4m3fn"
    name = f"{rows}x{n}x{k} {dtype} {mode} to {out}{' bias' if bias else ''}{' logits' if logits else ''}"
    tolerance, why = (4e-3, FAST) if fp8 else (2.5e-3, EXACT)
    if accumulation == "precise":
        name, why = f"{name} precise", PRECISE
        tolerance = 3e-4 if out == "float32" else 2e-3
    plugin = Gemm(out, "L" if logits else "T", accumulation)
    return Case(name, plugin, make, step, tolerance, why, moved, 2 * rows * n * k)


RAGGED = [case(rows, 384, 320) for rows in (1, 7, 63, 65, 127, 129, 300)]
RAGGED += [
    case(65, 1003, 864, out="float32"),
    case(5, 1003, 864, out="float32", logits=True),
    case(129, 1003, 864),
    case(300, 1002, 16, "rowwise", bias=True),
    case(7, 336, 128),  # K of one stage
    case(129, 576, 4096, "rowwise"),
    case(300, 4096, 864, "rowwise", out="float16", bias=True),
    *(case(rows, 392, 384, mode, bias=True) for rows in (1, 7, 65, 129, 300) for mode in ("block", "block8")),
    *(case(515, 1536, k, mode, out="float16") for k in (2048, 2304) for mode in ("block", "block8")),
    case(127, 264, 328, "none", "bfloat16", bias=True),
    case(33, 1003, 864, "none", "bfloat16", "float32", logits=True),
    case(300, 520, 1000, "none", "float16", "float16"),
    case(515, 1536, 2048, "none", "bfloat16"),
    case(1500, 1536, 2064),
    case(3300, 264, 4096),  # the raster's second group has two row blocks
    case(3300, 1032, 1536, "block", bias=True),  # tiles of 256 rows past both ends, whose scales come by TMA
]
PRECISE_CASES = [
    *(case(rows, 392, 320, bias=True, accumulation="precise") for rows in (1, 7, 65, 129, 300)),
    case(300, 1002, 16, "rowwise", accumulation="precise"),
    case(515, 1003, 2064, "rowwise", out="float32", bias=True, accumulation="precise"),
    *(case(rows, 4096, 11008, out="float32", accumulation="precise") for rows in (1, 65, 512)),
    *(case(rows, 4096, 4096, accumulation="precise") for rows in (1, 16, 64, 512, 2048)),
]
LLAMA_7B = [(12288, 4096), (4096, 4096), (4096, 11008)]
CASES = RAGGED + PRECISE_CASES + [case(m, n, k) for n, k in LLAMA_7B for m in (1, 16, 64, 128, 512, 2048)]
CASES += [case(m, n, k, "block") for n, k in LLAMA_7B for m in (1, 64, 512, 2048)]
CASES += [case(2048, 12288, 4096, "rowwise"), case(2048, 12288, 4096, "none", "bfloat16")]
CASES += [case(2113, 16520, 512, "rowwise", bias=True)]  # tiles that many waves alone are offered
CASES += [case(16, 32000, 4096, "none", "bfloat16", "float32", logits=True)]
