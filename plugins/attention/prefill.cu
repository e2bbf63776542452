// Causal attention of packed prefill chunks over the paged cache: O = softmax(scale Q K^T) V, per query tile of 128 rows
// and head. Persistent (blocks take items from a list), warp-specialised: a TMA warp fills rings of K and V tiles of 128
// tokens (two pages); two consumer warpgroups of 64 query rows each issue Q K^T of tile j, then P V of tile j - 1, and take
// the softmax of tile j under it.
//
// The running maximum is an integer in the log2 domain, so that rescaling is exact and P is quantized to the same codes in
// whatever order tiles come. e4m3: P * 256 becomes e4m3 in registers; the cache's token permutation (layout.py) makes an
// accumulator fragment an operand fragment. 16 bits: P is rounded to the model's type, V is read transposed by wgmma; the
// maximum is that of a row's first tile, and P may be above 1: only when a thread's sum of P in a tile passes P_LIMIT, its warp
// computes the tile's scores once more (scores.cuh) and raises the maxima. So no exponential waits for a maximum.
// e4m3 products are summed by wgmma with about 14 bits of fraction, so every tile's P V is added up in float32.
//
// A tile of 128 x 128 took, on an H200 in clocks (e4m3, D 128), 1015 for its products alone, 1680 for the rest alone, and
// 2410 for both: they overlap little. A warp stands still while its wgmma wait for those before; beside wgmma, integer and
// conversion instructions take 1.8 times as long, additions 1.2 times, and wgmma itself 1.1 to 1.4 times. Only the
// exponentials (8 clocks each) run beside it undisturbed. So fewer and better placed instructions helped, to 2310 clocks
// (TFLOP/s at 16384 tokens, 32/8 heads, sustained: 816 before, 879 after): the addition of the tile before under Q K^T,
// maxima three at a time, no additions among the exponentials, the division by the output's scale once a row.
// What did not: a quarter of the exponentials by a polynomial of degree 3 (-7 %), adding up every second or
// fourth tile (-1 to -2 %), warpgroups that take turns at the products (-6 %) or at the exponentials (-12 %), or that start
// apart (-2 %), P V issued after the maxima (-6 %), maxima reduced only when one rises (-11 %), scores computed one tile
// ahead into a second set of registers with the sums in shared memory (-22 %), the next item's Q K^T before an item's end (0),
// maxima raised only when a code of P reaches 448 (-5 to -9 %: the check costs as much, and what waits for exponentials among
// them holds them up), sums and codes taken among the exponentials (-1 to -6 %), tiles in halves of 64 tokens, Q K^T of one and
// P V of the other under the softmax between them (-7 to -11 %; there, without the exponentials 12 % more, without adding up
// 10, without sums 6, without packing 4), and at 4 x 1024 tokens, where the power limit does not count yet: the waits for the
// next K and V under the exponentials (-2 %), products in turn by a named barrier (-3 %), five or six tiles of K and V in place
// of four (+1 %, -2 %). ex2 of two float16 takes twice the clocks of one float32. Q rotated and quantized here saves
// rope_kv_write.cu 15 us at 4096 tokens of 32 heads, but takes the consumers 20 us, and the producer's three idle warps, an item
// ahead, 18 to 30 us; at 16384 tokens these hide it, and nothing is gained.
// 16 bits: a third tile of K and V in place of a second one of Q is worth 6 % (4096 tokens) to 15 % (16384 tokens); with it,
// products in turn by a named barrier cost 0 to 2 % (without it they gain 2 to 3 %), and Q sent for after the item's first tiles
// of K and V costs 0 to 5 %. No wait for maxima: 10 to 16 % (4 % at 1024 tokens), of which 0 to 2 % by the additions of P behind
// the exponentials; in halves of 64 tokens it is 3 %, with Q in registers 2 to 6 %.
// (Times of contestants in turn: under the power limit the place in the turn is worth up to 3 %.)
//
// Beside decode rows (`beside`) blocks do not wait for decode attention to end: they start where its blocks have left a
// multiprocessor, which happens up to 5 % apart, and take items in turn from the first on. It lets them start once what comes
// before it is done, so q, K, V and the list are there; they wait for it before they end, so that whoever waits for them
// waits for both. A step of 590 contexts of 2049 to 4096 and 434 tokens of a prompt takes 42.6 instead of 43.2 ms, one of 88 of
// 20000 to 22000 and 910 tokens at 10000 47.8 instead of 48.2.
//
// Constants: NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, FP8_CACHE, QUANT_OUT, DTYPE, SCALE_LOG2 (softmax scale * log2 e), Q_STAGES (tiles of
// Q), STAGES (tiles of K and of V).
#include "fp8/convert.cuh"
#include "fp8/mbarrier.cuh"
#include "fp8/sync.cuh"
#include "fp8/tma.cuh"
#include "fp8/wgmma.cuh"
#include "scores.cuh"
#include "softmax.cuh"
#include "tiles.cuh"

