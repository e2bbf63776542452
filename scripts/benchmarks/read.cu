// Reads, and nothing else: what the memory gives where nothing is written. Each block has `pieces` of its own, one behind
// the other, of ROWS rows of 128 bytes; STAGES of them are on their way.
//
// TB/s of 4 GB on an H200 in pieces of 16 KB, 2 blocks of 4 on a multiprocessor 4.58, 1 of 12 4.57; of 1 GB 4.44; in pieces
// of 8 KB 4.54; by vector loads, 8 of each of 2048 threads on their way, 4.45. A copy, which writes too, has 4.2 to 4.3.
//
// Constants: ROWS, STAGES.
#include "fp8/mbarrier.cuh"
#include "fp8/tma.cuh"

constexpr int PIECE = ROWS * 128;

extern "C" __global__ void __launch_bounds__(32) read(const __grid_constant__ TensorMap map, int pieces) {
  extern __shared__ __align__(1024) u8 ring[];
  __shared__ u64 full[STAGES];
  if (threadIdx.x) return;
  for (int i = 0; i < STAGES; i++) mbarrier_init(shared_address(&full[i]), 1);
  fence_mbarrier_init();
  const int first = blockIdx.x * pieces;
  auto send = [&](int i) {
    const u32 bar = shared_address(&full[i % STAGES]);
    mbarrier_arrive_expect_tx(bar, PIECE);
    tma_load_2d(shared_address(ring) + i % STAGES * PIECE, &map, bar, 0, (first + i) * ROWS);
  };
  for (int i = 0; i < min(STAGES, pieces); i++) send(i);
  for (int i = 0; i < pieces; i++) {
    mbarrier_wait(shared_address(&full[i % STAGES]), i / STAGES % 2);
    if (i + STAGES < pieces) send(i + STAGES);
  }
}
