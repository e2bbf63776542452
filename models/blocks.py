"""Blocks shared by decoder models, emitted with every rounding point explicit.

Roles inside an attention module A (`model.layers.0.self_attn`), D = head size, G = query heads per KV head:

  q DT [T,H*D] -Cast[A/q_widen]-Unsqueeze[A/q_batch]-RotaryEmbedding[A/q_rotary]-Reshape[A/q_heads] f32 [T,KVH,G,D]
  k DT alike: A/k_widen, A/k_batch, A/k_rotary, A/k_heads [T,KVH,D];  v: A/v_widen, A/v_heads
  KV cache in DT:  Cast[A/q_round]-Cast[A/q_round_widen], the same for k; v is DT already
                   k, v -ScatterND[A/k_cache, A/v_cache]-> kv_cache.{i}.key.out, .value.out [S,KVH,D]
                   Reshape to rows [A/q_rows, A/k_rows, A/v_rows] - Attention[A/attention] - Reshape[A/output] [T,H*D]
  KV cache in FP8: QuantizeLinear[A/q_quantize]-DequantizeLinear[A/q_dequantize], k and v alike; ScatterND as above
                   MatMul[A/product], Mul[A/logits], Where[A/masked], ReduceMax[A/row_max], Ceil[A/row_exponent],
                   Sub[A/shifted], Pow[A/exponentials] (2^shifted), ReduceSum[A/row_sum],
                   QuantizeLinear[A/p_quantize]-DequantizeLinear[A/p_dequantize], MatMul[A/weighted], Div[A/normalized],
                   Transpose[A/merged], Reshape[A/output]
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from fp8.builder.graph import BOOL, F32, I32, I64, GraphBuilder, Linear

# P lies in (0, 1]. With this scale its codes reach 256, a power of two well inside e4m3's range.
P_SCALE = 1.0 / 256.0


@dataclass(frozen=True)
class Attention:
    """Shape of a grouped-query attention with rotary position embedding."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    output_bias: bool = False

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.head_dim)


@dataclass(frozen=True)
class Step:
    """What all layers share in one step: see `step_inputs`."""

    positions: gs.Tensor  # int64 [1, T]
    slots: gs.Tensor  # int64 [T, 1], where each token's K and V go
    visible: gs.Tensor  # bool [T, S]
    cos: gs.Tensor  # f32 [P, R/2]
    sin: gs.Tensor


def step_inputs(b: GraphBuilder, cos: np.ndarray, sin: np.ndarray) -> Step:
    """Graph inputs of a packed batch and the mask that all layers share.

    A slot is visible to a token if it belongs to the token's sequence and holds a position no later than the token's.
    """
    positions = b.input("position_ids", I32, ["T"])
    sequences = b.input("sequence_ids", I32, ["T"])
    slots = b.input("slot_mapping", I32, ["T"])
    slot_sequences = b.input("slot_sequence_ids", I32, ["S"])
    slot_positions = b.input("slot_position_ids", I32, ["S"])
    row, column = "attention_mask/token_", "attention_mask/slot_"
    token_sequence, token_position = (
        b.unsqueeze(x, 1, f"{row}{n}") for x, n in ((sequences, "sequence"), (positions, "position"))
    )
    slot_sequence, slot_position = (
        b.unsqueeze(x, 0, f"{column}{n}") for x, n in ((slot_sequences, "sequence"), (slot_positions, "position"))
    )
    zero = b.constant("constant/zero", np.array(0, np.int32))
    same = b.op("Equal", "attention_mask/same_sequence", [token_sequence, slot_sequence], BOOL, ["T", "S"])
    past = b.op("LessOrEqual", "attention_mask/not_later", [slot_position, token_position], BOOL, ["T", "S"])
    used = b.op("GreaterOrEqual", "attention_mask/used", [slot_position, zero], BOOL, [1, "S"])
    return Step(
        b.cast(b.unsqueeze(positions, 0, "rotary/positions"), I64, "rotary/positions_int64"),
        b.cast(b.unsqueeze(slots, 1, "kv_cache/slots"), I64, "kv_cache/slots_int64"),
        b.same("And", "attention_mask/visible", b.same("And", "attention_mask/causal", same, past), used),
        b.constant("rotary.cos", cos),
        b.constant("rotary.sin", sin),
    )