#define METHOD __device__ __forceinline__

constexpr int PAGE = 64;
constexpr int ROW = HEAD_DIM * (FP8_CACHE ? 1 : 2);      // bytes of a q, k or v row
constexpr int SWIZZLE = ROW < 128 ? ROW : 128;           // bytes of a row of one swizzle atom
constexpr int ATOMS = ROW / SWIZZLE;                     // atom columns of a tile
constexpr int ATOM_ELEMENTS = SWIZZLE / (FP8_CACHE ? 1 : 2);
constexpr int TILE_BYTES = 128 * ROW;                    // of Q, K and V alike
constexpr int ATOM_BYTES = 128 * SWIZZLE;                // one atom column of a tile
constexpr int PV_STEPS = TILE_KV * (FP8_CACHE ? 1 : 2) / 32;
constexpr int OUT_BYTES = QUANT_OUT ? 1 : 2;
constexpr float P_LIMIT = 32768;                         // 16 bits: of a thread's sum of P of a tile, that float16 holds each
static_assert(SWIZZLE == 64 || SWIZZLE == 128);

struct Item {
  int row, rows, position, sequence, head;  // rows < 0: there are no more
  METHOD int tiles() const { return max(position + rows + TILE_KV - 1, 0) / TILE_KV; }
};

struct Shared {
  u64 q_full[Q_STAGES], q_empty[Q_STAGES], k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
  Item items[Q_STAGES];  // beside each Q tile
  float zero;            // 0; 16 bits
};

// The item of some rank in the list (tiles.cuh), of which `list` is the first entry.
DEVICE bool get_item(Item& item, const int4* tiles, int4 list, int rank) {
  if (rank >= list.x * NUM_HEADS) return false;
  const int section = rank / (list.x * list.z), inside = rank - section * list.x * list.z;
  const int heads = min(list.z, NUM_HEADS - section * list.z);
  const int4 tile = __ldcg(tiles + 1 + inside / heads);
  item = {tile.x, tile.y, tile.z, tile.w, section * list.z + inside % heads};
  return true;
}

// A position in a ring of N buffers.
template <int N> struct Ring {
  int stage = 0;
  u32 phase = 0;
  METHOD void next() {
    if (++stage == N) stage = 0, phase ^= 1;
  }
};

// K-major operand of SWIZZLE-byte rows: q, k.
DEVICE u64 row_descriptor(u32 address) {
  constexpr u64 layout = SWIZZLE == 128 ? 1 : 2, stride = 8 * SWIZZLE >> 4;
  return (u64)((address & 0x3FFFF) >> 4) | (1ull << 16) | (stride << 32) | (layout << 62);
}
// e4m3: V^T in rows of 16 tokens (no swizzle); the leading offset steps over 16 tokens, the stride over 8 dimensions. 16 bits:
// rows of V, read transposed; the leading offset steps over 64 dimensions, the stride over 8 tokens.
DEVICE u64 value_descriptor(u32 address) {
  constexpr u64 layout = FP8_CACHE ? 0 : 1, stride = FP8_CACHE ? 128 >> 4 : 1024 >> 4, leading = FP8_CACHE ? HEAD_DIM : ATOM_BYTES >> 4;
  return (u64)((address & 0x3FFFF) >> 4) | (leading << 16) | (stride << 32) | (layout << 62);
}

