"""Attention of decode rows, one query token per sequence: tactics and launch of decode.cu. For the interface that it
shares with the prefill part see prefill.py; for the method see decode.cu."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fp8.plugins.attention import rope_kv_write
from fp8.plugins.base import BLOCK_SIZE, Kernel, Launcher, PluginError, StepShape, Tensor

if TYPE_CHECKING:
    import torch

    from fp8.plugins.attention.plugin import Attention
    from fp8.plugins.cuda import Function

E4M3 = "float8_e4m3fn"
MULTIPROCESSORS = 132
SHARED_LIMIT = 227 * 1024  # bytes a block; a multiprocessor has 1 KB more, and keeps 1 KB of each block's
MOST_HEADS = 16  # of a unit: two tiles of columns of a product
END = 16  # tokens: where a context ends, keys come in boxes of so many
UNIT_COST = 2  # tiles that take about as long as a unit's merge; for the dealing of many units
MOST_TILES = 2**16 - 16  # of a context: places are counted in 16 bits, a few of them after the tiles
MANY = 2 * MULTIPROCESSORS  # units from which on blocks mostly have whole ones
LEAVING = 300_000_000  # bytes of keys and values up to which they are the first to leave the L2 cache
FEWEST = MULTIPROCESSORS // 4  # units below which one is cut into four parts or more


@dataclass(frozen=True)
class Decode:
    """Warps in a block, slots in each warp's ring, blocks on a multiprocessor: for many units, where small blocks merge
    cheaply. Few units are cut among the blocks, and larger blocks make fewer partial results: `few` is for those,
    `alone` and `fewest` where there is a multiprocessor for each."""

    decode_warps: int = 3
    decode_slots: int = 2
    decode_blocks: int = 4

    def few(self) -> Decode:
        """What runs a step of few units, with as many slots on a multiprocessor."""
        if self._twelve:
            return Decode(6, 2, 2)
        return Decode(4, max(2, self.decode_warps * self.decode_slots * self.decode_blocks // 8), 2)

    def alone(self) -> Decode:
        """Where a unit has a multiprocessor. Keys and values of a tile for each warp; nine for up to 18 tiles in two
        rounds."""
        return Decode(9, 2, 1) if self._twelve else self.fewest()

    def fewest(self) -> Decode:
        """Where a unit has several."""
        return Decode(8, 2, 1)

    @property
    def _twelve(self) -> bool:
        """Whether twelve warps' registers suffice on a multiprocessor, and rows are cut for threes of warps."""
        return self.decode_warps == 3

    def variants(self) -> tuple[Decode, Decode, Decode, Decode]:
        """Variants for many units, for few, for a multiprocessor per unit, and for several per unit."""
        return self, self.few(), self.alone(), self.fewest()

    @property
    def grid(self) -> int:
        return MULTIPROCESSORS * self.decode_blocks


