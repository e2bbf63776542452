// All-reduce of many bytes: tiles go through slots in the peers' regions, with a flag per tile, block by block; the next
// tile is on its way while one is waited for. Grid: at most MOST_BLOCKS; `bytes` are whole units.
//
// One phase (PHASES 1): every rank sends its tile to all others, and each adds all. Two: a tile has a part for each rank,
// which gets it from all others, adds, and sends the sum to all: 2 / WORLD of the bytes.
//
// Reuse. A block sends its tiles in the order e = 0, 1, ..., through all launches. One phase: tile e + 1 leaves after the
// block waited for the peers' tiles e - 1, which they sent after they had added tile e - 3; so there are four slots. Two
// phases: part e + 1 leaves after the sums e - 1 came, for which the peers had read parts e - 1; sums e leave after the
// peers' parts e came, which they sent after they had read sums e - 2; so there are two slots for each.
//
// Tries, on two H200s: mpirun -n 2 fp8-bench all_reduce, sums in a row in a CUDA graph, bfloat16, us.
//                      8 KB  128 KB  512 KB    2 MB    8 MB   32 MB
//   NCCL                6.6     7.3    10.0    26.8    47.3     135
//   push.cu             1.9     2.4     3.5     7.9    29.2       -    the smallest blocks that hold it; largest: 2.1 at 8 KB
//   one phase           3.2     3.7     5.1    10.6    31.2     102    264 blocks; 132: 128 at 32 MB; tiles of 8 KB: 118
//   two phases          5.4     5.7     6.8    12.0    30.0     101    no fewer bytes among two ranks, one wait more
//   FP8, one phase        -       -     5.0     8.6    22.3      67    of 8 MB a block has one tile, so that loading, the wire
//                                                                      (4.3 MB: 13 us at 330 GB/s) and adding do not overlap
//   FP8, push.cu          -       -     3.3     5.9    18.9       -    of 16 MB 37.9, one phase 38.0
//
// FP8: see wire.cuh. With two phases the sums are rounded so again.
// Constants: WORLD, THREADS, UNITS (of a thread in a tile, 16 bytes on the wire each), DTYPE, MAXIMUM, PHASES, FP8,
// SLOTS, RESIDENT (blocks of a multiprocessor), STREAM_AREA, STREAM_SLOT (bytes of values), STREAM_SCALES (bytes of scales
// behind them).
#include "fp8/peers.cuh"
#include "fp8/sync.cuh"
#include "wire.cuh"

constexpr int TILE_UNITS = THREADS * UNITS;
constexpr int PARTS = PHASES == 1 ? 1 : WORLD;
constexpr int FAMILY = PHASES == 1 ? ONE_PHASE : TWO_PHASES;
constexpr int FIRST_FLAG = PHASES == 1 ? 0 : 1;  // one phase has one kind of flag, two have two
static_assert(TILE_UNITS * 16 <= STREAM_SLOT && TILE_UNITS / 8 * 4 <= STREAM_SCALES, "a tile fits its slot");

DEVICE u8* slot(u64 region, int kind, u32 epoch, int source) {
  const u64 n = (((u64)kind * SLOTS + epoch % SLOTS) * MOST_BLOCKS + blockIdx.x) * WORLD + source;
  return (u8*)(region + STREAM_AREA + n * (STREAM_SLOT + STREAM_SCALES));
}
DEVICE void store_wire(u8* slot, int unit, const Wire& w) {
  *(uint4*)(slot + unit * 16) = w.data;
  if (FP8 && unit % 8 == 0) *(float*)(slot + STREAM_SLOT + unit / 8 * 4) = w.scale;
}
DEVICE Wire load_wire(const u8* slot, int unit) {
  Wire w = {__ldcg((const uint4*)(slot + unit * 16)), 0.0f};
  if (FP8) w.scale = __ldcg((const float*)(slot + STREAM_SLOT + unit / 8 * 4));
  return w;
}

struct Block {
  const u8* x;
  u8* y;
  const Peers& peers;
  u32 rank;
  u64 bytes;
  Patience& patience;

  DEVICE_MEMBER u64 own() const { return peers.region[rank]; }
  // Where unit u of this thread lies in x: of part `part` of a tile.
  DEVICE_MEMBER u64 offset(u64 tile, int part, int u) const {
    return ((tile * PARTS + part) * TILE_UNITS + unit(u)) * (u64)UNIT_BYTES;
  }
  DEVICE_MEMBER int unit(int u) const { return u * THREADS + threadIdx.x; }  // of a tile
  DEVICE_MEMBER u32 other(int k) const { return rank + k < WORLD ? rank + k : rank + k - WORLD; }

