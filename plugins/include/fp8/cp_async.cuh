#pragma once
// cp.async: small copies from global to shared memory that no thread waits for until it asks.
#include "fp8/types.cuh"

DEVICE void cp_async_4(u32 dst, const void* src) { asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(dst), "l"(src) : "memory"); }
// Waits for all copies of the calling thread; other threads need a barrier too.
DEVICE void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }
