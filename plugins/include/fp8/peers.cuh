#pragma once
// Memory of the other GPUs of a host, reached over NVLink: a region of one layout on every rank; stores, loads and flags
// that all GPUs see; waits that end.
// Constants, of plugins/all_reduce/region.py: WORLD, MOST_BLOCKS, EPOCHS, FLAGS, PATIENCE (nanoseconds).
#include "fp8/registers.cuh"
#include "fp8/types.cuh"

struct Peers { u64 region[WORLD]; };  // addresses of all ranks' regions, this one's included

// Kinds of exchange, each with slots, flags and counts of its own.
enum { PUSH, ONE_PHASE, TWO_PHASES, FAMILIES };

// Seen by all GPUs of the host, in no order but that of a release and the acquire that sees it.
DEVICE void store_system(void* p, uint4 v) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
DEVICE void store_system(void* p, uint2 v) {
  asm volatile("st.relaxed.sys.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(v.x), "r"(v.y) : "memory");
}
DEVICE uint4 load_system(const void* p) {
  uint4 v;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
DEVICE void store_system(void* p, u32 v) { asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }
DEVICE u32 load_word_system(const void* p) {
  u32 v;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
DEVICE void store_release_system(void* p, u32 v) { asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }
// Seen by this GPU.
DEVICE u32 load_acquire_gpu(const void* p) {
  u32 v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
DEVICE u32 load_acquire_system(const void* p) {
  u32 v;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
// A word that is its own flag: zero is "not there yet", so words travel complemented, and the one whose complement is zero, a
// NaN in every type, goes as another NaN.
DEVICE u32 to_wire(u32 word) { return word == ~0u ? ~0x7FFF7FFFu : ~word; }
DEVICE void trap() { asm volatile("trap;"); }

// A wait for a peer that ends: a rank whose peer does not come fails, with an error that every later call reports, and
// does not go on with what is not there.
struct Patience {
  u64 start = 0;
  u32 polls = 0;
  DEVICE_MEMBER void poll() {
    if (++polls % 4096) return;
    const u64 now = global_nanoseconds();
    if (!start) start = now;
    else if (now - start > PATIENCE) trap();
  }
};

// Each block counts its exchanges of a family through all launches, so that a launch with any number of blocks, replayed
// from a CUDA graph, goes on where the last one of that block ended; all ranks launch the same.
DEVICE u32* epoch_of_block(u64 own, int family) { return (u32*)(own + EPOCHS) + family * MOST_BLOCKS + blockIdx.x; }
// `source` has sent so many, in this block, at this step of the family's exchanges.
DEVICE void* flag_of_block(u64 region, int kind, int source) {
  return (u32*)(region + FLAGS) + (kind * MOST_BLOCKS + blockIdx.x) * WORLD + source;
}
