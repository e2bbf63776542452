// y[M, N] = x[M, K] w[N, K]^T for M <= TOKENS <= 128: the weights stream through once, so device memory is the bound.
//
// Operands swap: 64 weight rows are wgmma's M, the tokens its N. One CTA takes ROWS weight rows (any multiple of 16: that is
// what balances N over the SMs) and 1/SPLIT of K; the SPLIT CTAs of a cluster add their partial sums through distributed
// shared memory, in rank order. A ring of STAGES stages holds ATOMS 128-byte columns of w and x each; the ring's first fill
// of w is issued before griddepcontrol.wait, so it streams while the kernels before are still at work.
// FOLD > 1: a CTA of 64 / FOLD rows stacks FOLD columns of K into one wgmma (A: FOLD atoms above one another, B: their
// tokens side by side), of which the diagonal blocks are wanted; they are added at the end.
//
// Tries, on an H200: a CUDA graph of launches chained by programmatic dependent launch over 420 MB of weights, us a launch
// at one token unless said otherwise; cuBLASLt (torch._scaled_mm) in the same run.
//   N x K           12288x4096  4096x4096  22016x4096  4096x11008
//   cuBLASLt           16.0        7.5        27.1        16.8
//   64 rows, SPLIT 2   13.4        5.5        26.4        12.4     a cluster costs more than it balances, but at 64 tokens
//   ROWS fits N        12.8        6.0        23.2        12.9     one wave of full rings, no cluster, 1 to 3 CTAs per SM
//   + FOLD (32 rows)   13.1        5.3         -          11.7     wgmma takes 2 KB of A in ~50 clocks whatever its N
//   + evict_first      12.6        5.3        22.9        11.6     at 64 tokens 14.7 -> 13.7, 6.9 -> 6.6, 26.8 -> 25.9, 14.2 -> 13.6
// With these, 6144x4096: 7.4 (9.5), 28672x4096: 29.6 (30.4), 4096x14336: 14.9 (20.1), in parentheses cuBLASLt in another run.
// At 96 tokens 15.0 (16.1), 7.7 (7.8), 24.9 (27.3), 14.4 (14.8); at 128 gemm.cu is as fast or faster but where K is long:
// 4096x11008 15.9 (gemm.cu 17.3, cuBLASLt 17.1), 4096x14336 18.8 (21.3, 21.1).
// Then descriptors in uniform registers, a barrier that counts partial sums (SPLIT 2: -0.3 to -1.3 us) and the start of the
// next kernel when 5/32 of w are left to ask for, the best tactic before -> after in one run (cuBLASLt), at 1, 16, 64 tokens:
//    4096x4096    5.34 ->  5.25 ( 7.6)    5.77 ->  5.24 ( 7.7)    6.94 ->  6.19 ( 7.4)
//    6144x4096    7.28 ->  6.79 (10.0)    7.70 ->  6.90 (10.0)    8.43 ->  8.28 ( 9.8)
//   12288x4096   12.23 -> 12.04 (15.9)   12.76 -> 12.50 (15.9)   14.05 -> 13.76 (15.5)
//   22016x4096   21.57 -> 21.40 (25.3)          -                23.96 -> 23.66 (27.5)
//   4096x11008   11.13 -> 11.03 (16.0)   11.67 -> 11.54 (16.0)   13.80 -> 13.21 (14.3)
//   4096x14336   14.61 -> 14.50 (19.3)          -                17.12 -> 16.42 (18.0)
// The start counts where the next kernel's CTAs fit beside this one's (4096x4096: 5.59 -> 5.25, 5.70 -> 5.24, 6.71 -> 6.19):
// earlier, its first fill queues before the rest of this one's w; later (nothing left) its launch comes too late (+4 to 20%
// from 12288x4096 on). Elsewhere +-1%. But where a norm or attention comes next, the linear behind that is to have its first
// fill in time: with `early` the next kernel starts at once. A step of 8 layers with every start late, with a start behind the
// first fill where that is 2/5 of w, with `early` before norms and attention: llama-3.1-8B 761.6, 737.4, 725.0 us at 1 token,
// 811.6, 804.8, 799.8 at 8, 846.1, 841.2, 838.7 at 16, 928.5, 930.5, 933.1 at 32, 1139.3, 1145.2, 1141.4 at 64; llama-7B 558.1,
// 558.7, 556.8 at 1, 670.7, 676.4, 677.2 at 8, 823.2, 823.9, 821.2 at 16, 1137.7, 1137.6, 1136.0 at 32, 1757.7, 1756.3, 1747.3
// at 64. Behind the first fill instead of at once: +8.3 us at 1 token (8B), +2.1 (7B), else within 6 us to either side.
// Then outputs of four groups of tokens at once, without branches between them, SwiGLU without those of division, and a warp of
// its own that asks for x. Before -> after in one run, at 64 tokens: 6144x4096 7.93 -> 7.50, 12288x4096 14.48 -> 14.15, 22016x4096
// 23.85 -> 23.59, with SwiGLU 25.37 -> 23.73, 28672x4096 with SwiGLU 32.87 -> 31.87 (31.44 -> 30.05 in another run), 4096x11008
// 13.30 -> 12.85, 4096x14336 16.48 -> 16.02; 4096x4096 at 16 tokens 5.15 -> 4.90; at 96 4096x14336 17.84 -> 17.45, at 128
// 4096x11008 15.42 -> 14.89; at one token +-1%. A layer of llama-3.1-8B with 64 sequences at 1088 tokens takes 106.0 instead of
// 108.0 us; down_proj in stages of two columns, which alone are as fast, makes it 0.5 to 0.7 less, o_proj in 64 blocks, whose
// rings hold 14 of 32 columns before its x is there, 2.2 less than in 128 that hold 6 of 16.
// There x of the first fill, the same for all blocks, comes at 5.3 TB/s, a stage of 8 KB to 128 blocks in 0.19 us: by then w comes
// at the memory's rate again. From the end of the kernel before to the first product it is 0.8 to 1.3 us, 0.4 of them x.
// Without gain: a ring of x of its own, so that w's is deeper (+2 to 30%: x comes as fast as its ring is deep, and a
// stage then waits for two barriers; with one barrier for both and a warp for each, of 26 stages of 8 KB 16 for w +2%, 18 +6%, 20
// +12%); blocks that begin with different columns, not all with the same x (+2 to 5% at 64 tokens, +12% at 96, +20% at 128); x by multicast to two neighbours along N (+5 to 60%; with a
// warp of its own for x, and barriers that both blocks' readers arrive at, +1 to 3% with one block on K, +25 to 80% with two, 8192x28672 alone -0.3%); the
// ring's barriers made by a warp's lanes, and a fill that no other warp waits for (+1 to 23%, 28672x4096 -1%); two or four independent accumulators in turn (+-0.5%); x of
// the first fill by ordinary loads instead of TMA (+1 to 5% at one token, +30% at eight) and, on top of that, releasing
// a stage at once while the ring is empty (+0 to 5%), L2 prefetch past the ring, before the wait or after it (+10 to
// 50%), of the linear after next's weights by a CTA that is through (whole decode step of llama-7B: at best -0.4 of
// 68.3 us a layer, at worst +3); RMSNorm of x at this kernel's start instead of a kernel of its own (+2.1 us a layer
// for qkv).
// In a step, `window` stages of the first fill are on their way at a time, not all, as what a norm or attention in front loads
// queues behind them: 48 KB on a multiprocessor, or a little more. Steps of 8 layers with logits, in turn, without -> with it, us at 8, 16, 32 and
// 64: llama-3.1-8B 744 -> 737, 797 -> 772, 910 -> 888, 1165 -> 1148; llama-7B 630 -> 615, 780 -> 761, 1136 -> 1125, 1662 -> 1645. A stage more or
// less for one of the linears: within 2 us, or +2 to 11. It pays with deeper rings than those before (224 rows for 112 in gate_up). Where
// blocks take turns (lm_head of 8B, 12 to 45 us longer with a window) x is there before most of them: none. The warp that asks for w telling
// `full` what has landed, for a loop of products without that question, makes its own loop longer: alone 4096x11008 at one token 10.15 -> 10.60, at
// 64 12.29 -> 12.75, 4096x4096 4.57 -> 4.77, 6.16 -> 6.33.
// A box of x has as many rows as there are tokens. Rows of it past the map's end are zeros without traffic, but take longer than rows that are there:
// 4096x11008 by a tactic for 64 tokens took 17.5 us at 1, 16.4 at 16, 14.7 at 32, 12.6 at 48 and 12.3 at 64. Before -> after, at one token:
// 4096x4096 4.69 -> 4.58, 6144x4096 6.83 -> 6.59, 12288x4096 11.49 -> 11.33, 22016x4096 21.53 -> 21.23, 4096x11008 10.49 -> 10.27, 4096x14336 13.56 ->
// 13.17; at 40 4096x11008 13.13 -> 12.25, and a step of 8 layers of llama-3.1-8B 1178 -> 1137.
// What is stored is dear: lm_head of 8B (64 tokens, float32) takes 272 us, 241 without its stores, 265 with streaming ones (at 32 tokens 255, 241 and 258);
// 57344x8192 119, 112 and 121; 28672x4096 29.7, 29.2 and 31.0. Rows of a block (64 to 256) make no difference to that.
// PROMOTE adds the products of each 128 of K in float32; blockwise scales, which come with the stage, scale them there. At one
// token as fast as without: 12288x4096 12.3, 4096x4096 5.4, 24576x4096 23.8, 4096x14336 14.3; at 64 15.7 (gemm.cu 14.7), 8.5
// (7.6), 26.2 (26.7), 17.9 (18.4); at 128 gemm.cu is faster (17.3 against 23.0).
// Not measured: warpgroups that take stages in turn, and A from registers (the wgmma rate bounds 32 rows without FOLD). Mind
// that a stage must then always be the same warpgroup's: a wait by parity passes early when one runs a phase ahead.
#include "fp8/convert.cuh"
#include "fp8/exchange.cuh"
#include "fp8/mbarrier.cuh"
#include "fp8/swiglu.cuh"
#include "fp8/sync.cuh"
#include "fp8/tma.cuh"
#include "fp8/wgmma.cuh"
#ifdef SEND  // 16-bit rows go to all ranks instead of y, as they are there
#include "../all_reduce/sent.cuh"
#define SEND_PARAMETERS , const __grid_constant__ Peers peers, u32 me, u64 area
#define SENDING(...) __VA_ARGS__
#define PUT(out, token, n, four) send(peers, me, area, token, n, four)
#else
#define SEND_PARAMETERS
#define SENDING(...)
#define PUT(out, token, n, four) *(uint2*)(out) = (four)
#endif