@dataclass(frozen=True)
class Shape:
    """What decode_shape.cuh derives from the constants, for the host's side of it."""

    head_dim: int
    kv_heads: int
    group: int
    fp8: bool

    @property
    def tile(self) -> int:
        """Tokens."""
        return 64 if self.fp8 else 32

    @property
    def slot_bytes(self) -> int:
        return self.tile * self.head_dim * (1 if self.fp8 else 2)

    @property
    def parts(self) -> int:
        """Units that share a KV head."""
        return -(-self.group // MOST_HEADS)

    @property
    def rows(self) -> int:
        """Heads in a unit, at most."""
        return -(-self.group // self.parts)

    @property
    def units(self) -> int:
        """Units of one sequence."""
        return self.kv_heads * self.parts

    @property
    def partial_bytes(self) -> int:
        return 6 * self.rows * self.head_dim

    def least(self, tactic: Decode) -> int:
        """Tiles that a block takes of one sequence's unit, if there are as many: with many units reading is what takes
        time, with few of them joining."""
        return min(5, tactic.decode_warps) if self.units >= 16 else tactic.decode_warps

    def check_context(self, tokens: int) -> None:
        """Raises PluginError for block tables of more tokens than the kernel counts."""
        most = MOST_TILES * self.tile
        if tokens > most:
            raise PluginError(
                f"block_tables are for contexts of {tokens} tokens, but decode attention counts {most} at most; "
                "build the engine with a smaller max_seq_len"
            )

    def shared_bytes(self, tactic: Decode, sequences: int) -> int:
        """`Shared` of decode_block.cuh: rings, merged columns, maxima and sums of each warp, barriers; the unit's
        queries, newest key and value; places of each sequence's units."""
        values = 256 if tactic.decode_warps < 4 else 512
        columns = min(self.head_dim, max(32, next(c for c in (128, 64, 32, 16) if c * self.rows <= values)))
        warp = tactic.decode_slots * (self.slot_bytes + 8) + self.rows * 4 * (columns + 4 + 2) + 4
        fresh = (self.rows + 2) * (self.head_dim * (1 if self.fp8 else 2) + 16) + 48
        return tactic.decode_warps * warp + fresh + 2 * sequences + 80

    def blocks(self, tactic: Decode, sequences: int) -> int:
        """That a multiprocessor holds at a time: with very many sequences, fewer than `tactic.decode_blocks`."""
        return min(tactic.decode_blocks, (SHARED_LIMIT + 1024) // (self.shared_bytes(tactic, sequences) + 1024))

    def fits(self, tactic: Decode, sequences: int) -> bool:
        return self.blocks(tactic, sequences) == tactic.decode_blocks


def shape(plugin: Attention, inputs: Sequence[Tensor | None]) -> Shape:
    cache = inputs[8]
    assert cache is not None
    group = plugin.num_heads // plugin.num_kv_heads
    return Shape(plugin.head_dim, plugin.num_kv_heads, group, cache.dtype == E4M3)


def pairs_at_once(inputs: Sequence[Tensor | None]) -> int:
    """Rotation pairs of a head that a thread takes."""
    rotary_dim = rope_kv_write.rotary_dim(inputs[6])
    return math.gcd(2, rotary_dim // 2) if rotary_dim else 2


def candidates(plugin: Attention, inputs: Sequence[Tensor | None]) -> list[Decode]:
    """Four blocks of three warps or two, two of four, one of eight: rings of 192 KB on a multiprocessor in each."""
    sequences = 128  # the tables of more of them fit too, with fewer blocks on a multiprocessor
    of = shape(plugin, inputs)
    slots = 24576 // of.slot_bytes
    wanted = [Decode(2, slots, 4), Decode(4, slots, 2), Decode(8, slots, 1)]
    # More heads need more registers than twelve warps have; a row's pairs, taken one by one, are for an even number.
    if of.rows <= MOST_HEADS // 2 and 96 % (of.head_dim // (2 * pairs_at_once(inputs))) == 0:
        wanted.insert(0, Decode(3, slots * 2 // 3, 4))
    return [tactic for tactic in dict.fromkeys(wanted) if of.fits(tactic, sequences)]


def kernels(plugin: Attention, tactic: Decode, inputs: Sequence[Tensor | None]) -> tuple[Kernel, ...]:
    """The kernels of all variants."""
    return tuple(kernel(plugin, t, inputs) for t in tactic.variants())


def kernel(plugin: Attention, tactic: Decode, inputs: Sequence[Tensor | None]) -> Kernel:
    of, qkv, rotary_dim = shape(plugin, inputs), inputs[0], rope_kv_write.rotary_dim(inputs[6])
    assert qkv is not None
    constants = (
        ("HEAD_DIM", of.head_dim),
        ("KV_HEADS", of.kv_heads),
        ("GROUP", of.group),
        ("FP8_CACHE", int(of.fp8)),
        ("DTYPE", ("bfloat16", "float16").index(qkv.dtype)),
        ("ROTARY_DIM", rotary_dim),
        ("VEC", pairs_at_once(inputs)),
        ("QUANT_OUT", int(plugin.quant_out)),
        ("SOFTMAX_SCALE", plugin.softmax_scale),
        ("WARPS", tactic.decode_warps),
        ("SLOTS", tactic.decode_slots),
        ("BLOCKS_PER_SM", tactic.decode_blocks),
        ("LEAST", of.least(tactic)),
    )
    return Kernel("attention", "decode.cu", "decode", constants)


def workspace(
    plugin: Attention, tactic: Decode, inputs: Sequence[Tensor | None], max_tokens: int, max_sequences: int
) -> int:
    """A partial result for each block, zero between launches."""
    return max(t.grid for t in tactic.variants()) * shape(plugin, inputs).partial_bytes


def bind(
    plugin: Attention,
    tactic: Decode,
    functions: Sequence[Function],
    tensors: Sequence[torch.Tensor | None],
    workspace: torch.Tensor | None,
) -> Launcher:
    from fp8.plugins.cuda import Launch, matrix_map

    qkv, positions, slots, _, lengths, tables, cos, sin, key, value = tensors[:10]
    assert lengths is not None and tables is not None and key is not None and value is not None
    assert workspace is not None
    of = Shape(plugin.head_dim, plugin.num_kv_heads, plugin.num_heads // plugin.num_kv_heads, key.element_size() == 1)
    of.check_context(tables.shape[1] * BLOCK_SIZE)
    span, keys = min(of.head_dim, 128 // key.element_size()), key.view(-1, of.head_dim)
    whole, end = (matrix_map(keys, span, tokens, span * key.element_size()) for tokens in (of.tile, END))
    if of.fp8:  # a page's values as they lie
        values = matrix_map(value.view(-1, 128), 128, of.head_dim // 2, 0)
    else:
        values = matrix_map(value.view(-1, of.head_dim), 64, of.tile)
    sequences, unit_cost, prompts, parts, once = (ctypes.c_int() for _ in range(5))
    scales = tensors[10:14]  # q, k, v, out
    width = ctypes.c_int(tables.shape[1])
    steps = [qkv, positions, slots, tables, lengths]
    outputs = [tensors[14], workspace]
    numbers = [sequences, width, unit_cost, prompts, parts, once]
    args = [whole, values, end, *steps, cos, sin, key, value, *scales, *outputs, *numbers]
    variants = tactic.variants()
    launches = [
        Launch(function, 32 * t.decode_warps, args, of.shared_bytes(t, len(lengths)))
        for function, t in zip(functions, variants, strict=True)
    ]

    def run(step: StepShape) -> None:
        sequences.value = step.decode_sequences
        unit_cost.value = UNIT_COST if step.decode_sequences * of.units >= MANY else 0
        prompts.value = step.sequences > step.decode_sequences
        which, grid, parts.value = dealing(of, tactic, step.decode_sequences, step.max_context)
        units = step.decode_sequences * of.units
        size = 2 * units * -(-step.max_context // of.tile) * of.slot_bytes
        once.value = of.parts == 1 and units <= grid and size <= LEAVING
        launches[which](grid, of.shared_bytes(variants[which], step.decode_sequences))

    return run


def dealing(of: Shape, tactic: Decode, sequences: int, max_context: int) -> tuple[int, int, int]:
    """Which variant, in how many blocks, and, where contexts have one length, how many of them for each unit or,
    negative, how many units for each block; 0 where that would leave too many blocks without any."""
    units = sequences * of.units
    which = sum(units < least for least in (MANY, MULTIPROCESSORS + 1, FEWEST))
    used = tactic.variants()[which]
    # All blocks run at once: one that came later would have as much to do as the others, and nobody beside it.
    grid = MULTIPROCESSORS * of.blocks(used, sequences)
    if units < MANY:
        tiles = -(-max_context // of.tile)  # of a unit, at most
        cut = of.least(used) if sequences == 1 and tiles > used.decode_warps else used.decode_warps
        grid = max(1, min(grid, units * -(-tiles // cut)))
    parts, each = grid // max(1, units), -(-units // grid)
    busy = units * parts if parts else units // each
    return which, grid, (parts or -each) if sequences > 1 and 9 * busy >= 8 * grid else 0
