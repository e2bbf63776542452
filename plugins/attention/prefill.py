"""Attention of prefill chunks: packed sequences of any length, causal, over the paged cache.

plugin.py joins two parts of one interface, this module for the prefill rows and decode.py for the decode rows:

    @dataclass(frozen=True) class Decode (here: Prefill)
        The tactic: ints and strings with defaults, every field's name beginning with `decode_` (here: `prefill_`).
        The plugin's tactic record inherits from both, so it can be passed wherever either is asked for.
    candidates(plugin, inputs) -> list[Decode]
        Legal tactics, the favourite first; few, since the tuner times the parts' candidates one part at a time.
    kernels(plugin, tactic, inputs) -> tuple[Kernel, ...]
        What to compile; `functions` of `bind` come in this order.
    workspace(plugin, tactic, inputs, max_tokens, max_sequences) -> int
        Bytes of zero-initialised scratch, left zero where it must be zero at the next launch.
    bind(plugin, tactic, functions, [q,] tensors, workspace) -> Launcher
        q: the rotated and quantized (or rounded) queries [max_tokens, H, D], e4m3 or 16 bits like the cache, which
        rope_kv_write.cu, or the linear in front (joined.py), has put into the workspace; decode rows make their own,
        and write the cache too. tensors: the plugin's inputs, then its output. workspace: this part's uint8 slice,
        1024-byte aligned, or None where it asked for 0 bytes. The launcher enqueues the decode rows
        [0, step.decode_sequences), row i of sequence i, or here the sequences [step.decode_sequences, step.sequences);
        it is not called where there are none. It must not trust step.max_context to be exact (under a CUDA graph it is
        an upper bound), and writes every row of its sequences: zeros where sequence_lengths is 0.

rope_kv_write, or that linear, comes first in the stream, if there are other than decode rows, then the decode part,
then the prefill part. All are launched with programmatic dependent launch and run `griddepcontrol.wait` before they
read what a kernel of the step writes, that is qkv, q, and the step's own tokens in the caches; the step's inputs are
uploaded before its first kernel. The prefill part depends on nothing that the decode part writes: beside decode rows it
starts after their wait and waits for their end before its own.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fp8.plugins.base import Kernel, Launcher, StepShape, Tensor

if TYPE_CHECKING:
    import torch

    from fp8.plugins.attention.plugin import Attention
    from fp8.plugins.cuda import Function

E4M3 = "float8_e4m3fn"
TILE = 128  # tokens of a K or V tile
LONG = 2048  # tokens of the longest context from which on divisions into more pieces are weighed (tiles.cuh)
UNIT = 64  # query rows of a consumer warpgroup, the fewest of a piece that does not end its sequence
SHARED_LIMIT = 226 * 1024  # bytes of dynamic shared memory; barriers take less than the 1 KB left
TILE_ENTRY = 16  # bytes of the work list: tiles.cuh


@dataclass(frozen=True)
class Prefill:
    """Depth of the rings of K tiles, of V tiles (with 16 bits the same), and of Q tiles. 16 bits: three, three and one,
    where there is room for no more, are 6 to 15 % faster than two of each."""

    prefill_stages: int = 3
    prefill_values: int = 2
    prefill_queries: int = 2


def _fp8(inputs: Sequence[Tensor | None]) -> bool:
    cache = inputs[8]
    assert cache is not None
    return cache.dtype == E4M3


def row_bytes(plugin: Attention, inputs: Sequence[Tensor | None]) -> int:
    """Of one head of q, k or v."""
    return plugin.head_dim * (1 if _fp8(inputs) else 2)


def tile_rows(fp8: bool) -> int:
    """Most query rows of a work item: 64 of each of the kernel's consumer warpgroups (tiles.cuh)."""
    return 192 if fp8 else 128


def shared_bytes(head_dim: int, fp8: bool, tactic: Prefill) -> int:
    """The rings, and with an e4m3 cache the float32 total of O."""
    rows = tactic.prefill_queries * tile_rows(fp8) + (tactic.prefill_stages + tactic.prefill_values) * TILE
    return rows * head_dim + 4 * tile_rows(fp8) * head_dim if fp8 else 2 * rows * head_dim


def candidates(plugin: Attention, inputs: Sequence[Tensor | None]) -> list[Prefill]:
    if _fp8(inputs):
        return [Prefill(3, 2, 2), Prefill(2, 3, 2)]
    deep = (t for t in (Prefill(4, 4, 2), Prefill(3, 3, 1)) if shared_bytes(plugin.head_dim, False, t) <= SHARED_LIMIT)
    return [next(deep), Prefill(2, 2, 2)]


