// Rotary embedding of q and k in float32, quantization of q, k and v (or rounding to the cache's 16-bit type), and the
// write of k and v into the paged cache by slot. One thread takes VEC rotation pairs of HEADS heads of one token. e4m3
// values of prefill rows go through threads that take VALUE_DIMS dimensions of one token, so that a warp of consecutive
// tokens writes the transposed, permuted page rows in whole 32-byte sectors; those of decode rows, each of which is a
// sector of its own, through threads of two dimensions, spread over the multiprocessors. All loads of a thread are in
// flight at once. The last block writes the work list of the prefill kernel.
//
// Constants: NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, ROTARY_DIM (0 = none), VEC (divides ROTARY_DIM / 2), FP8_CACHE,
// QUANT_OUT, DTYPE.
#include "fp8/convert.cuh"
#include "fp8/sync.cuh"
#include "divide.cuh"
#include "tiles.cuh"

#define METHOD __device__ __forceinline__

constexpr int HEADS = 4;  // per thread: independent loads in flight
constexpr int PIECES = HEAD_DIM / (2 * VEC);
constexpr int VALUE_DIMS = 32;
constexpr int ROW = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM;
constexpr int ROTATED = NUM_HEADS + NUM_KV_HEADS;
constexpr int MOVED = ROTATED + (FP8_CACHE ? 0 : NUM_KV_HEADS);  // heads of the elementwise part
constexpr int GROUPS = (MOVED + HEADS - 1) / HEADS;
constexpr int CACHE_BYTES = FP8_CACHE ? 1 : 2;
constexpr int OUT_BYTES = QUANT_OUT ? 1 : 2;
static_assert(HEAD_DIM % 16 == 0 && ROTARY_DIM % 2 == 0 && ROTARY_DIM <= HEAD_DIM && (ROTARY_DIM / 2) % VEC == 0);

template <int BYTES> struct Word;
template <> struct Word<16> { typedef uint4 type; };
template <> struct Word<8> { typedef uint2 type; };
template <> struct Word<4> { typedef u32 type; };
template <> struct Word<2> { typedef u16 type; };
template <> struct Word<1> { typedef u8 type; };

// N values of the model's type, not yet converted: half the registers while they are on their way.
template <int N> struct Raw {
  typename Word<2 * N>::type word;
  METHOD void load(const u16* from) { word = *(const typename Word<2 * N>::type*)from; }
  METHOD void convert(float (&x)[N]) const {
    union { typename Word<2 * N>::type word; u16 item[N]; } raw;
    raw.word = word;
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = to_float<DTYPE>(raw.item[i]);
  }
};

template <int N> DEVICE void load32(float (&x)[N], const float* from) {
#pragma unroll
  for (int i = 0; i < N; i += (N < 4 ? N : 4)) {
    union { typename Word<N < 4 ? 4 * N : 16>::type word; float item[N < 4 ? N : 4]; } raw;
    raw.word = *(const decltype(raw.word)*)(from + i);
#pragma unroll
    for (int k = 0; k < (N < 4 ? N : 4); k++) x[i + k] = raw.item[k];
  }
}

// To the cache's type.
template <int N> DEVICE void store(u8* to, const float (&x)[N], Divisor by) {
  union { typename Word<CACHE_BYTES * N>::type word; u8 code[CACHE_BYTES * N]; u16 item[(CACHE_BYTES * N + 1) / 2]; } raw;
  if constexpr (!FP8_CACHE) {
#pragma unroll
    for (int i = 0; i < N; i++) raw.item[i] = from_float<DTYPE>(x[i]);
  } else if constexpr (N == 1) {
    raw.code[0] = (u8)e4m3x2(divide(x[0], by), 0.f);
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 2) raw.item[i / 2] = e4m3x2(divide(x[i], by), divide(x[i + 1], by));
  }
  *(decltype(raw.word)*)to = raw.word;
}