  DEVICE_MEMBER void read(u64 tile, int part, Wire (&w)[UNITS]) const {
#pragma unroll
    for (int u = 0; u < UNITS; u++) w[u] = read_x(x, offset(tile, part, u), bytes);
  }
  DEVICE_MEMBER void store(u8* to, const Wire (&w)[UNITS]) const {
#pragma unroll
    for (int u = 0; u < UNITS; u++) store_wire(to, unit(u), w[u]);
  }
  // To all others, and in FP8 to this rank, which takes its own values as the others do.
  DEVICE_MEMBER void send(u32 epoch, u64 tile) const {
    Wire w[UNITS];
    if (PHASES == 1) read(tile, 0, w);
#pragma unroll
    for (int k = FP8 ? 0 : 1; k < WORLD; k++) {
      const u32 peer = other(k);
      if (PHASES == 2) read(tile, peer, w);
      store(slot(peers.region[peer], 0, epoch, rank), w);
    }
    signal(0, epoch);
  }
  DEVICE_MEMBER void signal(int kind, u32 epoch) const {
    __syncthreads();
    if (threadIdx.x < WORLD && threadIdx.x != rank)
      store_release_system(flag_of_block(peers.region[threadIdx.x], FIRST_FLAG + kind, rank), epoch + 1);
  }
  DEVICE_MEMBER void wait(int kind, u32 epoch) const {
    if (threadIdx.x < WORLD && threadIdx.x != rank) {
      const void* flag = flag_of_block(own(), FIRST_FLAG + kind, threadIdx.x);
      while ((int)(load_acquire_system(flag) - (epoch + 1)) < 0) patience.poll();
    }
    __syncthreads();
  }
  // All loads first: a store could be to where the next load is from, for all that the compiler knows.
  DEVICE_MEMBER void add(u32 epoch, u64 tile) const {
    const int part = PHASES == 1 ? 0 : rank;
    Wire parts[UNITS][WORLD];
#pragma unroll
    for (int u = 0; u < UNITS; u++)
#pragma unroll
      for (int r = 0; r < WORLD; r++) {
        const u64 place = offset(tile, part, u);
        const bool mine = !FP8 && r == rank && place < bytes;
        parts[u][r] = load_wire(mine ? x + place - unit(u) * 16 : slot(own(), 0, epoch, r), unit(u));
      }
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
      float total[VALUES];
      decode(parts[u][0], total);
#pragma unroll
      for (int r = 1; r < WORLD; r++) {
        float v[VALUES];
        decode(parts[u][r], v);
#pragma unroll
        for (int j = 0; j < VALUES; j++) total[j] = combine(total[j], v[j]);
      }
      if (PHASES == 2) {
        const Wire sum = encode(total);
#pragma unroll
        for (int k = 1; k < WORLD; k++)
          store_wire(slot(peers.region[other(k)], 1, epoch, rank), unit(u), sum);
        decode(sum, total);
      }
      write_y<true>(y, offset(tile, part, u), bytes, total);
    }
    if (PHASES == 2) signal(1, epoch);
  }
  DEVICE_MEMBER void collect(u32 epoch, u64 tile) const {
    Wire sums[UNITS][WORLD - 1];
#pragma unroll
    for (int u = 0; u < UNITS; u++)
#pragma unroll
      for (int k = 1; k < WORLD; k++)
        sums[u][k - 1] = load_wire(slot(own(), 1, epoch, other(k)), unit(u));
#pragma unroll
    for (int u = 0; u < UNITS; u++)
#pragma unroll
      for (int k = 1; k < WORLD; k++) {
        float v[VALUES];
        decode(sums[u][k - 1], v);
        write_y<true>(y, offset(tile, other(k), u), bytes, v);
      }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
all_reduce(const u8* x, u8* y, const __grid_constant__ Peers peers, u32 rank, u64 bytes) {
  griddepcontrol_launch_dependents();
  u32* const counter = epoch_of_block(peers.region[rank], FAMILY);
  Patience patience;
  griddepcontrol_wait();
  const Block block = {x, y, peers, rank, bytes, patience};
  constexpr u64 TILE = (u64)PARTS * TILE_UNITS * UNIT_BYTES;
  const u64 tiles = (bytes + TILE - 1) / TILE;
  u32 epoch = *counter;
  __syncthreads();
  u64 tile = blockIdx.x;
  if (tile < tiles) block.send(epoch, tile);
  for (; tile < tiles; tile += gridDim.x, epoch++) {
    if (tile + gridDim.x < tiles) block.send(epoch + 1, tile + gridDim.x);
    block.wait(0, epoch);
    block.add(epoch, tile);
    if (PHASES == 2) {
      block.wait(1, epoch);
      block.collect(epoch, tile);
    }
  }
  if (threadIdx.x == 0) *counter = epoch;
}
