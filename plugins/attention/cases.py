"""Cases of attention with prefill rows: ragged lengths, chunked prefill, mixed batches and padding for correctness;
long prompts of Llama's shapes for speed. Those of pure decode batches are in decode_cases.py."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fp8.plugins.attention.plugin import Attention
from fp8.plugins.base import BLOCK_SIZE, Case, StepShape

E4M3 = torch.float8_e4m3fn
SCALE = 0.01  # of q, k and v: 448 * 0.01 is near the largest of a thousand normal values, so some saturate
OUT_SCALE = 0.004
FP8 = (
    "the tensor cores add e4m3 products with about 14 bits of fraction, so P differs by 1e-4 to 5e-4 before it becomes "
    "a code, and 1 code in 200 falls to the neighbour, 2^-4 to 2^-3 away: rms sqrt(5e-4 * 0.09) = 7e-3 of the output; "
    "of a few rows only, one such code is more: 2^-3 of a row"
)
FP8_OUT = FP8 + "; some codes of the e4m3 output fall to the neighbour likewise: another 1e-2"
MEAN = "; values of one sign are all cut off the same way, against a sum of up to 1024 tokens: 1.2e-2 of the output"
FLIPPED, FLIP = 1 / 200, 0.09  # the share of P's codes, and the rms of how far
UNLUCKY = 1e-6  # of all draws exceed a case's tolerance
DT = "P is rounded to the 16-bit type for the tensor cores and the output once more (bfloat16 unit roundoff 2^-9)"
TOLERANCES = {  # by e4m3 cache and e4m3 output
    (True, True): (2e-2, FP8_OUT),
    (True, False): (1e-2, FP8),
    (False, True): (2e-2, DT + "; the e4m3 output has a code in 20 at the neighbour: 1e-2"),
    (False, False): (5e-3, DT),
}


@dataclass(frozen=True)
class Batch:
    """Sequences as (new tokens, context with them), decode sequences first; then rows that belong to none."""

    sequences: tuple[tuple[int, int], ...]
    padding_rows: int = 0

    @property
    def step(self) -> StepShape:
        decode = next((i for i, (n, _) in enumerate(self.sequences) if n != 1), len(self.sequences))
        queries = [n for n, _ in self.sequences]
        tokens = sum(queries) + self.padding_rows
        contexts = [length for _, length in self.sequences]
        return StepShape(tokens, len(queries), decode, max(queries[decode:], default=0), max(contexts), len(queries))

    @property
    def scores(self) -> int:
        """Visible pairs of a query and a key, per head."""
        return sum(n * (length - n) + n * (n + 1) // 2 for n, length in self.sequences)

    @property
    def codes(self) -> float:
        """How many codes of P a head's output hangs on, as if all weighed the same: of C visible tokens each weighs
        about 1/C, so that rows of few tokens make up most of the output's norm."""
        visible = [c for n, length in self.sequences for c in range(max(0, length - n) + 1, length + 1)]
        return sum(1 / c for c in visible) ** 2 / sum(c**-3 for c in visible)


def most_flips(codes: float) -> int:
    """So many of these codes fall to the neighbour in all but UNLUCKY draws: their number is Poisson-distributed."""
    mean, most, likely = codes * FLIPPED, 0, math.exp(-codes * FLIPPED)
    while likely < 1 - UNLUCKY:
        most += 1
        likely += math.exp(most * math.log(mean) - mean - math.lgamma(most + 1))
    return most


def fp8_tolerance(codes: float, quant_out: bool) -> tuple[float, str]:
    """That of TOLERANCES, or what the flips of so few codes can do that they do not average out: of the 16 codes of
    8 heads and 2 tokens mostly none falls to the neighbour, but one that does is 2.2e-2 of the output."""
    tolerance, why = TOLERANCES[True, quant_out]
    unlucky = math.sqrt(most_flips(codes) / codes * FLIP**2 + (1e-4 if quant_out else 0.0))
    return max(tolerance, unlucky), why


