#pragma once
// Attention of the one token. All tiles of 64 tokens of all KV heads are dealt out in runs to the blocks and their warpgroups.
// Tokens are the 64 rows of one wgmma, dimensions those of two others; heads that share a KV head are columns. Every tile's
// result goes to the block that has the head, which joins them in the order of the context.
#include "../attention/rotary.cuh"
#include "fp8/ex2.cuh"
#include "fp8/rows.cuh"
#include "fp8/wgmma.cuh"
#include "shape.cuh"

constexpr int TILE = 64, HEADS = KV_HEADS * GROUP;  // a tile is a page of the cache
constexpr int KEYS_BYTES = TILE * HEAD_DIM, AT_ONCE = 4;
static_assert(HEAD_DIM == 128 && ROTARY_DIM == 128 && FP8_CACHE && GROUP <= 8 && GRID >= HEADS && STAGE == 2 * KEYS_BYTES);

// A head's result for a tile: for each dimension the value and the tag, and maximum, sum and the tag twice.
struct Tile {
  uint2 o[GROUP][HEAD_DIM];
  uint4 m_l[GROUP];
};

// The block's run of all tiles of all KV heads.
struct Run {
  int length, tiles, begin, count;  // tokens, tiles of a head, first tile and number of tiles of this block
  DEVICE_MEMBER explicit Run(int tokens) {
    length = tokens, tiles = (tokens + TILE - 1) / TILE;
    const int all = KV_HEADS * tiles;
    begin = all * (int)blockIdx.x / GRID;
    count = all * ((int)blockIdx.x + 1) / GRID - begin;
  }
};

// A warpgroup's tiles at work. Operands are in units of 16 bytes of a column's K, one column behind the other; wgmma's columns
// from GROUP on reach into the next unit, and are not used.
struct alignas(128) Attending {
  union {
    struct {
      u8 q[AT_ONCE][HEAD_DIM * GROUP + 128];
      float s[AT_ONCE][GROUP][TILE];
    };
    float joined[3 * HEAD_DIM];  // what this warpgroup has of a head
  };
  u8 p[AT_ONCE][TILE * GROUP + 128];
};

// What does not change from layer to layer.
struct Token {
  float cos[2], sin[2];  // of the lane's pairs
  int slot;
  DEVICE_MEMBER explicit Token(const Params& p) {
    Pairs<2>(threadIdx.x % 32).load_angles(cos, sin, p.cos, p.sin, *p.position_ids);
    slot = *p.slot_mapping;
  }
};

// The new token's place in a tile and in the cache: an e4m3 pair of the key, or of the value, beginning at dimension d.
DEVICE void add_key(const Layer& layer, u32 keys, int row, u64 head, int slot, int d, u16 codes) {
  *(u16*)shared_pointer(keys + row * HEAD_DIM + ((d / 16 ^ row % 8) << 4) + d % 16) = codes;
  *(u16*)(layer.key_cache + (head * TILE + slot % TILE) * HEAD_DIM + d) = codes;
}
DEVICE void add_value(const Layer& layer, u32 values, int row, u64 head, int slot, int d, u16 codes) {
  const int first = value_offset(row) + d * VALUE_GROUP;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    *(u8*)shared_pointer(values + first + i * VALUE_GROUP) = codes >> 8 * i;
    layer.value_cache[head * HEAD_DIM * TILE + first + i * VALUE_GROUP] = codes >> 8 * i;
  }
}

// A KV head's part of the row of qkv: its queries, and the new key and value. A lane has two pairs of each.
struct Row {
  static constexpr int MOST = GROUP + 2;
  float left[MOST][2], right[MOST][2];

