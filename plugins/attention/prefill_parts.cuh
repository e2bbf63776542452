#pragma once
// What the prefill kernels of both cache types share: items of the work list (tiles.cuh), rings, and how a row of O leaves.
//
// Constants: NUM_HEADS, HEAD_DIM, FP8_CACHE, QUANT_OUT, DTYPE.
#include "fp8/convert.cuh"
#include "fp8/types.cuh"
#include "softmax.cuh"
#include "tiles.cuh"

#define METHOD __device__ __forceinline__

constexpr int PAGE = 64;
constexpr int ROW = HEAD_DIM * (FP8_CACHE ? 1 : 2);  // bytes of a q, k or v row
constexpr int SWIZZLE = ROW < 128 ? ROW : 128;       // bytes of a row of one swizzle atom
constexpr int PV_STEPS = TILE_KV * (FP8_CACHE ? 1 : 2) / 32;
constexpr int OUT_BYTES = QUANT_OUT ? 1 : 2;
static_assert(SWIZZLE == 64 || SWIZZLE == 128);

struct Item {
  int row, rows, position, sequence, head;  // rows < 0: there are no more
  METHOD int tiles() const { return max(position + rows + TILE_KV - 1, 0) / TILE_KV; }
};

// The item of some rank in the list (tiles.cuh), of which `list` is the first entry.
DEVICE bool get_item(Item& item, const int4* tiles, int4 list, int rank) {
  if (rank >= list.x * NUM_HEADS) return false;
  const int section = rank / (list.x * list.z), inside = rank - section * list.x * list.z;
  const int heads = min(list.z, NUM_HEADS - section * list.z);
  const int4 tile = __ldcg(tiles + 1 + inside / heads);
  item = {tile.x, tile.y, tile.z, tile.w, section * list.z + inside % heads};
  return true;
}

// A position in a ring of N buffers.
template <int N> struct Ring {
  int stage = 0;
  u32 phase = 0;
  METHOD void next() {
    if (++stage == N) stage = 0, phase ^= 1;
  }
};

// K-major operand of SWIZZLE-byte rows: q, k.
DEVICE u64 row_descriptor(u32 address) {
  constexpr u64 layout = SWIZZLE == 128 ? 1 : 2, stride = 8 * SWIZZLE >> 4;
  return (u64)((address & 0x3FFFF) >> 4) | (1ull << 16) | (stride << 32) | (layout << 62);
}

DEVICE void scale_rows(float (&o)[HEAD_DIM / 2], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < HEAD_DIM / 2; i++) o[i] *= factor[i / 2 % 2];
}

// 4 x 4 transpose over the threads of a quad: word i of thread c becomes word c of thread i.
DEVICE void transpose_quad(u32 (&w)[4], int c) {
#pragma unroll
  for (int d = 1; d < 4; d *= 2) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i & d) continue;
      const u32 got = __shfl_xor_sync(~0u, c & d ? w[i] : w[i + d], d);
      if (c & d) w[i] = got;
      else w[i + d] = got;
    }
  }
}

// Writes a row of O, `row` 0 or 1 of the thread's two, in 16-byte pieces.
DEVICE void store_row(u8* to, const float (&o)[HEAD_DIM / 2], int row, int c, bool valid) {
  constexpr int BLOCKS = QUANT_OUT ? 8 : 4;  // of 8 columns per 4 x 4 words
#pragma unroll
  for (int base = 0; base < HEAD_DIM / 8; base += BLOCKS) {
    u32 w[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float* x = &o[(base + i * (BLOCKS / 4)) * 4 + 2 * row];
      if constexpr (QUANT_OUT)
        w[i] = e4m3x4(x[0], x[1], x[4], x[5]);
      else w[i] = from_float2<DTYPE>(x[0], x[1]);
    }
    transpose_quad(w, c);
    uint4 piece = make_uint4(w[0], w[1], w[2], w[3]);
    if constexpr (QUANT_OUT)  // low halves are the first block of 8 columns, high halves the second
      piece = make_uint4(__byte_perm(w[0], w[1], 0x5410), __byte_perm(w[2], w[3], 0x5410), __byte_perm(w[0], w[1], 0x7632),
                         __byte_perm(w[2], w[3], 0x7632));
    if (valid) *(uint4*)(to + base * 8 * OUT_BYTES + c * 16) = piece;
  }
}