def index_inputs(batch: Batch, generator: torch.Generator, device: str) -> tuple[list[torch.Tensor], int]:
    """position_ids, slot_mapping, query_start, sequence_lengths, block_tables over pages in random order, and how many
    pages the pool must have. Entries of the tables after a sequence's end are -1."""
    pages = [-(-length // BLOCK_SIZE) for _, length in batch.sequences]
    num_blocks = sum(pages) + 2
    order = torch.randperm(num_blocks, generator=generator, device=device).tolist()
    tables = torch.full((len(pages), max(pages) + 1), -1)
    positions, slots, starts = [], [], [0]
    for i, (n, length) in enumerate(batch.sequences):
        mine = [order.pop() for _ in range(pages[i])]
        tables[i, : pages[i]] = torch.tensor(mine, dtype=torch.long)
        new = range(length - n, length) if length else [-1] * n
        positions += [max(p, 0) for p in new]
        slots += [mine[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE if p >= 0 else -1 for p in new]
        starts.append(starts[-1] + n)
    positions += [0] * batch.padding_rows
    slots += [-1] * batch.padding_rows
    lengths = [length for _, length in batch.sequences]
    lists = [torch.tensor(x) for x in (positions, slots, starts, lengths)]
    return [t.to(device, torch.int32) for t in (*lists, tables)], num_blocks


def rotary_tables(length: int, rotary_dim: int, device: str) -> list[torch.Tensor]:
    frequency = 10000.0 ** (-torch.arange(0, rotary_dim, 2, device=device) / rotary_dim)
    angle = torch.arange(length, device=device).unsqueeze(1) * frequency
    return [angle.cos(), angle.sin()]


def inputs(
    plugin: Attention, batch: Batch, dtype: str, fp8: bool, rotary_dim: int, generator: torch.Generator, device: str
) -> list[torch.Tensor | None]:
    """Fresh Gaussian inputs in the reference layout; the pool holds values everywhere."""
    kind = getattr(torch, dtype)
    index, num_blocks = index_inputs(batch, generator, device)
    width = (plugin.num_heads + 2 * plugin.num_kv_heads) * plugin.head_dim
    qkv = torch.randn(batch.step.tokens, width, generator=generator, device=device).to(kind)
    pool = (num_blocks, BLOCK_SIZE, plugin.num_kv_heads, plugin.head_dim)
    caches = [torch.randn(pool, generator=generator, device=device) for _ in range(2)]
    caches = [(c / SCALE).clamp(-448, 448).to(E4M3) for c in caches] if fp8 else [c.to(kind) for c in caches]
    tables = rotary_tables(batch.step.max_context, rotary_dim, device) if plugin.rotary else [None, None]
    scales = [torch.tensor([SCALE * f], device=device) if fp8 else None for f in (1.0, 1.1, 0.9)]
    out_scale = torch.tensor([OUT_SCALE], device=device) if plugin.quant_out else None
    return [qkv, *index, *tables, *caches, *scales, out_scale]


def case(
    name: str,
    sequences: list[tuple[int, int]],
    heads: tuple[int, int] = (8, 2),
    head_dim: int = 128,
    dtype: str = "bfloat16",
    fp8: bool = True,
    quant_out: bool | None = None,
    rotary_dim: int | None = None,
    padding_rows: int = 0,
    steep: float = 1.0,
    mean: float = 0.0,
) -> Case:
    """quant_out: as `fp8` if not given; rotary_dim: head_dim if not given, 0 for none; steep: a factor of q and of the
    new k, whose square is the standard deviation of the scores; mean: of the new values."""
    batch, quant_out = Batch(tuple(sequences), padding_rows), fp8 if quant_out is None else quant_out
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    plugin = Attention(*heads, head_dim, head_dim**-0.5, rotary_dim > 0, quant_out, dtype)

    def make(generator: torch.Generator, device: str) -> list[torch.Tensor | None]:
        given = inputs(plugin, batch, dtype, fp8, rotary_dim, generator, device)
        assert given[0] is not None
        given[0][:, : (heads[0] + heads[1]) * head_dim] *= steep
        given[0][:, (heads[0] + heads[1]) * head_dim :] += mean
        return given

    cache = f"{'e4m3' if fp8 else dtype} cache to {'e4m3' if quant_out else dtype}"
    tolerance, why = fp8_tolerance(batch.codes * heads[0], quant_out) if fp8 else TOLERANCES[False, quant_out]
    tokens, item = batch.step.tokens, 1 if fp8 else 2
    if fp8:
        tolerance += 2**-3 / (tokens * heads[0]) ** 0.5
    if mean:
        tolerance, why = tolerance + 1e-2, why + MEAN
    kv = sum(length for _, length in batch.sequences) * 2 * heads[1] * head_dim * item
    moved = tokens * head_dim * (2 * (heads[0] + 2 * heads[1]) + heads[0] * (1 if quant_out else 2)) + kv
    title = f"{name} {heads[0]}/{heads[1]}x{head_dim} {cache}"
    return Case(title, plugin, make, batch.step, tolerance, why, moved, 4 * batch.scores * heads[0] * head_dim)


def whole(*lengths: int) -> list[tuple[int, int]]:
    """Prompts with no cached context."""
    return [(n, n) for n in lengths]


CHUNKS = [(65, 130), (64, 64), (7, 700), (128, 1000), (300, 301), (2, 3)]
FEW_BESIDE = [*((1, 3000 + 7 * i) for i in range(40)), (910, 4910)]
BESIDE = [
    *((1, 100 + 13 * i) for i in range(150)),
    (300, 900),
    (129, 129),
    (500, 500),
]  # prompts beside many decode rows
ROWS = [(n, n + 500) for units in range(1, 10) for n in (64 * units - 1, 64 * units, 64 * units + 1)]
MIXED = [(1, 1), (1, 300), (1, 64), (1, 65), (130, 195), (5, 5), (63, 129)]


def cases() -> list[Case]:
    found = [case(f"prompt {n}", whole(n), head_dim=d) for n in (2, 7, 63, 64, 65, 300, 1024) for d in (64, 128)]
    for fp8 in (True, False):
        for head_dim in (64, 128):
            found += [
                case("several", whole(65, 2, 128, 300, 129), (4, 4), head_dim, fp8=fp8),
                case("chunks", CHUNKS, (8, 1), head_dim, fp8=fp8, quant_out=False),
                case("mixed", MIXED, (8, 2), head_dim, "float16", fp8, padding_rows=3),
            ]
        found += [
            case("rotary 20", CHUNKS, fp8=fp8, rotary_dim=20),
            case("rotary 6", whole(65, 9), fp8=fp8, rotary_dim=6),
            case("no rotary", MIXED, fp8=fp8, rotary_dim=0),
            case("empty sequence", [(9, 0), (70, 70)], fp8=fp8),
            case("heads of 3", CHUNKS, (9, 3), 64, fp8=fp8),
        ]
    for steep in (2, 6):  # a row's maximum rises by much after its first tokens; by more than float32's range
        found += [
            case(f"steep {steep}", whole(300, 1024), dtype=d, fp8=False, steep=steep) for d in ("bfloat16", "float16")
        ]
        found += [case(f"steep {steep}", [(65, 700), (300, 301)], (4, 1), 64, fp8=False, steep=steep)]
    found += [case("mean 2", [(1000, 1500), (2048, 2048)], quant_out=False, mean=2)]
    found += [case("to e4m3", CHUNKS, fp8=False, quant_out=True), case("many", whole(*range(1, 200)), (4, 1), 64)]
    # Divided differently by the number of heads.
    for n, context in ((65, 5000), (300, 3000), (449, 3000), (577, 3000), (910, 10910), (1216, 3000)):
        found += [case(f"{n} rows of {context}", [(n, context)], heads) for heads in ((32, 8), (8, 2))]
        found += [case(f"{n} rows of {context}", [(n, context)], (8, 2), fp8=False)]
    found += [case("rows of every kind", ROWS), case("40 x 128", whole(*[128] * 40), (32, 8))]
    found += [case("end and begin", [(300, 20000), (610, 610)], (32, 8))]
    for heads in ((32, 8), (32, 32)):
        found += [case(f"prompt {n}", whole(n), heads) for n in (4096, 16384)]
        found += [case("8 x 1024", whole(*[1024] * 8), heads)]
    found += [case("64 x 1024", whole(*[1024] * 64), (32, 8)), case("beside many", BESIDE, (32, 8))]
    found += [case("beside few", FEW_BESIDE, (32, 8))]
    return [*found, case("prompt 4096", whole(4096), (32, 8), fp8=False)]