// Constants: GEMM_N, GEMM_K; WEIGHT (0 e4m3, 1 bf16, 2 f16); OUT (0 bf16, 1 f16, 2 f32, 3 e4m3); SWIGLU and its 16-bit
// type ROUND (0 bf16, 1 f16); X_SCALE (0 none, 1 scalar, 2 per token, 3 blockwise), W_SCALE (0 none, 1 per row, 2 blockwise:
// of W_GROUP rows), BIAS; PROMOTE; and the tactic.
constexpr int ATOM = 128;  // bytes of K in one swizzle atom: 4 wgmma
constexpr int ATOM_K = WEIGHT == 0 ? 128 : 64;
constexpr int K_BLOCKS = (GEMM_K + ATOM_K * ATOMS - 1) / (ATOM_K * ATOMS);
constexpr int W_ATOM = ROWS * ATOM, X_ATOM = TOKENS * ATOM, STAGE = ATOMS * (W_ATOM + X_ATOM);
constexpr int TILES = (ROWS * FOLD + 63) / 64, TILES_EACH = TILES / WARPGROUPS;
constexpr int CONSUMERS = 128 * WARPGROUPS;
constexpr int GROUPS = TOKENS / 8;                            // of accumulator columns
constexpr int UNITS = TILES * GROUPS;                         // 64 rows x 8 tokens: what a rank of the cluster reduces at a time
constexpr int OWNED = (UNITS + SPLIT - 1) / SPLIT;            // units per rank
constexpr int UNIT_BYTES = 64 * 8 * 4;
constexpr int TOGETHER = GROUPS < 4 ? GROUPS : 4;             // groups whose outputs are computed at once
// The last tile of a stage may reach past its rows; what it reads there only feeds rows that are never stored.
constexpr bool BLOCKWISE = X_SCALE == 3;
constexpr int ATOM_SCALES = TOKENS + ROWS / 8, STAGE_SCALES = BLOCKWISE ? ATOMS * ATOM_SCALES : 0;  // floats
constexpr int APART = 4 * WARPGROUPS / FOLD;  // warps between two folds of the same rows
constexpr int VALUES = TILES_EACH * TOKENS * FOLD / 2;
// Wgmmas of different columns that a warpgroup waits for at once: PROMOTE needs accumulators for each.
constexpr int AT_ONCE = !PROMOTE || VALUES >= 64 ? 1 : ATOMS / FOLD < 64 / VALUES ? ATOMS / FOLD : 64 / VALUES;
constexpr int OVERRUN = TILES * 64 * ATOM - W_ATOM * FOLD - ATOMS * X_ATOM;
constexpr int RING = STAGES * STAGE + (OVERRUN > 0 ? OVERRUN : 0);
static_assert(ROWS % 16 == 0 && ROWS <= 256 && TOKENS % 8 == 0 && TOKENS <= 128);
static_assert(TILES % WARPGROUPS == 0 && K_BLOCKS >= SPLIT && STAGES >= 2 && ATOMS % FOLD == 0);
static_assert(!PROMOTE || (WEIGHT == 0 && ATOMS / FOLD % AT_ONCE == 0));
static_assert(!BLOCKWISE || (PROMOTE && W_SCALE == 2 && GEMM_K % 128 == 0 && GEMM_N % 8 == 0));
static_assert(FOLD == 1 || (ROWS * FOLD == 64 && WARPGROUPS == 1));

