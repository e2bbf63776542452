// All-gather of few rows: one exchange (push.cuh), each thread a unit or some of every rank's part. All ranks send as many
// units as the largest part has: what push.cuh says of slots holds only if a block hears from every peer each time.
// Grid: at most MOST_BLOCKS.
// Constants: PARTS (16-byte units of a row that each rank has, a list), THREADS, HELD, and those of push.cuh.
#include "../all_reduce/push.cuh"
#include "fp8/sync.cuh"

constexpr u32 part(int rank) {
  constexpr u32 parts[WORLD] = {PARTS};
  return parts[rank];
}
constexpr u32 columns_before(int rank) { return rank ? columns_before(rank - 1) + part(rank - 1) : 0; }
constexpr u32 largest(int ranks) { return ranks == 1 || largest(ranks - 1) < part(ranks - 1) ? part(ranks - 1) : largest(ranks - 1); }

DEVICE u32 place(int i) { return (i * gridDim.x + blockIdx.x) * THREADS + threadIdx.x; }
template <int Rank> DEVICE void store_part(uint4* y, u32 place, uint4 v) {
  y[(u64)(place / part(Rank)) * columns_before(WORLD) + columns_before(Rank) + place % part(Rank)] = v;
}

// Rank by rank, as divisors are constants so.
template <int Rank>
DEVICE void gather(const uint4 (&mine)[HELD], uint4* y, const Peers& peers, u32 rank, u32 rows, u32 epoch, Patience& patience) {
  if constexpr (Rank < WORLD) {
#pragma unroll
    for (int i = 0; i < HELD; i++) {
      if (place(i) >= rows * largest(WORLD)) continue;
      const uint4 v = rank == Rank ? mine[i] : take(peers.region[rank], epoch, Rank, i, patience);
      if (place(i) < rows * part(Rank)) store_part<Rank>(y, place(i), v);
    }
    gather<Rank + 1>(mine, y, peers, rank, rows, epoch, patience);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
all_gather(const uint4* x, uint4* y, const __grid_constant__ Peers peers, u32 rank, u32 rows, u32 own) {
  griddepcontrol_launch_dependents();
  u32* const counter = epoch_of_block(peers.region[rank], PUSH);
  Patience patience;
  griddepcontrol_wait();
  const u32 epoch = *counter;
  uint4 mine[HELD] = {};
#pragma unroll
  for (int i = 0; i < HELD; i++)
    if (place(i) < own) mine[i] = x[place(i)];
#pragma unroll
  for (int i = 0; i < HELD; i++)
    if (place(i) < rows * largest(WORLD)) push(peers, rank, epoch, i, {mine[i], 0.0f});
  gather<0>(mine, y, peers, rank, rows, epoch, patience);
  __syncthreads();  // all have read the counter
  if (threadIdx.x == 0) *counter = epoch + 1;
}
