#pragma once
// What o and down add to the residual, and who keeps it.
//
// Alone, a finisher adds a row to the residual of the norm before and stores the sum for all blocks. Of several ranks (WORLD)
// each has a share of the row, rounded as a linear's y is: its finisher stores it into the memory of all ranks (peers.cuh), and
// every block adds the shares up, in float32 in the order of the ranks, and to the residual, which it keeps itself: the thread
// that has four values of a row has the same four in every layer. Nothing is passed on inside a GPU.
//
// Shares are words with tags, as all of Exchange. A rank has two places for each of the two sums of a layer, used in turn. When
// one is filled again, all blocks of all ranks have read it: a share of down's y, of the layer after the one that filled the
// place, is made of codes of every block of its rank (each has a part of gate_up's y), which the block made after it had read
// the place; and who fills it again has had all those shares (of all ranks: they are in o's x, by way of qkv). `launches` is
// beside them: it counts the layers of all launches over this memory. A launch may begin on one rank while others are in the one
// before, if both are of one size: an engine has but one. All ranks launch the same.
// Constants, with WORLD: those of peers.cuh, LAYERS_AREA, LAYERS_SUMS (bytes, plugins/all_reduce/region.py).
#include "shape.cuh"

constexpr int SUM_UNITS = HIDDEN / 4, SUM_HELD = (SUM_UNITS + CONSUMERS - 1) / CONSUMERS;  // of four values; of a consumer
DEVICE int sum_unit(int i) { return (int)threadIdx.x + i * CONSUMERS; }
DEVICE bool has_unit(int i) { return (i + 1) * CONSUMERS <= SUM_UNITS || sum_unit(i) < SUM_UNITS; }

DEVICE bool arrived(uint4 v, u32 tag) { return (((v.x ^ tag) | (v.y ^ tag) | (v.z ^ tag) | (v.w ^ tag)) >> 16) == 0; }

// COUNT units of four words, dealt out to the consumers; `tag` is in the upper half of each word.
template <int COUNT, int HELD> DEVICE void receive(uint4 (&v)[HELD], const u32* words, u32 tag) {
  const uint4* from = (const uint4*)words + threadIdx.x;
  const auto mine = [&](int i) { return (i + 1) * CONSUMERS <= COUNT || (int)threadIdx.x + i * CONSUMERS < COUNT; };
  bool all;
  do {
    all = true;
#pragma unroll
    for (int i = 0; i < HELD; i++)
      if (mine(i)) v[i] = load_words(from + i * CONSUMERS);
#pragma unroll
    for (int i = 0; i < HELD; i++)
      if (mine(i)) all &= arrived(v[i], tag);
  } while (!all);
}

#ifdef WORLD
#define NORM static __device__ __noinline__  // inlined, it takes registers that the rows of many heads need
constexpr int AT_ONCE_SUMS = larger(1, 4 / WORLD);  // units that a consumer awaits together: more loads are in the way of the words

DEVICE u32* launches_of(const Params& p) { return (u32*)(p.peers.region[p.me] + LAYERS_AREA); }
DEVICE u32* share_of(u64 region, int op, u32 tag, int source) {
  return (u32*)(region + LAYERS_AREA + LAYERS_SUMS) + ((op / DOWN * 2 + (tag >> 16) % 2) * WORLD + source) * HIDDEN;
}

template <int OP> DEVICE u32 addend(const Params&, const Exchange&, int, u32, bool) { return 0; }
// A row of this rank's share.
template <int OP> DEVICE void put_sum(const Params& p, u16 share, int n, u32 tag) {
#pragma unroll
  for (int k = 1; k <= WORLD; k++) {  // this one last
    const int to = p.me + k < WORLD ? p.me + k : p.me + k - WORLD;
    store_system(share_of(p.peers.region[to], OP, tag, p.me) + n, share | tag);
  }
}
DEVICE void put_last(const Params& p, int n, u16 y, u32) { p.y[n] = y; }

// The residual's values that a consumer has. They are in memory: registers are short.
struct Residual {
  bool first = true;  // it is as the step before left it