struct Stage {
  u32 w, x;
};
DEVICE Stage stage_at(u32 ring, int i) { return {ring + i * STAGE, ring + i * STAGE + ATOMS * W_ATOM}; }

DEVICE void load_w(const Stage& s, const TensorMap* map, u32 bar, int block, int row) {
#pragma unroll
  for (int a = 0; a < ATOMS; a++) tma_load_2d_evict_first(s.w + a * W_ATOM, map, bar, (block * ATOMS + a) * ATOM_K, row);
}
// As many rows as there are tokens: the map's boxes have no more. Others of a stage hold anything, for tokens that are not stored.
DEVICE void load_x(const Stage& s, const TensorMap* map, u32 bar, int block) {
#pragma unroll
  for (int a = 0; a < ATOMS; a++) tma_load_2d(s.x + a * X_ATOM, map, bar, (block * ATOMS + a) * ATOM_K, 0);
}

// What blocks `block` of K scale: per column of K, tokens, then groups of 8 rows.
DEVICE void load_w_scales(u32 to, const float* w_scale, int block, int row) {
  for (int i = threadIdx.x % 32; i < ATOMS * (ROWS / 8); i += 32) {
    int a = i / (ROWS / 8), g = i % (ROWS / 8), k = min(block * ATOMS + a, GEMM_K / 128 - 1);
    copy_async<4>(to + (a * ATOM_SCALES + TOKENS + g) * 4, w_scale + (u64)(min(row + g * 8, GEMM_N - 1) / W_GROUP) * (GEMM_K / 128) + k);
  }
}
DEVICE void load_x_scales(u32 to, const float* x_scale, int block, int tokens) {
  for (int i = threadIdx.x % 32; i < ATOMS * TOKENS; i += 32) {
    int a = i / TOKENS, t = i % TOKENS, k = min(block * ATOMS + a, GEMM_K / 128 - 1);
    copy_async<4>(to + (a * ATOM_SCALES + t) * 4, x_scale + (u64)min(t, tokens - 1) * (GEMM_K / 128) + k);
  }
}

