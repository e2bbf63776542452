#pragma once
// Which tile a CTA takes next, and what it loads of a stage.
#include "fp8/tma.cuh"
#include "gemm_shape.cuh"

// Tile `unit` of the raster: groups of GROUP row blocks, row blocks fastest, keep a wave's operands in L2.
struct Tile {
  int m, n;
};
DEVICE Tile tile_of(int unit, int m_units, u32 rank) {
  constexpr int GROUP_UNITS = GROUP / CLUSTER_M, N_UNITS = (N_BLOCKS + CLUSTER_N - 1) / CLUSTER_N;
  int group = unit / (GROUP_UNITS * N_UNITS), first = group * GROUP_UNITS;
  int height = min(GROUP_UNITS, m_units - first), rest = unit - group * GROUP_UNITS * N_UNITS;
  int m = first + rest % height, n = rest / height;
  if (CLUSTER_M > 1) m = m * CLUSTER_M + rank;
  if (CLUSTER_N > 1) n = n * CLUSTER_N + rank;
  return {m * BLOCK_M, n * BLOCK_N};
}

// Loads this CTA's part of an operand's stage: all of it, or its share for the whole cluster.
template <int ROWS, bool SHARED> DEVICE void load(u32 dst, const TensorMap* map, u32 bar, int k, int row, u32 rank) {
  constexpr int PART = ROWS / CLUSTER;
  if (SHARED) tma_load_2d_multicast(dst + rank * (PART * ROW), map, bar, k, row + rank * PART, (1 << CLUSTER) - 1);
  else tma_load_2d(dst, map, bar, k, row);
}
