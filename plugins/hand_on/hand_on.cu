// Bytes from one GPU to the next: `send` stores them into the other's memory over NVLink, where a word is its own flag
// (peers.cuh, to_wire), and `receive` there takes them out and puts zeros back. Nobody waits for the other's kernel.
//
// A block has `depth` places, which its messages take in turn; whoever sends sees to it that the message that was in a
// place before has been received. Both sides launch a message with the same grid, a thread for 16 bytes, and count the
// messages of each block themselves.
// Constants: THREADS, BLOCKS (places of a message, at most), and those of peers.cuh, of which PATIENCE alone counts.
#include "fp8/peers.cuh"
#include "fp8/sync.cuh"

DEVICE u64 offset() { return ((u64)blockIdx.x * THREADS + threadIdx.x) * 16; }
DEVICE u8* place(u64 area, u32 turn) { return (u8*)(area + (u64)turn * BLOCKS * THREADS * 16 + offset()); }
DEVICE void count(u32* counter, u32 turn, u32 depth) {
  __syncthreads();  // all have read it
  if (threadIdx.x == 0) *counter = turn + 1 == depth ? 0 : turn + 1;
}
// A message of `bytes`, a multiple of 4, may end within a thread's words.
DEVICE bool whole(u64 bytes) { return offset() + 16 <= bytes; }

extern "C" __global__ void __launch_bounds__(THREADS)
send(const u8* x, u64 area, u32* counters, u32 depth, u64 bytes) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const u32 turn = counters[blockIdx.x];
  uint4 v = {0, 0, 0, 0};
  if (whole(bytes)) v = *(const uint4*)(x + offset());
  else
    for (int i = 0; i < 4; i++)
      if (offset() + 4 * i < bytes) (&v.x)[i] = *(const u32*)(x + offset() + 4 * i);
  if (offset() < bytes) store_system(place(area, turn), make_uint4(to_wire(v.x), to_wire(v.y), to_wire(v.z), to_wire(v.w)));
  count(counters + blockIdx.x, turn, depth);
}

extern "C" __global__ void __launch_bounds__(THREADS)
receive(u8* y, u64 area, u32* counters, u32 depth, u64 bytes) {
  griddepcontrol_launch_dependents();
  Patience patience;
  griddepcontrol_wait();
  const u32 turn = counters[blockIdx.x];
  if (offset() < bytes) {
    u8* const from = place(area, turn);
    uint4 v = load_system(from);
    while (!(v.x && v.y && v.z && v.w)) {
      patience.poll();
      v = load_system(from);
    }
    store_system(from, make_uint4(0, 0, 0, 0));
    v = make_uint4(~v.x, ~v.y, ~v.z, ~v.w);
    if (whole(bytes)) *(uint4*)(y + offset()) = v;
    else
      for (int i = 0; i < 4; i++)
        if (offset() + 4 * i < bytes) *(u32*)(y + offset() + 4 * i) = (&v.x)[i];
  }
  count(counters + blockIdx.x, turn, depth);
}