def kernels(plugin: Attention, tactic: Prefill, inputs: Sequence[Tensor | None]) -> tuple[Kernel, ...]:
    qkv, fp8 = inputs[0], _fp8(inputs)
    assert qkv is not None
    constants = (
        ("NUM_HEADS", plugin.num_heads),
        ("NUM_KV_HEADS", plugin.num_kv_heads),
        ("HEAD_DIM", plugin.head_dim),
        ("FP8_CACHE", int(fp8)),
        ("QUANT_OUT", int(plugin.quant_out)),
        ("DTYPE", ("bfloat16", "float16").index(qkv.dtype)),
        ("SCALE_LOG2", plugin.softmax_scale * math.log2(math.e)),
        ("Q_STAGES", tactic.prefill_queries),
    )
    if fp8:
        stages = (("K_STAGES", tactic.prefill_stages), ("V_STAGES", tactic.prefill_values))
        return (Kernel("attention", "prefill_e4m3.cu", "prefill", constants + stages),)
    return (Kernel("attention", "prefill.cu", "prefill", (*constants, ("STAGES", tactic.prefill_stages))),)


def most_pieces(tokens: int, sequences: int, fp8: bool, max_context: int = LONG) -> int:
    """Bound of the number of pieces that rows are divided into: every sequence has at most one that is smaller, and
    there are more than the fewest only where a context has LONG tokens."""
    return tokens // (UNIT if max_context >= LONG else tile_rows(fp8)) + sequences


def workspace(
    plugin: Attention, tactic: Prefill, inputs: Sequence[Tensor | None], max_tokens: int, max_sequences: int
) -> int:
    """The work list, which the first part writes: its length, then its tiles."""
    return TILE_ENTRY * (1 + most_pieces(max_tokens, max_sequences, _fp8(inputs)))


def bind(
    plugin: Attention,
    tactic: Prefill,
    functions: Sequence[Function],
    q: torch.Tensor,
    tensors: Sequence[torch.Tensor | None],
    workspace: torch.Tensor | None,
) -> Launcher:
    import torch

    from fp8.plugins.cuda import Launch

    tables, key, y = tensors[5], tensors[8], tensors[14]
    assert tables is not None and key is not None and y is not None and workspace is not None
    fp8 = key.element_size() == 1
    rows = tile_rows(fp8)
    maps = [_query_map(q, rows), *_cache_maps(plugin, tensors)]
    beside = ctypes.c_int()
    args = [*maps, workspace, tables, *tensors[10:14], y, ctypes.c_int(tables.shape[1]), beside]
    launch = Launch(functions[0], 2 * rows + 128, args, shared_bytes(plugin.head_dim, fp8, tactic))
    multiprocessors = torch.cuda.get_device_properties(y.device).multi_processor_count

    def run(step: StepShape) -> None:
        rows, sequences = step.tokens - step.decode_sequences, step.sequences - step.decode_sequences
        pieces = most_pieces(rows, sequences, fp8, step.max_context)
        beside.value = step.decode_sequences > 0
        launch(min(multiprocessors, pieces * plugin.num_heads))

    return run


def _query_map(q: torch.Tensor, rows: int) -> object:
    """[tokens, heads, D]: a box is the rows of a work item of one head, one swizzle atom wide."""
    from fp8.plugins.cuda import tensor_map

    tokens, heads, head_dim = q.shape
    size = q.element_size()
    swizzle = min(head_dim * size, 128)
    return tensor_map(
        q.data_ptr(),
        str(q.dtype).removeprefix("torch."),
        [head_dim, heads, tokens],
        [head_dim * size, heads * head_dim * size],
        [swizzle // size, 1, rows],
        swizzle,
    )


def _cache_maps(plugin: Attention, tensors: Sequence[torch.Tensor | None]) -> list[object]:
    """K and V as matrices, a box per page and swizzle atom; a negative page lies outside and reads as zeros."""
    from fp8.plugins.cuda import matrix_map

    key, value = tensors[8], tensors[9]
    assert key is not None and value is not None
    swizzle = min(plugin.head_dim * key.element_size(), 128)
    keys = matrix_map(key.view(-1, plugin.head_dim), swizzle // key.element_size(), 64, swizzle)
    if key.element_size() == 1:
        return [keys, matrix_map(value.view(-1, 128), 128, plugin.head_dim // 2, 0)]
    return [keys, matrix_map(value.view(-1, plugin.head_dim), swizzle // value.element_size(), 64, swizzle)]
