"""The meaning of paged attention with rotary embedding and KV-cache write, in torch.

Every rounding point is the graph's: rotary embedding in float32, then q, k and v to e4m3 codes or to the cache's dtype;
scores, softmax and P V in float32, where the cache is e4m3 with P rounded to e4m3 at a scale of 1/256.
"""

from __future__ import annotations

import math

import torch

from fp8.plugins.base import BLOCK_SIZE, E4M3_MAX, StepShape

E4M3 = torch.float8_e4m3fn
P_SCALE = 1 / 256  # of the probabilities: p in (0, 1] becomes codes in (0, 256]
ELEMENTS = 1 << 26  # float32 values in the largest intermediate


def attention(
    qkv: torch.Tensor,
    position_ids: torch.Tensor,
    slot_mapping: torch.Tensor,
    query_start: torch.Tensor,
    sequence_lengths: torch.Tensor,
    block_tables: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    q_scale: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    *,
    step: StepShape,
    num_heads: int,
    softmax_scale: float,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Writes the new keys and values to the caches [num_blocks, 64, KVH, D] and returns y [T, H * D]: e4m3 codes where
    `out_scale` is given, else `out_dtype`. Rows that belong to no sequence, or to one of length 0, are zero."""
    kv_heads, head_dim = key_cache.shape[2:]
    rows = qkv[: step.tokens].view(step.tokens, num_heads + 2 * kv_heads, head_dim)
    q, k, v = rows.split([num_heads, kv_heads, kv_heads], dim=1)
    positions = position_ids[: step.tokens].long()
    q = rotate(q.float(), positions, cos, sin)
    k = rotate(k.float(), positions, cos, sin)
    q = quantize(q, q_scale) * q_scale if q_scale is not None else q.to(qkv.dtype).float()
    write(key_cache, slot_mapping[: step.tokens], k, k_scale)
    write(value_cache, slot_mapping[: step.tokens], v.float(), v_scale)

    y = torch.zeros(len(qkv), num_heads, head_dim, device=qkv.device)
    paged = Paged(key_cache, value_cache, block_tables, k_scale, v_scale)
    decode = step.decode_sequences
    lengths = sequence_lengths[: step.sequences].tolist()
    starts = query_start[: step.sequences + 1].tolist()
    per_batch = max(1, ELEMENTS // max(1, max(lengths[:decode], default=1) * max(num_heads, 2 * kv_heads * head_dim)))
    for first in range(0, decode, per_batch):
        last = min(first + per_batch, decode)
        y[first:last] = paged.decode(q[first:last], lengths[first:last], range(first, last), softmax_scale)
    for i in range(decode, step.sequences):
        begin, end = starts[i], starts[i + 1]
        if lengths[i] > 0 and end > begin:
            y[begin:end] = paged.prefill(q[begin:end], lengths[i], i, softmax_scale)
    y = y.flatten(1)
    return quantize(y, out_scale).to(E4M3) if out_scale is not None else y.to(out_dtype)


def rotate(
    x: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None
) -> torch.Tensor:
    """Rotary embedding of x [T, heads, D] in float32: pairs (i, i + R/2) of the first R dimensions; the rest passes."""
    if cos is None or sin is None:
        return x
    half = cos.shape[1]
    c, s = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat([c * a - s * b, s * a + c * b, x[..., 2 * half :]], dim=-1)


def quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """QuantizeLinear to e4m3, saturating: the codes' values in float32."""
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3).float()


def write(cache: torch.Tensor, slots: torch.Tensor, x: torch.Tensor, scale: torch.Tensor | None) -> None:
    """Puts x [T, KVH, D] into the slots of a cache [num_blocks, 64, KVH, D]; slot -1 is skipped."""
    kept = slots >= 0
    x = (quantize(x, scale) if scale is not None else x).to(cache.dtype)
    whole = cache.view(-1, *cache.shape[2:])
    if cache.dtype == E4M3:  # torch indexes bytes everywhere, float8 not
        whole, x = whole.view(torch.uint8), x.view(torch.uint8)
    whole[slots[kept].long()] = x[kept]