DEVICE void issue_qk(float (&s)[TILE_KV / 2], u64 q, u64 k) {
#pragma unroll
  for (int i = 0; i < ROW / 32; i++) {
    const u64 at = i / 4 * (ATOM_BYTES >> 4) + i % 4 * 2;
    if constexpr (FP8_CACHE) wgmma_ss_e4m3(s, q + at, k + at, i != 0);
    else if constexpr (DTYPE == 0) wgmma_ss_bf16(s, q + at, k + at, i != 0);
    else wgmma_ss_f16(s, q + at, k + at, i != 0);
  }
}

DEVICE void issue_pv(float (&o)[HEAD_DIM / 2], const u32 (&p)[PV_STEPS][4], u64 v, int onto = 0) {
#pragma unroll
  for (int i = 0; i < PV_STEPS; i++) {
    const u64 at = i * (FP8_CACHE ? 32 * HEAD_DIM >> 4 : 16 * 128 >> 4);
    const int accumulate = FP8_CACHE ? (i != 0 ? 1 : onto) : 1;
    if constexpr (FP8_CACHE) wgmma_rs_e4m3(o, p[i], v + at, accumulate);
    else if constexpr (DTYPE == 0) wgmma_rs_bf16<1>(o, p[i], v + at, accumulate);
    else wgmma_rs_f16<1>(o, p[i], v + at, accumulate);
  }
}

DEVICE void pack(const float (&s)[TILE_KV / 2], u32 (&p)[PV_STEPS][4]) {
#pragma unroll
  for (int i = 0; i < PV_STEPS; i++) {
    if constexpr (FP8_CACHE) {
      const float* x = &s[16 * i];
      p[i][0] = e4m3x4(x[0], x[1], x[4], x[5]), p[i][1] = e4m3x4(x[2], x[3], x[6], x[7]);
      p[i][2] = e4m3x4(x[8], x[9], x[12], x[13]), p[i][3] = e4m3x4(x[10], x[11], x[14], x[15]);
    } else {
#pragma unroll
      for (int k = 0; k < 4; k++) p[i][k] = from_float2<DTYPE>(s[8 * i + 2 * k], s[8 * i + 2 * k + 1]);
    }
  }
}

DEVICE void scale_rows(float (&o)[HEAD_DIM / 2], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < HEAD_DIM / 2; i++) o[i] *= factor[i / 2 % 2];
}

// 4 x 4 transpose over the threads of a quad: word i of thread c becomes word c of thread i.
DEVICE void transpose_quad(u32 (&w)[4], int c) {
#pragma unroll
  for (int d = 1; d < 4; d *= 2) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i & d) continue;
      const u32 got = __shfl_xor_sync(~0u, c & d ? w[i] : w[i + d], d);
      if (c & d) w[i] = got;
      else w[i + d] = got;
    }
  }
}

