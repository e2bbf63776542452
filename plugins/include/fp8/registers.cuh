#pragma once
// Special registers: where a thread is, and when.
#include "fp8/types.cuh"

DEVICE u32 multiprocessor() {
  u32 r;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(r));
  return r;
}
DEVICE u64 global_nanoseconds() {
  u64 r;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(r));
  return r;
}
