#pragma once
// Where attention follows (HEADS): what rope_kv_write.cu does to rows of prompts, done to them before they leave. A tile's
// rows lie in shared memory as a linear's would, rounded to the 16-bit type; from there q and k are rotated in float32, all
// is quantized (or rounded) and goes to the queries and to its slots of the paged cache: the same bits. Rows of decode
// sequences leave as a linear's.
//
// us on an H200 under the power limit, [product, attention] of 4 x 1024 and 1 x 4096 tokens, K = 4096 (two runs, of which each
// timed rope_kv_write.cu in turn; the product alone takes 311 with 32/32 heads, 154 with 32/8):
//                                                                    32/32 heads    32/8
//   rope_kv_write.cu between the two                                 455   607     272   421
//   this                                                             429   586     262   403
//   rope_kv_write.cu between the two                                 469   629     277   429
//   rotated in the registers of the accumulators, no shared memory   444   600     273   417
//   the same without its loads of angles, whose values are wrong     428   550     248   371
// In an accumulator's layout a warp reads angles by 32 bytes of a line and puts codes away by 16 bits: each takes a turn of the
// L1 cache and shared memory that the other warpgroup's products want. From rows in shared memory eight lanes read a line. 512
// tokens of 32/8 heads want tiles of 128 x 192; with those of 64 x 128 for this epilogue's sake 35.4 us become 36.8.
//
// Constants: HEADS (0: none of this), KV_HEADS, HEAD_DIM, ROTARY_DIM (0 = none), FP8_CACHE, DTYPE.
#include "gemm_epilogue.cuh"
#include "../attention/rotary.cuh"
#include "../attention/tiles.cuh"

constexpr int TILE_HEADS = BLOCK_N / HEAD_DIM;  // whole heads of one kind
constexpr int VEC = 4;                          // rotation pairs that a thread takes at once: eight lanes read a line of angles
constexpr int PIECES = Pairs<VEC>::COUNT;       // of a head
constexpr int STEPS = 4;                        // of a warp through its 16 rows
constexpr int TOGETHER = FP8_CACHE ? 2 : 1;     // of them, their angles are loaded at once; 16-bit rows need the registers
static_assert(BLOCK_N == 128 && PINGPONG && TMA_STORE && !SWIGLU && !QUANT && BUFFERS == 2 && CHUNK == 128);
static_assert(HEADS % TILE_HEADS == 0 && KV_HEADS % TILE_HEADS == 0);

struct Cache {
  const int *positions, *slots, *query_start, *lengths;
  const float *cos, *sin, *q_scale, *k_scale, *v_scale;
  u8 *keys, *values, *queries;
  int4* tiles;
  int sequences, decode_rows;
};

enum Kind { QUERIES, KEYS, VALUES };
DEVICE Kind kind_of(int column) { return column < HEADS * HEAD_DIM ? QUERIES : column < (HEADS + KV_HEADS) * HEAD_DIM ? KEYS : VALUES; }

// Where 16-bit value `column` of a row is staged: two buffers of 64 columns.
DEVICE const u16* staged(const u8* buffers, int row, int column) {
  return (const u16*)(buffers + column / 64 * (64 * CHUNK) + swizzled(row, column % 64 / 8)) + column % 8;
}

// The `step`-th of a thread's rows: the two that half a warp reads at once lie in different banks.
DEVICE int row_of(int step) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  return warp * 16 + step / 2 * 8 + lane / 8 % 2 * 4 + step % 2 * 2 + lane / 16;
}

// Of one of a thread's rows, before the tile is staged.
struct Place {
  int token, position, slot;
  bool valid;
};

// Of TOGETHER of a thread's rows and its two pieces, lane % 8 and that plus 8 of the tile's 16.
struct Angles {
  float c[TOGETHER][2][VEC], s[TOGETHER][2][VEC];
  DEVICE_MEMBER void load(const Cache& cache, const Place (&places)[STEPS], int first) {
#pragma unroll
    for (int i = 0; i < TOGETHER; i++)
#pragma unroll
      for (int h = 0; h < 2; h++)
        Pairs<VEC>((threadIdx.x % 8 + 8 * h) % PIECES).load_angles(c[i][h], s[i][h], cache.cos, cache.sin, places[first + i].position);
  }
};