// Writes a row of O, `row` 0 or 1 of the thread's two, in 16-byte pieces.
DEVICE void store_row(u8* to, const float (&o)[HEAD_DIM / 2], int row, int c, bool valid) {
  constexpr int BLOCKS = QUANT_OUT ? 8 : 4;  // of 8 columns per 4 x 4 words
#pragma unroll
  for (int base = 0; base < HEAD_DIM / 8; base += BLOCKS) {
    u32 w[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float* x = &o[(base + i * (BLOCKS / 4)) * 4 + 2 * row];
      if constexpr (QUANT_OUT)
        w[i] = e4m3x4(x[0], x[1], x[4], x[5]);
      else w[i] = from_float2<DTYPE>(x[0], x[1]);
    }
    transpose_quad(w, c);
    uint4 piece = make_uint4(w[0], w[1], w[2], w[3]);
    if constexpr (QUANT_OUT)  // low halves are the first block of 8 columns, high halves the second
      piece = make_uint4(__byte_perm(w[0], w[1], 0x5410), __byte_perm(w[2], w[3], 0x5410), __byte_perm(w[0], w[1], 0x7632),
                         __byte_perm(w[2], w[3], 0x7632));
    if (valid) *(uint4*)(to + base * 8 * OUT_BYTES + c * 16) = piece;
  }
}

DEVICE void produce(const TensorMap* q_map, const TensorMap* k_map, const TensorMap* v_map, int4* tiles, const int* block_tables,
                    int max_blocks, int beside, Shared& b, u32 q_smem, u32 k_smem, u32 v_smem) {
  const int lane = threadIdx.x % 32;
  const int4 list = __ldcg(tiles);
  Ring<Q_STAGES> q;
  Ring<STAGES> ring;
  Item item;
  int rank = blockIdx.x;
  if (beside) rank = __shfl_sync(~0u, lane == 0 ? atomicAdd(&tiles[0].y, 1) : 0, 0);  // who starts first, takes the longest
#pragma unroll 1
  while (get_item(item, tiles, list, rank)) {
    int taken;  // arrives during this item
    if (lane == 0) {
      taken = atomicAdd(&tiles[0].y, 1);
      mbarrier_wait(shared_address(&b.q_empty[q.stage]), q.phase ^ 1);
      const u32 bar = shared_address(&b.q_full[q.stage]);
      b.items[q.stage] = item;
      mbarrier_arrive_expect_tx(bar, TILE_BYTES);
#pragma unroll
      for (int a = 0; a < ATOMS; a++)
        tma_load_3d(q_smem + q.stage * TILE_BYTES + a * ATOM_BYTES, q_map, bar, a * ATOM_ELEMENTS, item.head, item.row);
    }
    q.next();
    const int kv_head = item.head / (NUM_HEADS / NUM_KV_HEADS);
    const int tile_count = item.tiles(), pages = (item.position + item.rows + PAGE - 1) / PAGE;
    const int* table = block_tables + (u64)item.sequence * max_blocks;
    int page_ids = 0;
#pragma unroll 1
    for (int j = 0; j < tile_count; j++) {
      if (j % 16 == 0) page_ids = j * 2 + lane < pages ? table[j * 2 + lane] : -1;  // 32 pages at a time
      const int page0 = __shfl_sync(~0u, page_ids, j % 16 * 2), page1 = __shfl_sync(~0u, page_ids, j % 16 * 2 + 1);
      if (lane == 0) {
        // A page of -1 lies outside of the map: TMA fills zeros.
        mbarrier_wait(shared_address(&b.k_empty[ring.stage]), ring.phase ^ 1);
        const u32 k_bar = shared_address(&b.k_full[ring.stage]), k_to = k_smem + ring.stage * TILE_BYTES;
        mbarrier_arrive_expect_tx(k_bar, TILE_BYTES);
#pragma unroll
        for (int a = 0; a < ATOMS; a++) {
          tma_load_2d(k_to + a * ATOM_BYTES, k_map, k_bar, a * ATOM_ELEMENTS, (page0 * NUM_KV_HEADS + kv_head) * PAGE);
          tma_load_2d(k_to + a * ATOM_BYTES + PAGE * SWIZZLE, k_map, k_bar, a * ATOM_ELEMENTS, (page1 * NUM_KV_HEADS + kv_head) * PAGE);
        }
        mbarrier_wait(shared_address(&b.v_empty[ring.stage]), ring.phase ^ 1);
        const u32 v_bar = shared_address(&b.v_full[ring.stage]), v_to = v_smem + ring.stage * TILE_BYTES;
        mbarrier_arrive_expect_tx(v_bar, TILE_BYTES);
        if constexpr (FP8_CACHE) {
          tma_load_2d(v_to, v_map, v_bar, 0, (page0 * NUM_KV_HEADS + kv_head) * (HEAD_DIM / 2));
          tma_load_2d(v_to + HEAD_DIM * PAGE, v_map, v_bar, 0, (page1 * NUM_KV_HEADS + kv_head) * (HEAD_DIM / 2));
        } else {
#pragma unroll
          for (int a = 0; a < ATOMS; a++) {
            tma_load_2d(v_to + a * ATOM_BYTES, v_map, v_bar, a * ATOM_ELEMENTS, (page0 * NUM_KV_HEADS + kv_head) * PAGE);
            tma_load_2d(v_to + a * ATOM_BYTES + PAGE * SWIZZLE, v_map, v_bar, a * ATOM_ELEMENTS, (page1 * NUM_KV_HEADS + kv_head) * PAGE);
          }
        }
      }
      ring.next();
    }
    rank = (beside ? 0 : gridDim.x) + __shfl_sync(~0u, taken, 0);
  }
  if (lane == 0) {
    mbarrier_wait(shared_address(&b.q_empty[q.stage]), q.phase ^ 1);
    b.items[q.stage].rows = -1;
    mbarrier_arrive(shared_address(&b.q_full[q.stage]));
  }
}

