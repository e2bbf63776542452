// y = x * w for rows of 64 floats, a block of 64 threads each; FAULT: what is wrong with it.
#include "fp8/sync.cuh"

#define WRONG 1
#define ILLEGAL_ADDRESS 2
#define ENDLESS 3
#define REFUSED 4

#if FAULT == REFUSED
#error "refused"
#endif

extern "C" __global__ void __launch_bounds__(64) faulty(const float* x, const float* w, float* y) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int at = blockIdx.x * 64 + threadIdx.x;
  if (FAULT == ENDLESS) {
    while (*(const volatile float*)x < 1e30f) {
    }
  }
  if (FAULT == ILLEGAL_ADDRESS) y += 1ll << 44;
  y[at] = x[at] * w[threadIdx.x] * (FAULT == WRONG ? 1.1f : 1.0f);
}