DEVICE void move_rows(const u8* buffers, u8* to, const Cache& cache, const Place (&places)[STEPS], Angles& angles, Kind kind, int head,
                      MiddleDivisor by) {
  const bool rotates = ROTARY_DIM && (FP8_CACHE || kind != VALUES);
#pragma unroll
  for (int i = 0; i < STEPS; i++) {
    if (rotates && i > 0 && i % TOGETHER == 0) angles.load(cache, places, i);
    const Place& at = places[i];
    const int r = row_of(i);
    const u32 in_cache = (at.slot / 64 * KV_HEADS + head) * 64 + at.slot % 64;
    u8* row = to + (u64)(kind == QUERIES ? at.token * HEADS + head : in_cache) * (HEAD_DIM * CACHE_BYTES);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int piece = threadIdx.x % 8 + 8 * h, in = piece / PIECES;
      const Pairs<VEC> pairs(piece % PIECES);
      Raw<VEC> left, right;
      float a[VEC], b[VEC];
      left.load(staged(buffers, r, in * HEAD_DIM + pairs.first)), right.load(staged(buffers, r, in * HEAD_DIM + pairs.second));
      left.convert(a), right.convert(b);
      if (rotates) pairs.rotate(a, b, angles.c[i % TOGETHER][h], angles.s[i % TOGETHER][h]);
      u8* place = row + in * (kind == QUERIES ? 1 : 64) * (HEAD_DIM * CACHE_BYTES);
      const auto divided = [&](float x) { return by.divide(x); };
      if (at.valid) {
        store_codes(place + pairs.first * CACHE_BYTES, a, divided);
        store_codes(place + pairs.second * CACHE_BYTES, b, divided);
      }
    }
  }
}

// e4m3 values, transposed: lanes are consecutive tokens, so that whole rows of 16 are written.
DEVICE void move_columns(const u8* buffers, u8* values, int row, int slot, int head, MiddleDivisor by) {
  int warp = threadIdx.x / 32 % 4;
  int r = warp % 2 * 32 + threadIdx.x % 32, column = warp / 2 * 64;
  if (slot < 0) return;
  u8* to = values + ((u64)(slot / 64) * KV_HEADS + head + column / HEAD_DIM) * HEAD_DIM * 64 + value_offset(slot % 64) + column % HEAD_DIM * VALUE_GROUP;
#pragma unroll
  for (int i = 0; i < 64; i += 8) {
    Raw<8> raw;
    float x[8];
    raw.load(staged(buffers, r, column + i));
    raw.convert(x);
#pragma unroll
    for (int k = 0; k < 8; k += 2) {
      const u16 codes = e4m3x2(by.divide(x[k]), by.divide(x[k + 1]));
      to[(i + k) * VALUE_GROUP] = (u8)codes, to[(i + k + 1) * VALUE_GROUP] = codes >> 8;
    }
  }
}

// 64 rows of one warpgroup.
DEVICE void write_heads(const float (&d)[BLOCK_N / 2], const Cache& cache, const TensorMap* map, u8* buffers, const float* scale, const float* bias,
                        int row, int column, int rows, const float (&x_scale)[2], float quantum) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, warpgroup = threadIdx.x / 128;
  const Kind kind = kind_of(column);
  const bool rotates = ROTARY_DIM && kind != VALUES, transposes = FP8_CACHE && kind == VALUES;
  const int head = (column - (kind == QUERIES ? 0 : kind == KEYS ? HEADS : HEADS + KV_HEADS) * HEAD_DIM) / HEAD_DIM;
  Place places[STEPS];
#pragma unroll
  for (int i = 0; i < STEPS; i++) {
    Place& at = places[i];
    at.token = row + row_of(i);
    at.valid = at.token >= cache.decode_rows && at.token < rows;
    at.position = rotates && at.valid ? cache.positions[at.token] : 0;
    at.slot = kind != QUERIES && !transposes && at.valid ? cache.slots[at.token] : 0;
    if (at.slot < 0) at.valid = false;
  }
  int token = row + warp % 2 * 32 + lane, slot = -1;
  if (transposes && token >= cache.decode_rows && token < rows) slot = cache.slots[token];
  if (threadIdx.x % 128 == 0) bulk_wait_group_read<0>();
  warpgroup_sync(warpgroup);  // the buffers are free
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) stage(buffers + c * (64 * CHUNK), d, scale, bias, c * CHUNK_N, x_scale, 0);
  Angles angles;
  if (rotates) angles.load(cache, places, 0);
  const bool decodes = row < cache.decode_rows;
  if (decodes) fence_proxy_async();
  warpgroup_sync(warpgroup);
  if (decodes && threadIdx.x % 128 == 0) {
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) tma_store_2d(map, shared_address(buffers) + c * (64 * CHUNK), column + c * 64, row);
    bulk_commit_group();
  }
  const MiddleDivisor by(FP8_CACHE ? quantum : 1.f);
  if (transposes) move_columns(buffers, cache.values, row, slot, head, by);
  else move_rows(buffers, kind == QUERIES ? cache.queries : kind == KEYS ? cache.keys : cache.values, cache, places, angles, kind, head, by);
}
