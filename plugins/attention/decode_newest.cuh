#pragma once
// The newest token: a unit's row of qkv rotated and quantized; its key and value put into the tile and the cache.
#include "fp8/rows.cuh"
#include "decode_block.cuh"
#include "decode_products.cuh"

// Heads of a unit: of all the heads of a KV head, units take ROWS each, and the last one the rest.
DEVICE int rows_of(int unit) { return GROUP % ROWS == 0 ? ROWS : min(ROWS, GROUP - unit % PARTS * ROWS); }
DEVICE int first_head(int unit) { return unit / PARTS * GROUP + unit % PARTS * ROWS; }

struct Inputs {
  const u16* qkv;
  const int *lengths, *slots, *positions;
  const float *cos, *sin;
};

// A unit's part of its row of qkv, on its way. A thread takes the same pairs of every STEP-th row.
struct Incoming {
  static constexpr int STEP = THREADS / Pairs<VEC>::COUNT, EACH = (ROWS + 2 + STEP - 1) / STEP;
  static_assert(THREADS % Pairs<VEC>::COUNT == 0);
  Raw<VEC> left[EACH], right[EACH];
  float c[VEC], s[VEC];
  int length, slot, position;

  // What does not come from the kernel before: numbers, and then angles, which need them.
  __device__ __forceinline__ void load_facts(const Inputs& in, int sequence) { load_numbers(in, sequence), load_angles(in); }
  __device__ __forceinline__ void load_numbers(const Inputs& in, int sequence) {
    position = ROTARY_DIM ? in.positions[sequence] : 0;
    length = in.lengths[sequence], slot = in.slots[sequence];
  }
  __device__ __forceinline__ void load_angles(const Inputs& in) {
    if (ROTARY_DIM) Pairs<VEC>(threadIdx.x % Pairs<VEC>::COUNT).load_angles(c, s, in.cos, in.sin, position);
  }
  __device__ __forceinline__ void load_row(const Inputs& in, const Cursor& at) {
    const Pairs<VEC> pairs(threadIdx.x % Pairs<VEC>::COUNT);
    const u16* token = in.qkv + (u64)at.sequence * (HEADS + 2 * KV_HEADS) * HEAD_DIM;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int row = threadIdx.x / Pairs<VEC>::COUNT + i * STEP, of_kv = row - ROWS;
      if (row >= ROWS + 2 || of_kv < 0 && row >= rows_of(at.unit)) continue;
      const int head = of_kv < 0 ? first_head(at.unit) + row : HEADS + of_kv * KV_HEADS + at.unit / PARTS;
      left[i].load(token + head * HEAD_DIM + pairs.first);
      right[i].load(token + head * HEAD_DIM + pairs.second);
    }
  }

  // Rotated and in the cache's type.
  __device__ __forceinline__ void store(Fresh& fresh, const Cursor& at, const float* scales) const {
    const Pairs<VEC> pairs(threadIdx.x % Pairs<VEC>::COUNT);
    if (threadIdx.x == 0) {
      fresh.at = at;
      fresh.length = length, fresh.slot = slot;
      fresh.head = at.unit / PARTS, fresh.writes = at.unit % PARTS == 0;
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int row = threadIdx.x / Pairs<VEC>::COUNT + i * STEP;
      if (row >= ROWS + 2) continue;
      float a[VEC], b[VEC];
      left[i].convert(a);
      right[i].convert(b);
      if (row <= ROWS) pairs.rotate(a, b, c, s);
      const Divisor d(row < ROWS ? scales[0] : row == ROWS ? scales[1] : scales[2]);
      const auto divided = [&](float x) { return d.divide(x); };
      store_codes(fresh.rows[row] + pairs.first * BYTES, a, divided);
      store_codes(fresh.rows[row] + pairs.second * BYTES, b, divided);
    }
  }
};

// As operands of products over 16 of the head dimension. In e4m3 32 bits of a row, taken apart, serve for dimensions
// 2c, 2c + 1 and 2c + 8, 2c + 9: the order within a product is free, so long as keys are taken apart in the same way.
DEVICE void load_queries(u32 (&q)[COLUMN_TILES][STEPS][2], const Fresh& fresh, int rows) {
  const int column = threadIdx.x % 4 * 4;  // bytes
#pragma unroll
  for (int n = 0; n < COLUMN_TILES; n++) {
    const int r = 8 * n + threadIdx.x % 32 / 4;
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
      const u32* from = (const u32*)&fresh.rows[r < rows ? r : 0][column + 16 * BYTES * k];
      if (FP8_CACHE) {
        e4m3x4_to_f16(r < rows ? *from : 0u, q[n][k][0], q[n][k][1]);
      } else {
        q[n][k][0] = r < rows ? from[0] : 0u;
        q[n][k][1] = r < rows ? from[4] : 0u;
      }
    }
  }
}

// Puts the newest token, `row` in its tile, into a slot of keys or of values, and into the cache. Run by a warp.
template <bool VALUES> DEVICE void add_newest(const Fresh& fresh, u8* cache, u32 slot, int row) {
  if (fresh.slot < 0) return;
  const int lane = threadIdx.x % 32, token = fresh.slot % PAGE;
  const u64 head = (u64)(fresh.slot / PAGE) * KV_HEADS + fresh.head;
  const u8* from = fresh.rows[ROWS + VALUES];
  if (FP8_CACHE && VALUES) {
    const int offset = value_offset(token) + lane * VALUE_GROUP;
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 32; i++) {
      const int at = offset + 32 * i * VALUE_GROUP;
      *(u8*)shared_pointer(slot + at) = from[32 * i + lane];
      if (fresh.writes) cache[head * HEAD_DIM * PAGE + at] = from[32 * i + lane];
    }
  } else {
#pragma unroll
    for (int i = lane; i < HEAD_DIM * BYTES / 4; i += 32) {
      const u32 word = *(const u32*)(from + 4 * i);
      const int chunk = i / 4;  // of 16 bytes
      const u32 start = slot + chunk / 8 * TILE * 128 + row / 8 * 8 * SPAN;
      *(u32*)shared_pointer(start + swizzled<SPAN>(row % 8, chunk % 8) + i % 4 * 4) = word;
      if (fresh.writes) *(u32*)(cache + (head * PAGE + token) * HEAD_DIM * BYTES + 4 * i) = word;
    }
  }
  fence_proxy_async();  // TMA will fill the slot again
  __syncwarp();
}
