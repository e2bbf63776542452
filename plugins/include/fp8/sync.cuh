#pragma once
// wgmma ordering, programmatic dependent launch, register hand-over, named barriers, clusters.
#include "fp8/types.cuh"

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> DEVICE void wgmma_wait_group() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// Shared-memory operand, 128-byte swizzle: rows of 128 bytes, atoms of 8 rows; the tile base is 1024-byte aligned.
// Advance along K inside the atom by adding (bytes >> 4) to the descriptor.
DEVICE u64 wgmma_descriptor(u32 address) {
  return (u64)((address & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

// Waits for the full completion of the kernels before; nothing they wrote may be read, and nothing written, earlier.
DEVICE void griddepcontrol_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// Lets the next kernel start its prologue; has no memory semantics.
DEVICE void griddepcontrol_launch_dependents() { asm volatile("griddepcontrol.launch_dependents;"); }

template <int N> DEVICE void setmaxnreg_inc() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> DEVICE void setmaxnreg_dec() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }

template <int Id, int Threads> DEVICE void named_barrier_sync() { asm volatile("bar.sync %0, %1;" ::"n"(Id), "n"(Threads) : "memory"); }
template <int Id, int Threads> DEVICE void named_barrier_arrive() { asm volatile("bar.arrive %0, %1;" ::"n"(Id), "n"(Threads) : "memory"); }
// The same with a number that is not known when the kernel is compiled.
DEVICE void barrier_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEVICE void barrier_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// One lane of a converged warp, always the same. ptxas knows that one thread runs what follows: what TMA takes stays in uniform
// registers, where behind `threadIdx.x == 0` each copy stands in a loop over the lanes that might run it.
DEVICE bool elect_one() {
  u32 elected;
  asm volatile("{.reg .pred p; elect.sync _|p, 0xFFFFFFFF; selp.u32 %0, 1, 0, p;}" : "=r"(elected));
  return elected;
}

DEVICE u32 cluster_rank() { u32 r; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return r; }
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DEVICE u32 map_shared_rank(u32 address, u32 rank) {
  u32 r;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(rank));
  return r;
}

// Pins a value here: what reads it afterwards is not moved before the waits and products that stand in front.
DEVICE void pin(float& x) { asm volatile("" : "+f"(x)); }
DEVICE void pin(int& x) { asm volatile("" : "+r"(x)); }
DEVICE void pin(u64& x) { asm volatile("" : "+l"(x)); }
// A value of shared memory, read here and not earlier, so that ptxas cannot move what needs it up.
DEVICE float load_late(const float& shared) {
  float x;
  asm volatile("ld.volatile.shared.f32 %0, [%1];" : "=f"(x) : "r"(shared_address(&shared)) : "memory");
  return x;
}
