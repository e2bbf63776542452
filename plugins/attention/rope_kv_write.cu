// The rows of prefill, and those of no sequence: rotary embedding of q and k in float32, quantization of q, k and v (or
// rounding to the cache's 16-bit type), and the write of k and v into the paged cache by slot. One thread takes VEC
// rotation pairs of HEADS heads of one token, all loads of which are in flight at once. e4m3 values go through warps that take
// VALUE_DIMS dimensions of a group of tokens that lie together in a page. The first block writes the work list of the prefill
// kernel. Decode rows do it themselves. Where the linear in front can, it does all of this in its epilogue (gemm_heads.cuh).
//
// us on an H200 (e4m3, 32/8 heads at 1024 and 4096 tokens, 32/32 at 4096 and 16384, at 4 x 1021, and 32/8 at 64 x 67): 7.2, 22.0,
// 42.3, 161, 42.3, 22.9; a copy of as many bytes 6.3, 19.7, 37.0, 143, 36.8, 20.4. Blocks of values behind those of pairs 7.3, 22.5,
// 41.4, 160, 45.2, 24.7 (warps whose tokens are no whole group take longest; all tokens of such a group at once: 44.9, 25.4, and 1 %
// more elsewhere), among them 7.2, 22.7, 42.9, 164, 46.6, 25.0; with one head a thread 6.8, 23.6, 44.2, 168, 47.1, 26.0,
// four 7.2, 22.6, 41.5, 160, 45.5, 24.2. Whole sectors of values by an exchange between lanes: nothing. Before, one head a thread
// and values 16 dimensions of a token, each a byte: 7.2, 23.9, 47.4, 182, 53.2, 27.8.
//
// Constants: NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, ROTARY_DIM (0 = none), VEC (divides ROTARY_DIM / 2), FP8_CACHE,
// QUANT_OUT, DTYPE, HEADS, BLOCKS (of 256 threads on a multiprocessor).
#include "fp8/divide.cuh"
#include "fp8/sync.cuh"
#include "rotary.cuh"
#include "tiles.cuh"

constexpr int VALUE_DIMS = 64;  // of a warp
constexpr int ROW = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM;
constexpr int ROTATED = NUM_HEADS + NUM_KV_HEADS;
constexpr int MOVED = ROTATED + (FP8_CACHE ? 0 : NUM_KV_HEADS);  // heads of the elementwise part
constexpr int GROUPS = (MOVED + HEADS - 1) / HEADS;
constexpr int OUT_BYTES = QUANT_OUT ? 1 : 2;
static_assert(HEAD_DIM % VALUE_DIMS == 0);
static_assert(!FP8_CACHE || (NUM_HEADS % HEADS == 0 && NUM_KV_HEADS % HEADS == 0), "a thread's heads have one scale");