// Rotates and writes pairs (first + i, second + i) of heads [head, head + HEADS) of one token.
DEVICE void move_pairs(const u16* qkv, const int* position_ids, const int* slot_mapping, const float* cos, const float* sin,
                       u8* key_cache, u8* value_cache, u8* q, u8* y, Divisor q_scale, Divisor k_scale, int rows, int token, int group, int piece) {
  const int at = piece * VEC;
  const bool rotates = at < ROTARY_DIM / 2;
  const int first = rotates ? at : ROTARY_DIM + at - ROTARY_DIM / 2;
  const int second = first + (rotates ? ROTARY_DIM / 2 : (HEAD_DIM - ROTARY_DIM) / 2);
  Raw<VEC> left[HEADS], right[HEADS];
  float c[VEC], s[VEC];
#pragma unroll
  for (int i = 0; i < HEADS; i++) {
    const int head = group * HEADS + i;
    if (head >= MOVED) break;
    const u16* from = qkv + (u64)token * ROW + head * HEAD_DIM;
    left[i].load(from + first);
    right[i].load(from + second);
  }
  const int slot = slot_mapping[token];
  if (rotates) {
    const u64 position = position_ids[token];
    load32(c, cos + position * (ROTARY_DIM / 2) + at);
    load32(s, sin + position * (ROTARY_DIM / 2) + at);
  }
#pragma unroll
  for (int i = 0; i < HEADS; i++) {
    const int head = group * HEADS + i;
    if (head >= MOVED) break;
    float a[VEC], b[VEC];
    left[i].convert(a);
    right[i].convert(b);
    if (rotates && head < ROTATED) {
#pragma unroll
      for (int k = 0; k < VEC; k++) {  // each product and sum rounded, as in the graph: no contraction to FMA
        const float x = a[k], z = b[k];
        a[k] = __fsub_rn(__fmul_rn(c[k], x), __fmul_rn(s[k], z));
        b[k] = __fadd_rn(__fmul_rn(s[k], x), __fmul_rn(c[k], z));
      }
    }
    u8* to;
    if (head < NUM_HEADS) {
      to = q + ((u64)token * NUM_HEADS + head) * HEAD_DIM * CACHE_BYTES;
      if (token >= rows) {  // a row of no sequence: the attention kernels do not come here
        u8* out = y + ((u64)token * NUM_HEADS + head) * HEAD_DIM * OUT_BYTES;
        for (int k = 0; k < VEC * OUT_BYTES; k++) out[first * OUT_BYTES + k] = out[second * OUT_BYTES + k] = 0;
      }
    } else {
      if (slot < 0) continue;
      u8* cache = head < ROTATED ? key_cache : value_cache;
      const int kv_head = (head - NUM_HEADS) % NUM_KV_HEADS;
      to = cache + (((u64)(slot / 64) * NUM_KV_HEADS + kv_head) * 64 + slot % 64) * HEAD_DIM * CACHE_BYTES;
    }
    const Divisor by = head < NUM_HEADS ? q_scale : k_scale;
    store(to + first * CACHE_BYTES, a, by);
    store(to + second * CACHE_BYTES, b, by);
  }
}

// Where dimension 0 of a token's value head is in the cache; the next dimension is 64 bytes further.
DEVICE u8* value_place(u8* value_cache, int slot, int kv_head) {
  const int offset = slot % 64;
  const int place = (offset & 48) | (offset & 6) << 1 | (offset & 8) >> 2 | (offset & 1);  // layout.py: PERMUTATION
  return value_cache + ((u64)(slot / 64) * NUM_KV_HEADS + kv_head) * HEAD_DIM * 64 + place;
}

// Two dimensions of one token's value head, to e4m3.
DEVICE void scatter_values(const u16* qkv, const int* slot_mapping, u8* value_cache, Divisor v_scale, int token, int kv_head, int dim) {
  Raw<2> raw;
  raw.load(qkv + (u64)token * ROW + (ROTATED + kv_head) * HEAD_DIM + dim);
  const int slot = slot_mapping[token];
  if (slot < 0) return;
  float x[2];
  raw.convert(x);
  const u16 codes = e4m3x2(divide(x[0], v_scale), divide(x[1], v_scale));
  u8* to = value_place(value_cache, slot, kv_head) + dim * 64;
  to[0] = (u8)codes, to[64] = codes >> 8;
}