struct Consumer {
  Shared& b;
  u32 k_smem, v_smem;
  Ring<STAGES> k, v;
  float scale;
  int lane;
  METHOD void wait_k() { mbarrier_wait(shared_address(&b.k_full[k.stage]), k.phase); }
  METHOD void wait_v() { mbarrier_wait(shared_address(&b.v_full[v.stage]), v.phase); }
  METHOD void release_k() {
    if (lane == 0) mbarrier_arrive(shared_address(&b.k_empty[k.stage]));
    k.next();
  }
  METHOD void release_v() {
    if (lane == 0) mbarrier_arrive(shared_address(&b.v_empty[v.stage]));
    v.next();
  }

  // Adds O of a finished tile to the total, and rescales what there is to the maximum of the tile after it.
  METHOD void add_up(float (&o)[HEAD_DIM / 2], float (&total)[HEAD_DIM / 2], const Softmax& state) {
    if constexpr (FP8_CACHE) {
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 2; i++) total[i] += o[i];
    }
    if (state.changed) scale_rows(FP8_CACHE ? total : o, state.rescale);  // seldom after the first tiles
  }

  // P of a tile and its sums once more, with maxima that the tile has raised.
  template <bool MASKED>
  METHOD void weigh_again(float (&s)[TILE_KV / 2], float (&l)[2], u32 (&p)[PV_STEPS][4], Softmax& state, u32 q_tile, int first,
                          const int (&visible)[2]) {
    scores<ROW, ATOM_BYTES>(s, q_tile, first, k_smem + k.stage * TILE_BYTES, lane);
    if constexpr (MASKED) mask(s, visible);
    raise(s, state, scale);
    exponentials(s, state, scale);
    sums(s, l, 0.f);
    pack(s, p);
  }

  // One step of the main loop: S of this tile and O of the tile before. q_tile, first: where the warp's rows of Q are.
  template <bool MASKED>
  METHOD void step(float (&s)[TILE_KV / 2], float (&o)[HEAD_DIM / 2], float (&total)[HEAD_DIM / 2], u32 (&p)[PV_STEPS][4], Softmax& state,
                   u64 q, u32 q_tile, int first, const int (&visible)[2]) {
    wait_k();
    wgmma_fence();
    issue_qk(s, q, row_descriptor(k_smem + k.stage * TILE_BYTES));
    wgmma_commit_group();
    add_up(o, total, state);
    wait_v();
    wgmma_fence();
    issue_pv(o, p, value_descriptor(v_smem + v.stage * TILE_BYTES));
    wgmma_commit_group();
    wgmma_wait_group<1>();
    pin_scores(s);
    if constexpr (FP8_CACHE) release_k();
    if constexpr (MASKED) mask(s, visible);
    if constexpr (FP8_CACHE) raise(s, state, scale);
    exponentials(s, state, scale);
    // Already complete; its loop ends the basic block, without which ptxas moves what follows up, over the exponentials.
    wait_v();
    wgmma_wait_group<0>();
    float l[2];
    if constexpr (FP8_CACHE) {
      release_v();
      sums(s, l, 0.f);
      state.sum[0] += l[0], state.sum[1] += l[1];
      pack(s, p);
    } else {
      const float zero = load_late(b.zero);
      release_v();
      pack(s, p);
      sums(s, l, zero);
      state.changed = false;
      if (__any_sync(~0u, fmaxf(l[0], l[1]) > P_LIMIT)) weigh_again<MASKED>(s, l, p, state, q_tile, first, visible);
      release_k();
      state.sum[0] += l[0], state.sum[1] += l[1];
    }
  }
};

