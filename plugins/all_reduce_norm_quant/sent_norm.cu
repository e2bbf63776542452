// As push_norm.cu, of rows that the linear layers sent (sent.cuh): one block per row, which waits for the words themselves and
// for no kernel. Those before the linear have ended when it begins. Grid: rows, at most SENT_ROWS.
// Constants: those of norm_row.cuh, with RESIDUAL, and of sent.cuh; MAXIMUM 0.
//
// On two H200s, 8 layers of Llama-7B's shape at tp 2, one sequence: a step with 15 such sums takes 353.9 us, with push_norm.cu
// 361.3 (with the 8 of o_proj alone 356.0, with the 7 of down_proj 357.5). From the last word to this kernel's end it takes 1.5
// to 1.9 us, and the next one's wait ends 0.4 to 0.6 us later. With a wait for the linear's end here, behind everything else, and
// a linear that also stores y: no gain (one GPU that sends to itself).
#include "fp8/norm_row.cuh"
#include "fp8/sync.cuh"
#include "../all_reduce/sent.cuh"
#include "../all_reduce/values.cuh"

static_assert(RESIDUAL && !GATHER, "every row is summed up and kept");
static_assert(HIDDEN * 2 <= SENT_BEGUN, "a row fits its place");

// The sum over the ranks, in their order, of that unit of the row.
DEVICE uint4 take_sum(u64 own, u64 area, int i, Patience& patience) {
  uint4 v[WORLD];
  for (bool there = false; !there;) {
    there = true;
#pragma unroll
    for (int r = 0; r < WORLD; r++) v[r] = load_system(sent_row(own, area, blockIdx.x, r) + column(i) * 16);
#pragma unroll
    for (int r = 0; r < WORLD; r++) there &= v[r].x && v[r].y && v[r].z && v[r].w;
    if (!there) patience.poll();
  }
  float total[8], other[8];
#pragma unroll
  for (int r = 0; r < WORLD; r++) {
    store_system(sent_row(own, area, blockIdx.x, r) + column(i) * 16, make_uint4(0, 0, 0, 0));
    unpack_unit(make_uint4(~v[r].x, ~v[r].y, ~v[r].z, ~v[r].w), r ? other : total);
#pragma unroll
    for (int j = 0; j < 8; j++) total[j] = r ? combine(total[j], other[j]) : total[j];
  }
  return pack_unit(total);
}

extern "C" __global__ void __launch_bounds__(THREADS)
sent_norm(const uint4* residual, const uint4* weight, const uint4* bias, const float* scale, void* y, float* y_scale,
          uint4* residual_out, const __grid_constant__ Peers peers, u32 rank, u64 area) {
  const Stored stored(weight, bias, scale);
  const u64 own = peers.region[rank], source = (u64)blockIdx.x * VECTORS;
  u32* const begun = begun_of(own, area, blockIdx.x, rank);
  uint4 raw[HELD] = {}, added[HELD] = {};
  Patience patience;
  if (threadIdx.x == 0)
    while (!load_acquire_gpu(begun)) patience.poll();
  __syncthreads();  // the kernels before the linear have ended
  // Not before: else the next exchange but one, whose rows come to the same place, could have its norm here, too.
  griddepcontrol_launch_dependents();
#pragma unroll
  for (int i = 0; i < HELD; i++)
    if (inside(i)) added[i] = load_system(residual + source + column(i));
#pragma unroll
  for (int i = 0; i < HELD; i++)
    if (inside(i)) raw[i] = take_sum(own, area, i, patience);
  norm_row(stored, raw, added, source, y, y_scale, residual_out);
  if (threadIdx.x == 0) *begun = 0;
}