DEVICE void mma(float (&d)[TOKENS * FOLD / 2], u64 a, u64 b, int accumulate) {
  if constexpr (WEIGHT == 0) wgmma_ss_e4m3(d, a, b, accumulate);
  else if constexpr (WEIGHT == 1) wgmma_ss_bf16(d, a, b, accumulate);
  else wgmma_ss_f16(d, a, b, accumulate);
}

// Columns `a` to `a` + FOLD of a stage: this warpgroup's tiles of 64 rows. `w`, `x`: low words of the descriptors.
DEVICE void multiply(float (&d)[TILES_EACH][TOKENS * FOLD / 2], u32 w, u32 x, int a, int more) {
  constexpr u64 HIGH = 64ull << 32 | 1ull << 62;
#pragma unroll
  for (int j = 0; j < 4; j++)
#pragma unroll
    for (int t = 0; t < TILES_EACH; t++)
      mma(d[t], HIGH | (w + (a * W_ATOM + t * 64 * ATOM) / 16 + 2 * j), HIGH | (x + a * X_ATOM / 16 + 2 * j), more | j);
}

// The value `i` that is wanted of a folded accumulator.
DEVICE float diagonal(const float (&d)[TOKENS * FOLD / 2], int i) {
  int fold = threadIdx.x / 32 / APART;
  float v = d[i];
#pragma unroll
  for (int f = 1; f < FOLD; f++) v = fold == f ? d[f * TOKENS / 2 + i] : v;
  return v;
}

// sum += d of columns `a` to `a` + FOLD, which BLOCKWISE scales.
DEVICE void promote(float (&sum)[TILES_EACH][TOKENS / 2], const float (&d)[TILES_EACH][TOKENS * FOLD / 2], const float* scales, int a, int first_tile) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float* mine = scales + (a + (FOLD > 1 ? warp / APART : 0)) * ATOM_SCALES;
  float w[TILES_EACH][2];
