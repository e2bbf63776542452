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
// `address` and `bar` are of the same CTA in the cluster's shared window (map_shared_rank): 16 bytes, of which the barrier
// counts the arrival.
DEVICE void store_cluster_v4(u32 address, u32 bar, float a, float b, float c, float d) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, %4, %5}, [%1];" ::"r"(address), "r"(bar), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}
