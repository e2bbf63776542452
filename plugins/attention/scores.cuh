#pragma once
// The scores of a warp's 16 rows with a tile of keys by mma.sync, in the registers where wgmma puts them: a warp can do
// this alone, when it wants the scores of a tile once more. 16 bits: a tile is columns of 128-byte swizzle atoms.
//
// Constants: DTYPE.
#include "fp8/mma.cuh"
#include "softmax.cuh"

// 16 bytes of a row of a tile; columns of atoms are ATOM_BYTES apart.
template <int ATOM_BYTES> DEVICE u32 piece_address(u32 tile, int row, int piece) {
  return tile + piece / 8 * ATOM_BYTES + row * 128 + (piece % 8 ^ row % 8) * 16;
}

// s = rows `first` to `first` + 15 of Q, times K^T. ROW: bytes of a row of either.
template <int ROW, int ATOM_BYTES> DEVICE void scores(float (&s)[TILE_KV / 2], u32 q, int first, u32 k, int lane) {
  float d[TILE_KV / 8][4] = {};
#pragma unroll 1
  for (int i = 0; i < ROW / 16; i += 2) {
    u32 a[4];
    ldmatrix_x4(piece_address<ATOM_BYTES>(q, first + lane % 16, i + lane / 16), a);
#pragma unroll
    for (int n = 0; n < TILE_KV / 16; n++) {
      u32 b[4];
      ldmatrix_x4(piece_address<ATOM_BYTES>(k, 16 * n + lane / 16 * 8 + lane % 8, i + lane / 8 % 2), b);
      mma_m16n8k16<DTYPE>(d[2 * n], a, b[0], b[1]);
      mma_m16n8k16<DTYPE>(d[2 * n + 1], a, b[2], b[3]);
    }
  }
#pragma unroll
  for (int i = 0; i < TILE_KV / 2; i++) s[i] = d[i / 4][i % 4];
}
