// All-reduce of few bytes: one exchange (push.cuh), each thread a unit or some. Grid: at most MOST_BLOCKS.
#include "push.cuh"
#include "fp8/sync.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
push(const u8* x, u8* y, const __grid_constant__ Peers peers, u32 rank, u64 bytes) {
  griddepcontrol_launch_dependents();
  const u64 own = peers.region[rank];
  u32* const counter = epoch_of_block(own, PUSH);
  Patience patience;
  griddepcontrol_wait();
  const u32 epoch = *counter;
  uint4 mine[HELD];
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    const u64 offset = ((u64)(i * gridDim.x + blockIdx.x) * THREADS + threadIdx.x) * 16;
    if (offset < bytes) mine[i] = load_unit(x, offset, bytes);
  }
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    const u64 offset = ((u64)(i * gridDim.x + blockIdx.x) * THREADS + threadIdx.x) * 16;
    if (offset < bytes) push_unit(peers, rank, epoch, i, mine[i]);
  }
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    const u64 offset = ((u64)(i * gridDim.x + blockIdx.x) * THREADS + threadIdx.x) * 16;
    if (offset < bytes) store_unit(y, offset, bytes, receive_unit(own, rank, epoch, i, mine[i], patience));
  }
  __syncthreads();  // all have read the counter
  if (threadIdx.x == 0) *counter = epoch + 1;
}
