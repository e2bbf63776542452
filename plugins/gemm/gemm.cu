// y[M, N] = x[M, K] w[N, K]^T for many tokens: TMA and wgmma, persistent, warp-specialised.
//
// One producer warpgroup (one thread issues TMA) fills a ring of STAGES stages of BLOCK_M x 128 bytes of x and
// BLOCK_N x 128 bytes of w; one or two consumer warpgroups multiply. Cooperative: they share a tile's rows.
// PINGPONG: they take turns in whole tiles, so that the epilogue of one runs under the products of the other.
// A cluster either shares what all its CTAs load (CLUSTER_M row blocks share w, or CLUSTER_N column blocks share x; each
// CTA loads one part and multicasts it), or splits K (SPLIT CTAs per tile; partial sums meet in distributed shared
// memory and are added in the order of K, so the result does not depend on timing; then a CTA takes one tile only).
// PROMOTE: the tensor cores keep some 14 bits of an e4m3 sum, so each stage's products (128 of K) are added in float32 to a
// second set of accumulators; the other warpgroup multiplies meanwhile, and (of 64 rows) the next tile's first stage does under
// the epilogue. Blockwise scales (of 128 of K: per row of x, per 128 or 8 rows of w) cannot wait for the epilogue: they scale
// the products on this way. They come to shared memory with the stage: a warp of the producer's copies them, or
// (SCALES_BY_TMA) four k blocks' at once by TMA. SETS 2: a warpgroup's products of one stage are added while those of the next,
// in accumulators of their own, are under way, too.
// The epilogue goes chunk by chunk (64 rows x CHUNK bytes) through swizzled shared buffers to a TMA store; where rows
// are not multiples of 16 bytes, or float32, it stores from registers. ADD: TMA first fills a buffer with what is to be added
// (of a tile's first chunks before its products), and each thread adds where it then writes. Rows past M that a tile covers
// are written too (TMA knows the buffer's rows only); nothing reads them.
//
// Tries under the power limit of an H200 (SM clock 1.2 to 1.3 GHz), M = 8192, clocks of which the tensor cores are busy:
//                                                         12288 x 4096   4096 x 14336   57344 x 8192
//   cuBLASLt, scalar scales; scales by rows and columns     88.6  97.0     93.6  95.2     93.7  99.5
//   128 x 128 in turn, rasters of 2048 rows                     96.6           95.1           89.9
//   1024 rows (512: 96.2, 95.3, 98.8)                           96.7           95.4           97.7
//   + a cluster of two that shares w                            96.8           95.5           99.0 (2048 rows)
//   128 x 192 in turn, a cluster of two that shares w           95.5           92.6           99.3
//   256 x 128 (128 x 256: 86.5, 93.5, 94.3)                     86.1           93.2           94.1
//   + the second warpgroup a stage behind (two: the same)       86.1           92.9           94.1
//   + where tiles meet, a warpgroup's first 64 rows two
//     stages ahead: half an epilogue under products             89.7           93.9           96.0
//   256 x 192, the first 64 rows one stage ahead                88.2           82.1           95.1
// Without its loads 128 x 128 in turn is 97.0% busy, 256 x 128 85.6%: the epilogue's writes are what the latter lacks. L2
// hints (x evicted last, w and y first) gain nothing. What is missing to 100% is the last wave, begin and end.
//
// Tries of the blockwise mode on an H200, TFLOP/s at 2048 x 12288 x 4096 in bursts of 15 ms, 128 x 192 unless said otherwise
// (one instruction an element; without these additions 1563 to 1768):
//   scales per 128 rows of w in registers, fetched while wgmma is under way                1366   with the power limit 1155
//   + one store buffer, so that the ring has five stages                                   1373   1165
//   the next scales' addresses computed between a stage's wgmmas (without: 1343)           1199    997
//   + scales fetched before wgmma starts                                                   1181
//   the next stage awaited and its scales fetched before these products are added          1230   1056
//   the columns in two parts, of which one is added while the other multiplies             1247   1034
//   128 x 256 in four such parts, x in registers                                           1218   1025
//   three warpgroups, 192 x 128                                                            1222
//   a cluster of two that shares w (alone 1343)                                            1230   1040
// Since then, two sizes under the power limit, 20 ms each in turn with 25 others      2048 x 12288 x 4096   4096 x 7168 x 16384
//   cuBLASLt, per-tensor; DeepGEMM's kernel, 256 x 128                                     1198  1187      1287  1216
//   as above: 128 x 192; 128 x 128                                                         1096  1063      1106  1011
//   descriptors' low words, stage and scales counted on, not computed anew where products
//     wait for them (per k block 160 instructions, not 173)                                1191  1145      1185  1184
//   + warpgroups take turns by named barriers (+ the turn passed on when one, two or
//     three of four wgmmas are through: 3 to 9% slower)                                    1149            1117
//   + store buffers for a whole tile, one stage less                                       1172  1106      1142  1112
//   + scales fetched right before wgmma, as DeepGEMM does                                   964  1005       941  1030
//   256 x 128, products of 64 rows after those of the other 64                             1051            1187
//     + turns, buffers for a whole tile, rasters of 1024 rows                              1131            1190
//     + a cluster of two that shares x, buffers for a whole tile                           1104            1147
// Then two sets of products for 128 columns (SETS), in another run, sustained, TFLOP/s and SM clock in MHz:
//                                            2048 x 12288 x 4096   4096 x 4096 x 4096   4096 x 7168 x 16384
//   128 x 192; 128 x 128, one set                1193 1327  1089 1289   1009 1274  1077 1284   1146 1262  1143 1262
//   128 x 128, two; all awaited every 2nd k block     1009 1282
//     every 4th, 8th, 16th, 32nd                 1079 to 1130 1278              1127 1287         1069 1237
//     + a cluster of two that shares w                1096 1288            1105 1305         1134 1232
// and in a third (its first rows at a cooler card's clocks):
//   128 x 192; 128 x 128, one set; two           1276 1387  1159 1393  1151 1313 | 1036  1091  1137 | 1241  1196  1087 1245
//   two, without additions; without loads; neither    1118 1211  1121 1253  1337 1380 | - | 1158 1185  1179 1235  1383 1372
//   + the warpgroups' products in turn                1082 1253 | 1046 1224 | 1126 1209
//   + store buffers of half the width, two            1116 1272 | 1099 1255 | 1168 1221 (128 x 192 so: 1092 | 991 | 1043)
//   + two store buffers, one stage less               1137 1263 | 1126 1269 | 1118 1145
// In a fourth, 50 ms each in turn with three others: 128 x 128 with one set, two, at 512, 2048 and 4096 x 4096 x 4096
// 1045 990, 1081 1092, 1095 1098, 128 x 192 and two at 8192 x 4096 x 4096 1141 1099. What keeps the tensor cores busier takes
// clocks in turn (at 16384 above 0.98 TFLOP/s per MHz, 128 x 192 0.92). But a warpgroup alone, 64 x 12288 x 4096 by 64 x 96:
// 14.1 us instead of 14.5, 14.0 and 14.2 instead of 14.4 and 14.6 (64 x 128 16.3 instead of 16.6; 64 x 64 7.7 instead of 7.6).
// Three cards later, sustained as fp8-bench kernel measures it (TFLOP/s, means of three calls), and in bursts:
//              4096 x 7168 x 16384   4096 x 4096 x 14336   2048 x 4096 x 4096   2048 x 12288 x 4096   512 x 4096 x 4096
//   128 x 128      1133  1226            1198  1295             1144  1251           1148  1276          1044  1141
//   + two sets     1101  1211            1190  1285             1171  1284           1176  1312          1072  1166
//   128 x 192      1212  1336            1128  1241             1080  1225           1233  1362           736   925
//   256 x 128      1187  1377            1189  1381             1122  1303           1136  1332
//   DeepGEMM's     1305  1467            1278  1463             1177  1349           1227  1402          ( 983  1151)
// 256 x 128 there: products of a warpgroup's second 64 rows start behind the first's additions, the next stage is awaited under
// them; in DeepGEMM's order (a stage awaited, multiplied, added) 1140, 1345; a cluster of two loses 2 to 8%. Of the others:
//   ptxas' choice of yields is the best: cubins with these bits changed, either way, lose 5 to 15%, DeepGEMM's own too
//   the scales copied by 8 lanes instead of 32: 192 1064 instead of 1244, 128 959 instead of 1147; by 4 lanes 923
//   + asked for 8 k blocks ahead, one arrival instead of 32: 1166 instead of 1198, 128 1119 instead of 1137
// Since then, sustained (bursts):           4096 x 7168 x 16384   2048 x 12288 x 4096   2048 x 4096 x 4096   8192 x 4096 x 4096
//   256 x 128 as above                          1014 (1280)           1051 (1247)          1078 (1248)         1047 (1238)
//   + an elected lane issues TMA (below)        1038 (1280)
//     + scales by TMA, x's as 256 x 16 bytes    1063 (1293)
//     + DeepGEMM's order                        1204 (1384)
//       + four k blocks in the loop's body      1278 (1425)           1164 (1354)          1186 (1349)         1179 (1346)
//         + buffers for a tile, three stages                          1193 (1372)          1199 (1350)         1210 (1362)
//         + scales copied instead                                     1130 (1334)          1138 (1318)         1144 (1326)
//     + the second warpgroup multiplies a stage
//       when the first has begun                1177 (1365)           1117 (1322)          1110 (1300)         1117 (1316)
//   128 x 192, elected; + scales by TMA         1188  1155            1188  1185           1056  1064          1153  1131
//   DeepGEMM's 256 x 128                        1190 (1451)           1175 (1390)          1146 (1346)         1182 (1398)
// An elected lane: behind threadIdx.x % 128 == 0 ptxas puts each TMA copy in a loop over lanes (R2UR, BRA.U.ANY), 50 to 130
// clocks; of three more copies for four k blocks 128 x 192 became 10% slower, 64 x 64 9.8 us instead of 7.6. That is what the
// 8 lanes and the copies ahead above had cost. Four k blocks in the body: ptxas asks for a stage under the additions before.
// x's scales transposed, a row of 256 for each k block: as by 16 bytes. TMA's L2 promotion of 256 bytes: no change.
// Earlier, several in turn and warm (the first of these would be 1001): scales by every thread 936, per 8 rows of w and with
// the stage 1000, four k blocks at once 1056, a warpgroup that starts later 1007, 256 x 96 1001.
// Two CTAs on an SM with half a ring each, for few tokens: 64 x 12288 x 4096 15.8 us instead of 14.6.
// Promoted, BUFFERS for all chunks of a tile where the ring leaves room: 64 x 12288 x 4096 13.94 instead of 14.24, 64 x 24576 x
// 4096 26.4 instead of 26.7; the last tile's in the ring itself: 14.0, 26.5, but 512 x 12288 x 4096 42.0 instead of 41.5.
// Where weights come first (AHEAD), those of all stages, before x: 64 x 4096 x 4096 8.0 us instead of 7.3, 128 x 12288 x 4096
// 17.7 instead of 16.5 (per-tensor 15.9 and 15.0): x queued behind what fills every ring, 15 MB. Where more tiles
// follow, all stages: with three, the same main loop had 1106 instead of 1231 at 2048 x 4096 x 4096 and 1198 instead of 1335
// at 8192 x 7168 x 16384 (two runs), as if the warpgroups, once both had waited for one stage, multiplied and added together.
#include "fp8/mbarrier.cuh"
#include "fp8/sync.cuh"
#include "fp8/tma.cuh"
#include "fp8/wgmma.cuh"
#include "gemm_epilogue.cuh"
#include "gemm_promote.cuh"
#include "gemm_shape.cuh"
#include "gemm_tile.cuh"
#if HEADS
#include "gemm_heads.cuh"
#endif

