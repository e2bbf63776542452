#pragma once
// stmatrix: accumulator fragments to shared memory, 16 bytes of a row per lane address.
#include "fp8/types.cuh"

// Four 8x8 matrices of 16-bit values; lane l holds the address of row l % 8 of matrix l / 8.
DEVICE void stmatrix_x4(u32 address, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
// Reads another CTA's shared memory; `address` comes from map_shared_rank.
DEVICE float4 load_shared_cluster(u32 address) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address) : "memory");
  return v;
}