// Rotates and writes a piece, VEC pairs, of HEADS heads of one token. What others wait for is loaded first, and the reciprocal
// (a branch) comes behind all loads.
DEVICE void move_pairs(const u16* qkv, const int* position_ids, const int* slot_mapping, const float* cos, const float* sin,
                       u8* key_cache, u8* value_cache, u8* q, u8* y, const float* scale, const int* rows, int token, int group, int piece) {
  const Pairs<VEC> pairs(piece);
  Raw<VEC> left[HEADS], right[HEADS];
  float c[VEC], s[VEC];
  const int position = ROTARY_DIM ? position_ids[token] : 0, slot = slot_mapping[token], used = *rows;
  const float divisor = FP8_CACHE ? *scale : 1.f;
#pragma unroll
  for (int i = 0; i < HEADS; i++) {
    const int head = group * HEADS + i;
    if (MOVED % HEADS && head >= MOVED) break;
    const u16* from = qkv + (u64)token * ROW + head * HEAD_DIM;
    left[i].load(from + pairs.first);
    right[i].load(from + pairs.second);
  }
  if (ROTARY_DIM) pairs.load_angles(c, s, cos, sin, position);
  const MiddleDivisor by(divisor);
#pragma unroll
  for (int i = 0; i < HEADS; i++) {
    const int head = group * HEADS + i;
    if (MOVED % HEADS && head >= MOVED) break;
    float a[VEC], b[VEC];
    left[i].convert(a);
    right[i].convert(b);
    if (head < ROTATED) pairs.rotate(a, b, c, s);
    u8* to;
    if (head < NUM_HEADS) {
      to = q + ((u64)token * NUM_HEADS + head) * HEAD_DIM * CACHE_BYTES;
      if (token >= used) {  // a row of no sequence: the attention kernels do not come here
        u8* out = y + ((u64)token * NUM_HEADS + head) * HEAD_DIM * OUT_BYTES;
        for (int k = 0; k < VEC * OUT_BYTES; k++) out[pairs.first * OUT_BYTES + k] = out[pairs.second * OUT_BYTES + k] = 0;
      }
    } else {
      if (slot < 0) continue;
      u8* cache = head < ROTATED ? key_cache : value_cache;
      const int kv_head = (head - NUM_HEADS) % NUM_KV_HEADS;
      to = cache + (((u64)(slot / 64) * NUM_KV_HEADS + kv_head) * 64 + slot % 64) * HEAD_DIM * CACHE_BYTES;
    }
    const auto divided = [&](float x) { return by.divide(x); };
    store_codes(to + pairs.first * CACHE_BYTES, a, divided);
    store_codes(to + pairs.second * CACHE_BYTES, b, divided);
  }
}

// Values to e4m3, transposed: a warp takes VALUE_DIMS dimensions of a head, two a lane, of the groups of VALUE_GROUP tokens that
// lie together in a page and begin among the tokens [first, first + VALUE_GROUP), and of those tokens of this range that
// belong to no group that is here as a whole: where a chunk begins or ends within one.
struct Values {
  const u16* qkv;
  const int* slot_mapping;
  u8* cache;
  float scale;
  int kv_head, dim;

  DEVICE_MEMBER const u32* from(int token) const { return (const u32*)(qkv + (u64)token * ROW + (ROTATED + kv_head) * HEAD_DIM + dim); }
  DEVICE_MEMBER u8* to(int slot) const {
    return cache + ((u64)(slot / 64) * NUM_KV_HEADS + kv_head) * HEAD_DIM * 64 + value_offset(slot % 64) + dim * VALUE_GROUP;
  }
  DEVICE_MEMBER static float divided(MiddleDivisor by, u32 pair, int half) { return by.divide(to_float<DTYPE>((u16)(pair >> 16 * half))); }

