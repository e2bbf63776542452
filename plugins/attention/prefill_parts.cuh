#pragma once
// What the prefill kernels of both cache types share: items of the work list (tiles.cuh), rings, and how rows of O leave.
//
// Constants: NUM_HEADS, HEAD_DIM, FP8_CACHE, QUANT_OUT, DTYPE.
#include "fp8/convert.cuh"
#include "fp8/mbarrier.cuh"
#include "fp8/types.cuh"
#include "softmax.cuh"
#include "tiles.cuh"

constexpr int PAGE = 64;
constexpr int ROW = HEAD_DIM * (FP8_CACHE ? 1 : 2);  // bytes of a q, k or v row
constexpr int SWIZZLE = ROW < 128 ? ROW : 128;       // bytes of a row of one swizzle atom
constexpr int PV_STEPS = TILE_KV * (FP8_CACHE ? 1 : 2) / 32;
constexpr int OUT_BYTES = QUANT_OUT ? 1 : 2;
static_assert(SWIZZLE == 64 || SWIZZLE == 128);

struct Item {
  int row, rows, position, sequence, head;  // rows < 0: there are no more
  DEVICE_MEMBER int tiles() const { return max(position + rows + TILE_KV - 1, 0) / TILE_KV; }
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
  DEVICE_MEMBER void next() {
    if (++stage == N) stage = 0, phase ^= 1;
  }
};

// A consumer's places in the rings of K and V tiles, of which `Shared` has the barriers.
template <class Shared, int K, int V> struct Rings {
  Shared& b;
  int lane;
  Ring<K> k;
  Ring<V> v;
  DEVICE_MEMBER void wait_k() { mbarrier_wait(shared_address(&b.k_full[k.stage]), k.phase); }
  DEVICE_MEMBER void wait_v() { mbarrier_wait(shared_address(&b.v_full[v.stage]), v.phase); }
  DEVICE_MEMBER void release_k() {
    if (lane == 0) mbarrier_arrive(shared_address(&b.k_empty[k.stage]));
    k.next();
  }
  DEVICE_MEMBER void release_v() {
    if (lane == 0) mbarrier_arrive(shared_address(&b.v_empty[v.stage]));
    v.next();
  }
  DEVICE_MEMBER void skip() {  // a tile that the warpgroup has no rows for
    wait_k();
    release_k();
    wait_v();
    release_v();
  }
};

// A consumer's warp is done with an item and its tile of Q.
template <class Shared, int N> DEVICE void release_item(Shared& b, Ring<N>& q, int lane) {
  __syncwarp();  // all lanes have read the item, also where none of them had products to wait for
  if (lane == 0) mbarrier_arrive(shared_address(&b.q_empty[q.stage]));
  q.next();
}

// Behind the last item: tells the consumers that there are no more.
template <class Shared, int N> DEVICE void end_items(Shared& b, const Ring<N>& q) {
  mbarrier_wait(shared_address(&b.q_empty[q.stage]), q.phase ^ 1);
  b.items[q.stage].rows = -1;
  mbarrier_arrive(shared_address(&b.q_full[q.stage]));
}

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

// What a row of O is multiplied with at last: `part` is this thread's of the sum of P, which a quad shares.
DEVICE float row_factor(float part, float out_factor) {
  float l = part;
  l += __shfl_xor_sync(~0u, l, 1);
  l += __shfl_xor_sync(~0u, l, 2);
  return l > 0.f ? out_factor / l : 0.f;  // a sequence of length 0 has no sum
}

// Writes the thread's two rows of an item.
DEVICE void store_rows(u8* y, const float (&o)[HEAD_DIM / 2], const Item& item, int row_of_tile, int c) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int place = row_of_tile + 8 * r;
    u8* to = y + ((u64)(item.row + place) * NUM_HEADS + item.head) * HEAD_DIM * OUT_BYTES;
    store_row(to, o, r, c, place < item.rows);
  }
}