  DEVICE_MEMBER explicit Residual(const Params&) {}
  static DEVICE_MEMBER u32 added(u32 pair, const uint4 (&v)[WORLD], int first) {
    u32 result = 0;
#pragma unroll
    for (int j = 0; j < 2; j++) {
      float total = 0.f;
#pragma unroll
      for (int r = 0; r < WORLD; r++) {
        const float share = to_float<DTYPE>((u16)(first ? (j ? v[r].w : v[r].z) : (j ? v[r].y : v[r].x)));
        total = r ? __fadd_rn(total, share) : share;
      }
      const float sum = to_float<DTYPE>(from_float<DTYPE>(total)) + to_float<DTYPE>((u16)(pair >> 16 * j));
      result |= (u32)from_float<DTYPE>(sum) << 16 * j;
    }
    return result;
  }
  // Adds the sum behind `op` of the layer with this tag; what comes of it is in `held`, too.
  DEVICE_MEMBER void add(const Params& p, int op, u32 tag, uint2 (&held)[SUM_HELD]) {
    const u64 own = p.peers.region[p.me];
    uint2* const kept = p.kept + blockIdx.x * SUM_UNITS;
    const uint2* const from = first ? (const uint2*)p.residual : kept;
    Patience patience;
#pragma unroll
    for (int i = 0; i < SUM_HELD; i++)
      if (has_unit(i)) held[i] = from[sum_unit(i)];
    const u64 base = (u64)share_of(own, op, tag, 0);
#pragma unroll
    for (int start = 0; start < SUM_HELD; start += AT_ONCE_SUMS) {
      uint4 v[AT_ONCE_SUMS][WORLD];
      const auto mine = [&](int i) { return start + i < SUM_HELD && has_unit(start + i); };
      for (;;) {
#pragma unroll
        for (int i = 0; i < AT_ONCE_SUMS; i++)
#pragma unroll
          for (int r = 0; r < WORLD; r++)
            if (mine(i)) v[i][r] = load_system((const uint4*)(base + r * (HIDDEN * 4)) + sum_unit(start + i));
        bool all = true;
#pragma unroll
        for (int i = 0; i < AT_ONCE_SUMS; i++)
#pragma unroll
          for (int r = 0; r < WORLD; r++)
            if (mine(i)) all &= arrived(v[i][r], tag);
        if (all) break;
        patience.poll();
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE_SUMS; i++)
        if (mine(i)) {
          uint2& two = held[start + i];
          two = make_uint2(added(two.x, v[i], 0), added(two.y, v[i], 1));
          kept[sum_unit(start + i)] = two;
        }
    }
    first = false;
  }
  __device__ __noinline__ void add(const Params& p, int op, u32 tag) {
    uint2 held[SUM_HELD];
    add(p, op, tag, held);
  }
  DEVICE_MEMBER void store(const Params& p) const {
#pragma unroll
    for (int i = 0; i < SUM_HELD; i++)
      if (has_unit(i)) ((uint2*)p.residual_out)[sum_unit(i)] = p.kept[blockIdx.x * SUM_UNITS + sum_unit(i)];
  }
};
// The residual with the sum behind an op, as words whose lower halves are the values.
struct Sums {
  const Params& p;
  Residual& residual;
  int op;
  DEVICE_MEMBER Sums(const Params& params, Residual& held, int behind) : p(params), residual(held), op(behind) {}
  DEVICE_MEMBER void operator()(uint4 (&v)[SUM_HELD], u32 tag) const {
    uint2 held[SUM_HELD];
    residual.add(p, op, tag, held);
#pragma unroll
    for (int i = 0; i < SUM_HELD; i++) v[i] = make_uint4(held[i].x, held[i].x >> 16, held[i].y, held[i].y >> 16);
  }
};
#else
#define NORM DEVICE
DEVICE u32* launches_of(const Params& p) { return &p.exchange->launches; }

DEVICE u32 await_word(const u32* p, u32 tag) {
  u32 v;
  do v = load_words(p);
  while ((v ^ tag) >> 16);
  return v;
}
// The residual of row n, as a finisher needs it.
template <int OP> DEVICE u32 addend(const Params& p, const Exchange& exchange, int n, u32 tag, bool first) {
  u32 residual = 0;
  if (OP == O && first) residual = p.residual[n];
  else if (OP == O) residual = await_word(exchange.sums[1] + n, tag - 0x10000);
  else if (OP == DOWN) residual = await_word(exchange.sums[0] + n, tag);
  return residual;
}
template <int OP> DEVICE void put_sum(const Params& p, u16 sum, int n, u32 tag) { store_words(p.exchange->sums[OP / DOWN] + n, sum | tag); }
DEVICE void put_last(const Params& p, int n, u16 y, u32 residual) { p.y[n] = y, p.residual_out[n] = (u16)residual; }

struct Residual {  // a finisher's business
  DEVICE_MEMBER explicit Residual(const Params&) {}
  DEVICE_MEMBER void add(const Params&, int, u32) {}
  DEVICE_MEMBER void store(const Params&) const {}
};
struct Sums {
  const u32* words;
  DEVICE_MEMBER Sums(const Params& p, Residual&, int op) { words = p.exchange->sums[op / DOWN]; }
  template <int HELD> DEVICE_MEMBER void operator()(uint4 (&v)[HELD], u32 tag) const { receive<SUM_UNITS>(v, words, tag); }
};
#endif
