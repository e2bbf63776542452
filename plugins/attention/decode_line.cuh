#pragma once
// The line of all tiles of all units, a place in it, and who sends for the tiles.
#include "fp8/mbarrier.cuh"
#include "fp8/tma.cuh"
#include "decode_shape.cuh"

struct Problem {
  const int *block_tables, *lengths;
  const u16* counts;  // of each sequence: places in one of its units
  int max_blocks;
  int nothing;  // places behind the tiles of a unit
  int end;  // of this block's run of places
  int once;  // keys and values are the first to leave the L2 cache: for what all layers need
};

// A place in the line of tiles.
struct Cursor {
  int index, sequence, unit, tile;
  int places;  // of the unit

  // `before`: places in the sequences before `sequence`, which has this place.
  __device__ __forceinline__ void seek(const Problem& p, int place, int in, int before) {
    index = place;
    sequence = in;
    unit = tile = places = 0;
    if (place >= p.end) return;
    places = p.counts[in];
    unit = (place - before) / places;
    tile = place - before - unit * places;
  }
  __device__ __forceinline__ int tiles(const Problem& p) const { return places - p.nothing; }
  __device__ __forceinline__ void advance(const Problem& p, int steps) {
    index += steps;
    tile += steps;
    if (index >= p.end) return;
    while (tile >= places) {
      tile -= places;
      if (++unit < UNITS) continue;
      unit = 0;
      do places = p.counts[++sequence];
      while (places == 0);
    }
  }
  // On to the next tile, in steps of `step`, if there is none at this place.
  __device__ __forceinline__ void skip_nothing(const Problem& p, int step) {
    while (index < p.end && tile >= tiles(p)) advance(p, step);
  }
};

// Boxes of a whole tile, and of END tokens for the keys that a context has in its last one. Values come whole: where P is 0
// they must be finite, as what lies in the cache is.
struct Maps {
  const TensorMap *k, *v, *k_end;
};

// Pages of a sequence, asked for before it is known where a block begins: a lane has one, of the first 32.
struct Guess {
  int sequence, page;  // -1: of none

  __device__ __forceinline__ void ask(const int* block_tables, int max_blocks) {
    if (sequence >= 0) page = __ldg(block_tables + sequence * max_blocks + min((int)threadIdx.x % 32, max_blocks - 1));
  }
};

// Fills a warp's slots, in order: keys and values of its first tile, of its second, ... All lanes keep it, one sends.
struct Producer {
  Cursor at;
  int page;  // asked for a tile ahead

  __device__ __forceinline__ void start(const Problem& p, const Cursor& first, int steps, const Guess& guess) {
    at = first;
    at.advance(p, steps);
    at.skip_nothing(p, WARPS);
    const int i = at.tile * TILE / PAGE;
    if (at.index < p.end && at.sequence == guess.sequence && i < 32) page = __shfl_sync(~0u, guess.page, i);
    else look_up(p);
  }
  __device__ __forceinline__ void look_up(const Problem& p) {
    if (at.index < p.end) page = __ldg(p.block_tables + at.sequence * p.max_blocks + at.tile * TILE / PAGE);
  }
  // Of END tokens, for the tile's keys. Looked up here and now, once a unit: registers are short. Larger blocks are for few
  // units, of which nobody shall wait for that.
  __device__ __forceinline__ int boxes(const Problem& p) const {
    if (WARPS >= 4 || at.tile + 1 < at.tiles(p)) return TILE / END;
    return (__ldg(p.lengths + at.sequence) - at.tile * TILE + END - 1) / END;
  }
  static __device__ __forceinline__ void send(bool once, u32 to, const TensorMap* map, u32 full, int x, int y) {
    if (once) tma_load_2d_evict_first(to, map, full, x, y);
    else tma_load_2d(to, map, full, x, y);
  }
  __device__ __forceinline__ void fill(const Problem& p, const Maps& maps, u32 slot, u32 full, bool values) {
    if (at.index >= p.end) return;
    const int head = page * KV_HEADS + at.unit / PARTS;
    const int row = head * PAGE + at.tile * TILE % PAGE;
    if (threadIdx.x % 32 == 0) {
      const int parts = values ? TILE / END : boxes(p);
      mbarrier_arrive_expect_tx(full, parts * END * HEAD_DIM * BYTES);
      if (FP8_CACHE && values) {
        send(p.once, slot, maps.v, full, 0, head * (HEAD_DIM / 2));
      } else {
#pragma unroll
        for (int column = 0; column < HEAD_DIM; column += SPAN / BYTES) {
          const u32 to = slot + column * BYTES * TILE;
          if (parts == TILE / END) send(p.once, to, values ? maps.v : maps.k, full, column, row);
          else
#pragma unroll
            for (int i = 0; i < TILE / END - 1; i++)
              if (i < parts) send(p.once, to + i * END * SPAN, maps.k_end, full, column, row + i * END);
        }
      }
    }
    if (values) {
      at.advance(p, WARPS);
      at.skip_nothing(p, WARPS);
      look_up(p);
    }
  }
};