// VALUE_DIMS dimensions of one token's value head, to e4m3, transposed. Lanes are consecutive tokens.
DEVICE void transpose_values(const u16* qkv, const int* slot_mapping, u8* value_cache, Divisor v_scale, int token, int kv_head, int dim) {
  const int slot = slot_mapping[token];
  if (slot < 0) return;
  const u16* from = qkv + (u64)token * ROW + (ROTATED + kv_head) * HEAD_DIM + dim;
  Raw<8> raw[VALUE_DIMS / 8];
#pragma unroll
  for (int i = 0; i < VALUE_DIMS / 8; i++) raw[i].load(from + 8 * i);
  u8* to = value_place(value_cache, slot, kv_head) + dim * 64;
#pragma unroll
  for (int i = 0; i < VALUE_DIMS / 8; i++) {
    float x[8];
    raw[i].convert(x);
#pragma unroll
    for (int k = 0; k < 8; k += 2) {
      const u16 codes = e4m3x2(divide(x[k], v_scale), divide(x[k + 1], v_scale));
      to[(8 * i + k) * 64] = (u8)codes, to[(8 * i + k + 1) * 64] = codes >> 8;
    }
  }
}

extern "C" __global__ void __launch_bounds__(256, 3)
rope_kv_write(const u16* qkv, const int* position_ids, const int* slot_mapping, const int* query_start, const int* sequence_lengths,
              const float* cos, const float* sin, u8* key_cache, u8* value_cache, const float* q_scale, const float* k_scale,
              const float* v_scale, u8* q, u8* y, int4* tiles, int tokens, int sequences, int decode_sequences) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int pair_blocks = ((u64)tokens * GROUPS * PIECES + 255) / 256;
  const int scatter_blocks = FP8_CACHE ? ((u64)decode_sequences * (NUM_KV_HEADS * HEAD_DIM / 2) + 255) / 256 : 0;
  const int value_blocks = FP8_CACHE ? ((tokens - decode_sequences + 31) / 32 * (NUM_KV_HEADS * HEAD_DIM / VALUE_DIMS) + 7) / 8 : 0;
  const int block = blockIdx.x;
  if (block < pair_blocks) {
    const u32 unit = block * 256 + threadIdx.x;
    const u32 token = unit / (GROUPS * PIECES);
    if (token >= tokens) return;
    move_pairs(qkv, position_ids, slot_mapping, cos, sin, key_cache, value_cache, q, y, divisor(FP8_CACHE ? *q_scale : 1.f),
               divisor(FP8_CACHE ? *k_scale : 1.f), query_start[sequences], token, unit / PIECES % GROUPS, unit % PIECES);
  } else if (block < pair_blocks + scatter_blocks) {
    const u32 unit = (block - pair_blocks) * 256 + threadIdx.x;
    const u32 dim = unit % (HEAD_DIM / 2) * 2, rest = unit / (HEAD_DIM / 2);
    const u32 token = rest / NUM_KV_HEADS;
    if (token < decode_sequences) scatter_values(qkv, slot_mapping, value_cache, divisor(*v_scale), token, rest % NUM_KV_HEADS, dim);
  } else if (block < pair_blocks + scatter_blocks + value_blocks) {
    const u32 warp = (block - pair_blocks - scatter_blocks) * 8 + threadIdx.x / 32;
    const u32 dim = warp % (HEAD_DIM / VALUE_DIMS) * VALUE_DIMS, rest = warp / (HEAD_DIM / VALUE_DIMS);
    const u32 token = decode_sequences + rest / NUM_KV_HEADS * 32 + threadIdx.x % 32;
    if (token < tokens) transpose_values(qkv, slot_mapping, value_cache, divisor(*v_scale), token, rest % NUM_KV_HEADS, dim);
  } else {
    write_tiles(tiles, query_start, sequence_lengths, decode_sequences, sequences);
  }
}
