// Rows of a table by token id: blockIdx.x is the token, blockIdx.y the part of its row; one 16-byte unit per thread.
// Constants: HIDDEN (16-bit values), VOCABULARY, THREADS.
#include "fp8/sync.cuh"

constexpr int VECTORS = HIDDEN / 8;
static_assert(HIDDEN % 8 == 0, "rows are whole 16-byte units");

extern "C" __global__ void __launch_bounds__(THREADS) embedding(const int* input_ids, const uint4* table, uint4* y) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int column = blockIdx.y * THREADS + threadIdx.x;
  if (column >= VECTORS) return;
  const int id = input_ids[blockIdx.x];
  uint4 v = make_uint4(0, 0, 0, 0);
  if (0 <= id && id < VOCABULARY) v = table[(u64)id * VECTORS + column];
  y[(u64)blockIdx.x * VECTORS + column] = v;
}
