// A step's inputs, from pinned host memory to where its kernels read them: as many rows of each field as the step has. The
// host's copies are taken in turn, by a count of its own, so that a CUDA graph's replays go on where the last one ended.
// A block takes a part of one field: blockIdx.y.
// Constants: THREADS.
#include "fp8/types.cuh"
#include "fp8/sync.cuh"

struct Field { int offset, counted, width; };  // bytes; by which of the step's counts; bytes a row

extern "C" __global__ void __launch_bounds__(THREADS)
fetch(const u8* staging, const Field* fields, u8* buffer, int* state, int stages, int size, int tokens, int sequences,
      int rows) {
  griddepcontrol_launch_dependents();
  const Field field = fields[blockIdx.y];
  griddepcontrol_wait();  // the kernels before have read what they were given
  const int turn = state[0];
  const int count = field.counted == 0 ? tokens : field.counted == 1 ? sequences : field.counted == 2 ? sequences + 1 : rows;
  const int at = (blockIdx.x * THREADS + threadIdx.x) * 16;
  if (at < count * field.width)  // fields are padded to whole units; never from a cache: the host writes for every step
    *(uint4*)(buffer + field.offset + at) = __ldcv((const uint4*)(staging + (u64)turn * size + field.offset + at));
  __syncthreads();  // all have read the turn
  if (threadIdx.x == 0 && atomicAdd(state + 1, 1) == gridDim.x * gridDim.y - 1) {
    state[0] = turn + 1 == stages ? 0 : turn + 1;
    state[1] = 0;
  }
}
