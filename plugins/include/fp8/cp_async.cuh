#pragma once
// cp.async: copies from global to shared memory, or into the L2 cache, that no thread waits for until it asks.
#include "fp8/types.cuh"

DEVICE void cp_async_4(u32 dst, const void* src) { asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(dst), "l"(src) : "memory"); }
// Waits for all copies of the calling thread; other threads need a barrier too.
DEVICE void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// Into the L2 cache, where all writes meet: harmless, whatever is written there afterwards. `from`, `bytes`: multiples of 16.
DEVICE void prefetch_l2(const void* from, u32 bytes) { asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory"); }
DEVICE void prefetch_l2_line(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }
