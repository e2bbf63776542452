// The rows of prefill, and those of no sequence: rotary embedding of q and k in float32, quantization of q, k and v (or
// rounding to the cache's 16-bit type), and the write of k and v into the paged cache by slot. One thread takes VEC
// rotation pairs of HEADS heads of one token. e4m3 values go through threads that take VALUE_DIMS dimensions of one token,
// so that a warp of consecutive tokens writes whole rows of 16 of them. All loads of a
// thread are in flight at once. The first block writes the work list of the prefill kernel. Decode rows do it themselves. Where
// the linear in front can, it does all of this in its epilogue (gemm_heads.cuh).
//
// us on an H200 (e4m3, 32/8 heads at 1024 and 4096 tokens, 32/32 at 4096 and 16384): 7.0, 23.2, 46.0, 183; with 4 heads and 32
// dimensions a thread 8.4, 26.3, 45.9, 173; with values stored four tokens in a word 7.5, 23.6, 44.5, 180.
//
// Constants: NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, ROTARY_DIM (0 = none), VEC (divides ROTARY_DIM / 2), FP8_CACHE,
// QUANT_OUT, DTYPE.
#include "fp8/divide.cuh"
#include "fp8/sync.cuh"
#include "rotary.cuh"
#include "tiles.cuh"

// Per thread, independent loads in flight. To e4m3 there is as much to compute as to wait for: more threads and less of each.
constexpr int HEADS = FP8_CACHE ? 1 : 4;
constexpr int VALUE_DIMS = 16;
constexpr int ROW = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM;
constexpr int ROTATED = NUM_HEADS + NUM_KV_HEADS;
constexpr int MOVED = ROTATED + (FP8_CACHE ? 0 : NUM_KV_HEADS);  // heads of the elementwise part
constexpr int GROUPS = (MOVED + HEADS - 1) / HEADS;
constexpr int OUT_BYTES = QUANT_OUT ? 1 : 2;
static_assert(HEAD_DIM % 16 == 0);

// Rotates and writes a piece, VEC pairs, of HEADS heads of one token.
DEVICE void move_pairs(const u16* qkv, const int* position_ids, const int* slot_mapping, const float* cos, const float* sin,
                       u8* key_cache, u8* value_cache, u8* q, u8* y, MiddleDivisor q_scale, MiddleDivisor k_scale, int rows, int token, int group, int piece) {
  const Pairs<VEC> pairs(piece);
  Raw<VEC> left[HEADS], right[HEADS];
  float c[VEC], s[VEC];
#pragma unroll
  for (int i = 0; i < HEADS; i++) {
    const int head = group * HEADS + i;
    if (head >= MOVED) break;
    const u16* from = qkv + (u64)token * ROW + head * HEAD_DIM;
    left[i].load(from + pairs.first);
    right[i].load(from + pairs.second);
  }
  const int slot = slot_mapping[token];
  if (ROTARY_DIM) pairs.load_angles(c, s, cos, sin, position_ids[token]);
#pragma unroll
  for (int i = 0; i < HEADS; i++) {
    const int head = group * HEADS + i;
    if (head >= MOVED) break;
    float a[VEC], b[VEC];
    left[i].convert(a);
    right[i].convert(b);
    if (head < ROTATED) pairs.rotate(a, b, c, s);
    u8* to;
    if (head < NUM_HEADS) {
      to = q + ((u64)token * NUM_HEADS + head) * HEAD_DIM * CACHE_BYTES;
      if (token >= rows) {  // a row of no sequence: the attention kernels do not come here
        u8* out = y + ((u64)token * NUM_HEADS + head) * HEAD_DIM * OUT_BYTES;
        for (int k = 0; k < VEC * OUT_BYTES; k++) out[pairs.first * OUT_BYTES + k] = out[pairs.second * OUT_BYTES + k] = 0;
      }
    } else {
      if (slot < 0) continue;
      u8* cache = head < ROTATED ? key_cache : value_cache;
      const int kv_head = (head - NUM_HEADS) % NUM_KV_HEADS;
      to = cache + (((u64)(slot / 64) * NUM_KV_HEADS + kv_head) * 64 + slot % 64) * HEAD_DIM * CACHE_BYTES;
    }
    const MiddleDivisor by = head < NUM_HEADS ? q_scale : k_scale;
    const auto divided = [&](float x) { return by.divide(x); };
    store_codes(to + pairs.first * CACHE_BYTES, a, divided);
    store_codes(to + pairs.second * CACHE_BYTES, b, divided);
  }
}

