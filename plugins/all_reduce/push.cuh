#pragma once
// The exchange with the least latency: every rank stores its units into all others' regions, and a word is its own flag
// (Lamport, "Concurrent reading and writing", 1977): peers.cuh, to_wire. The reader puts zeros back.
//
// A block has two slots for each rank, which its exchanges use in turn. A rank fills a slot again two exchanges later: it
// has then read all that this block of each peer sent in between, which the peer sent in a launch after the one that read
// and cleared the slot. So a rank is never more than one exchange ahead of another, and no word is lost or stale.
// Constants: WORLD, THREADS, HELD (units per thread), DTYPE, MAXIMUM, FP8, PUSH_AREA, PUSH_SLOT (bytes of values),
// PUSH_SCALES (bytes of scales behind them).
#include "fp8/peers.cuh"
#include "wire.cuh"

static_assert(THREADS * HELD * 16 <= PUSH_SLOT && THREADS * HELD / 8 * 4 <= PUSH_SCALES, "a block's units fit its slot");
static_assert(!FP8 || WORLD == 2, "a sum among more ranks is rounded before it is anybody's");

DEVICE u8* push_slot(u64 region, u32 epoch, int source) {
  const u64 slot = ((u64)(epoch % 2) * MOST_BLOCKS + blockIdx.x) * WORLD + source;
  return (u8*)(region + PUSH_AREA + slot * (PUSH_SLOT + PUSH_SCALES));
}
DEVICE int push_unit(int i) { return i * THREADS + threadIdx.x; }
DEVICE u8* data_of(u8* slot, int i) { return slot + push_unit(i) * 16; }
DEVICE u8* scale_of(u8* slot, int i) { return slot + PUSH_SLOT + push_unit(i) / 8 * 4; }  // of 128 values, 8 units

DEVICE void push(const Peers& peers, u32 rank, u32 epoch, int i, const Wire& w) {
  const uint4 data = {to_wire(w.data.x), to_wire(w.data.y), to_wire(w.data.z), to_wire(w.data.w)};
#pragma unroll
  for (int k = 1; k < WORLD; k++) {  // not all at one rank first
    u8* const slot = push_slot(peers.region[rank + k < WORLD ? rank + k : rank + k - WORLD], epoch, rank);
    store_system(data_of(slot, i), data);
    if (FP8 && push_unit(i) % 8 == 0) store_system(scale_of(slot, i), ~__float_as_uint(w.scale));
  }
}
// That unit of one other rank.
DEVICE uint4 take(u64 own, u32 epoch, int source, int i, Patience& patience) {
  u8* const from = data_of(push_slot(own, epoch, source), i);
  for (;;) {
    const uint4 v = load_system(from);
    if (v.x && v.y && v.z && v.w) {
      store_system(from, make_uint4(0, 0, 0, 0));
      return make_uint4(~v.x, ~v.y, ~v.z, ~v.w);
    }
    patience.poll();
  }
}
// The sum or maximum of that unit over all ranks. `mine` is this one's, and its slot is read for nothing, which costs less
// than not to. In FP8 all lanes of a warp come here, as eight of them read one scale, which one of them clears; those whose
// unit is not `wanted` wait for nothing.
DEVICE void receive(u64 own, u32 rank, u32 epoch, int i, const Wire& mine, bool wanted, Patience& patience,
                    float (&total)[VALUES]) {
  Wire parts[WORLD];
  u32 scales[WORLD];
  for (;;) {
    bool there = true;
#pragma unroll
    for (int r = 0; r < WORLD; r++) {
      parts[r].data = load_system(data_of(push_slot(own, epoch, r), i));
      scales[r] = FP8 ? load_word_system(scale_of(push_slot(own, epoch, r), i)) : 1;
    }
#pragma unroll
    for (int r = 0; r < WORLD; r++) {
      const uint4 v = parts[r].data;
      there &= r == rank || (v.x && v.y && v.z && v.w && scales[r]);
    }
    if (FP8) there = __all_sync(~0u, there || !wanted);
    if (there) break;
    patience.poll();
  }
#pragma unroll
  for (int r = 0; r < WORLD; r++) {
    const uint4 v = parts[r].data;
    if (r != rank && wanted) store_system(data_of(push_slot(own, epoch, r), i), make_uint4(0, 0, 0, 0));
    if (FP8 && r != rank && wanted && push_unit(i) % 8 == 0) store_system(scale_of(push_slot(own, epoch, r), i), 0u);
    parts[r].data = r == rank ? mine.data : make_uint4(~v.x, ~v.y, ~v.z, ~v.w);
    parts[r].scale = r == rank ? mine.scale : __uint_as_float(~scales[r]);
  }
  decode(parts[0], total);
#pragma unroll
  for (int r = 1; r < WORLD; r++) {
    float other[VALUES];
    decode(parts[r], other);
#pragma unroll
    for (int j = 0; j < VALUES; j++) total[j] = combine(total[j], other[j]);
  }
}
