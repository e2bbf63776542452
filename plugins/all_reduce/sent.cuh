#pragma once
// Rows of few tokens that a linear layer sends to all ranks as it has them, to this one too, and the kernel that adds them up
// at once, without waiting for the linear's end: words are their own flags, as in push.cuh, and the reader puts zeros back.
//
// An engine's exchanges of this kind take three areas in turn, so that none is filled again before another exchange has come
// in between (region.py, sent_area): whoever sends in that one has read all of the one before.
//
// What the reader needs beside the rows was written by kernels that ended before the linear began, and so is in the L2 cache: a
// word says that it has begun. The linear writes nothing but what it sends, and all of it is read: nobody waits for its end.
// Constants: WORLD, SENT_BYTES (of a row of one rank), SENT_BEGUN (where in them that word is).
#include "fp8/peers.cuh"

DEVICE u8* sent_row(u64 region, u64 area, int row, int source) {
  return (u8*)(region + area + (u64)(row * WORLD + source) * SENT_BYTES);
}
// 16-bit values `n` to `n` + 4 of a row, to all ranks, this one last.
DEVICE void send(const Peers& peers, u32 me, u64 area, int row, int n, uint2 v) {
#pragma unroll
  for (int k = 1; k <= WORLD; k++) {
    u8* const to = sent_row(peers.region[me + k < WORLD ? me + k : me + k - WORLD], area, row, me) + 2 * n;
    store_system(to, make_uint2(to_wire(v.x), to_wire(v.y)));
  }
}
DEVICE u32* begun_of(u64 own, u64 area, int row, u32 me) { return (u32*)(sent_row(own, area, row, me) + SENT_BEGUN); }
