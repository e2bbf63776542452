// All-reduce of few bytes: one exchange (push.cuh), each thread a unit or some. Grid: at most MOST_BLOCKS. In FP8 `bytes` are
// whole groups of 128 values.
#include "push.cuh"
#include "fp8/sync.cuh"

DEVICE u64 place(int i) { return ((u64)(i * gridDim.x + blockIdx.x) * THREADS + threadIdx.x) * UNIT_BYTES; }

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
all_reduce(const u8* x, u8* y, const __grid_constant__ Peers peers, u32 rank, u64 bytes) {
  griddepcontrol_launch_dependents();
  const u64 own = peers.region[rank];
  u32* const counter = epoch_of_block(own, PUSH);
  Patience patience;
  griddepcontrol_wait();
  const u32 epoch = *counter;
  Wire mine[HELD];
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    if (FP8) mine[i] = read_x(x, place(i), bytes);
    else if (place(i) < bytes) mine[i].data = load_unit(x, place(i), bytes);
  }
#pragma unroll
  for (int i = 0; i < HELD; i++)
    if (place(i) < bytes) push(peers, rank, epoch, i, mine[i]);
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    if (!FP8 && place(i) >= bytes) continue;
    float total[VALUES];
    receive(own, rank, epoch, i, mine[i], place(i) < bytes, patience, total);
    write_y<(bool)FP8>(y, place(i), bytes, total);
  }
  __syncthreads();  // all have read the counter
  if (threadIdx.x == 0) *counter = epoch + 1;
}
