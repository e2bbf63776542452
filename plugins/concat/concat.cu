// Rows of up to three tensors side by side: blockIdx.x is the row, blockIdx.y the part of it; one 16-byte unit per thread.
// Constants: A, B, C (16-bit values per row; C may be 0), THREADS.
#include "fp8/sync.cuh"

static_assert(A % 8 == 0 && B % 8 == 0 && C % 8 == 0, "rows are whole 16-byte units");
constexpr int UNITS_A = A / 8, UNITS_B = B / 8, UNITS_C = C / 8, UNITS = UNITS_A + UNITS_B + UNITS_C;

extern "C" __global__ void __launch_bounds__(THREADS)
    concat(const uint4* a, const uint4* b, const uint4* c, uint4* y) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const u64 row = blockIdx.x;
  const int column = blockIdx.y * THREADS + threadIdx.x;
  if (column >= UNITS) return;
  uint4 v;
  if (column < UNITS_A) {
    v = a[row * UNITS_A + column];
  } else if (column < UNITS_A + UNITS_B) {
    v = b[row * UNITS_B + column - UNITS_A];
  } else {
    v = c[row * UNITS_C + column - UNITS_A - UNITS_B];
  }
  y[row * UNITS + column] = v;
}