class Paged:
    """Attention over the sequences of a paged cache."""

    def __init__(
        self,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        block_tables: torch.Tensor,
        k_scale: torch.Tensor | None,
        v_scale: torch.Tensor | None,
    ) -> None:
        self.key_cache, self.value_cache, self.block_tables = key_cache, value_cache, block_tables
        self.k_scale, self.v_scale = k_scale, v_scale
        self.fp8 = key_cache.dtype == E4M3

    def prefill(self, q: torch.Tensor, length: int, sequence: int, softmax_scale: float) -> torch.Tensor:
        """q [n, H, D], the last n tokens of a context of `length` -> o [n, H, D]. Works through it in pieces."""
        n, heads, head_dim = q.shape
        blocks = self.block_tables[sequence, : -(-length // BLOCK_SIZE)].long()
        k = self._gather(self.key_cache, blocks, self.k_scale)[:length].transpose(0, 1)  # [KVH, length, D]
        v = self._gather(self.value_cache, blocks, self.v_scale)[:length].transpose(0, 1)
        kv_heads = k.shape[0]
        q = q.view(n, kv_heads, heads // kv_heads, head_dim).permute(1, 2, 0, 3)  # [KVH, group, n, D]
        o = torch.empty_like(q)
        piece = max(1, ELEMENTS // (length * (heads // kv_heads)))
        slot = torch.arange(length, device=q.device)
        for head in range(kv_heads):
            for first in range(0, n, piece):
                last = min(first + piece, n)
                position = torch.arange(length - n + first, length - n + last, device=q.device)
                visible = slot <= position.unsqueeze(1)
                o[head, :, first:last] = self._attend(q[head, :, first:last], k[head], v[head], visible, softmax_scale)
        return o.permute(2, 0, 1, 3).reshape(n, heads, head_dim)

    def decode(self, q: torch.Tensor, lengths: list[int], sequences: range, softmax_scale: float) -> torch.Tensor:
        """q [B, H, D], the last token of each context -> o [B, H, D]; zero where the length is 0."""
        batch, heads, head_dim = q.shape
        longest = max(lengths)
        if longest == 0:
            return torch.zeros_like(q)
        blocks = self.block_tables[sequences.start : sequences.stop, : -(-longest // BLOCK_SIZE)].long()
        blocks = blocks.clamp(0, len(self.key_cache) - 1)  # entries after a sequence's end may hold anything
        k = self._gather(self.key_cache, blocks.flatten(), self.k_scale).view(batch, -1, *self.key_cache.shape[2:])
        v = self._gather(self.value_cache, blocks.flatten(), self.v_scale).view_as(k)
        kv_heads = k.shape[2]
        length = torch.tensor(lengths, device=q.device).view(-1, 1, 1, 1)
        visible = torch.arange(k.shape[1], device=q.device) < length
        q = q.view(batch, kv_heads, heads // kv_heads, head_dim)
        o = self._attend(q, k.transpose(1, 2), v.transpose(1, 2), visible | (length == 0), softmax_scale)
        return torch.where(length == 0, 0.0, o).view(batch, heads, head_dim)

    @staticmethod
    def _gather(cache: torch.Tensor, blocks: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """The dequantized tokens [len(blocks) * 64, KVH, D] of some blocks."""
        if cache.dtype == E4M3:
            codes = cache.view(torch.uint8)[blocks].view(E4M3).float()
            return (codes * scale).flatten(0, 1)
        return cache[blocks].float().flatten(0, 1)

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, softmax_scale: float
    ) -> torch.Tensor:
        """q [..., n, D], k and v [..., m, D], visible [..., n, m] -> o [..., n, D], all float32."""
        if not self.fp8:
            s = (q @ k.transpose(-1, -2) * softmax_scale).masked_fill_(~visible, -math.inf)
            return torch.softmax(s, -1) @ v
        s = (q @ k.transpose(-1, -2) * (softmax_scale * math.log2(math.e))).masked_fill_(~visible, -math.inf)
        p = torch.exp2(s - s.amax(-1, keepdim=True).ceil())
        total = p.sum(-1, keepdim=True)
        return quantize(p, torch.tensor(P_SCALE)) * P_SCALE @ v / total