DEVICE void mma(float (&d)[BLOCK_N / 2], u64 a, u64 b, int accumulate) {
  if constexpr (OPERAND == 0) wgmma_ss_e4m3(d, a, b, accumulate);
  else if constexpr (OPERAND == 1) wgmma_ss_bf16(d, a, b, accumulate);
  else wgmma_ss_f16(d, a, b, accumulate);
}

// The consumer warpgroup is through with a stage: each of its warps tells every CTA that loads into it.
DEVICE void release(u32 empty) {
  int lane = threadIdx.x % 32;
  if (CLUSTER_M * CLUSTER_N == 1) {
    if (lane == 0) mbarrier_arrive(empty);
  } else if (lane < CLUSTER) mbarrier_arrive_cluster(empty, lane);
}

template <bool First, class A, class B> DEVICE auto& pick(A& a, B& b) {
  if constexpr (First) return a;
  else return b;
}

// PINGPONG: the main loops run in the order of the tiles. (Without it a warpgroup could wait for a stage two uses ahead,
// which a parity does not tell from now.)
DEVICE void await_turn(int warpgroup) {
  if (warpgroup == 0) named_barrier_sync<4, 256>();
  else named_barrier_sync<5, 256>();
}
DEVICE void pass_turn(int warpgroup) {
  if (warpgroup == 0) named_barrier_arrive<5, 256>();
  else named_barrier_arrive<4, 256>();
}

