#pragma once
// The exchange with the least latency: every rank stores its units into all others' regions, and a word is its own flag
// (Lamport, "Concurrent reading and writing", 1977). Zero is "not there yet": words travel complemented, and the one whose
// complement is zero, a NaN in every type, goes as another NaN. The reader puts zeros back.
//
// A block has two slots for each rank, which its exchanges use in turn. A rank fills a slot again two exchanges later: it
// has then read all that this block of each peer sent in between, which the peer sent in a launch after the one that read
// and cleared the slot. So a rank is never more than one exchange ahead of another, and no word is lost or stale.
// Constants: WORLD, THREADS, HELD (units per thread), DTYPE, MAXIMUM, PUSH_AREA, PUSH_SLOT.
#include "fp8/peers.cuh"
#include "values.cuh"

static_assert(THREADS * HELD * 16 <= PUSH_SLOT, "a block's units fit its slot");

DEVICE u8* push_slot(u64 region, u32 epoch, int source, int i) {
  const u64 slot = ((u64)(epoch % 2) * MOST_BLOCKS + blockIdx.x) * WORLD + source;
  return (u8*)(region + PUSH_AREA + slot * PUSH_SLOT + (u64)(i * THREADS + threadIdx.x) * 16);
}
DEVICE u32 to_wire(u32 word) { return word == ~0u ? ~0x7FFF7FFFu : ~word; }

DEVICE void push_unit(const Peers& peers, u32 rank, u32 epoch, int i, uint4 v) {
  const uint4 wire = {to_wire(v.x), to_wire(v.y), to_wire(v.z), to_wire(v.w)};
#pragma unroll
  for (int k = 1; k < WORLD; k++) {  // not all at one rank first
    const u32 peer = rank + k < WORLD ? rank + k : rank + k - WORLD;
    store_system(push_slot(peers.region[peer], epoch, rank, i), wire);
  }
}
// The sum or maximum of that unit over all ranks; `mine` is this one's, and its slot is read for nothing, which costs less
// than not to.
DEVICE uint4 receive_unit(u64 own, u32 rank, u32 epoch, int i, uint4 mine, Patience& patience) {
  uint4 parts[WORLD];
  for (;;) {
    bool there = true;
#pragma unroll
    for (int r = 0; r < WORLD; r++) parts[r] = load_system(push_slot(own, epoch, r, i));
#pragma unroll
    for (int r = 0; r < WORLD; r++) there &= r == rank || (parts[r].x && parts[r].y && parts[r].z && parts[r].w);
    if (there) break;
    patience.poll();
  }
#pragma unroll
  for (int r = 0; r < WORLD; r++) {
    if (r != rank) store_system(push_slot(own, epoch, r, i), make_uint4(0, 0, 0, 0));
    parts[r] = r == rank ? mine : make_uint4(~parts[r].x, ~parts[r].y, ~parts[r].z, ~parts[r].w);
  }
  return reduce_units(parts);
}