#pragma unroll
  for (int t = 0; t < TILES_EACH; t++)
#pragma unroll
    for (int i = 0; i < 2; i++) {  // rows past ROWS take any: they are not stored
      int g = (first_tile + t) * 8 + warp % 4 * 2 + i;
      w[t][i] = BLOCKWISE ? mine[TOKENS + (FOLD > 1 ? g % (ROWS / 8) : min(g, ROWS / 8 - 1))] : 1.f;
    }
#pragma unroll
  for (int g = 0; g < GROUPS; g++) {
    float2 x = BLOCKWISE ? *(const float2*)(mine + 8 * g + 2 * (lane % 4)) : make_float2(1.f, 1.f);
#pragma unroll
    for (int t = 0; t < TILES_EACH; t++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        float scale = (e % 2 ? x.y : x.x) * w[t][e / 2];
        sum[t][4 * g + e] = fmaf(diagonal(d[t], 4 * g + e), scale, sum[t][4 * g + e]);
      }
  }
}

// FOLD > 1: adds the sums of the folds; the warps of the first ROWS rows then hold them.
DEVICE void unfold(float (&sum)[TILES_EACH][TOKENS / 2], float* scratch) {
  constexpr int SUMS = TILES_EACH * TOKENS / 2;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, fold = warp / APART;
  if (FOLD > 1 && fold)
#pragma unroll
    for (int t = 0; t < TILES_EACH; t++)
#pragma unroll
      for (int i = 0; i < TOKENS / 2; i++) scratch[(warp * SUMS + t * TOKENS / 2 + i) * 32 + lane] = sum[t][i];
  if (FOLD > 1 || X_SCALE == 2) named_barrier_sync<1, CONSUMERS>();  // token_scale is written, too
  if (FOLD == 1 || fold) return;
#pragma unroll
  for (int f = 1; f < FOLD; f++)
#pragma unroll
    for (int t = 0; t < TILES_EACH; t++)
#pragma unroll
      for (int i = 0; i < TOKENS / 2; i++) sum[t][i] += scratch[((warp + f * APART) * SUMS + t * TOKENS / 2 + i) * 32 + lane];
}

// Sends each unit of partial sums to the rank that owns it. `rank` is a constant after unrolling.
DEVICE void send(const float (&d)[TILES_EACH][TOKENS / 2], u32 partials, u32 bar, int first_tile, u32 rank) {
  u32 lane = threadIdx.x % 128 * 16;
#pragma unroll
  for (int t = 0; t < TILES_EACH; t++)
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
      u32 unit = (first_tile + t) * GROUPS + g, owner = unit % SPLIT;
      u32 slot = unit / SPLIT * (SPLIT - 1) + (rank < owner ? rank : rank - 1);
      if (owner != rank)
        store_cluster_v4(map_shared_rank(partials + slot * UNIT_BYTES + lane, owner), map_shared_rank(bar, owner), d[t][4 * g], d[t][4 * g + 1], d[t][4 * g + 2], d[t][4 * g + 3]);
    }
}
// Adds what the peers sent of a unit of this rank's own.
DEVICE void collect(float (&v)[4], const u8* partials, u32 unit) {
#pragma unroll
  for (int i = 0; i < SPLIT - 1; i++) {
    float4 more = *(const float4*)(partials + (unit / SPLIT * (SPLIT - 1) + i) * UNIT_BYTES + threadIdx.x % 128 * 16);
    v[0] += more.x, v[1] += more.y, v[2] += more.z, v[3] += more.w;
  }
}