def rms_norm(b: GraphBuilder, x: gs.Tensor, name: str, size: int, epsilon: float) -> gs.Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight: x DT [T, H] -> f32, not rounded to DT."""
    weight = b.widen(b.weight(f"{name}.weight", (size,), ("embed",)), f"{name}/widen_weight")
    return b.same("RMSNormalization", f"{name}/norm", b.widen(x, f"{name}/widen"), weight, axis=-1, epsilon=epsilon)


def attention(b: GraphBuilder, x: gs.Tensor, shape: Attention, step: Step, module: str, layer: int) -> gs.Tensor:
    """Self-attention over the KV cache after this step's writes: x f32 [T, H] -> DT [T, H]."""
    s = shape
    q_size, kv_size = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
    q, k, v = b.linears(
        x,
        [
            Linear(f"{module}.q_proj", q_size, s.hidden_size, ("heads", "embed"), s.qkv_bias),
            Linear(f"{module}.k_proj", kv_size, s.hidden_size, ("kv_heads", "embed"), s.qkv_bias),
            Linear(f"{module}.v_proj", kv_size, s.hidden_size, ("kv_heads", "embed"), s.qkv_bias),
        ],
    )
    q = _rotary(b, q, s.num_heads, step, f"{module}/q")
    k = _rotary(b, k, s.num_kv_heads, step, f"{module}/k")
    q = b.reshape(q, ["T", s.num_kv_heads, s.group, s.head_dim], f"{module}/q_heads")
    k = b.reshape(k, ["T", s.num_kv_heads, s.head_dim], f"{module}/k_heads")
    v = b.reshape(b.widen(v, f"{module}/v_widen"), ["T", s.num_kv_heads, s.head_dim], f"{module}/v_heads")
    b.graph.activations.update({f"{module}.{n}_scale": t.name for n, t in (("q", q), ("k", k), ("v", v))})
    if b.format.fp8_kv_cache:
        out = _fp8_attention(b, q, k, v, s, step, module, layer)
    else:
        out = _plain_attention(b, q, k, v, s, step, module, layer)
    out = b.reshape(out, ["T", q_size], f"{module}/output")
    projection = Linear(f"{module}.o_proj", s.hidden_size, q_size, ("embed", "heads"), s.output_bias)
    return b.linears(b.format.attention_output(b, out, projection.name), [projection])[0]


def _rotary(b: GraphBuilder, x: gs.Tensor, heads: int, step: Step, name: str) -> gs.Tensor:
    x = b.unsqueeze(b.widen(x, f"{name}_widen"), 0, f"{name}_batch")
    dims = 2 * step.cos.shape[1]
    partial = {} if dims == x.shape[2] // heads else {"rotary_embedding_dim": dims}
    return b.same(
        "RotaryEmbedding", f"{name}_rotary", x, step.cos, step.sin, step.positions, num_heads=heads, **partial
    )


def _write_cache(b: GraphBuilder, x: gs.Tensor, step: Step, node: str, cache: str) -> gs.Tensor:
    """Scatters f32 [T, KVH, D] into the cache input of that name -> the cache after this step."""
    before = b.input(cache, F32, ["S", *x.shape[1:]])
    after = b.op("ScatterND", node, [before, step.slots, x], F32, before.shape)
    b.output(after, f"{cache}.out")
    return after


