#pragma once
// The work list of the prefill kernels: one entry per piece of a sequence's query rows, longest first, so that blocks which take
// from it in order end evenly. An entry is {first row in the packed batch, valid rows, position of the first row in its context,
// sequence}. tiles[0] is {entries, items taken, heads of a section, 0}: an item is an entry and a head; a long list is gone through
// for one section of heads after another, so that what a section reads stays in the L2 cache.
//
// A piece has one to MOST_UNITS units of UNIT rows, one of each consumer warpgroup. The more, the less a unit costs; but few long
// items leave multiprocessors without work: 5 pieces of 192 rows and 32 heads are 160 items, two rounds of blocks of which the
// second is nearly empty, 8 pieces of 128 rows two rounds of 256 shorter ones. So where there are few rounds of long contexts the
// division into the fewest pieces is weighed against those into as many as fill the rounds, or one more. Blocks begin apart
// beside decode rows, as decode attention leaves them. How rows are divided changes no bit of them.
//
// us of an H200, 32/8 heads, the fewest pieces and so: 910 rows at position 10000 266 and 218, beside 88 decode rows of 21000 1090
// and 1047, at 19000 1287 and 1216, 250 rows there 1069 and 1007; 300 rows at 19700 and a prompt of 610 251 and 204, beside the same
// 1086 and 1034; 1216 rows at 10000 273 and 255. Where an item is short against decode attention, no division gains: 910 rows at
// 5000 take 918 beside the same, in pieces of 128 955, as the few multiprocessors that are free early take the second round.
// Sections cost two rounds 3 %. Weighed for every list: 1 to 4 us for contexts of up to 1024 tokens, which gain nothing.
//
// Constants: FP8_CACHE.
#include "fp8/types.cuh"

constexpr int UNIT = 64;                         // query rows of a consumer warpgroup
constexpr int MOST_UNITS = FP8_CACHE ? 3 : 2;    // of a piece
constexpr int WEIGHED = 3;                       // divisions that are looked at
constexpr int UNIT_COSTS = FP8_CACHE ? 42 | 49 << 8 | 64 << 16 : 43 | 64 << 8;  // of a tile of keys for so many units
constexpr float BEGIN_TILES = 1.2f;              // what its begin and its end cost it, in tiles
constexpr float WORTH = 0.98f;                   // a division into more pieces must be better by as much
constexpr float SPREAD = 64 * 7e-9f;             // how far apart decode attention leaves blocks, for a byte that it reads
constexpr float MOST_SPREAD = 48.f;              // bins; beyond, divisions are not weighed
constexpr int MULTIPROCESSORS = 132;
constexpr int SECTION_BYTES = 16 << 20;  // of keys and values
constexpr int FEW_ROUNDS = 4;            // of items: no sections, and divisions are weighed
constexpr int LONG = 2048;               // tokens of a context from which on that pays for itself: it takes 2 us
constexpr int TILE_BINS = 128;           // by cost

DEVICE float piece_cost(int units, int context) {
  return (UNIT_COSTS >> 8 * (units - 1) & 0xFF) * ((context + 127) / 128 + BEGIN_TILES);
}

// Exclusive prefix sum over the warp, and the sum of all.
DEVICE int warp_prefix(int own, int& all) {
  int sum = own;
  for (int d = 1; d < 32; d *= 2) {
    const int other = __shfl_up_sync(~0u, sum, d);
    if ((int)threadIdx.x % 32 >= d) sum += other;
  }
  all = __shfl_sync(~0u, sum, 31);
  return sum - own;
}

DEVICE float warp_sum(float x) {
  for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(~0u, x, d);
  return x;
}

// Counting sort by one warp of the pieces of the sequences [first, last), with `bins` [TILE_BINS] in shared memory.
struct Tiles {
  int* bins;
  int4* tiles;
  const int *query_start, *sequence_lengths;
  int first, last, heads;
  int context, longest, fewest;        // tokens of all sequences, of the longest one; pieces, if as few as can be
  float per_cost, per_weight, spread;  // a bin's cost; sequences' share of further pieces; how far apart blocks begin, in bins

  DEVICE_MEMBER static int units_of(int rows) { return (rows + UNIT - 1) / UNIT; }
  DEVICE_MEMBER static int fewest_of(int units) { return (units + MOST_UNITS - 1) / MOST_UNITS; }

  DEVICE_MEMBER void look() {
    float weight = 0.f;
#pragma unroll 1
    for (int i = first + (int)threadIdx.x % 32; i < last; i += 32) {
      const int length = sequence_lengths[i], units = units_of(query_start[i + 1] - query_start[i]);
      context += length, longest = max(longest, length), fewest += fewest_of(units);
      weight += (float)units * length;
    }
    context = __reduce_add_sync(~0u, context), longest = __reduce_max_sync(~0u, longest), fewest = __reduce_add_sync(~0u, fewest);
    weight = warp_sum(weight);
    per_cost = __fdividef(TILE_BINS, piece_cost(MOST_UNITS, longest)), per_weight = __fdividef(1.f, fmaxf(weight, 1.f));
  }

  DEVICE_MEMBER void look_at_decode_rows(int kv_bytes) {
    float tokens = 0.f;
#pragma unroll 2
    for (int i = threadIdx.x % 32; i < first; i += 32) tokens += sequence_lengths[i];
    spread = warp_sum(tokens) * kv_bytes * SPREAD * per_cost;
  }

  DEVICE_MEMBER void clear() {
    for (int i = 0; i < TILE_BINS / 32; i++) bins[threadIdx.x % 32 * (TILE_BINS / 32) + i] = 0;
    __syncwarp();
  }