  DEVICE_MEMBER void write_group(int token, int slot) const {
    u32 pairs[VALUE_GROUP];
#pragma unroll
    for (int i = 0; i < VALUE_GROUP; i++) pairs[i] = *from(token + i);
    const MiddleDivisor by(scale);
    uint4* out = (uint4*)to(slot);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      u32 word[4];
#pragma unroll
      for (int k = 0; k < 4; k++) {  // places 4 k and on: value_place
        const u32* x = &pairs[2 * k];
        word[k] = e4m3x4(divided(by, x[0], half), divided(by, x[1], half), divided(by, x[8], half), divided(by, x[9], half));
      }
      out[half] = make_uint4(word[0], word[1], word[2], word[3]);
    }
  }

  DEVICE_MEMBER void write_token(int token, int slot) const {
    const u32 pair = *from(token);
    const MiddleDivisor by(scale);
    const u16 codes = e4m3x2(divided(by, pair, 0), divided(by, pair, 1));
    u8* out = to(slot);
    out[0] = (u8)codes, out[VALUE_GROUP] = codes >> 8;
  }

  // begin, end: of all rows. Bits of 48 tokens from 16 before `first` on tell which have consecutive slots.
  DEVICE_MEMBER void write(int first, int begin, int end) const {
    const int lane = threadIdx.x % 32, near = first - VALUE_GROUP + lane, far = near + 32;
    const int slot = near >= begin && near < end ? slot_mapping[near] : -1;
    const int far_slot = lane < VALUE_GROUP && far < end ? slot_mapping[far] : -1;
    u32 left = __ballot_sync(~0u, slot >= 0) & 0xFFFF0000;
#pragma unroll 1
    while (left) {
      const int offset = __shfl_sync(~0u, slot - near, __ffs(left) - 1);  // of slots from tokens, in one run of them
      const u64 run = (u64)__ballot_sync(~0u, far_slot >= 0 && far_slot - far == offset) << 32 |
                      __ballot_sync(~0u, slot >= 0 && slot - near == offset);
      const int start = VALUE_GROUP + (-(offset + first) & (VALUE_GROUP - 1));  // bit of the group that begins in this range
      const bool before = (run >> (start - VALUE_GROUP) & 0xFFFF) == 0xFFFF, whole = (run >> start & 0xFFFF) == 0xFFFF;
      const int token = first - VALUE_GROUP + start;
      if (whole) write_group(token, token + offset);
      const u32 mine = (u32)run & left, behind = ~0u << start;
#pragma unroll 1
      for (u32 rest = mine & (before ? behind : ~0u) & (whole ? ~behind : ~0u); rest; rest &= rest - 1) {
        const int at = first - VALUE_GROUP + __ffs(rest) - 1;
        write_token(at, at + offset);
      }
      left &= ~mine;
    }
  }
};

extern "C" __global__ void __launch_bounds__(256, BLOCKS)
rope_kv_write(const u16* qkv, const int* position_ids, const int* slot_mapping, const int* query_start, const int* sequence_lengths,
              const float* cos, const float* sin, u8* key_cache, u8* value_cache, const float* q_scale, const float* k_scale,
              const float* v_scale, u8* q, u8* y, int4* tiles, int tokens, int sequences, int decode_sequences) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  constexpr int PIECES = Pairs<VEC>::COUNT;
  const int rows = tokens - decode_sequences;
  const int pair_blocks = ((u64)rows * GROUPS * PIECES + 255) / 256;
  const int listing = sequences > decode_sequences, value_blocks = gridDim.x - listing - pair_blocks;
  const int block = blockIdx.x - listing;
  if (block < 0) {
    __shared__ int bins[TILE_BINS];
    if (threadIdx.x < 32)
      write_tiles(bins, tiles, query_start, sequence_lengths, decode_sequences, sequences, 2 * HEAD_DIM * CACHE_BYTES, NUM_KV_HEADS,
                  NUM_HEADS / NUM_KV_HEADS);
  } else if (block < value_blocks) {
    const u32 warp = block * 8 + threadIdx.x / 32;
    const u32 piece = warp % (HEAD_DIM / VALUE_DIMS), rest = warp / (HEAD_DIM / VALUE_DIMS);
    const int first = decode_sequences + rest / NUM_KV_HEADS * VALUE_GROUP, dim = piece * VALUE_DIMS + threadIdx.x % 32 * 2;
    const Values values{qkv, slot_mapping, value_cache, *v_scale, (int)(rest % NUM_KV_HEADS), dim};
    if (first < tokens) values.write(first, decode_sequences, tokens);
  } else {
    const u32 unit = (block - value_blocks) * 256 + threadIdx.x;
    const u32 token = decode_sequences + unit / (GROUPS * PIECES);
    if (token >= tokens) return;
    const int group = unit / PIECES % GROUPS;
    move_pairs(qkv, position_ids, slot_mapping, cos, sin, key_cache, value_cache, q, y, group * HEADS < NUM_HEADS ? q_scale : k_scale,
               query_start + sequences, token, group, unit % PIECES);
  }
}
