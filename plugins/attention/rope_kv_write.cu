// Rotary embedding of q and k in float32, quantization of q, k and v (or rounding to the cache's 16-bit type), and the
// write of k and v into the paged cache by slot. One thread takes VEC rotation pairs of HEADS heads of one token; e4m3
// values go through threads that take 8 dimensions of one token, so that a warp of consecutive tokens writes the
// transposed, permuted page rows in whole 32-byte sectors. The last block writes the work list of the prefill kernel.
//
// Constants: NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, ROTARY_DIM (0 = none), VEC (divides ROTARY_DIM / 2), FP8_CACHE,
// QUANT_OUT, DTYPE.
#include "fp8/convert.cuh"
#include "fp8/sync.cuh"
#include "tiles.cuh"

constexpr int HEADS = 4;  // per thread: independent loads in flight
constexpr int PIECES = HEAD_DIM / (2 * VEC);
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

template <int N> DEVICE void load16(float (&x)[N], const u16* from) {
  union { typename Word<2 * N>::type word; u16 item[N]; } raw;
  raw.word = *(const typename Word<2 * N>::type*)from;
#pragma unroll
  for (int i = 0; i < N; i++) x[i] = to_float<DTYPE>(raw.item[i]);
}

template <int N> DEVICE void load32(float (&x)[N], const float* from) {
#pragma unroll
  for (int i = 0; i < N; i += (N < 4 ? N : 4)) {
    union { typename Word<N < 4 ? 4 * N : 16>::type word; float item[N < 4 ? N : 4]; } raw;
    raw.word = *(const decltype(raw.word)*)(from + i);
#pragma unroll
    for (int k = 0; k < (N < 4 ? N : 4); k++) x[i + k] = raw.item[k];
  }
}

// To the cache's type; a true division, so that the codes are QuantizeLinear's.
template <int N> DEVICE void store(u8* to, const float (&x)[N], float scale) {
  union { typename Word<CACHE_BYTES * N>::type word; u8 code[CACHE_BYTES * N]; u16 item[(CACHE_BYTES * N + 1) / 2]; } raw;
#pragma unroll
  for (int i = 0; i < N; i++) {
    if (FP8_CACHE) raw.code[i] = (u8)e4m3x2(__fdiv_rn(x[i], scale), 0.f);
    else raw.item[i] = from_float<DTYPE>(x[i]);
  }
  *(decltype(raw.word)*)to = raw.word;
}

// Rotates and writes pairs (first + i, second + i) of heads [head, head + HEADS) of one token.
DEVICE void move_pairs(const u16* qkv, const int* position_ids, const int* slot_mapping, const float* cos, const float* sin,
                       u8* key_cache, u8* value_cache, u8* q, u8* y, float q_scale, float k_scale, int rows, int token, int group, int piece) {
  const int at = piece * VEC;
  const bool rotates = at < ROTARY_DIM / 2;
  const int first = rotates ? at : ROTARY_DIM + at - ROTARY_DIM / 2;
  const int second = first + (rotates ? ROTARY_DIM / 2 : (HEAD_DIM - ROTARY_DIM) / 2);
  float a[HEADS][VEC], b[HEADS][VEC], c[VEC], s[VEC];
#pragma unroll
  for (int i = 0; i < HEADS; i++) {
    const int head = group * HEADS + i;
    if (head >= MOVED) break;
    const u16* from = qkv + (u64)token * ROW + head * HEAD_DIM;
    load16(a[i], from + first);
    load16(b[i], from + second);
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
    if (rotates && head < ROTATED) {
#pragma unroll
      for (int k = 0; k < VEC; k++) {  // two roundings per product and sum, as in the graph: no contraction to FMA
        const float x = a[i][k], z = b[i][k];
        a[i][k] = __fsub_rn(__fmul_rn(c[k], x), __fmul_rn(s[k], z));
        b[i][k] = __fadd_rn(__fmul_rn(s[k], x), __fmul_rn(c[k], z));
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
    const float scale = head < NUM_HEADS ? q_scale : k_scale;
    store(to + first * CACHE_BYTES, a[i], scale);
    store(to + second * CACHE_BYTES, b[i], scale);
  }
}

// Eight dimensions of one token's value head, to e4m3, transposed. Lanes are consecutive tokens.
DEVICE void transpose_values(const u16* qkv, const int* slot_mapping, u8* value_cache, float v_scale, int token, int kv_head, int dim) {
  const int slot = slot_mapping[token];
  if (slot < 0) return;
  float x[8];
  load16(x, qkv + (u64)token * ROW + (ROTATED + kv_head) * HEAD_DIM + dim);
  const int offset = slot % 64;
  const int place = (offset & 48) | (offset & 6) << 1 | (offset & 8) >> 2 | (offset & 1);  // layout.py: PERMUTATION
  u8* to = value_cache + (((u64)(slot / 64) * NUM_KV_HEADS + kv_head) * HEAD_DIM + dim) * 64 + place;
#pragma unroll
  for (int i = 0; i < 8; i++) to[i * 64] = (u8)e4m3x2(__fdiv_rn(x[i], v_scale), 0.f);
}

extern "C" __global__ void __launch_bounds__(256)
rope_kv_write(const u16* qkv, const int* position_ids, const int* slot_mapping, const int* query_start, const int* sequence_lengths,
              const float* cos, const float* sin, u8* key_cache, u8* value_cache, const float* q_scale, const float* k_scale,
              const float* v_scale, u8* q, u8* y, int4* tiles, int tokens, int sequences, int decode_sequences) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int pair_blocks = ((u64)tokens * GROUPS * PIECES + 255) / 256;
  const int value_blocks = FP8_CACHE ? ((tokens + 31) / 32 * NUM_KV_HEADS * (HEAD_DIM / 8) + 7) / 8 : 0;
  const int block = blockIdx.x;
  if (block < pair_blocks) {
    const u32 unit = block * 256 + threadIdx.x;
    const u32 token = unit / (GROUPS * PIECES);
    if (token >= tokens) return;
    move_pairs(qkv, position_ids, slot_mapping, cos, sin, key_cache, value_cache, q, y, FP8_CACHE ? *q_scale : 1.f,
               FP8_CACHE ? *k_scale : 1.f, query_start[sequences], token, unit / PIECES % GROUPS, unit % PIECES);
  } else if (block < pair_blocks + value_blocks) {
    const u32 warp = (block - pair_blocks) * 8 + threadIdx.x / 32;
    const u32 dim = warp % (HEAD_DIM / 8) * 8, rest = warp / (HEAD_DIM / 8);
    const u32 token = rest / NUM_KV_HEADS * 32 + threadIdx.x % 32;
    if (token < tokens) transpose_values(qkv, slot_mapping, value_cache, *v_scale, token, rest % NUM_KV_HEADS, dim);
  } else {
    write_tiles(tiles, query_start, sequence_lengths, decode_sequences, sequences);
  }
}
