#pragma once
// cp.async and prefetch: copies into the L2 cache, for which no thread waits.
#include "fp8/types.cuh"

// Into the L2 cache, where all writes meet: harmless, whatever is written there afterwards. `from`, `bytes`: multiples of 16.
DEVICE void prefetch_l2(const void* from, u32 bytes) { asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory"); }
DEVICE void prefetch_l2_line(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }
