#pragma once
// What gemm.cu derives from its constants.
//
// Constants: GEMM_N, GEMM_K; OPERAND (0 e4m3, 1 bf16, 2 f16); OUT (0 bf16, 1 f16, 2 f32: also what SWIGLU rounds gate and up
// to); SWIGLU; QUANT (output e4m3); X_SCALE (0 none, 1 scalar, 2 per token, 3 blockwise), W_SCALE (0 none, 1 per column,
// 2 blockwise), BIAS; PROMOTE; TMA_STORE; the tactic; SCALE_VECTOR (k blocks whose scales come at once), SCALES_BY_TMA;
// BUFFERS (a warpgroup's, of 64 rows x CHUNK). With ADD the output is the sum with what `added` maps.
#include "fp8/types.cuh"
#ifndef ADD
#define ADD 0
#endif

constexpr int WARPGROUPS = BLOCK_M == 64 && !PINGPONG ? 1 : 2;
constexpr int TILE_ROWS = PINGPONG ? BLOCK_M : BLOCK_M / WARPGROUPS;  // of one warpgroup
constexpr int MMAS = TILE_ROWS / 64;
constexpr int CLUSTER = CLUSTER_M * CLUSTER_N * SPLIT;
constexpr int ROW = 128;  // bytes of K in a stage: one swizzle atom, four wgmma
constexpr int ROW_K = OPERAND == 0 ? 128 : 64;
constexpr int K_BLOCKS = (GEMM_K + ROW_K - 1) / ROW_K;
constexpr int X_BYTES = BLOCK_M * ROW, STAGE_BYTES = X_BYTES + BLOCK_N * ROW;
constexpr int N_BLOCKS = (GEMM_N + BLOCK_N - 1) / BLOCK_N;
constexpr int OUT_N = SWIGLU ? GEMM_N / 2 : GEMM_N;
constexpr int OUT_BYTES = QUANT ? 1 : OUT == 2 ? 4 : 2;
constexpr int TILE_BYTES = BLOCK_N / (SWIGLU ? 2 : 1) * OUT_BYTES;  // of one output row
constexpr int CHUNK = TILE_BYTES % 128 == 0 ? 128 : TILE_BYTES % 64 == 0 ? 64 : 32;
constexpr int CHUNKS = TILE_BYTES / CHUNK;
constexpr int CHUNK_N = BLOCK_N / CHUNKS;                // accumulator columns of a chunk
constexpr bool SCALED = W_SCALE == 1 || X_SCALE == 1, BLOCKWISE = X_SCALE == 3;
// BLOCKWISE: columns that share a scale: a group of W_GROUP rows of w, or what is within one wherever the tile lies.
constexpr int SHARED_N = W_GROUP == 8 ? 8 : BLOCK_N % 128 == 0 ? 128 : BLOCK_N % 64 == 0 ? 64 : BLOCK_N % 32 == 0 ? 32 : 16;
constexpr int COLUMNS = BLOCKWISE && W_GROUP > 8 ? BLOCK_N / SHARED_N : 0;  // scales of them that registers hold
// A ring of scales: a slot holds SCALE_VECTOR k blocks, side by side, of the tile's rows, then of its columns.
constexpr int SLOT_ROWS = SCALES_BY_TMA ? 8 : 4;  // it is a multiple of so many; TMA writes to multiples of 128 bytes
constexpr int SLOT = (BLOCK_M + BLOCK_N / SHARED_N + SLOT_ROWS - 1) / SLOT_ROWS * SLOT_ROWS * SCALE_VECTOR;
constexpr int SCALE_BYTES = (BLOCK_M + COLUMNS) * SCALE_VECTOR * 4;  // of a slot, that come by TMA
constexpr int SLOTS = BLOCKWISE ? (STAGES + 2 * SCALE_VECTOR - 1) / SCALE_VECTOR : 0;
constexpr int AHEAD = STAGES < 3 ? STAGES : 3;            // stages of weights that are asked for before x, where no tile follows
constexpr int CONSUMERS = PINGPONG ? 1 : WARPGROUPS;     // warpgroups that read a stage
constexpr int VECTOR = (BLOCK_N + 127) / 128;            // scales that a thread carries to shared memory
static_assert(TILE_ROWS % 64 == 0 && BLOCK_N % 16 == 0 && TILE_BYTES % 32 == 0);
static_assert(CLUSTER == CLUSTER_M || CLUSTER == CLUSTER_N || CLUSTER == SPLIT, "a cluster has one purpose");
static_assert(SPLIT == 1 || (!PINGPONG && BLOCK_M * BLOCK_N * 4 <= STAGES * STAGE_BYTES && SPLIT <= K_BLOCKS));
static_assert(!PROMOTE || (OPERAND == 0 && !PINGPONG && (MMAS == 1 || SETS == 1)));
static_assert(!SCALES_BY_TMA || (COLUMNS && SCALE_VECTOR == 4 && SPLIT == 1), "TMA copies multiples of 16 bytes");
static_assert(!ADD || (PINGPONG && TMA_STORE && !SWIGLU && !QUANT));
static_assert(SETS == 1 || (SETS == 2 && PROMOTE && K_BLOCKS % (2 * SPLIT) == 0));
// SETS 2: k blocks in the body of the loop, and those before it.
constexpr int UNROLLED = SETS == 1 ? 1 : K_BLOCKS / SPLIT < 16 ? K_BLOCKS / SPLIT : 16, REST = K_BLOCKS / SPLIT % UNROLLED;
static_assert(!BLOCKWISE || (PROMOTE && !SWIGLU && W_SCALE == 2 && GEMM_K % 128 == 0 && GEMM_N % 8 == 0));

struct Arguments {
  const float *x_scale, *w_scale, *bias, *out_scale;
  void* y;
  int rows;
};

// ADD: how a warpgroup's buffers get what is to be added: chunk by chunk, to where the sums leave from.
struct Added {
  const TensorMap* map;
  u32 bars;    // a barrier for each buffer
  u32 phases;  // a bit for each
};
