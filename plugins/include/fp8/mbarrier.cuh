#pragma once
// mbarrier: the parity of a phase flips each time the expected arrivals and bytes are complete.
#include "fp8/types.cuh"

DEVICE void mbarrier_init(u32 bar, u32 arrivals) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals)); }
// Makes initialised barriers visible to the async proxy and the cluster; a __syncthreads or cluster barrier must follow.
DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void mbarrier_arrive(u32 bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory"); }
DEVICE void mbarrier_arrive_expect_tx(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
// Arrives at the same barrier of CTA `rank` of the cluster. Orders this thread's CTA only: enough to hand back a buffer that
// was read, not to publish writes (cluster scope would cost a memory barrier each time).
DEVICE void mbarrier_arrive_cluster(u32 bar, u32 rank) {
  asm volatile("{.reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [remote];}" ::"r"(bar), "r"(rank) : "memory");
}
DEVICE void mbarrier_wait(u32 bar, u32 parity) {
  asm volatile(
      "{.reg .pred p; WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra DONE; bra WAIT; DONE: }" ::"r"(bar), "r"(parity)
      : "memory");
}