DEVICE void consume(u8* y, const float* q_scale, const float* k_scale, const float* v_scale, const float* out_scale,
                    Shared& b, u32 q_smem, u32 k_smem, u32 v_smem, int group) {
  const int lane = threadIdx.x % 32, c = lane % 4, row_of_tile = group * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4;
  const float v_factor = FP8_CACHE ? *v_scale : 1.f;
  const float out_factor = QUANT_OUT ? v_factor / *out_scale : v_factor;
  Consumer my{b, k_smem, v_smem, {}, {}, FP8_CACHE ? (float)SCALE_LOG2 * *q_scale * *k_scale : (float)SCALE_LOG2, lane};
  Ring<Q_STAGES> q_ring;
#pragma unroll 1
  while (true) {
    mbarrier_wait(shared_address(&b.q_full[q_ring.stage]), q_ring.phase);
    const Item item = b.items[q_ring.stage];
    if (item.rows < 0) break;
    float s[TILE_KV / 2], o[HEAD_DIM / 2], total[HEAD_DIM / 2];
    u32 p[PV_STEPS][4];
    Softmax state{{-1e30f, -1e30f}, {0.f, 0.f}, {1.f, 1.f}, false};
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; i++) o[i] = total[i] = 0.f;
    const int all = item.tiles(), my_rows = min(item.rows, group * 64 + 64);
    const int mine = item.rows > group * 64 ? max(item.position + my_rows + TILE_KV - 1, 0) / TILE_KV : 0;
    const int whole = (item.position + group * 64 + 1) / TILE_KV;  // tiles that every row sees wholly
    const int last = item.position + row_of_tile - 2 * c;
    const u32 q_tile = q_smem + q_ring.stage * TILE_BYTES;
    const int first = row_of_tile - lane / 4;
    const u64 q = row_descriptor(q_tile + group * 64 * SWIZZLE);
    if (mine > 0) {
      my.wait_k();
      wgmma_fence();
      issue_qk(s, q, row_descriptor(k_smem + my.k.stage * TILE_BYTES));
      wgmma_commit_group();
      wgmma_wait_group<0>();
      pin_scores(s);
      my.release_k();
      if (whole < 1) {
        const int visible[2] = {last, last + 8};
        mask(s, visible);
      }
      raise(s, state, my.scale);
      state.changed = false;  // there is nothing to rescale yet
      exponentials(s, state, my.scale);
      if constexpr (FP8_CACHE) {
        float l[2];
        sums(s, l, 0.f);
        state.sum[0] += l[0], state.sum[1] += l[1];
      } else sums(s, state.sum, 0.f);
      pack(s, p);
      int j = 1;
#pragma unroll 1
      for (; j < whole; j++) {
        const int visible[2] = {0, 0};
        my.step<false>(s, o, total, p, state, q, q_tile, first, visible);
      }
#pragma unroll 1
      for (; j < mine; j++) {
        const int visible[2] = {last - j * TILE_KV, last + 8 - j * TILE_KV};
        my.step<true>(s, o, total, p, state, q, q_tile, first, visible);
      }
      if (state.changed) {
        scale_rows(o, state.rescale);
        if constexpr (FP8_CACHE) scale_rows(total, state.rescale);
      }
      my.wait_v();
      wgmma_fence();
      issue_pv(o, p, value_descriptor(v_smem + my.v.stage * TILE_BYTES), 1);  // onto that of the tile before: saves adding it up
      wgmma_commit_group();
      wgmma_wait_group<0>();
      my.release_v();
    }
    int row = item.row, rows = item.rows, head = item.head;
    if constexpr (FP8_CACHE && !QUANT_OUT) {  // read anew: here ptxas would spill them over the main loop
      row = b.items[q_ring.stage].row, rows = b.items[q_ring.stage].rows, head = b.items[q_ring.stage].head;
    }
    __syncwarp();  // all lanes have read the item, also where none of them had products to wait for
    if (lane == 0) mbarrier_arrive(shared_address(&b.q_empty[q_ring.stage]));
    q_ring.next();
    for (int j = mine; j < all; j++) {  // tiles for the other warpgroup alone
      my.wait_k();
      my.release_k();
      my.wait_v();
      my.release_v();
    }
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float l = state.sum[r];
      l += __shfl_xor_sync(~0u, l, 1);
      l += __shfl_xor_sync(~0u, l, 2);
      factor[r] = l > 0.f ? out_factor / l : 0.f;  // a sequence of length 0 has no sum
    }
    if constexpr (FP8_CACHE) {
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 2; i++) o[i] += total[i];
    }
    scale_rows(o, factor);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int place = row_of_tile + 8 * r;
      u8* to = y + ((u64)(row + place) * NUM_HEADS + head) * HEAD_DIM * OUT_BYTES;
      store_row(to, o, r, c, place < rows);
    }
  }
}

