// y = a + b, added in float32 and rounded once; blockIdx.x is the row, blockIdx.y the part of it.
// Constants: WIDTH (values per row), THREADS, DTYPE.
#include "fp8/rows.cuh"
#include "fp8/sync.cuh"

static_assert(WIDTH % 8 == 0, "rows are whole 16-byte units");
constexpr int VECTORS = WIDTH / 8;

extern "C" __global__ void __launch_bounds__(THREADS) add(const uint4* a, const uint4* b, uint4* y) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int column = blockIdx.y * THREADS + threadIdx.x;
  if (column >= VECTORS) return;
  const u64 i = (u64)blockIdx.x * VECTORS + column;
  float left[8], right[8];
  unpack8<DTYPE>(a[i], left);
  unpack8<DTYPE>(b[i], right);
#pragma unroll
  for (int j = 0; j < 8; j++) left[j] += right[j];
  y[i] = pack8<DTYPE>(left);
}