  // More pieces than the fewest: none, as many as fill their rounds, or those of a round more.
  DEVICE_MEMBER int further(int choice) const {
    const int rounds = (fewest * heads + MULTIPROCESSORS - 1) / MULTIPROCESSORS + choice - 1;
    return choice == 0 ? 0 : rounds * MULTIPROCESSORS / heads - fewest;
  }

  // Counts the pieces, `extra` more than the fewest, by bins, or puts them into the list where the bins say. Returns a lane's
  // part of their cost.
  DEVICE_MEMBER float pass(int extra, bool place) {
    const int lane = threadIdx.x % 32;
    const int shift = last - first > 16 ? 0 : __clz(last - first - 1) - 27;  // 2 ^ shift lanes share a sequence
    float cost = 0.f;
#pragma unroll 1
    for (int i = first + (lane >> shift); i < last; i += 32 >> shift) {
      const int begin = query_start[i], rows = query_start[i + 1] - begin, length = sequence_lengths[i], units = units_of(rows);
      if (units == 0) continue;
      const int share = extra * ((float)units * length * per_weight) + 0.001f;
      const int pieces = min(units, fewest_of(units) + share);
      const int each = 1 + (units >= 2 * pieces) + (units >= 3 * pieces), larger = units - each * pieces;
#pragma unroll 1
      for (int k = lane & ((1 << shift) - 1); k < pieces; k += 1 << shift) {  // from the sequence's end on
        const int end = (units - k * each - min(k, larger)) * UNIT, height = each + (k < larger);
        const int row = end - height * UNIT, valid = min(end, rows) - row;
        const float c = piece_cost(height, max(length - rows + row + valid, 0)) * per_cost;
        const int at = atomicAdd(&bins[TILE_BINS - 1 - min((int)c, TILE_BINS - 1)], 1);
        cost += c;
        if (place) tiles[1 + at] = make_int4(begin + row, valid, length - rows + row, i);
      }
    }
    __syncwarp();
    return cost;
  }

  // Turns counts into places. Returns the number of pieces.
  DEVICE_MEMBER int sum_bins() {
    constexpr int EACH = TILE_BINS / 32;
    const int lane = threadIdx.x % 32;
    int sum = 0, all;
    for (int i = 0; i < EACH; i++) sum += bins[lane * EACH + i];
    int before = warp_prefix(sum, all);
    for (int i = 0; i < EACH; i++) {
      const int count = bins[lane * EACH + i];
      bins[lane * EACH + i] = before, before += count;
    }
    __syncwarp();
    return all;
  }

  // When blocks end, in bins, from counts. They are busy for the average. Of the items up to the n-th longest one block takes
  // n / MULTIPROCESSORS, the last of which begins the later the more blocks there are before it.
  DEVICE_MEMBER float duration(float cost) const {
    constexpr int EACH = TILE_BINS / 32;
    const int lane = threadIdx.x % 32;
    int sum = 0, all;
    for (int i = 0; i < EACH; i++) sum += bins[lane * EACH + i];
    int before = warp_prefix(sum, all);
    float time = warp_sum(cost) * heads / MULTIPROCESSORS + spread * 0.5f;
    for (int i = 0; i < EACH; i++) {
      const int count = bins[lane * EACH + i];
      before += count;
      const int items = before * heads - 1, done = items / MULTIPROCESSORS, bin = TILE_BINS - lane * EACH - i;
      if (count) time = fmaxf(time, (done + 1) * bin + spread * (items - done * MULTIPROCESSORS) / MULTIPROCESSORS);
      if (count && done > 0) time = fmaxf(time, done * bin + spread);
    }
    return __int_as_float(__reduce_max_sync(~0u, __float_as_int(time)));  // none is negative
  }
};

// The list of the sequences [first, last); those before are decode rows. The order within a bin is free and changes no result.
// `kv_bytes`: of a token and a head; `group`: heads that share them, of `kv_heads`.
DEVICE void write_tiles(int* bins, int4* tiles, const int* query_start, const int* sequence_lengths, int first, int last, int kv_bytes,
                        int kv_heads, int group) {
  Tiles my{bins, tiles, query_start, sequence_lengths, first, last, kv_heads * group, 0, 1, 0};
  my.look();
  const bool few = my.fewest * my.heads <= FEW_ROUNDS * MULTIPROCESSORS, worthwhile = few && my.longest >= LONG;
  const int at_once = few ? kv_heads : min(kv_heads, max(1, (int)__fdividef(SECTION_BYTES, (float)my.context * kv_bytes)));
  if (threadIdx.x % 32 == 0) tiles[0] = make_int4(0, 0, at_once * group, 0);
  if (worthwhile) my.look_at_decode_rows(kv_bytes * kv_heads);
  const bool weighed = worthwhile && my.spread <= MOST_SPREAD;
  int best = 0;  // further pieces
  float shortest = 0.f;
#pragma unroll 1
  for (int turn = weighed ? 0 : WEIGHED; turn < WEIGHED + 2; turn++) {  // weigh, then count, then place: one code
    const bool weigh = turn < WEIGHED, place = turn == WEIGHED + 1;
    const int extra = weigh ? my.further(turn) : best;
    if (weigh && turn > 0 && extra <= 0) continue;
    if (!place) my.clear();
    const float cost = my.pass(extra, place);
    if (weigh) {
      const float time = my.duration(cost);
      if (turn == 0 || time < shortest * WORTH) shortest = time, best = extra;
      __syncwarp();
    } else if (!place) {
      const int pieces = my.sum_bins();
      if (threadIdx.x % 32 == 0) tiles[0].x = pieces;
    }
  }
}
