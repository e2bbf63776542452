"""The first part of attention, for prompts' rows, in the epilogue of the linear layer that makes q, k and v.

gemm_heads.cuh rotates and quantizes them before they leave, and writes the KV cache, and the queries, as
rope_kv_write.cu would, the same bits. Decode rows leave as a linear's, since decode attention reads them so.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fp8.plugins.attention import rope_kv_write
from fp8.plugins.base import Kernel, Launcher, StepShape, Tensor
from fp8.plugins.gemm import many_tokens
from fp8.plugins.gemm.linear import Linear
from fp8.plugins.gemm.many_tokens import ManyTokens

if TYPE_CHECKING:
    import torch

    from fp8.plugins.attention.plugin import Attention
    from fp8.plugins.cuda import Function

E4M3 = "float8_e4m3fn"
COLUMNS = 128  # of a tile: whole heads, of one kind
PAIRS = 4  # of a rotation, that a thread takes at once
BINS_BYTES = 512  # of shared memory, for the work list
TILES = 384  # of 128 x 128: about three for each multiprocessor, so that most epilogues run under products
Types = Sequence[Tensor | None]


def kernel(attention: Attention, given: Types, linear: Linear, types: Types, tactic: Any) -> Kernel | None:
    """The linear's kernel of that tactic with attention's first part in its epilogue. None where there is none: another
    kernel than gemm.cu, one whose epilogue does not run under other tiles' products (the larger epilogue would take as
    long as rope_kv_write.cu), tiles of other widths, heads that do not divide them, rotation pairs that four do not.

    given: the types of attention's inputs, of which the first is the linear's output; types: of the linear's inputs."""
    qkv, cache, rotated = given[0], given[8], rope_kv_write.rotary_dim(given[6])
    assert qkv is not None and cache is not None
    if linear.name != "gemm" or not isinstance(tactic, ManyTokens) or rotated % (2 * PAIRS):
        return None
    problem, heads = many_tokens.problem(linear, types), COLUMNS // attention.head_dim
    fits = problem.shared(tactic) + BINS_BYTES <= many_tokens.SHARED_MAX
    whole = attention.num_heads % heads == 0 and attention.num_kv_heads % heads == 0
    if tactic.BLOCK_N != COLUMNS or not (tactic.PINGPONG and fits and whole and problem["TMA_STORE"]):
        return None
    (plain,) = many_tokens.kernels(linear, tactic, types)
    constants = (
        ("HEADS", attention.num_heads),
        ("KV_HEADS", attention.num_kv_heads),
        ("HEAD_DIM", attention.head_dim),
        ("ROTARY_DIM", rotated),
        ("FP8_CACHE", int(cache.dtype == E4M3)),
        ("DTYPE", ("bfloat16", "float16").index(qkv.dtype)),
    )
    return Kernel(plain.plugin, plain.source, plain.entry, plain.constants + constants)


def worth(given: Types, tokens: int) -> bool:
    """Whether steps of up to so many rows gain by it. 1024 rows of 6144 columns do: 75.2 us become 71.6 on an H200."""
    qkv = given[0]
    assert qkv is not None
    return -(-tokens // COLUMNS) * -(-int(qkv.shape[1]) // COLUMNS) >= TILES


def bind(
    linear: Linear,
    tactic: ManyTokens,
    function: Function,
    operands: Sequence[torch.Tensor | None],
    q: torch.Tensor,
    tensors: Sequence[torch.Tensor | None],
    tiles: torch.Tensor,
) -> Launcher:
    """operands: the linear's inputs and output; q [max_tokens, H, D] and tiles as for rope_kv_write.bind; tensors:
    attention's inputs. The launcher enqueues the linear of all rows and the first part of those after the decode
    rows, of steps whose rows all belong to sequences."""
    _, position_ids, slot_mapping, query_start, lengths, _, cos, sin, key, value, *scales = tensors[:13]
    pointers = (position_ids, slot_mapping, query_start, lengths, cos, sin, *scales, key, value, q, tiles)
    addresses = [0 if t is None else t.data_ptr() for t in pointers]
    cache = (ctypes.c_uint64 * (len(addresses) + 1))(*addresses)  # the kernel's `Cache`
    launch = many_tokens.bind(linear, tactic, [function], operands, [cache])

    def run(step: StepShape) -> None:
        cache[len(addresses)] = step.sequences | step.decode_sequences << 32
        launch(step)

    return run