extern "C" __global__ void __launch_bounds__(128 * (WARPGROUPS + 1), 1)
gemm(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap y_map,
     const float* x_scale, const float* w_scale, const float* bias, const float* out_scale, void* y, int rows
#if HEADS
     , const __grid_constant__ Cache cache
#endif
#if ADD
     , const __grid_constant__ TensorMap added_map
#endif
#if SCALES_BY_TMA
     , const __grid_constant__ TensorMap x_scale_map
#endif
     ) {
  griddepcontrol_launch_dependents();
  extern __shared__ __align__(1024) u8 shared[];
  u8* buffers = shared + STAGES * STAGE_BYTES;
  float* vectors = (float*)(buffers + WARPGROUPS * BUFFERS * 64 * CHUNK);  // per warpgroup: scale [BLOCK_N], bias [BLOCK_N]
  float* block_scales = vectors + WARPGROUPS * (SCALED + BIAS) * BLOCK_N;
  u64* full = (u64*)(block_scales + SLOTS * SLOT);
  u32 stages = shared_address(shared), full_bar = shared_address(full), empty_bar = full_bar + STAGES * 8;
  u32 added_bar = empty_bar + STAGES * 8;
  int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0), leader = threadIdx.x % 128 == 0;
  u32 rank = CLUSTER > 1 ? cluster_rank() : 0;

  if (threadIdx.x == 0) {
    prefetch_tensormap(&x_map), prefetch_tensormap(&w_map);
    for (int i = 0; i < STAGES; i++) {
      mbarrier_init(full_bar + i * 8, BLOCKWISE && !SCALES_BY_TMA ? 33 : 1);
      mbarrier_init(empty_bar + i * 8, CLUSTER_M * CLUSTER_N * CONSUMERS * 4);
    }
    if (ADD)
      for (int i = 0; i < WARPGROUPS * BUFFERS; i++) mbarrier_init(added_bar + i * 8, 1);
    fence_mbarrier_init();
  }
  if (CLUSTER > 1) cluster_arrive(), cluster_wait();
  else __syncthreads();

  int m_units = ((rows + BLOCK_M - 1) / BLOCK_M + CLUSTER_M - 1) / CLUSTER_M;
  int units = m_units * ((N_BLOCKS + CLUSTER_N - 1) / CLUSTER_N);
  int first = blockIdx.x / CLUSTER, step = gridDim.x / CLUSTER;
  int k_begin = K_BLOCKS * rank / SPLIT, k_end = K_BLOCKS * (rank + 1) / SPLIT;  // SPLIT = 1: all
  if (SPLIT == 1) k_begin = 0, k_end = K_BLOCKS;
  int stage = 0, parity = 0;

  if (warpgroup == WARPGROUPS) {
    if constexpr (WARPGROUPS == 2) setmaxnreg_dec<40>();
    const int warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0);
    if (warp == 0 && elect_one()) {
      // SCALES_BY_TMA: scales of the k blocks from `k` on come with its stage.
      auto brings = [](int k) { return SCALES_BY_TMA && k % SCALE_VECTOR == 0; };
      auto expect = [&](int stage, int k) { mbarrier_arrive_expect_tx(full_bar + stage * 8, STAGE_BYTES + (brings(k) ? SCALE_BYTES : 0)); };
      auto load_x = [&](int stage, int k, Tile t, int slot) {
        load<BLOCK_M, (CLUSTER_N > 1)>(stages + stage * STAGE_BYTES, &x_map, full_bar + stage * 8, k * ROW_K, t.m, rank);
#if SCALES_BY_TMA
        if (brings(k)) tma_load_2d(shared_address(block_scales + slot * SLOT), &x_scale_map, full_bar + stage * 8, k, t.m);
#endif
      };
      auto load_w = [&](int stage, int k, Tile t, int slot) {
        load<BLOCK_N, (CLUSTER_M > 1)>(stages + stage * STAGE_BYTES + X_BYTES, &w_map, full_bar + stage * 8, k * ROW_K, t.n, rank);
        if (brings(k))
#pragma unroll
          for (int c = 0; c < COLUMNS; c++)
            bulk_load(shared_address(block_scales + slot * SLOT + (BLOCK_M + c) * SCALE_VECTOR),
                      w_scale + (size_t)(min(t.n + c * SHARED_N, GEMM_N - 1) / W_GROUP) * K_BLOCKS + k, SCALE_VECTOR * 4, full_bar + stage * 8);
      };
      int slot = 0;
      int filled = 0;  // k blocks of the first tile whose weights are asked for before the kernels before have ended
      if (first < units) {
        Tile t = tile_of(first, m_units, rank);
        filled = min(first + step < units ? STAGES : AHEAD, k_end - k_begin);
        for (int i = 0; i < filled; i++) {
          expect(i, k_begin + i);
          load_w(i, k_begin + i, t, i / SCALE_VECTOR);
        }
        griddepcontrol_wait();
        for (int i = 0; i < filled; i++) load_x(i, k_begin + i, t, i / SCALE_VECTOR);
        if constexpr (SCALES_BY_TMA) slot = (filled + SCALE_VECTOR - 1) / SCALE_VECTOR % SLOTS;
        if (filled == STAGES) parity = 1;
        else stage = filled;
      }
      for (int unit = first; unit < units; unit += step, filled = 0) {
        Tile t = tile_of(unit, m_units, rank);
#pragma unroll 1
        for (int k = k_begin + filled; k < k_end; k++) {
          mbarrier_wait(empty_bar + stage * 8, parity ^ 1);
          expect(stage, k);
          load_w(stage, k, t, slot);
          load_x(stage, k, t, slot);
          if (brings(k) && ++slot == SLOTS) slot = 0;
          if (++stage == STAGES) stage = 0, parity ^= 1;
        }
      }
    } else if (BLOCKWISE && !SCALES_BY_TMA && warp == 1) {  // the second warp brings the scales
      constexpr int V = SCALE_VECTOR;
      int lane = threadIdx.x % 32, slot = 0;
      griddepcontrol_wait();
      for (int unit = first; unit < units; unit += step) {
        Tile t = tile_of(unit, m_units, rank);
#pragma unroll 1
        for (int k = k_begin; k < k_end; k++) {
          mbarrier_wait(empty_bar + stage * 8, parity ^ 1);
          if (k % V == 0) {
            u32 to = shared_address(block_scales + slot * SLOT);
#pragma unroll
            for (int r = lane; r < BLOCK_M; r += 32) copy_async<4 * V>(to + r * 4 * V, x_scale + (size_t)min(t.m + r, rows - 1) * K_BLOCKS + k);
#pragma unroll
            for (int c = lane; c < BLOCK_N / SHARED_N; c += 32)
              copy_async<4 * V>(to + (BLOCK_M + c) * 4 * V, w_scale + (size_t)(min(t.n + c * SHARED_N, GEMM_N - 1) / W_GROUP) * K_BLOCKS + k);
            if (++slot == SLOTS) slot = 0;
          }
          copy_async_arrive(full_bar + stage * 8);
          if (++stage == STAGES) stage = 0, parity ^= 1;
        }
      }
    }
