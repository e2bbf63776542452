// Residual add, RMSNorm or LayerNorm, and rounding or quantization: one block per row, the row in registers, read once.
// Constants: those of norm_row.cuh.
#include "fp8/norm_row.cuh"
#include "fp8/sync.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
norm_quant(const uint4* x, const uint4* residual, const uint4* weight, const uint4* bias, const float* scale,
           const int* rows, void* y, float* y_scale, uint4* residual_out) {
  griddepcontrol_launch_dependents();
  const Stored stored(weight, bias, scale);
  griddepcontrol_wait();

  const u64 source = (u64)(GATHER ? rows[blockIdx.x] : blockIdx.x) * VECTORS;
  uint4 raw[HELD] = {}, added[HELD] = {};
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    if (!inside(i)) continue;
    raw[i] = x[source + column(i)];
    if (RESIDUAL) added[i] = residual[source + column(i)];
  }
  norm_row(stored, raw, added, source, y, y_scale, residual_out);
}