// Rows n = base + lane / 4 and n + 8, tokens first + 2 (lane % 4) and the next: v[0], v[1] of row n, v[2], v[3] of row n + 8.
// After the transpose a lane holds one token, so that 16-bit rows leave in whole 32-byte sectors.
DEVICE void store_16bit(u16* y, const float (&v)[4], int base, int first, int tokens SENDING(, const Peers& peers, u32 me, u64 area)) {
  int lane = threadIdx.x % 32, token = first + lane / 4;
  u32 low = movmatrix_trans(from_float2<OUT == 1>(v[0], v[1])), high = movmatrix_trans(from_float2<OUT == 1>(v[2], v[3]));
  bool odd = lane & 1;  // odd lanes take the upper eight rows
  u32 other = __shfl_xor_sync(~0u, odd ? low : high, 1);
  uint2 pair = odd ? make_uint2(other, high) : make_uint2(low, other);
  int n = base + (lane & 2) * 2 + odd * 8;
  if (token >= tokens) return;
  u16* out = y + (u64)token * GEMM_N + n;
  if constexpr (GEMM_N % 4 == 0) {
    if (n < GEMM_N) PUT(out, token, n, pair);
  } else {
    if (n < GEMM_N) out[0] = pair.x;
    if (n + 1 < GEMM_N) out[1] = pair.x >> 16;
    if (n + 2 < GEMM_N) out[2] = pair.y;
    if (n + 3 < GEMM_N) out[3] = pair.y >> 16;
  }
}
DEVICE void store_f32(float* y, const float (&v)[4], int base, int first, int tokens) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int e = 0; e < 4; e++) {
    int token = first + 2 * (lane % 4) + e % 2, n = base + lane / 4 + e / 2 * 8;
    if (token < tokens && n < GEMM_N) y[(u64)token * GEMM_N + n] = v[e];
  }
}
// Row n is a gate, row n + 8 its up; gate and up round to 16 bits first, as two linears would.
DEVICE void store_swiglu(void* y, float (&v)[4], int base, int first, int tokens, float out_scale, float reciprocal) {
  int lane = threadIdx.x % 32, token = first + lane / 4, feature = base / 2 + 2 * (lane % 4);
  round_pair<ROUND>(v[0], v[1]), round_pair<ROUND>(v[2], v[3]);
  float h[2] = {swiglu(v[0], v[2]), swiglu(v[1], v[3])};
  u32 packed;
  if constexpr (OUT == 3) {
    u32 codes = e4m3x2(quotient(h[0], out_scale, reciprocal), quotient(h[1], out_scale, reciprocal));
    packed = movmatrix_trans((codes & 0xff) | (codes & 0xff00) << 8);
  } else packed = movmatrix_trans(from_float2<OUT == 1>(h[0], h[1]));
  if (token >= tokens || base >= GEMM_N) return;
  u64 at = (u64)token * (GEMM_N / 2) + feature;
  if constexpr (OUT == 3) *(u16*)((u8*)y + at) = packed | packed >> 8;
  else *(u32*)((u16*)y + at) = packed;
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 64, 1)
few_tokens(const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap x_map, const float* x_scale,
           const float* w_scale, const float* bias, const float* out_scale, void* y, int tokens, int early, int window SEND_PARAMETERS) {
  if (early) griddepcontrol_launch_dependents();
  extern __shared__ __align__(1024) u8 shared[];
  __shared__ u64 full[STAGES], empty[STAGES], landed[STAGES], sums;
  __shared__ float token_scale[TOKENS];
  u8* partials = shared + RING;
  float* scratch = (float*)(partials + OWNED * (SPLIT - 1) * UNIT_BYTES);
  float* stage_scales = scratch + (FOLD > 1 ? 64 * TOKENS : 0);  // per stage
  u32 ring = shared_address(shared), rank = SPLIT > 1 ? cluster_rank() : 0;
  // The shuffle tells the compiler that a warp has one part: ring and descriptors then stay in uniform registers.
  int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32, row = blockIdx.x / SPLIT * ROWS;
  int begin = K_BLOCKS * rank / SPLIT, count = K_BLOCKS * (rank + 1) / SPLIT - begin;
  int filled = count < STAGES ? count : STAGES;
  // The next kernel may start once little of w is left to ask for: its own first fill would come before the rest.
  int start = count - 1 - count * 5 / 32;
  // Stages of the first fill whose w has a barrier of its own, as only `window` of them are on their way at a time.
  int apart = window < filled ? filled : 0, first = window < filled ? window : filled;
  bool w_producer = warp == CONSUMERS / 32, x_producer = warp == CONSUMERS / 32 + 1;
  // Elected, no copy stands in a loop over lanes. Where warps copy scales, too, this saves 1 to 3%; without them 6144 x 4096 took
  // 6.66 us instead of 6.48, 4096 x 14336 14.1 instead of 13.9: w's copies, sooner, are then in each other's way.
  const bool elected = BLOCKWISE ? elect_one() : lane == 0;

  int x_bytes = ATOMS * ATOM * tokens;  // of a stage
  auto ask = [&](int k, int stage) {
    u32 bar = shared_address(full + stage);
    mbarrier_arrive_expect_tx(bar, k < apart ? x_bytes : ATOMS * W_ATOM + x_bytes);
    if (k < apart) mbarrier_arrive_expect_tx(bar = shared_address(landed + stage), ATOMS * W_ATOM);
    load_w(stage_at(ring, stage), &w_map, bar, begin + k, row);
    if (k == start) griddepcontrol_launch_dependents();
  };
  if (w_producer && elected) {
    prefetch_tensormap(&w_map);
    prefetch_tensormap(&x_map);
    for (int i = 0; i < STAGES; i++) {
      mbarrier_init(shared_address(full + i), BLOCKWISE ? 65 : 1);
      mbarrier_init(shared_address(empty + i), CONSUMERS / 32);
    }
#pragma unroll 1
    for (int i = 0; i < apart; i++) mbarrier_init(shared_address(landed + i), 1);
    if (SPLIT > 1) mbarrier_init(shared_address(&sums), 1);
    fence_mbarrier_init();
    if (SPLIT > 1) mbarrier_arrive_expect_tx(shared_address(&sums), (UNITS - rank + SPLIT - 1) / SPLIT * (SPLIT - 1) * UNIT_BYTES);
#pragma unroll 1
    for (int i = 0; i < first; i++) ask(i, i);
  }
  __syncthreads();
  if (SPLIT > 1) cluster_arrive();  // a peer may be written to once it runs

  int first_tile = WARPGROUPS == 1 ? 0 : warp / 4 * TILES_EACH;
  float sum[TILES_EACH][TOKENS / 2], scale[TILES_EACH][2], offset[TILES_EACH][2], tensor_scale = 1.f, quantum = 1.f, reciprocal = 1.f;
  auto scales_at = [&](int stage) { return shared_address(stage_scales) + stage * STAGE_SCALES * 4; };
  if (w_producer) {
    if (BLOCKWISE)
      for (int i = 0; i < filled; i++) load_w_scales(scales_at(i), w_scale, begin + i, row), copy_async_arrive(shared_address(full + i));
    int stage = first % STAGES, parity = first < STAGES;  // of `empty`, at the first lap's end 0
    if (BLOCKWISE || elected) {
#pragma unroll 1
      for (int k = first; k < count; k++) {
        if (k < filled) mbarrier_wait(shared_address(landed + k - window), 0);
        else mbarrier_wait(shared_address(empty + stage), parity);
        if (elected) ask(k, stage);
        if (BLOCKWISE && k >= filled) load_w_scales(scales_at(stage), w_scale, begin + k, row), copy_async_arrive(shared_address(full + stage));
        if (++stage == STAGES) stage = 0, parity ^= 1;
      }
    }
    __syncwarp();
  } else if (x_producer) {
    auto load = [&](int stage, u32 bar, int k) {
      if (elected) load_x(stage_at(ring, stage), &x_map, bar, begin + k);
      if (BLOCKWISE) load_x_scales(scales_at(stage), x_scale, begin + k, tokens), copy_async_arrive(bar);
    };
    griddepcontrol_wait();
#pragma unroll 1
    for (int i = 0; i < filled; i++) load(i, shared_address(full + i), i);
    int stage = 0, parity = 0;
    if (BLOCKWISE || elected) {
#pragma unroll 1
      for (int k = filled; k < count; k++) {
        mbarrier_wait(shared_address(empty + stage), parity);
        load(stage, shared_address(full + stage), k);
        if (++stage == STAGES) stage = 0, parity ^= 1;
      }
    }
    __syncwarp();
  } else {
#pragma unroll
    for (int t = 0; t < TILES_EACH; t++)
#pragma unroll
      for (int i = 0; i < 2; i++) {  // constants of the engine: may be read before the wait
        int n = row + (first_tile + t) * 64 + warp % 4 * 16 + lane / 4 + i * 8;
        scale[t][i] = W_SCALE == 1 && n < GEMM_N ? w_scale[n] : 1.f;
        offset[t][i] = BIAS && n < GEMM_N ? bias[n] : 0.f;
      }
    if (SWIGLU && OUT == 3) quantum = out_scale[0], reciprocal = __frcp_rn(quantum), pin(reciprocal);
    griddepcontrol_wait();
    SENDING(if (blockIdx.x == 0 && (int)threadIdx.x < tokens) store_system(begun_of(peers.region[me], area, threadIdx.x, me), 1u));
    if (X_SCALE == 1) tensor_scale = x_scale[0];
    if (X_SCALE == 2 && threadIdx.x < TOKENS) token_scale[threadIdx.x] = (int)threadIdx.x < tokens ? x_scale[threadIdx.x] : 0.f;
    u32 w = wgmma_descriptor(ring + first_tile * 64 * ATOM), x = wgmma_descriptor(stage_at(ring, 0).x);
    int stage = 0, parity = 0;
    float d[AT_ONCE][TILES_EACH][TOKENS * FOLD / 2];
    if constexpr (PROMOTE) {
#pragma unroll
      for (int t = 0; t < TILES_EACH; t++)
#pragma unroll
        for (int i = 0; i < TOKENS / 2; i++) sum[t][i] = 0.f;
#pragma unroll 1
      for (int k = 0; k < count; k++) {
        if (k < apart) mbarrier_wait(shared_address(landed + k), 0);
        mbarrier_wait(shared_address(full + stage), parity);
#pragma unroll
        for (int a = 0; a < ATOMS; a += FOLD * AT_ONCE) {
          wgmma_fence();
#pragma unroll
          for (int i = 0; i < AT_ONCE; i++) multiply(d[i], w + stage * (STAGE / 16), x + stage * (STAGE / 16), a + i * FOLD, 0);
          wgmma_commit_group();
          wgmma_wait_group<0>();
#pragma unroll
          for (int i = 0; i < AT_ONCE; i++) {
#pragma unroll
            for (int t = 0; t < TILES_EACH; t++)
#pragma unroll
              for (int j = 0; j < TOKENS * FOLD / 2; j++) pin(d[i][t][j]);
            promote(sum, d[i], stage_scales + stage * STAGE_SCALES, a + i * FOLD, first_tile);
          }
        }
        __syncwarp();  // every lane has read the scales
        if (lane == 0) mbarrier_arrive(shared_address(empty + stage));
        if (++stage == STAGES) stage = 0, parity ^= 1;
      }
    } else {
      int last = -1;
#pragma unroll 1
      for (int k = 0; k < count; k++) {
        if (k < apart) mbarrier_wait(shared_address(landed + k), 0);
        mbarrier_wait(shared_address(full + stage), parity);
        wgmma_fence();
#pragma unroll
        for (int a = 0; a < ATOMS; a += FOLD) multiply(d[0], w + stage * (STAGE / 16), x + stage * (STAGE / 16), a, k | a);
        wgmma_commit_group();
        wgmma_wait_group<1>();  // the stage before is read
        if (last >= 0 && lane == 0) mbarrier_arrive(shared_address(empty + last));
        last = stage;
        if (++stage == STAGES) stage = 0, parity ^= 1;
      }
      wgmma_wait_group<0>();
#pragma unroll
      for (int t = 0; t < TILES_EACH; t++)
#pragma unroll
        for (int i = 0; i < TOKENS / 2; i++) sum[t][i] = diagonal(d[0][t], i);
    }
  }

  if (SPLIT > 1) cluster_wait();
  if (w_producer || x_producer) return;
  unfold(sum, scratch);
  // No branches but one for all units of a rank, and those past the last token: the units' latencies overlap.
#pragma unroll
  for (u32 r = 0; r < SPLIT; r++) {
    if (SPLIT > 1 && r != rank) continue;
    if (SPLIT > 1) send(sum, shared_address(partials), shared_address(&sums), first_tile, r), mbarrier_wait(shared_address(&sums), 0);
#pragma unroll
    for (int t = 0; t < TILES_EACH; t++) {
      int base = (first_tile + t) * 64 + warp % 4 * 16;
      if (base >= ROWS) break;
#pragma unroll
      for (int from = 0; from < GROUPS; from += TOGETHER) {
        if (8 * from >= tokens) break;
#pragma unroll
        for (int g = from; g < from + TOGETHER && g < GROUPS; g++) {
          u32 unit = (first_tile + t) * GROUPS + g;
          if (unit % SPLIT != r) continue;
          float v[4];
#pragma unroll
          for (int e = 0; e < 4; e++) v[e] = sum[t][4 * g + e];
          collect(v, partials, unit);
#pragma unroll
          for (int e = 0; e < 4; e++) {
            float x = X_SCALE == 1 ? tensor_scale : X_SCALE == 2 ? token_scale[8 * g + 2 * (lane % 4) + e % 2] : 1.f;
            v[e] = v[e] * x * scale[t][e / 2] + offset[t][e / 2];
          }
          if constexpr (SWIGLU) store_swiglu(y, v, row + base, 8 * g, tokens, quantum, reciprocal);
          else if constexpr (OUT == 2) store_f32((float*)y, v, row + base, 8 * g, tokens);
          else store_16bit((u16*)y, v, row + base, 8 * g, tokens SENDING(, peers, me, area));
        }
      }
    }
  }
}
