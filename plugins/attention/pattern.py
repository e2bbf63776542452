"""RoPE, KV-cache write and attention over the slots of a cache, with e4m3 Q, K, V and P or in the model's dtype.

Over slots a key is visible to a token if it belongs to the token's sequence and is not later. The plugin says the same
by block tables: `query_start`, `sequence_lengths` and `block_tables` are inputs that no pattern binds.
"""

from __future__ import annotations

import math

from fp8.plugins.quantize.pattern import ROUNDED

P_SCALE = 1 / 256


def attention(
    op, qkv, position_ids, slot_mapping, query_start, sequence_lengths, block_tables, cos, sin, key_cache, value_cache,
    q_scale, k_scale, v_scale, out_scale,
    *, fp8_cache=(True, False), quant_out=(True, False),
):  # fmt: skip
    q, k, v = op.Split(qkv, op.anything(), axis=1, outputs=3)
    q = rotated(op, q, position_ids, cos, sin, "num_heads")
    k = rotated(op, k, position_ids, cos, sin, "num_kv_heads")
    v = op.Reshape(op.Cast(v, to="float32"), op.anything())
    if fp8_cache:
        q, k, v = (through_e4m3(op, x, s) for x, s in ((q, q_scale), (k, k_scale), (v, v_scale)))
    else:
        q, k = (op.Cast(op.Cast(x, to=op.attribute("dtype")), to="float32") for x in (q, k))
    slots = op.shared(op.Cast(op.shared(op.Unsqueeze(slot_mapping, 1)), to="int64"))
    key, value = op.ScatterND(key_cache, slots, k), op.ScatterND(value_cache, slots, v)
    o = (fp8_softmax if fp8_cache else softmax)(op, q, key, value, visible(op, position_ids))
    o = op.Reshape(o, op.anything())
    if quant_out:
        y = op.QuantizeLinear(o, out_scale, saturate=1, output_dtype="float8_e4m3fn")
    else:
        y = op.Cast(o, to=op.attribute("out_dtype", *ROUNDED))
    return y, key, value


def rotated(op, x, position_ids, cos, sin, heads):
    """DT [T, heads * D] -> f32 [T, ..., D]."""
    positions = op.shared(op.Cast(op.shared(op.Unsqueeze(position_ids, 0)), to="int64"))
    x = op.Unsqueeze(op.Cast(x, to="float32"), 0)
    x = op.RotaryEmbedding(x, cos, sin, positions, interleaved=0, num_heads=op.attribute(heads))
    return op.Reshape(x, op.anything())


def through_e4m3(op, x, scale):
    return op.DequantizeLinear(op.QuantizeLinear(x, scale, saturate=1, output_dtype="float8_e4m3fn"), scale)


def visible(op, position_ids):
    """bool [T, S]: the slot is used, is of the token's sequence, and not later than the token."""
    sequence = op.shared(op.Unsqueeze(op.input("sequence_ids"), 1))
    position = op.shared(op.Unsqueeze(position_ids, 1))
    slot_sequence = op.shared(op.Unsqueeze(op.input("slot_sequence_ids"), 0))
    slot_position = op.shared(op.Unsqueeze(op.input("slot_position_ids"), 0))
    same = op.shared(op.Equal(sequence, slot_sequence))
    past = op.shared(op.LessOrEqual(slot_position, position))
    used = op.shared(op.GreaterOrEqual(slot_position, 0))
    return op.shared(op.And(op.shared(op.And(same, past)), used))


def fp8_softmax(op, q, key, value, mask):
    """f32 [T, KVH, G, D]; row maxima are rounded up to integers, P is quantized with 1/256 before it is normalised."""
    key = op.Unsqueeze(op.Transpose(key, perm=[1, 2, 0]), 1)
    value = op.Unsqueeze(op.Transpose(value, perm=[1, 0, 2]), 1)
    s = op.Mul(op.MatMul(op.Transpose(q, perm=[1, 2, 0, 3]), key), op.scalar("log2_scale"))
    s = op.Where(mask, s, -math.inf)
    p = op.Pow(2, op.Sub(s, op.Ceil(op.ReduceMax(s, 3, keepdims=1))))
    o = op.Div(op.module(op.MatMul(through_e4m3(op, p, P_SCALE), value)), op.ReduceSum(p, 3, keepdims=1))
    return op.Transpose(o, perm=[2, 0, 1, 3])


def softmax(op, q, key, value, mask):
    """f32 [1, T, H * D]."""
    q, key, value = (op.Reshape(x, op.anything()) for x in (q, key, value))
    heads = {"q_num_heads": op.attribute("num_heads"), "kv_num_heads": op.attribute("num_kv_heads")}
    scale = op.attribute("softmax_scale")
    return op.module(op.Attention(q, key, value, mask, is_causal=0, softcap=0.0, scale=scale, **heads))


def complete(inputs, attributes):
    """head_dim, out_dtype, and softmax_scale from the constant that holds softmax_scale * log2(e) in float32."""
    qkv, heads = inputs[0], attributes["num_heads"] + 2 * attributes["num_kv_heads"]
    head_dim = qkv.shape[1] // heads
    found = {"head_dim": head_dim, "out_dtype": qkv.dtype}
    if "log2_scale" in attributes:
        found["softmax_scale"] = attributes["log2_scale"] / math.log2(math.e)
    return found
