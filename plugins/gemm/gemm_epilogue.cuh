#pragma once
// From accumulators to the output: scales, bias, SwiGLU, quantization, and the store.
#include "fp8/convert.cuh"
#include "fp8/matrix.cuh"
#include "fp8/mbarrier.cuh"
#include "fp8/mma.cuh"
#include "fp8/swiglu.cuh"
#include "fp8/sync.cuh"
#include "fp8/tma.cuh"
#include "gemm_shape.cuh"

DEVICE void warpgroup_sync(int warpgroup) {  // immediates: a register as the barrier's number would reserve all 16
  if (warpgroup == 0) named_barrier_sync<1, 128>();
  else named_barrier_sync<2, 128>();
}

// v: rows r and r + 8, columns c and c + 1 of the accumulator -> scaled and biased.
DEVICE void finish(float (&v)[4], const float* scale, const float* bias, int column, const float (&x_scale)[2]) {
  if (X_SCALE == 2) v[0] *= x_scale[0], v[1] *= x_scale[0], v[2] *= x_scale[1], v[3] *= x_scale[1];
  if (SCALED) {
    float2 s = *(const float2*)(scale + column);
    v[0] *= s.x, v[1] *= s.y, v[2] *= s.x, v[3] *= s.y;
  }
  if (BIAS) {
    float2 b = *(const float2*)(bias + column);
    v[0] += b.x, v[1] += b.y, v[2] += b.x, v[3] += b.y;
  }
}

// gate becomes silu(gate) * up; both round to the 16-bit type first, as a linear of its own would.
DEVICE void swiglu(float (&gate)[4], float (&up)[4]) {
  round_pair<OUT == 1>(gate[0], gate[1]), round_pair<OUT == 1>(gate[2], gate[3]);
  round_pair<OUT == 1>(up[0], up[1]), round_pair<OUT == 1>(up[2], up[3]);
#pragma unroll
  for (int i = 0; i < 4; i++) gate[i] = swiglu(gate[i], up[i]);
}

// Columns `column` and the next of one output row, from registers.
DEVICE void store_pair(void* y, int rows, int row, int column, float a, float b) {
  if (row >= rows || column >= OUT_N) return;
  constexpr bool EVEN = OUT_N % 2 == 0;
  size_t at = (size_t)row * OUT_N + column;
  bool both = EVEN || column + 1 < OUT_N;
  if constexpr (QUANT) {
    *(u16*)((u8*)y + at) = e4m3x2(a, b);
  } else if constexpr (OUT == 2) {
    float* p = (float*)y + at;
    if (EVEN) *(float2*)p = make_float2(a, b);
    else {
      p[0] = a;
      if (both) p[1] = b;
    }
  } else {
    u16* p = (u16*)y + at;
    u32 packed = from_float2<OUT == 1>(a, b);
    if (EVEN) *(u32*)p = packed;
    else {
      p[0] = (u16)packed;
      if (both) p[1] = (u16)(packed >> 16);
    }
  }
}

// The swizzle that the TMA store undoes: 16-byte unit `unit` of row `row` in a buffer of CHUNK-byte rows.
DEVICE u32 swizzled(int row, int unit) { return row * CHUNK + ((unit ^ (row / (128 / CHUNK)) % (CHUNK / 16)) << 4); }

// Four accumulators of column group `column`, or (SPLIT) their sums over the cluster.
DEVICE void take(float (&v)[4], const float (&d)[BLOCK_N / 2], int column, u32 partials) {
#pragma unroll
  for (int i = 0; i < 4; i++) v[i] = d[column / 2 + i];
  if (SPLIT == 1) return;
  u32 at = partials + (column / 8) * 2048 + threadIdx.x % 128 * 16;
#pragma unroll
  for (int r = 0; r < SPLIT; r++) {
    float4 part = load_shared_cluster(map_shared_rank(at, r));
    if (r == 0) v[0] = part.x, v[1] = part.y, v[2] = part.z, v[3] = part.w;
    else v[0] += part.x, v[1] += part.y, v[2] += part.z, v[3] += part.w;
  }
}

// ADD: sends for the warpgroup's `chunk`-th chunk of the tile at (row, column), into a buffer that nothing reads any more.
DEVICE void send_for(const Added& added, u8* buffers, int chunk, int row, int column) {
  const u32 bar = added.bars + chunk % BUFFERS * 8;
  mbarrier_arrive_expect_tx(bar, 64 * CHUNK);
  tma_load_2d(shared_address(buffers + chunk % BUFFERS * 64 * CHUNK), added.map, bar, column + chunk % CHUNKS * (CHUNK / OUT_BYTES),
              row + chunk / CHUNKS * 64);
}

// Two sums of a rounded output and of what was added to it, rounded again.
DEVICE u32 sum_pair(float a, float b, u32 with) {
  round_pair<OUT == 1>(a, b);
  return from_float2<OUT == 1>(a + to_float<OUT == 1>((u16)with), b + to_float<OUT == 1>((u16)(with >> 16)));
}

