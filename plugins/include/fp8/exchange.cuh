#pragma once
// Data between threads without a trip through memory: a transposed 8x8 matrix in a warp, a store into a peer CTA.
#include "fp8/types.cuh"

// Thread l holds elements (l / 4, 2 (l % 4)) and its right neighbour of an 8x8 matrix of 16-bit values; so does the result
// of its transpose.
DEVICE u32 movmatrix_trans(u32 x) {
  u32 r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(x));
  return r;
}
// `address` is of the cluster's shared window (map_shared_rank).
DEVICE void store_cluster_v4(u32 address, float a, float b, float c, float d) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}
