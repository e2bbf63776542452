"""The first kernel of attention for prefill rows and rows of no sequence: rotary embedding, quantization, KV-cache
write, and the prefill part's work list. Constants and launch of rope_kv_write.cu; it has no tactic."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fp8.plugins.base import Kernel, Launcher, StepShape, Tensor

if TYPE_CHECKING:
    import torch

    from fp8.plugins.attention.plugin import Attention
    from fp8.plugins.cuda import Function

E4M3 = "float8_e4m3fn"
THREADS = 256
VALUE_DIMS = 64  # of a warp that transposes values
VALUE_GROUP = 16  # tokens that lie together


def rotary_dim(cos: Tensor | torch.Tensor | None) -> int:
    """Rotated dimensions of a head, 0 for none: twice the width of the table."""
    return 2 * int(cos.shape[1]) if cos is not None else 0


def vector(rotary_dim: int) -> int:
    """Rotation pairs of a thread: as many as keep every access aligned, at most 8."""
    return math.gcd(8, rotary_dim // 2) if rotary_dim else 8


def heads_of_thread(plugin: Attention, fp8: bool) -> int:
    """Those of one thread's pairs: as many as pay, and to e4m3 of q or of k alone."""
    return math.gcd(2, plugin.num_heads, plugin.num_kv_heads) if fp8 else 4


def kernel(plugin: Attention, inputs: Sequence[Tensor | None]) -> Kernel:
    qkv, cache, rotated = inputs[0], inputs[8], rotary_dim(inputs[6])
    assert qkv is not None and cache is not None
    constants = (
        ("NUM_HEADS", plugin.num_heads),
        ("NUM_KV_HEADS", plugin.num_kv_heads),
        ("HEAD_DIM", plugin.head_dim),
        ("ROTARY_DIM", rotated),
        ("VEC", vector(rotated)),
        ("HEADS", heads_of_thread(plugin, cache.dtype == E4M3)),
        ("BLOCKS", 4 if cache.dtype == E4M3 else 3),
        ("FP8_CACHE", int(cache.dtype == E4M3)),
        ("QUANT_OUT", int(plugin.quant_out)),
        ("DTYPE", ("bfloat16", "float16").index(qkv.dtype)),
    )
    return Kernel("attention", "rope_kv_write.cu", "rope_kv_write", constants)


def bind(
    plugin: Attention,
    function: Function,
    q: torch.Tensor,
    tensors: Sequence[torch.Tensor | None],
    tiles: torch.Tensor,
) -> Launcher:
    """q: [max_tokens, H, D] of the cache's dtype, written; tiles: the prefill part's workspace, written if it has rows.
    tensors: the plugin's inputs, then its output. The launcher enqueues rows [step.decode_sequences, step.tokens)."""
    from fp8.plugins.cuda import Launch

    qkv, position_ids, slot_mapping, query_start, lengths, _, cos, sin, key, value, *scales = tensors[:13]
    assert key is not None
    tokens, sequences, decode_sequences = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    steps = [qkv, position_ids, slot_mapping, query_start, lengths]
    sizes = [tokens, sequences, decode_sequences]
    args = [*steps, cos, sin, key, value, *scales, q, tensors[14], tiles, *sizes]
    launch = Launch(function, THREADS, args)
    fp8 = key.element_size() == 1
    vec = vector(rotary_dim(cos))
    heads = heads_of_thread(plugin, fp8)
    moved = plugin.num_heads + (1 if fp8 else 2) * plugin.num_kv_heads
    units = -(-moved // heads) * (plugin.head_dim // (2 * vec))

    def run(step: StepShape) -> None:
        tokens.value, sequences.value, decode_sequences.value = step.tokens, step.sequences, step.decode_sequences
        rows = step.tokens - step.decode_sequences
        blocks = -(-rows * units // THREADS)
        if fp8:
            groups = (rows + VALUE_GROUP - 1) // VALUE_GROUP
            blocks += -(-groups * plugin.num_kv_heads * (plugin.head_dim // VALUE_DIMS) // 8)  # a warp each
        launch(blocks + (step.sequences > step.decode_sequences))

    return run
