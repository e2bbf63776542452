// Residual add, RMSNorm or LayerNorm, and rounding or quantization: one block per row, the row in registers, read once.
// Constants: those of norm_row.cuh.
//
// The blocks that are there before the wait bring their residuals into the L2 cache, while the kernel before ends. Tries on
// an H200, TB/s of static / per-token / block scales at 2048 x 4096, then static at 16384 x 4096 and 4096 x 8192:
//   256 threads                 3.68 3.67 3.53   4.14  4.06
//   512 threads                 3.64 3.65 3.59   4.19  4.10
//   256 threads, prefetch       3.76 3.74 3.65   4.19  4.13
//   512 threads, prefetch       3.86 3.84 3.81   4.23  4.15
// Of a sum that was just written (summed.py), us at 2040, 4096 and 8192 rows of 4096: 128 threads 8.7, 14.1, 28.1; 192 9.9,
// 16.7, 31.5; 256 9.1, 15.3, 29.4; 512 10.8, 18.2, 34.4.
// Without gain: the residual of the rows 264 or 528 on, too (+-1%; at 4096 x 8192 528 are -11%), or x of those rows (-1 to
// -25%); streaming stores (-1%), streaming loads (-7%); persistent blocks that load a row ahead (-1 to -12%).
#include "fp8/cp_async.cuh"
#include "fp8/norm_row.cuh"
#include "fp8/sync.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
norm_quant(const uint4* x, const uint4* residual, const uint4* weight, const uint4* bias, const float* scale,
           const int* rows, void* y, float* y_scale, uint4* residual_out) {
  griddepcontrol_launch_dependents();
  if (RESIDUAL && !GATHER && threadIdx.x == 0) prefetch_l2(residual + (u64)blockIdx.x * VECTORS, VECTORS * 16);
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