extern "C" __global__ void __launch_bounds__(384, 1)
prefill(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
        int4* tiles, const int* block_tables, const float* q_scale, const float* k_scale, const float* v_scale, const float* out_scale,
        u8* y, int max_blocks, int beside) {
  extern __shared__ __align__(1024) u8 smem[];
  __shared__ Shared b;
  const u32 q_smem = shared_address(smem), k_smem = q_smem + Q_STAGES * TILE_BYTES, v_smem = k_smem + STAGES * TILE_BYTES;
  if (threadIdx.x == 0) {
    if constexpr (!FP8_CACHE) b.zero = 0.f;
    for (int i = 0; i < Q_STAGES; i++) mbarrier_init(shared_address(&b.q_full[i]), 1), mbarrier_init(shared_address(&b.q_empty[i]), 8);
    for (int i = 0; i < STAGES; i++) {
      mbarrier_init(shared_address(&b.k_full[i]), 1), mbarrier_init(shared_address(&b.k_empty[i]), 8);
      mbarrier_init(shared_address(&b.v_full[i]), 1), mbarrier_init(shared_address(&b.v_empty[i]), 8);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  griddepcontrol_launch_dependents();
  if (!beside) griddepcontrol_wait();
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (group == 2) {
    setmaxnreg_dec<40>();
    if (threadIdx.x < 288) produce(&q_map, &k_map, &v_map, tiles, block_tables, max_blocks, beside, b, q_smem, k_smem, v_smem);
  } else {
    setmaxnreg_inc<232>();
    consume(y, q_scale, k_scale, v_scale, out_scale, b, q_smem, k_smem, v_smem, group);
  }
  if (beside) griddepcontrol_wait();  // who waits for this kernel waits for decode attention too
}