#if HEADS
    else if (blockIdx.x == 0 && warp == 2 && cache.sequences > cache.decode_rows) {
      __shared__ int bins[TILE_BINS];
      griddepcontrol_wait();
      write_tiles(bins, cache.tiles, cache.query_start, cache.lengths, cache.decode_rows, cache.sequences, 2 * HEAD_DIM * CACHE_BYTES,
                  KV_HEADS, HEADS / KV_HEADS);
    }
#endif
    __syncwarp();
    if (SPLIT > 1) cluster_arrive(), cluster_wait();
  } else {
    if constexpr (WARPGROUPS == 2) setmaxnreg_inc<232>();  // 128 x 40 + 256 x 232 of the 64 K
    griddepcontrol_wait();
    const Arguments args{x_scale, w_scale, bias, out_scale, y, rows};
    buffers += warpgroup * BUFFERS * 64 * CHUNK;
    float* scales = vectors + warpgroup * (SCALED + BIAS) * BLOCK_N;
    float* biases = scales + SCALED * BLOCK_N;
    float scalar = X_SCALE == 1 ? x_scale[0] : 1.f, quantum = QUANT ? out_scale[0] : 1.f;
    int lane = threadIdx.x % 32, thread = threadIdx.x % 128;
#if ADD
    Added added = {&added_map, added_bar + warpgroup * BUFFERS * 8, 0};
#else
    Added added = {};
#endif
    float d[PROMOTE ? SETS : MMAS][BLOCK_N / 2];
    float promoted[PROMOTE ? MMAS : 1][PROMOTE ? BLOCK_N / 2 : 1];
    auto& sum = pick<PROMOTE>(promoted, d);
    if (PINGPONG && warpgroup == 1) {  // the first tile is the other's
      stage = K_BLOCKS % STAGES, parity = K_BLOCKS / STAGES % 2;
      first += step;
      pass_turn(warpgroup);
    }
    int last = 0, slot = 0, place = 0;  // the next k block's slot in the ring of scales, and its place there
    // Shuffled to itself, lest ptxas computes it anew where products wait for it. So are the low words of descriptors.
    int row_scales = BLOCKWISE ? __shfl_sync(~0u, (warpgroup * TILE_ROWS + thread / 32 * 16 + lane / 4) * SCALE_VECTOR, lane) : 0;
    u32 a_first = PROMOTE ? __shfl_sync(~0u, (u32)wgmma_descriptor(stages + warpgroup * TILE_ROWS * ROW), 0) : 0;
    u32 b_first = PROMOTE ? __shfl_sync(~0u, (u32)wgmma_descriptor(stages + X_BYTES), 0) : 0;
    u32 a_low = a_first + stage * (STAGE_BYTES / 16), b_low = b_first + stage * (STAGE_BYTES / 16);  // of this stage
    u64 high = wgmma_descriptor(0) >> 32 << 32;  // of every stage
    Scales scale;
    auto multiply_promoted = [&](float (&products)[BLOCK_N / 2], int m = 0) {  // this stage, the `m`-th 64 rows
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < 4; j++) mma(products, high | (a_low + m * (64 * ROW / 16) + 2 * j), high | (b_low + 2 * j), j);
      wgmma_commit_group();
    };
    auto multiply = [&](int sofar) {  // this stage, added to what `d` holds `sofar`
      wgmma_fence();
      u32 at = stages + stage * STAGE_BYTES;
      u64 a = wgmma_descriptor(at + (PINGPONG ? 0 : warpgroup * TILE_ROWS * ROW)), b = wgmma_descriptor(at + X_BYTES);
#pragma unroll
      for (int j = 0; j < 4; j++)
#pragma unroll
        for (int m = 0; m < MMAS; m++) mma(d[m], a + 2 * j + m * (64 * ROW >> 4), b + 2 * j, sofar | j);
      wgmma_commit_group();
    };
    auto advance = [&] {
      last = stage;
      if (++stage == STAGES) stage = 0, parity ^= 1;
      if (PROMOTE) a_low = a_first + stage * (STAGE_BYTES / 16), b_low = b_first + stage * (STAGE_BYTES / 16);
    };
    auto load_scales = [&](int m = 0) {  // of the `m`-th 64 rows
      const float* at = block_scales + slot + place;
      scale.columns = at + BLOCK_M * SCALE_VECTOR;
      if constexpr (BLOCKWISE) {
        float columns[COLUMNS ? COLUMNS : 1] = {1.f};
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) columns[c] = scale.columns[c * SCALE_VECTOR];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          float row = at[row_scales + (m * 64 + i * 8) * SCALE_VECTOR];
#pragma unroll
          for (int c = 0; c < (COLUMNS ? COLUMNS : 1); c++) {
            scale.row[c][i] = row * columns[c];
            pin(scale.row[c][i]);
          }
        }
      }
      if (m == MMAS - 1 && ++place == SCALE_VECTOR) {
        place = 0;
        slot = slot == (SLOTS - 1) * SLOT ? 0 : slot + SLOT;
      }
    };
    // PROMOTE of 64 rows: adds the products under way and starts those of the next stage; where there is none (there always is,
    // as ptxas sees it), those of what lies there. All other work stands here, not between the stage's four wgmmas: there the
    // other warpgroup's seem to come in between, so that both wait at once and add at once (12% slower).
    auto add_and_go_on = [&](bool more) {
      load_scales();
      wgmma_wait_group<0>();
#pragma unroll
      for (int i = 0; i < BLOCK_N / 2; i++) pin(d[0][i]);
      promote(sum[0], d[0], scale);
      release(empty_bar + stage * 8);
      advance();
      if (more) mbarrier_wait(full_bar + stage * 8, parity);
      multiply_promoted(d[0]);
    };
    // PROMOTE of twice 64 rows: multiplies and adds one after the other; the other warpgroup multiplies meanwhile.
    auto multiply_and_add = [&] {
      mbarrier_wait(full_bar + stage * 8, parity);
#pragma unroll
      for (int m = 0; m < MMAS; m++) {
        load_scales(m);
        multiply_promoted(d[0], m);
        wgmma_wait_group<0>();
#pragma unroll
        for (int i = 0; i < BLOCK_N / 2; i++) pin(d[0][i]);
        if (m == MMAS - 1) release(empty_bar + stage * 8);
        promote(sum[m], d[0], scale);
      }
      advance();
    };
    // SETS 2: starts the next stage's products and adds those under way. ptxas follows products past the end of a loop's body
    // only if all are awaited at its beginning (`first`): there the other warpgroup's alone are under way.
    auto go_on_and_add = [&](float (&sums)[BLOCK_N / 2], float (&products)[BLOCK_N / 2], float (&next)[BLOCK_N / 2], bool first, bool more) {
      advance();
      if (more) mbarrier_wait(full_bar + stage * 8, parity);
      if (first) wgmma_wait_group<0>();
      multiply_promoted(next);
      load_scales();
      wgmma_wait_group<1>();
#pragma unroll
      for (int i = 0; i < BLOCK_N / 2; i++) pin(products[i]);
      release(empty_bar + last * 8);
      promote(sums, products, scale);
    };
    if (PROMOTE && K_BLOCKS < 4 * UNROLLED) pin(k_end);  // a loop that is unrolled away lets ptxas wait too early
    if (PROMOTE && MMAS == 1) {
      mbarrier_wait(full_bar + stage * 8, parity);
      multiply_promoted(d[SETS - 1]);
    }
    for (int unit = first; unit < units; unit += PINGPONG ? 2 * step : step) {
      Tile t = tile_of(unit, m_units, rank);
      int row = t.m + (PINGPONG ? 0 : warpgroup * TILE_ROWS);
      float column_scale[VECTOR], column_bias[VECTOR], row_scale[MMAS][2];
#pragma unroll
      for (int i = 0; i < VECTOR; i++) {
        int n = t.n + thread + i * 128;
        bool in = thread + i * 128 < BLOCK_N && n < GEMM_N;
        if (SCALED) column_scale[i] = W_SCALE && in ? w_scale[n] : 1.f;  // times `scalar` later: products do not wait for it
        if (BIAS) column_bias[i] = in ? bias[n] : 0.f;
      }
#pragma unroll
      for (int m = 0; m < MMAS; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          int r = row + m * 64 + thread / 32 * 16 + lane / 4 + i * 8;
          row_scale[m][i] = X_SCALE == 2 && r < rows ? x_scale[r] : 1.f;
        }
      if (ADD && leader) {
        bulk_wait_group_read<0>();  // the tile before has left the buffers
#pragma unroll
        for (int i = 0; i < BUFFERS && i < MMAS * CHUNKS; i++) send_for(added, buffers, i, row, t.n);
      }
#if HEADS
      Kind kind = kind_of(t.n);
      if (FP8_CACHE) quantum = *(kind == QUERIES ? cache.q_scale : kind == KEYS ? cache.k_scale : cache.v_scale);
#endif
      if constexpr (PROMOTE) {
#pragma unroll
        for (int m = 0; m < MMAS; m++)
#pragma unroll
          for (int i = 0; i < BLOCK_N / 2; i++) sum[m][i] = 0.f;
      }
      if (PINGPONG) await_turn(warpgroup);
      if constexpr (SETS == 2) {
#pragma unroll
        for (int j = 0; j < REST; j++) go_on_and_add(sum[0], d[1 - j % 2], d[j % 2], j == 0, true);
#pragma unroll 1
        for (int k = k_begin + REST; k < k_end; k += UNROLLED)
#pragma unroll
          for (int j = 0; j < UNROLLED; j++)
            go_on_and_add(sum[0], d[1 - j % 2], d[j % 2], j == 0, j + 1 < UNROLLED || k + UNROLLED < k_end || unit + step < units);
      } else if constexpr (PROMOTE && MMAS > 1) {
#pragma unroll 4  // so ptxas asks for a stage under the additions before
        for (int k = k_begin; k < k_end; k++) multiply_and_add();
      } else if constexpr (PROMOTE) {
#pragma unroll 1
        for (int k = k_begin; k + 1 < k_end; k++) add_and_go_on(true);
        add_and_go_on(unit + step < units);
      } else {
#pragma unroll 1
        for (int k = k_begin; k < k_end; k++) {
          mbarrier_wait(full_bar + stage * 8, parity);
          multiply(k - k_begin);
          wgmma_wait_group<1>();  // the stage before is read
          if (k > k_begin) release(empty_bar + last * 8);
          advance();
        }
        if (PINGPONG) pass_turn(warpgroup);
        wgmma_wait_group<0>();
        release(empty_bar + last * 8);
      }
      if (PINGPONG) {  // skip the other's tile
        stage += K_BLOCKS % STAGES, parity ^= K_BLOCKS / STAGES % 2;
        if (stage >= STAGES) stage -= STAGES, parity ^= 1;
      }
      u32 partials = stages + warpgroup * (TILE_ROWS * BLOCK_N * 4);
      if constexpr (SPLIT > 1) {
        named_barrier_sync<3, 128 * WARPGROUPS>();  // every stage is read: the ring may hold sums
#pragma unroll
        for (int m = 0; m < MMAS; m++)
#pragma unroll
          for (int j = 0; j < BLOCK_N / 8; j++)
            *(float4*)(shared + (partials - stages) + (m * BLOCK_N / 8 + j) * 2048 + thread * 16) =
                make_float4(sum[m][4 * j], sum[m][4 * j + 1], sum[m][4 * j + 2], sum[m][4 * j + 3]);
        cluster_arrive(), cluster_wait();
      }
      if (SCALED || BIAS) {
        warpgroup_sync(warpgroup);  // the tile before has been written out
#pragma unroll
        for (int i = 0; i < VECTOR; i++)
          if (thread + i * 128 < BLOCK_N) {
            if (SCALED) scales[thread + i * 128] = column_scale[i] * scalar;
            if (BIAS) biases[thread + i * 128] = column_bias[i];
          }
        warpgroup_sync(warpgroup);
      }
#pragma unroll
      for (int m = 0; m < MMAS; m++) {
#if HEADS
        if (t.n < GEMM_N) write_heads(sum[m], cache, &y_map, buffers, scales, biases, row + m * 64, t.n, rows, row_scale[m], quantum);
#else
        write(m, sum[m], args, &y_map, buffers, scales, biases, row + m * 64, t.n, row_scale[m], quantum, rank,
              partials + m * 64 * BLOCK_N * 4, added);
#endif
      }
    }
    if (PROMOTE) wgmma_wait_group<0>();
    if (TMA_STORE && leader) bulk_wait_group<0>();
    __syncwarp();
  }
  // Neither may end while the other can still write or read here.
  if (CLUSTER > 1) cluster_arrive(), cluster_wait();
}