  static DEVICE_MEMBER int place(int head, int r) { return (r < GROUP ? head * GROUP + r : HEADS + (r - GROUP) * KV_HEADS + head) * HEAD_DIM; }
  // As the kernel before left it.
  DEVICE_MEMBER void load(const u16* qkv, const Pairs<2>& pairs, int head) {
#pragma unroll
    for (int r = 0; r < MOST; r++) {
      Raw<2> a, b;
      a.load(qkv + place(head, r) + pairs.first), b.load(qkv + place(head, r) + pairs.second);
      a.convert(left[r]), b.convert(right[r]);
    }
  }
  // As it arrives, all at once: key and value only if they are wanted.
  DEVICE_MEMBER void await(const u32* qkv, const Pairs<2>& pairs, int head, bool whole, u32 tag) {
    uint2 a[MOST], b[MOST];
    u32 other;
    do {
#pragma unroll
      for (int r = 0; r < MOST; r++)
        if (r < GROUP || whole) a[r] = load_words((const uint2*)(qkv + place(head, r) + pairs.first)), b[r] = load_words((const uint2*)(qkv + place(head, r) + pairs.second));
      other = 0;
#pragma unroll
      for (int r = 0; r < MOST; r++)
        if (r < GROUP || whole) other |= (a[r].x ^ tag) | (a[r].y ^ tag) | (b[r].x ^ tag) | (b[r].y ^ tag);
    } while (other >> 16);
#pragma unroll
    for (int r = 0; r < MOST; r++) {
      if (r >= GROUP && !whole) continue;
      left[r][0] = to_float<DTYPE>((u16)a[r].x), left[r][1] = to_float<DTYPE>((u16)a[r].y);
      right[r][0] = to_float<DTYPE>((u16)b[r].x), right[r][1] = to_float<DTYPE>((u16)b[r].y);
    }
  }
};

// Takes a KV head's row of qkv: the queries go to `q`, rotated and quantized, and in the last tile the new key and value into
// the tile and the cache. By a warp.
DEVICE void take_row(const Params& p, const Layer& layer, const Token& token, u8* q, u32 keys, int head, int row, bool last, bool first_layer, u32 before) {
  const Pairs<2> pairs(threadIdx.x % 32);
  const u64 cached = (u64)(token.slot / TILE) * KV_HEADS + head;
  Row of;
  if (first_layer) of.load(p.qkv, pairs, head);
  else of.await(p.exchange->qkv, pairs, head, last, before);
#pragma unroll
  for (int r = 0; r < Row::MOST; r++) {
    if (r >= GROUP && (!last || token.slot < 0)) continue;
    if (r <= GROUP) pairs.rotate(of.left[r], of.right[r], token.cos, token.sin);
    const Divisor divisor(r < GROUP ? layer.q_scale : r == GROUP ? layer.k_scale : layer.v_scale);
    const u16 first = e4m3x2(divisor.divide(of.left[r][0]), divisor.divide(of.left[r][1]));
    const u16 second = e4m3x2(divisor.divide(of.right[r][0]), divisor.divide(of.right[r][1]));
    if (r < GROUP) {
      *(u16*)(q + (pairs.first / 16 * GROUP + r) * 16 + pairs.first % 16) = first;
      *(u16*)(q + (pairs.second / 16 * GROUP + r) * 16 + pairs.second % 16) = second;
    } else if (r == GROUP) {
      add_key(layer, keys, row, cached, token.slot, pairs.first, first), add_key(layer, keys, row, cached, token.slot, pairs.second, second);
    } else {
      add_value(layer, keys + KEYS_BYTES, row, cached, token.slot, pairs.first, first), add_value(layer, keys + KEYS_BYTES, row, cached, token.slot, pairs.second, second);
    }
  }
}

// Scores of a tile become p, times 256, in e4m3, in the order of the values' tokens; maxima (powers of two) and sums leave. By
// a warp.
DEVICE void soften(Tile& tile, const float (&scores)[GROUP][TILE], u8* p, float scale, int valid, u32 tag) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < GROUP; r++) {
    float s[2], top = __int_as_float(0xFF800000), l = 0.f;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      s[i] = lane + 32 * i < valid ? scores[r][lane + 32 * i] : __int_as_float(0xFF800000);
      top = fmaxf(top, s[i]);
    }
#pragma unroll
    for (int d = 16; d; d /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
    const float m = ceilf(top * scale);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float v = ex2_approx(fmaf(s[i], scale, 8.f - m));
      const int place = value_place(lane + 32 * i);
      p[(place / 16 * GROUP + r) * 16 + place % 16] = (u8)e4m3x2(v, 0.f);
      l += v;
    }