// VALUE_DIMS dimensions of one token's value head, to e4m3, transposed. Lanes are consecutive tokens.
DEVICE void transpose_values(const u16* qkv, const int* slot_mapping, u8* value_cache, MiddleDivisor v_scale, int token, int kv_head, int dim) {
  const int slot = slot_mapping[token];
  if (slot < 0) return;
  const u16* from = qkv + (u64)token * ROW + (ROTATED + kv_head) * HEAD_DIM + dim;
  Raw<8> raw[VALUE_DIMS / 8];
#pragma unroll
  for (int i = 0; i < VALUE_DIMS / 8; i++) raw[i].load(from + 8 * i);
  u8* to = value_cache + ((u64)(slot / 64) * NUM_KV_HEADS + kv_head) * HEAD_DIM * 64 + value_offset(slot % 64) + dim * VALUE_GROUP;
#pragma unroll
  for (int i = 0; i < VALUE_DIMS / 8; i++) {
    float x[8];
    raw[i].convert(x);
#pragma unroll
    for (int k = 0; k < 8; k += 2) {
      const u16 codes = e4m3x2(v_scale.divide(x[k]), v_scale.divide(x[k + 1]));
      to[(8 * i + k) * VALUE_GROUP] = (u8)codes, to[(8 * i + k + 1) * VALUE_GROUP] = codes >> 8;
    }
  }
}

extern "C" __global__ void __launch_bounds__(256, FP8_CACHE ? 6 : 3)
rope_kv_write(const u16* qkv, const int* position_ids, const int* slot_mapping, const int* query_start, const int* sequence_lengths,
              const float* cos, const float* sin, u8* key_cache, u8* value_cache, const float* q_scale, const float* k_scale,
              const float* v_scale, u8* q, u8* y, int4* tiles, int tokens, int sequences, int decode_sequences) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  constexpr int PIECES = Pairs<VEC>::COUNT;
  const int rows = tokens - decode_sequences;
  const int pair_blocks = ((u64)rows * GROUPS * PIECES + 255) / 256;
  const int block = blockIdx.x - (sequences > decode_sequences);
  if (block < 0) {
    __shared__ int bins[TILE_BINS];
    if (threadIdx.x < 32)
      write_tiles(bins, tiles, query_start, sequence_lengths, decode_sequences, sequences, 2 * HEAD_DIM * CACHE_BYTES, NUM_KV_HEADS,
                  NUM_HEADS / NUM_KV_HEADS);
  } else if (block < pair_blocks) {
    const u32 unit = block * 256 + threadIdx.x;
    const u32 token = decode_sequences + unit / (GROUPS * PIECES);
    if (token >= tokens) return;
    move_pairs(qkv, position_ids, slot_mapping, cos, sin, key_cache, value_cache, q, y, MiddleDivisor(FP8_CACHE ? *q_scale : 1.f),
               MiddleDivisor(FP8_CACHE ? *k_scale : 1.f), query_start[sequences], token, unit / PIECES % GROUPS, unit % PIECES);
  } else {
    const u32 warp = (block - pair_blocks) * 8 + threadIdx.x / 32;
    const u32 dim = warp % (HEAD_DIM / VALUE_DIMS) * VALUE_DIMS, rest = warp / (HEAD_DIM / VALUE_DIMS);
    const u32 token = decode_sequences + rest / NUM_KV_HEADS * 32 + threadIdx.x % 32;
    if (token < tokens) transpose_values(qkv, slot_mapping, value_cache, MiddleDivisor(*v_scale), token, rest % NUM_KV_HEADS, dim);
  }
}
