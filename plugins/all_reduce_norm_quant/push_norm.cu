// Sum over the ranks, residual add, norm, and rounding or quantization of few rows: one block per row, which it exchanges
// as push.cuh tells. Grid: rows, at most MOST_BLOCKS.
// Constants: those of norm_row.cuh, with RESIDUAL, and of push.cuh.
//
// Tries, on two H200s, in the decode steps of 8 layers of Llama-7B's shape at tp 2, one sequence (3.2 us from when the linear
// before has ended until this has; a norm alone takes 1.5): the linear stores its rows into the peers' slots itself as it has
// them, and this waits for its end and for them: 3.1 us, and 0.3 more for the linear. Not to wait for its end is what counts
// (sent_norm.cu). A thread of each unit, of one row 512 of them: two units each are faster among sums in a row (2.8 us, 3.0),
// but not in a step (0.7 us slower a layer and sum).
#include "fp8/norm_row.cuh"
#include "fp8/sync.cuh"
#include "../all_reduce/push.cuh"

static_assert(RESIDUAL && !GATHER, "every row is summed up and kept");

extern "C" __global__ void __launch_bounds__(THREADS)
push_norm(const uint4* x, const uint4* residual, const uint4* weight, const uint4* bias, const float* scale, void* y,
          float* y_scale, uint4* residual_out, const __grid_constant__ Peers peers, u32 rank) {
  griddepcontrol_launch_dependents();
  const Stored stored(weight, bias, scale);
  const u64 own = peers.region[rank];
  u32* const counter = epoch_of_block(own, PUSH);
  Patience patience;
  griddepcontrol_wait();

  const u32 epoch = *counter;
  const u64 source = (u64)blockIdx.x * VECTORS;
  Wire mine[HELD];
  uint4 raw[HELD] = {}, added[HELD] = {};
#pragma unroll
  for (int i = 0; i < HELD; i++)
    if (inside(i)) mine[i].data = x[source + column(i)];
#pragma unroll
  for (int i = 0; i < HELD; i++)
    if (inside(i)) push(peers, rank, epoch, i, mine[i]);
#pragma unroll
  for (int i = 0; i < HELD; i++)
    if (inside(i)) added[i] = residual[source + column(i)];
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    if (!inside(i)) continue;
    float total[VALUES];
    receive(own, rank, epoch, i, mine[i], true, patience, total);
    raw[i] = pack_unit(total);
  }
  norm_row(stored, raw, added, source, y, y_scale, residual_out);
  __syncthreads();  // all have read the counter
  if (threadIdx.x == 0) *counter = epoch + 1;
}
