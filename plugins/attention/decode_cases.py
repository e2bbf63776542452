"""Cases of attention where every sequence has one new token: short, ragged and long contexts, many heads and few."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fp8.plugins.attention.plugin import Attention
from fp8.plugins.base import BLOCK_SIZE, Case, StepShape

WHY = (
    "P is rounded to e4m3 (2^-4 of a value, averaged over the context) at a maximum that differs between splits, "
    "and an FP8 output steps by 2^-3 where float32 sums in another order cross a boundary"
)
PADDING = 0  # length of a sequence that only fills up the batch


def case(
    heads: int,
    kv_heads: int,
    head_dim: int,
    lengths: list[int],
    fp8: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    rotary: bool = True,
) -> Case:
    """Output e4m3 with an FP8 cache and bfloat16, else `dtype`."""
    quant_out = fp8 and dtype == torch.bfloat16
    name = str(dtype).removeprefix("torch.")
    plugin = Attention(heads, kv_heads, head_dim, head_dim**-0.5, rotary, quant_out, name)

    def make(generator: torch.Generator, device: str) -> list[torch.Tensor | None]:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        def scalar(value: float) -> torch.Tensor:
            return torch.tensor([value], device=device)

        def int32(values: list) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        tables, blocks = block_tables(lengths)
        slots = [slot(table, n - 1) if n else -1 for table, n in zip(tables, lengths, strict=True)]
        frequency = 10000.0 ** -torch.linspace(0, 1, head_dim // 2, device=device)
        angles = torch.arange(max(lengths), device=device)[:, None] * frequency
        caches = [cache(normal, blocks, kv_heads, head_dim, fp8, dtype) for _ in range(2)]
        return [
            (2 * normal(len(lengths), (heads + 2 * kv_heads) * head_dim)).to(dtype),
            int32([max(n - 1, 0) for n in lengths]),
            int32(slots),
            int32(list(range(len(lengths) + 1))),
            int32(lengths),
            int32(tables),
            angles.cos() if rotary else None,
            angles.sin() if rotary else None,
            *caches,
            *([scalar(0.02), scalar(0.025), scalar(0.03)] if fp8 else [None] * 3),
            scalar(0.004) if quant_out else None,
        ]

    n = len(lengths)
    step = StepShape(n, n, n, 0, max(lengths), n)
    tokens = sum(lengths)
    shape = f"{heads}/{kv_heads} heads of {head_dim}, {described(lengths)}"
    return Case(
        f"decode {'fp8' if fp8 else '16-bit'} cache, {name}, {shape}{'' if rotary else ', no rotary'}",
        plugin,
        make,
        step,
        0.03 if fp8 else 0.01,
        WHY,
        2 * tokens * kv_heads * head_dim * (1 if fp8 else 2),
        4 * tokens * heads * head_dim,
    )


def described(lengths: list[int]) -> str:
    if len(set(lengths)) == 1:
        return f"{len(lengths)} x {lengths[0]}"
    return f"{len(lengths)} x {min(lengths)}..{max(lengths)}"


def slot(table: list[int], position: int) -> int:
    return table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE


def block_tables(lengths: list[int]) -> tuple[list[list[int]], int]:
    """Tables of scattered blocks, -1 after each sequence's end, and the size of the pool."""
    counts = [-(-n // BLOCK_SIZE) for n in lengths]
    blocks = sum(counts) + 2
    step = next(s for s in (7919, 7907, 7901) if blocks % s)
    order = iter([i * step % blocks for i in range(blocks)])
    tables = [[next(order) for _ in range(n)] + [-1] * (max(counts) - n) for n in counts]
    return tables, blocks


def cache(
    normal: Callable[..., torch.Tensor], blocks: int, kv_heads: int, head_dim: int, fp8: bool, dtype: torch.dtype
) -> torch.Tensor:
    """A pool in the reference's layout, piece by piece: large ones would not fit in float32."""
    parts = [normal(min(512, blocks - i), BLOCK_SIZE, kv_heads, head_dim) for i in range(0, blocks, 512)]
    made = [(40 * p).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8) if fp8 else p.to(dtype) for p in parts]
    whole = torch.cat(made)
    return whole.view(torch.float8_e4m3fn) if fp8 else whole


RAGGED = [PADDING, 5, PADDING, 64, 65, 1, 300, 129, PADDING]
CASES = [
    case(8, 2, 128, RAGGED),
    case(8, 8, 64, RAGGED, dtype=torch.float16),
    case(20, 1, 128, [200, 64]),
    case(16, 1, 64, [700], rotary=False),
    case(8, 2, 128, RAGGED, fp8=False),
    case(9, 3, 64, RAGGED, fp8=False, dtype=torch.float16),
    case(32, 8, 128, [1024]),
    case(32, 32, 128, [1024]),
    case(32, 8, 128, [65536]),
    case(32, 8, 128, [1088] * 8),
    case(32, 8, 128, [1088] * 16),
    case(32, 8, 128, [1030 + 4 * i for i in range(16)]),
    case(32, 32, 128, [1024] * 64),
    case(32, 8, 128, [1024] * 64),
    case(64, 8, 128, [2048] * 128),
    case(32, 8, 128, [100 + 61 * i for i in range(64)]),
    case(32, 8, 128, [1024] * 64, fp8=False),
]
