#pragma once
// What a block of decode.cu keeps in shared memory, and how it finds its run of the line.
#include "fp8/sync.cuh"
#include "decode_line.cuh"

// Of a unit, as in the cache: queries, the newest key, the newest value. The padding spreads rows over the banks.
struct Fresh {
  alignas(16) u8 rows[ROWS + 2][HEAD_DIM * BYTES + 16];
  Cursor at;   // of the unit. What a warp needs once a tile or seldom is here: the products need the registers
  int length;  // of the context
  int slot;  // of the newest token; negative: it is not written
  int head;  // of keys and values
  bool writes;  // this unit writes it into the cache: the first of those that share its head
};

struct Shared {
  alignas(1024) u8 ring[WARPS * SLOTS][SLOT_BYTES];
  alignas(16) float o[WARPS][ROWS][PITCH];
  float m[WARPS][ROWS], l[WARPS][ROWS];
  alignas(8) u64 full[WARPS * SLOTS];
  Fresh fresh;
  float scales[4];  // of queries, keys, values, the output; 1 where there is none
  int run, mine;
  alignas(16) int sums[(WARPS + 3) / 4 * 4];  // whole words of 16 bytes: read as such, without what lies behind
  int first, before;  // the sequence that has the first place of the block's run, and the places in those before it
  u16 counts[2];  // [sequences]: places in a unit
};

// Tiles of each sequence, if all have as many; else 0, as where `parts` is. Every warp finds out for itself: to deal by it
// takes neither barriers nor counts.
DEVICE int tiles_of_all(const int* sequence_lengths, int sequences, int parts) {
  if (!parts) return 0;
  constexpr int AT_ONCE = 4;
  const int lane = threadIdx.x % 32;
  int lengths[AT_ONCE];
#pragma unroll
  for (int j = 0; j < AT_ONCE; j++) lengths[j] = sequence_lengths[min(lane + 32 * j, sequences - 1)];
  const int tiles = (__shfl_sync(~0u, lengths[0], 0) + TILE - 1) / TILE;
  bool same = true;
#pragma unroll
  for (int j = 0; j < AT_ONCE; j++) same &= (lengths[j] + TILE - 1) / TILE == tiles;
  for (int i = lane + 32 * AT_ONCE; i < sequences; i += 32) same &= (sequence_lengths[i] + TILE - 1) / TILE == tiles;
  return __all_sync(~0u, same) ? tiles : 0;
}

// A thread's share of the sequences, neighbours: an odd number of pairs, so that threads beside each other read from
// different banks. `before` and `sum`: places in one unit of the sequences before them and of them.
struct Share {
  int begin, end, before, sum;
};

// Fills shared.counts; `total` becomes the sum over all sequences.
DEVICE Share count_places(Shared& shared, const int* sequence_lengths, int sequences, int nothing, int& total) {
  for (int i = threadIdx.x; i < sequences; i += THREADS) {
    const int tiles = (sequence_lengths[i] + TILE - 1) / TILE;
    shared.counts[i] = tiles ? tiles + nothing : 0;
  }
  __syncthreads();
  const int each = 2 * ((sequences + 2 * THREADS - 1) / (2 * THREADS) | 1);
  Share share;
  share.begin = min(sequences, (int)threadIdx.x * each);
  share.end = min(sequences, share.begin + each);
  share.sum = 0;
  for (int i = share.begin; i < share.end; i++) share.sum += shared.counts[i];
  int upto = share.sum;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int left = __shfl_up_sync(~0u, upto, d);
    if (threadIdx.x % 32 >= d) upto += left;
  }
  if (threadIdx.x % 32 == 31) shared.sums[threadIdx.x / 32] = upto;
  __syncthreads();
  share.before = upto - share.sum;
  total = 0;
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
    if (w < threadIdx.x / 32) share.before += shared.sums[w];
    total += shared.sums[w];
  }
  return share;
}

// Finds the sequence that has `place`; one thread does.
DEVICE void locate(Shared& shared, const Share& share, int place) {
  int before = share.before * UNITS;
  if (place < before || place >= before + share.sum * UNITS) return;
  int i = share.begin;
  while (place >= before + shared.counts[i] * UNITS) before += shared.counts[i++] * UNITS;
  shared.first = i, shared.before = before;
}