def _fp8_attention(
    b: GraphBuilder, q: gs.Tensor, k: gs.Tensor, v: gs.Tensor, s: Attention, step: Step, a: str, layer: int
) -> gs.Tensor:
    """softmax(q k^T) v with e4m3 q, k, v and P -> f32 [T, KVH, G, D].

    The row maximum is rounded up to an integer, so an online softmax rescales by exact powers of two and quantizes P to
    the same codes in whatever order it visits the keys; P is normalised after the product, by the unquantized row sum.
    """
    q, k, v = (_through_e4m3(b, x, b.scale(f"{a}.{n}_scale"), f"{a}/{n}") for x, n in ((q, "q"), (k, "k"), (v, "v")))
    keys = _write_cache(b, k, step, f"{a}/k_cache", f"kv_cache.{layer}.key")
    values = _write_cache(b, v, step, f"{a}/v_cache", f"kv_cache.{layer}.value")
    q = b.transpose(q, [1, 2, 0, 3], f"{a}/q_by_head")
    keys = b.unsqueeze(b.transpose(keys, [1, 2, 0], f"{a}/k_by_head"), 1, f"{a}/k_group")
    values = b.unsqueeze(b.transpose(values, [1, 0, 2], f"{a}/v_by_head"), 1, f"{a}/v_group")
    scores: list[int | str] = [s.num_kv_heads, s.group, "T", "S"]
    product = b.op("MatMul", f"{a}/product", [q, keys], F32, scores)
    logits = b.same("Mul", f"{a}/logits", product, b.scalar(float(np.float32(s.scale * math.log2(math.e)))))
    masked = b.op("Where", f"{a}/masked", [step.visible, logits, b.scalar(-math.inf)], F32, scores)
    exponent = b.same("Ceil", f"{a}/row_exponent", b.reduce("ReduceMax", masked, -1, f"{a}/row_max", keepdims=True))
    shifted = b.same("Sub", f"{a}/shifted", masked, exponent)
    p = b.op("Pow", f"{a}/exponentials", [b.scalar(2.0), shifted], F32, scores)
    total = b.reduce("ReduceSum", p, -1, f"{a}/row_sum", keepdims=True)
    weighted = b.op(
        "MatMul", f"{a}/weighted", [_through_e4m3(b, p, b.scalar(P_SCALE), f"{a}/p"), values], F32,
        [s.num_kv_heads, s.group, "T", s.head_dim],
    )  # fmt: skip
    return b.transpose(b.same("Div", f"{a}/normalized", weighted, total), [2, 0, 1, 3], f"{a}/merged")


def _through_e4m3(b: GraphBuilder, x: gs.Tensor, scale: gs.Tensor, name: str) -> gs.Tensor:
    return b.dequantize(b.quantize(x, scale, f"{name}_quantize"), scale, f"{name}_dequantize")


def _plain_attention(
    b: GraphBuilder, q: gs.Tensor, k: gs.Tensor, v: gs.Tensor, s: Attention, step: Step, a: str, layer: int
) -> gs.Tensor:
    """ONNX Attention over DT values -> f32 [1, T, H*D]."""
    q, k = (b.widen(b.round(x, f"{a}/{n}_round"), f"{a}/{n}_round_widen") for x, n in ((q, "q"), (k, "k")))
    keys = _write_cache(b, k, step, f"{a}/k_cache", f"kv_cache.{layer}.key")
    values = _write_cache(b, v, step, f"{a}/v_cache", f"kv_cache.{layer}.value")
    q_rows = b.reshape(q, [1, "T", s.num_heads * s.head_dim], f"{a}/q_rows")
    k_rows = b.reshape(keys, [1, "S", s.num_kv_heads * s.head_dim], f"{a}/k_rows")
    v_rows = b.reshape(values, [1, "S", s.num_kv_heads * s.head_dim], f"{a}/v_rows")
    return b.op(
        "Attention", f"{a}/attention", [q_rows, k_rows, v_rows, step.visible], F32, q_rows.shape,
        q_num_heads=s.num_heads, kv_num_heads=s.num_kv_heads, scale=s.scale, softmax_precision=1,
    )  # fmt: skip


def swiglu_mlp(b: GraphBuilder, x: gs.Tensor, hidden: int, inner: int, bias: bool, module: str) -> gs.Tensor:
    """down(silu(gate(x)) * up(x)), the middle in float32: x f32 [T, H] -> DT [T, H]."""
    gate, up = b.linears(
        x,
        [
            Linear(f"{module}.gate_proj", inner, hidden, ("mlp", "embed"), bias),
            Linear(f"{module}.up_proj", inner, hidden, ("mlp", "embed"), bias),
        ],
    )
    gate, up = b.widen(gate, f"{module}/gate_widen"), b.widen(up, f"{module}/up_widen")
    silu = b.same("Mul", f"{module}/silu", gate, b.same("Sigmoid", f"{module}/sigmoid", gate))
    inner_rows = b.same("Mul", f"{module}/hidden", silu, up)
    return b.linears(inner_rows, [Linear(f"{module}.down_proj", hidden, inner, ("embed", "mlp"), bias)])[0]