// A chunk's columns from `column` on of 64 rows to shared memory, in the 16-bit type.
DEVICE void stage(u8* buffer, const float (&d)[BLOCK_N / 2], const float* scale, const float* bias, int column, const float (&x_scale)[2],
                  u32 partials) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, pair = lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < CHUNK_N / 8; i += 2) {
    int at = column + i * 8;
    float u[4], v[4];
    take(u, d, at, partials), take(v, d, at + 8, partials);
    finish(u, scale, bias, at + pair, x_scale), finish(v, scale, bias, at + 8 + pair, x_scale);
    const u32 place = shared_address(buffer) + swizzled(warp * 16 + lane % 16, i + lane / 16);
    if constexpr (ADD) {
      u32 with[4];
      ldmatrix_x4(place, with);
      stmatrix_x4(place, sum_pair(u[0], u[1], with[0]), sum_pair(u[2], u[3], with[1]), sum_pair(v[0], v[1], with[2]),
                  sum_pair(v[2], v[3], with[3]));
    } else {
      stmatrix_x4(place, from_float2<OUT == 1>(u[0], u[1]), from_float2<OUT == 1>(u[2], u[3]), from_float2<OUT == 1>(v[0], v[1]),
                  from_float2<OUT == 1>(v[2], v[3]));
    }
  }
}

// 64 rows of one warpgroup, its `m`-th: chunk by chunk, to shared memory and out.
DEVICE void write(int m, const float (&d)[BLOCK_N / 2], const Arguments& args, const TensorMap* map, u8* buffers, const float* scale,
                  const float* bias, int row, int column, const float (&x_scale)[2], float quantum, u32 rank, u32 partials, Added& added) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, warpgroup = threadIdx.x / 128;
  float reciprocal = QUANT ? __frcp_rn(quantum) : 0.f;
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    if (SPLIT > 1 && c % SPLIT != rank) continue;
    int chunk = m * CHUNKS + c;
    u8* buffer = buffers + (BUFFERS ? chunk % BUFFERS : 0) * 64 * CHUNK;
    if constexpr (ADD) {  // the buffer was free, and has been filled
      const int slot = chunk % BUFFERS;
      mbarrier_wait(added.bars + slot * 8, added.phases >> slot & 1);
      added.phases ^= 1 << slot;
    } else if (TMA_STORE && (!PROMOTE || chunk == 0 || chunk >= BUFFERS || SPLIT > 1)) {  // a tile starts with all of them free
      if (threadIdx.x % 128 == 0) {
        if (chunk == 0 || SPLIT > 1 || BUFFERS == 1) bulk_wait_group_read<0>();
        else bulk_wait_group_read<BUFFERS - 1>();  // the buffer's last store has been read
      }
      warpgroup_sync(warpgroup);
    }
    if constexpr (TMA_STORE && !SWIGLU) stage(buffer, d, scale, bias, c * CHUNK_N, x_scale, partials);
    else
#pragma unroll
    for (int i = 0; i < CHUNK_N / 8; i += 2) {
      int at = c * CHUNK_N + i * 8, pair = lane % 4 * 2;
      float u[4], v[4];
      take(u, d, at, partials), take(v, d, at + 8, partials);
      finish(u, scale, bias, at + pair, x_scale), finish(v, scale, bias, at + 8 + pair, x_scale);
      int r = warp * 16 + lane / 4;
      if constexpr (SWIGLU) {
        swiglu(u, v);
        int out = (at / 2) + pair;
        if constexpr (QUANT)
          for (int e = 0; e < 4; e++) u[e] = quotient(u[e], quantum, reciprocal);
        if constexpr (!TMA_STORE) {
          store_pair(args.y, args.rows, row + r, column / 2 + out, u[0], u[1]);
          store_pair(args.y, args.rows, row + r + 8, column / 2 + out, u[2], u[3]);
        } else if constexpr (QUANT) {
          int byte = i * 4 + pair;
          *(u16*)(buffer + swizzled(r, byte / 16) + byte % 16) = e4m3x2(u[0], u[1]);
          *(u16*)(buffer + swizzled(r + 8, byte / 16) + byte % 16) = e4m3x2(u[2], u[3]);
        } else {
          *(u32*)(buffer + swizzled(r, i / 2) + pair * 2) = from_float2<OUT == 1>(u[0], u[1]);
          *(u32*)(buffer + swizzled(r + 8, i / 2) + pair * 2) = from_float2<OUT == 1>(u[2], u[3]);
        }
      } else {
        store_pair(args.y, args.rows, row + r, column + at + pair, u[0], u[1]);
        store_pair(args.y, args.rows, row + r + 8, column + at + pair, u[2], u[3]);
        store_pair(args.y, args.rows, row + r, column + at + 8 + pair, v[0], v[1]);
        store_pair(args.y, args.rows, row + r + 8, column + at + 8 + pair, v[2], v[3]);
      }
    }
    if (TMA_STORE) {
      fence_proxy_async();
      warpgroup_sync(warpgroup);
      if (threadIdx.x % 128 == 0) {
        tma_store_2d(map, shared_address(buffer), column / (SWIGLU ? 2 : 1) + c * (CHUNK / OUT_BYTES), row);
        bulk_commit_group();
        if (ADD && chunk + BUFFERS < MMAS * CHUNKS) {
          bulk_wait_group_read<0>();
          send_for(added, buffers, chunk + BUFFERS, row - m * 64, column);
        }
      }
    }
  }
}
