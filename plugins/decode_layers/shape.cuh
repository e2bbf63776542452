#pragma once
// What decode_layers.cu derives from its constants, and what it is given.
#include "fp8/mbarrier.cuh"
#include "fp8/sync.cuh"
#include "fp8/tma.cuh"
#include "fp8/words.cuh"
#ifdef WORLD  // the ranks that share the layers; none: this one has them whole
#include "fp8/peers.cuh"
constexpr int RANKS = WORLD;
#else
constexpr int RANKS = 1;
#endif

constexpr int ATOM = 128;                             // bytes of K in one swizzle atom
constexpr int UNIT = 16;                              // rows of weights that are multiplied, and finished, together
constexpr int STAGE_K = 8 * ATOM;                     // of K in a stage
constexpr int STAGE = UNIT * STAGE_K;                 // bytes; as many as a tile of keys and one of values have
constexpr int CONSUMERS = 128 * WARPGROUPS, TOTAL = CONSUMERS + 64;
constexpr int FINISHER = CONSUMERS / 32, PRODUCER = FINISHER + 1;  // warps
constexpr int ATTENTION = HEAD_DIM * KV_HEADS * GROUP, QKV = ATTENTION + 2 * HEAD_DIM * KV_HEADS;
enum { O, GATE_UP, DOWN, NEXT_QKV, OPS };

constexpr int rows_of_op(int op) { return op == GATE_UP ? 2 * MLP : op == NEXT_QKV ? QKV : HIDDEN; }
constexpr int columns_of(int op) { return op == O ? ATTENTION : op == DOWN ? MLP : HIDDEN; }
constexpr int units_of(int op) { return rows_of_op(op) / UNIT; }
constexpr int steps_of(int op) { return (columns_of(op) + STAGE_K - 1) / STAGE_K; }
constexpr int units_before(int op) { return op == O ? 0 : units_before(op - 1) + units_of(op - 1); }
// A block's first unit of an op; the next ones are GRID apart. Over the ops of a layer units are dealt out in turn.
DEVICE int first_unit(int op) {
  const int start = op == O ? 0 : op == GATE_UP ? units_before(GATE_UP) % GRID : op == DOWN ? units_before(DOWN) % GRID : units_before(NEXT_QKV) % GRID;
  const int unit = (int)blockIdx.x - start;
  return unit < 0 ? unit + GRID : unit;
}
constexpr int larger(int a, int b) { return a > b ? a : b; }
constexpr int X_BYTES = larger(steps_of(O), larger(steps_of(GATE_UP), steps_of(DOWN))) * STAGE_K + ATOM;
static_assert(ATTENTION % ATOM == 0 && HIDDEN % ATOM == 0 && MLP % ATOM == 0 && units_of(GATE_UP) >= GRID);

// One of the model's, as plugin.py packs it.
struct alignas(128) Layer {
  TensorMap keys, values, weights[OPS];
  const float* w_scale[OPS];
  const u16* gain[2];  // of the norms before gate_up and before qkv
  u8 *key_cache, *value_cache;
  float x_scale[OPS], out_scale[OPS];  // out_scale: of the x of that op, when it is quantized
  float q_scale, k_scale, v_scale;
};
static_assert(sizeof(Layer) == 896, "launch.py: LAYER_BYTES");

// What the blocks tell each other: words that say by a tag in which layer of which launch they were written, and so are
// their own flags. Every one is written anew in each layer.
struct Exchange {
  u32 sums[2][HIDDEN];         // behind o and behind down, residual included: 16 bits, and the tag's low half above them;
                               // of several ranks they are elsewhere: sums.cuh
  u32 hidden[MLP / 2];         // two e4m3 codes, and the tag
  u32 attention[ATTENTION / 2];
  u32 qkv[QKV];
  u32 launches;                // layers that were computed so far; of several ranks elsewhere, too
};

struct Params {
  const Layer* layers;
  const u16 *qkv, *residual;
  const int *position_ids, *slot_mapping, *sequence_lengths, *block_tables;
  const float *cos, *sin;
  u16 *y, *residual_out;
  Exchange* exchange;
  uint4* partials;  // of tiles: attend.cuh
#ifdef WORLD
  uint2* kept;  // of every block: the residual
  Peers peers;
  u32 me;
#endif
};

// Named barriers: sums of a unit lie in place `i`, place `i` is free again, all consumers, those of a warpgroup.
enum { FULL = 1, FREE = 3, EVERY = 5, GROUPS = 6 };

// The ring's place to fill or to read next.
struct Place {
  int stage = 0, parity = 0;
  DEVICE_MEMBER void advance(int count = 1) {
    stage += count;
    if (stage >= STAGES) stage -= STAGES, parity ^= 1;
  }
  DEVICE_MEMBER Place ahead(int count) const {  // at most STAGES
    Place found = *this;
    found.advance(count);
    return found;
  }
};
struct Ring {
  u32 data, full, empty;  // addresses in shared memory
};