#pragma unroll
    for (int d = 16; d; d /= 2) l += __shfl_xor_sync(~0u, l, d);
    if (lane == 0) store_words(&tile.m_l[r], make_uint4(__float_as_uint(m), __float_as_uint(l), tag, tag));
  }
}

// The run's tiles. `tag`: of this layer, whole. Every warpgroup takes its part, AT_ONCE tiles at a time.
DEVICE void attend(const Params& p, const Layer& layer, const Run& run, const Token& token, const Ring& ring, const Place& place, Attending* shared, bool first_layer, u32 tag) {
  constexpr u64 KEYS = 1ull << 62 | 64ull << 32 | 1ull << 16, VALUES = 8ull << 32 | (u64)HEAD_DIM << 16, B = 8ull << 32 | (u64)GROUP << 16;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32, group = warp / 4, mine = warp % 4;
  const int half = (run.count + WARPGROUPS - 1) / WARPGROUPS, end = min(run.count, (group + 1) * half);
  const float scale = (float)(SOFTMAX_SCALE * 1.4426950408889634) * (layer.q_scale * layer.k_scale);
  Attending& own = shared[group];
  const auto meet = [&] { barrier_sync(GROUPS + group, 128); };
#pragma unroll 1
  for (int start = group * half; start < end; start += AT_ONCE) {
    const int count = min(AT_ONCE, end - start), i = start + mine, head = (run.begin + i) / run.tiles, index = (run.begin + i) % run.tiles;
    const int valid = min(TILE, run.length - index * TILE);
    if (mine < count) {
      const bool last = index == run.tiles - 1;
      const Place at = place.ahead(i);
      if (last) mbarrier_wait(ring.full + at.stage * 8, at.parity);
      take_row(p, layer, token, own.q[mine], ring.data + at.stage * STAGE, head, valid - 1, last, first_layer, (tag - 1) << 16);
    }
    fence_proxy_async();
    meet();
#pragma unroll 1
    for (int t = 0; t < count; t++) {
      const Place at = place.ahead(start + t);
      const u32 keys = (ring.data + at.stage * STAGE) / 16, q = shared_address(own.q[t]) / 16;
      float d[4];
      mbarrier_wait(ring.full + at.stage * 8, at.parity);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < HEAD_DIM / 32; k++) wgmma_ss_e4m3(d, KEYS | (keys + 2 * k), B | (q + 2 * GROUP * k), k);
      wgmma_commit_group();
      wgmma_wait_group<0>();
#pragma unroll
      for (int e = 0; e < 4; e++) {
        pin(d[e]);
        const int column = lane % 4 * 2 + e % 2;
        if (column < GROUP) own.s[t][column][mine * 16 + lane / 4 + e / 2 * 8] = d[e];
      }
    }
    meet();
    if (mine < count) soften(((Tile*)p.partials)[run.begin + i], own.s[mine], own.p[mine], scale, valid, tag);
    fence_proxy_async();
    meet();
#pragma unroll 1
    for (int t = 0; t < count; t++) {
      const Place at = place.ahead(start + t);
      const u32 values = (ring.data + at.stage * STAGE + KEYS_BYTES) / 16, weights = shared_address(own.p[t]) / 16;
      float o[2][4];
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < TILE / 32; k++)
#pragma unroll
        for (int b = 0; b < 2; b++) wgmma_ss_e4m3(o[b], VALUES | (values + b * 64 + 2 * HEAD_DIM * k), B | (weights + 2 * GROUP * k), k);
      wgmma_commit_group();
      wgmma_wait_group<0>();
      Tile& tile = ((Tile*)p.partials)[run.begin + start + t];
#pragma unroll
      for (int b = 0; b < 2; b++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          pin(o[b][e]);
          const int column = lane % 4 * 2 + e % 2;
          if (column < GROUP) store_words(&tile.o[column][b * 64 + mine * 16 + lane / 4 + e / 2 * 8], make_uint2(__float_as_uint(o[b][e]), tag));
        }
      if (lane < WARPGROUPS) mbarrier_arrive(ring.empty + at.stage * 8);  // four warps, for all consumers
    }
  }
}
