#pragma once
// What decode.cu derives from its constants.
#include "rotary.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int PAGE = 64;                       // tokens
constexpr int TILE = FP8_CACHE ? 64 : 32;      // tokens: 8 KB of keys or values for a head of 128
constexpr int END = 16;                        // tokens: where a context ends, keys come in boxes of so many
constexpr int BYTES = CACHE_BYTES;
constexpr int SLOT_BYTES = TILE * HEAD_DIM * BYTES;
constexpr int PARTS = (GROUP + 15) / 16;       // units for one KV head
constexpr int ROWS = (GROUP + PARTS - 1) / PARTS;  // heads in a unit, at most
constexpr int UNITS = KV_HEADS * PARTS;        // of a sequence
constexpr int HEADS = KV_HEADS * GROUP;
// Tokens, and dimensions of the output, are the 16 rows of a product; heads its 8 columns.
constexpr int COLUMN_TILES = (ROWS + 7) / 8, STEPS = HEAD_DIM / 16, S_TILES = TILE / 16, O_TILES = HEAD_DIM / 16;
constexpr int PAIR = ROWS > 1 ? 2 : 1;         // heads of a thread in a tile of columns
constexpr int OPERAND = FP8_CACHE ? 1 : DTYPE; // of products: e4m3 codes are multiplied as f16, exactly
constexpr int SPAN = HEAD_DIM * BYTES < 128 ? HEAD_DIM * BYTES : 128;  // bytes of a swizzled row of keys
// Warps are merged COLUMNS at a time: 512 values of each, so that the rings can have the shared memory; 256 in small blocks.
constexpr int WIDEST = WARPS < 4 ? (ROWS <= 2 ? 128 : ROWS <= 4 ? 64 : 32) : ROWS <= 4 ? 128 : ROWS <= 8 ? 64 : 32;
constexpr int COLUMNS = WIDEST < HEAD_DIM ? WIDEST : HEAD_DIM;
constexpr bool AHEAD = ROWS <= 8;              // registers allow it: a unit's row is sent for before the unit before is done
constexpr int PITCH = COLUMNS + 4;             // floats; the padding spreads rows over the banks
// What a unit needs of the kernel before is asked for in front of its first tiles, not behind them, where it comes later by
// as much as all blocks' first tiles take. Not where the linear before is long and its blocks end far apart.
constexpr bool WAIT_FIRST = WARPS >= 8 && GROUP > 1;
static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "head_dim");
