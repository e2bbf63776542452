// Causal attention of packed prefill chunks over the paged e4m3 cache (prefill.cu: 16 bits): O = softmax(scale Q K^T) V, per piece
// of up to 192 query rows and head. Persistent (blocks take items from a list; `beside`: prefill.cu), warp-specialised: a TMA warp fills
// rings of K and V tiles of 128 tokens (two pages); three consumer warpgroups of 64 query rows each take turns at the products:
// P V of tile j - 1, then Q K^T of tile j, whose softmax runs under the products of the other two.
//
// The running maximum is an integer in the log2 domain, so that rescaling is exact and P is quantized to the same codes in
// whatever order tiles come. P * 256 becomes e4m3 in registers; the cache's token permutation (layout.py) makes an accumulator
// fragment an operand fragment.
// wgmma cuts each product off at about 14 bits below the sum. So every FLUSH tiles O goes to a float32 total in shared memory, before
// the warpgroup's turn, when it waits anyway: where values are 2 +- 1, O then comes out 1.2 % smaller at 4096 tokens (0.8 % if every
// 768 tokens, which costs 3 to 5 %, 0.5 % every 512, 0.05 % every 128). Where it is cut depends on the tokens' places in the context
// alone: a row has the same bits whatever chunk of the prompt it comes in.
//
// Registers, 160 a thread: S takes 64, then P 32 in its place, O 64. So P V has ended before Q K^T begins; the total has no place.
//
// Per 128 x 128 scores, in clocks of an H200 (D 128, 16384 tokens): products need 1015, all the rest 1290 with three warpgroups.
// Two, with the total in registers and Q K^T and P V of the tile before under one softmax, took 2100; three without turns 1930 to
// 2020, in turn by named barriers 1850 to 1880 (O flushed every 1024 tokens; 1960 every 512).
// An item of 128 rows, that is of two warpgroups, takes 0.77 of the time of one of 192, one of 64 rows 0.65 (0.89 and 0.65 without
// turns; who has no rows takes none).
// Tried here: tiles of 64 tokens, Q in registers or not, P V and Q K^T issued together, or P V under the softmax, 2170 to 2250; of 96
// tokens 2060 to 2170; the turn passed when all, half or a quarter of Q K^T is still to come, or between the products, +1 to +3 %
// (behind the maxima, where ptxas put it, 2 to 5 %); row sums by wgmma with a tile of ones, of the codes, are too coarse for few
// tokens and not faster. The flush costs 4 %; within the turn, under Q K^T, a quarter of the columns a tile 9 % and all of them
// 50 %, before the turn a quarter a tile 7 %, a quarter every second tile 3 %, in the softmax 2 % more. A float16 total would save
// 1 % from 8192 tokens on, but a row that ends with a flush's tile is rounded only where its piece goes on. Two tiles of Q, three of K
// and two of V against one, three and three: 1 to 2 %, 10 % at 1024 tokens. The last tile of a warpgroup in half where no row sees
// more: 5 % at 1024 tokens. An item's last P V in one turn with the next item's first Q K^T: 2 to 9 % slower, for what ends an item
// then stands before that tile's softmax. No difference (below 1 %): O overwritten after a flush instead of cleared; maxima made
// integers by an addition; negative scores looked at only while a maximum is negative; four tiles of K and of V; K and V loaded once
// for two blocks whose heads share them (a cluster, multicast). From 8192 tokens on the GPU is at its power limit: products in turn
// without the softmax take 3/4 of the time, 1.33 PFLOP/s.
// Tried with two warpgroups: a quarter of the exponentials by a polynomial of degree 3 (-7 %), adding up every second or fourth
// tile (-1 to -2 %), turns at the products (-3 to -6 %) or at the exponentials (-12 %), P V issued after the maxima (-6 %), maxima
// reduced only when one rises (-11 %), scores one tile ahead with the sums in shared memory (-22 %), the next item's Q K^T before an
// item's end (0), maxima raised only when a code of P reaches 448 (-5 to -9 %), sums and codes taken among the exponentials (-1 to
// -6 %), tiles in halves of 64 tokens, products of one under the softmax of the other (-7 to -11 %). Kept: maxima three at a time,
// the division by the output's scale once a row.
// ex2 of two float16 takes twice the clocks of one float32. Q rotated and quantized here saves rope_kv_write.cu 15 us at 4096
// tokens of 32 heads, but takes the consumers 20 us, and the producer's three idle warps, an item ahead, 18 to 30 us.
//
// Constants: NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, FP8_CACHE (1), QUANT_OUT, DTYPE, SCALE_LOG2 (softmax scale * log2 e), Q_STAGES,
// K_STAGES, V_STAGES (tiles of each).
#include "fp8/mbarrier.cuh"
#include "fp8/sync.cuh"
#include "fp8/tma.cuh"
#include "fp8/wgmma.cuh"
#include "prefill_parts.cuh"

constexpr int GROUPS = 3, WARPS = 4 * GROUPS;
constexpr int Q_BYTES = 64 * GROUPS * ROW, TILE_BYTES = TILE_KV * ROW;  // of a tile of Q; of K and V
constexpr int FLUSH = 8;    // tiles of a sum by wgmma
constexpr int AT_ONCE = 4;  // float4s of the total
static_assert(FP8_CACHE);

struct Shared {
  u64 q_full[Q_STAGES], q_empty[Q_STAGES], k_full[K_STAGES], k_empty[K_STAGES], v_full[V_STAGES], v_empty[V_STAGES];
  Item items[Q_STAGES];  // beside each Q tile
  int4 list;  // the first entry of the work list: it takes no registers here
};

// V^T in rows of 16 tokens (no swizzle); the leading offset steps over 16 tokens, the stride over 8 dimensions.
DEVICE u64 value_descriptor(u32 address) {
  return (u64)((address & 0x3FFFF) >> 4) | ((u64)HEAD_DIM << 16) | (128ull >> 4 << 32);
}

// Of a tile of a ring, from that of the first: where products are begun, no instruction more is in the turn than must be.
DEVICE u64 tile_descriptor(u64 first, int stage) {
  return (first & 0xFFFFFFFF00000000ull) | ((u32)first + stage * (TILE_BYTES >> 4));
}

template <int N> DEVICE void issue_qk(float (&s)[N], u64 q, u64 k) {
#pragma unroll
  for (int i = 0; i < ROW / 32; i++) wgmma_ss_e4m3(s, q + i * 2, k + i * 2, i != 0);
}

template <int STEPS> DEVICE void issue_pv(float (&o)[HEAD_DIM / 2], const u32 (&p)[PV_STEPS][4], u64 v) {
#pragma unroll
  for (int i = 0; i < STEPS; i++) wgmma_rs_e4m3(o, p[i], v + i * (32 * HEAD_DIM >> 4), 1);
}

template <int N> DEVICE void pack(const float (&s)[N], u32 (&p)[PV_STEPS][4]) {
#pragma unroll
  for (int i = 0; i < N / 16; i++) {
    const float* x = &s[16 * i];
    p[i][0] = e4m3x4(x[0], x[1], x[4], x[5]), p[i][1] = e4m3x4(x[2], x[3], x[6], x[7]);
    p[i][2] = e4m3x4(x[8], x[9], x[12], x[13]), p[i][3] = e4m3x4(x[10], x[11], x[14], x[15]);
  }
}

DEVICE void produce(const TensorMap* q_map, const TensorMap* k_map, const TensorMap* v_map, int4* tiles, const int* block_tables,
                    int max_blocks, int beside, Shared& b, u32 q_smem, u32 k_smem, u32 v_smem) {
  const int lane = threadIdx.x % 32;
  if (lane == 0) b.list = __ldcg(tiles);
  __syncwarp();
  Ring<Q_STAGES> q;
  Ring<K_STAGES> k;
  Ring<V_STAGES> v;
  Item item;
  int rank = blockIdx.x;
  if (beside) rank = __shfl_sync(~0u, lane == 0 ? atomicAdd(&tiles[0].y, 1) : 0, 0);  // who starts first, takes the longest
#pragma unroll 1
  while (get_item(item, tiles, b.list, rank)) {
    if (lane == 0) {
      mbarrier_wait(shared_address(&b.q_empty[q.stage]), q.phase ^ 1);
      const u32 bar = shared_address(&b.q_full[q.stage]);
      b.items[q.stage] = item;
      mbarrier_arrive_expect_tx(bar, Q_BYTES);
      tma_load_3d(q_smem + q.stage * Q_BYTES, q_map, bar, 0, item.head, item.row);
    }
    q.next();
    const int kv_head = item.head / (NUM_HEADS / NUM_KV_HEADS);
    const int tile_count = item.tiles(), pages = (item.position + item.rows + PAGE - 1) / PAGE;
    const u32 table = item.sequence * max_blocks;
    int page_ids = 0;
#pragma unroll 1
    for (int j = 0; j < tile_count; j++) {
      if (j % 16 == 0) page_ids = j * 2 + lane < pages ? block_tables[table + j * 2 + lane] : -1;  // 32 pages at a time
      const int page0 = (__shfl_sync(~0u, page_ids, j % 16 * 2) * NUM_KV_HEADS + kv_head) * PAGE;
      const int page1 = (__shfl_sync(~0u, page_ids, j % 16 * 2 + 1) * NUM_KV_HEADS + kv_head) * PAGE;
      if (lane == 0) {
        // A page of -1 lies outside of the map: TMA fills zeros.
        mbarrier_wait(shared_address(&b.k_empty[k.stage]), k.phase ^ 1);
        const u32 k_bar = shared_address(&b.k_full[k.stage]), k_to = k_smem + k.stage * TILE_BYTES;
        mbarrier_arrive_expect_tx(k_bar, TILE_BYTES);
        tma_load_2d(k_to, k_map, k_bar, 0, page0);
        tma_load_2d(k_to + TILE_BYTES / 2, k_map, k_bar, 0, page1);
        mbarrier_wait(shared_address(&b.v_empty[v.stage]), v.phase ^ 1);
        const u32 v_bar = shared_address(&b.v_full[v.stage]), v_to = v_smem + v.stage * TILE_BYTES;
        mbarrier_arrive_expect_tx(v_bar, TILE_BYTES);
        tma_load_2d(v_to, v_map, v_bar, 0, page0 / (128 / HEAD_DIM));
        tma_load_2d(v_to + TILE_BYTES / 2, v_map, v_bar, 0, page1 / (128 / HEAD_DIM));
      }
      k.next();
      v.next();
    }
    rank = (beside ? 0 : gridDim.x) + __shfl_sync(~0u, lane == 0 ? atomicAdd(&tiles[0].y, 1) : 0, 0);
  }
  if (lane == 0) end_items(b, q);
}

struct Consumer : Rings<Shared, K_STAGES, V_STAGES> {
  u64 k_first, v_first;  // descriptors of the rings' first tiles
  float scale;
  int group, next;  // next: the barrier of who has the next turn; 0 if a warpgroup is alone
  float4* total;  // of this thread in shared memory, 128 * GROUPS apart
  u32 behind[2];  // of the thread's two rows: log2 of what the total is to be divided by
  // The warpgroups issue products in turn, a tile's P V and Q K^T at a time: so the softmax of each runs under the products of
  // the others. Named barriers 1 to 3. Each that has rows takes as many turns in an item; between items the
  // turn is warpgroup 0's.
  DEVICE_MEMBER void take_turn() {
    if (next) barrier_sync(1 + group, 256);
  }
  DEVICE_MEMBER void pass_turn() {
    if (next) barrier_arrive(next, 256);
  }

  DEVICE_MEMBER float factor(int row) const { return __uint_as_float((127 - behind[row]) << 23); }

  // O of `tiles` tiles is complete: now and then adds it to the total in float32, by the tiles' number in the context alone.
  DEVICE_MEMBER void flush(float (&o)[HEAD_DIM / 2], int tiles) {
    if (tiles % FLUSH) return;
    const bool first = tiles == FLUSH;
    const float f0 = factor(0), f1 = factor(1);
#pragma unroll
    for (int base = 0; base < HEAD_DIM / 8; base += AT_ONCE) {
      float4 t[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) t[i] = first ? make_float4(0.f, 0.f, 0.f, 0.f) : total[(base + i) * 128 * GROUPS];
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        float* x = &o[4 * (base + i)];
        total[(base + i) * 128 * GROUPS] =
            make_float4(fmaf(t[i].x, f0, x[0]), fmaf(t[i].y, f0, x[1]), fmaf(t[i].z, f1, x[2]), fmaf(t[i].w, f1, x[3]));
        x[0] = x[1] = x[2] = x[3] = 0.f;
      }
    }
    behind[0] = behind[1] = 0;
  }
  // Adds the total of `tiles` tiles to what is in O.
  DEVICE_MEMBER void add_total(float (&o)[HEAD_DIM / 2], int tiles) {
    if (tiles <= FLUSH) return;
    const float f0 = factor(0), f1 = factor(1);
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 8; i++) {
      const float4 t = total[i * 128 * GROUPS];
      o[4 * i] = fmaf(t.x, f0, o[4 * i]), o[4 * i + 1] = fmaf(t.y, f0, o[4 * i + 1]);
      o[4 * i + 2] = fmaf(t.z, f1, o[4 * i + 2]), o[4 * i + 3] = fmaf(t.w, f1, o[4 * i + 3]);
    }
  }
  // To the maxima that a tile has raised: O, and the total when it is read.
  DEVICE_MEMBER void rescale(float (&o)[HEAD_DIM / 2], const Softmax& state) {
    scale_rows(o, state.rescale);
#pragma unroll
    for (int r = 0; r < 2; r++) behind[r] = min(behind[r] + 127 - (__float_as_uint(state.rescale[r]) >> 23), 127u);  // 127: becomes 0
  }

  // Begins P V of the tile before tile j, for whose V it has waited, in the warpgroup's turn, before which it waits anyway.
  template <int STEPS = PV_STEPS> DEVICE_MEMBER void add_values(float (&o)[HEAD_DIM / 2], const u32 (&p)[PV_STEPS][4]) {
    u64 v_tile = tile_descriptor(v_first, v.stage);
    pin(v_tile);
    take_turn();
    wgmma_fence();
    issue_pv<STEPS>(o, p, v_tile);
    wgmma_commit_group();
  }

  template <int N> DEVICE_MEMBER void begin_scores(float (&s)[N], u64 q, u64 k_tile) {
    wgmma_fence();
    issue_qk(s, q, k_tile);
    wgmma_commit_group();
  }

  // One step of the main loop: O of the tile before, and P of tile j, of which the first TOKENS are looked at.
  template <bool MASKED, int TOKENS = TILE_KV>
  DEVICE_MEMBER void step(float (&o)[HEAD_DIM / 2], u32 (&p)[PV_STEPS][4], Softmax& state, u64 q, const int (&visible)[2], int j) {
    float s[TOKENS / 2];
    u64 k_tile = tile_descriptor(k_first, k.stage);
    if (j > 0) {
      add_values(o, p);
      pin(k_tile), pin(q);  // made under P V, not behind it
      wait_k();
      wgmma_wait_group<0>();
      begin_scores(s, q, k_tile);
      release_v();
    } else {
      wait_k();
      take_turn();
      begin_scores(s, q, k_tile);
    }
    wgmma_wait_group<0>();
    pass_turn();
    pin_scores(s);
    release_k();
    wait_v();  // here, so that the maxima begin behind it: ptxas puts them in front of the turn's end otherwise
    if constexpr (MASKED) mask(s, visible);
    raise(s, state, scale);
    if (state.changed && j > 0) rescale(o, state);  // seldom after the first tiles
    exponentials(s, state, scale);
    float l[2];
    sums(s, l, 0.f);
    state.sum[0] += l[0], state.sum[1] += l[1];
    pack(s, p);
    if (TOKENS == TILE_KV && j > 0) flush(o, j);  // before it waits for its turn
  }
};

DEVICE void consume(u8* y, const float* q_scale, const float* k_scale, const float* v_scale, const float* out_scale,
                    Shared& b, u32 q_smem, u32 k_smem, u32 v_smem, float4* total, int group) {
  const int lane = threadIdx.x % 32, c = lane % 4, row_of_tile = group * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4;
  const float out_factor = QUANT_OUT ? *v_scale / *out_scale : *v_scale;
  const float scale = (float)SCALE_LOG2 * *q_scale * *k_scale;
  Consumer my{{b, lane}, row_descriptor(k_smem), value_descriptor(v_smem), scale, group, 1, total};
  if (group == GROUPS - 1) my.pass_turn();  // the first turn is warpgroup 0's
  Ring<Q_STAGES> q_ring;
#pragma unroll 1
  while (true) {
    mbarrier_wait(shared_address(&b.q_full[q_ring.stage]), q_ring.phase);
    const Item item = b.items[q_ring.stage];
    if (item.rows < 0) break;
    const int groups = (item.rows + 63) / 64;  // that have rows
    if (group >= groups) {
#pragma unroll 1
      for (int j = item.tiles(); j > 0; j--) my.skip();  // not ahead of the others: an mbarrier tells two phases apart
      release_item(b, q_ring, lane);
      continue;
    }
    my.next = groups == 1 ? 0 : group == groups - 1 ? 1 : 2 + group;
    float o[HEAD_DIM / 2];
    u32 p[PV_STEPS][4];
    Softmax state{{-1e30f, -1e30f}, {0.f, 0.f}, {1.f, 1.f}, false};
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; i++) o[i] = 0.f;
    my.behind[0] = my.behind[1] = 0;
    const int my_rows = min(item.rows, group * 64 + 64);
    const int mine = max(item.position + my_rows + TILE_KV - 1, 0) / TILE_KV;
    const int whole = (item.position + group * 64 + 1) / TILE_KV;  // tiles that every row sees wholly
    const int last = item.position + row_of_tile - 2 * c;
    const u64 q = row_descriptor(q_smem + q_ring.stage * Q_BYTES + group * 64 * SWIZZLE);
    if (mine > 0) {
      const bool half = item.position + my_rows - (mine - 1) * TILE_KV <= TILE_KV / 2;  // no row sees more of the last tile
      int j = 0;
#pragma unroll 1
      for (; j < whole; j++) {
        const int visible[2] = {0, 0};
        my.step<false>(o, p, state, q, visible, j);
      }
#pragma unroll 1
      for (; j < mine - half; j++) {
        const int visible[2] = {last - j * TILE_KV, last + 8 - j * TILE_KV};
        my.step<true>(o, p, state, q, visible, j);
      }
      if (half) {
        const int visible[2] = {last - j * TILE_KV, last + 8 - j * TILE_KV};
        my.step<true, TILE_KV / 2>(o, p, state, q, visible, j);
      }
      if (half && j > 0) my.flush(o, j);
      if (half) my.add_values<PV_STEPS / 2>(o, p);
      else my.add_values(o, p);
      wgmma_wait_group<0>();
      my.pass_turn();
      my.release_v();
      my.add_total(o, mine);
    } else {
      my.take_turn();
      my.pass_turn();
    }
    // Read anew, so that they need no registers over the main loop.
    const Item same = b.items[q_ring.stage];
    release_item(b, q_ring, lane);
    for (int j = mine; j < same.tiles(); j++) {  // tiles for the other warpgroups alone
      my.skip();
      my.take_turn();
      my.pass_turn();
    }
    const float factor[2] = {row_factor(state.sum[0], out_factor), row_factor(state.sum[1], out_factor)};
    scale_rows(o, factor);
    store_rows(y, o, same, row_of_tile, c);
  }
}

extern "C" __global__ void __launch_bounds__(128 * GROUPS + 128, 1)
prefill(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
        int4* tiles, const int* block_tables, const float* q_scale, const float* k_scale, const float* v_scale, const float* out_scale,
        u8* y, int max_blocks, int beside) {
  extern __shared__ __align__(1024) u8 smem[];
  __shared__ Shared b;
  const u32 q_smem = shared_address(smem), k_smem = q_smem + Q_STAGES * Q_BYTES, v_smem = k_smem + K_STAGES * TILE_BYTES;
  float4* total = (float4*)(smem + Q_STAGES * Q_BYTES + (K_STAGES + V_STAGES) * TILE_BYTES) + threadIdx.x;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Q_STAGES; i++) mbarrier_init(shared_address(&b.q_full[i]), 1), mbarrier_init(shared_address(&b.q_empty[i]), WARPS);
    for (int i = 0; i < K_STAGES; i++) mbarrier_init(shared_address(&b.k_full[i]), 1), mbarrier_init(shared_address(&b.k_empty[i]), WARPS);
    for (int i = 0; i < V_STAGES; i++) mbarrier_init(shared_address(&b.v_full[i]), 1), mbarrier_init(shared_address(&b.v_empty[i]), WARPS);
    fence_mbarrier_init();
  }
  __syncthreads();
  griddepcontrol_launch_dependents();
  if (!beside) griddepcontrol_wait();
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (group == GROUPS) {
    setmaxnreg_dec<32>();
    if (threadIdx.x < 128 * GROUPS + 32) produce(&q_map, &k_map, &v_map, tiles, block_tables, max_blocks, beside, b, q_smem, k_smem, v_smem);
  } else {
    setmaxnreg_inc<160>();
    consume(y, q_scale, k_scale, v_scale, out_scale, b, q_smem, k_smem, v_smem, total, group);
  }
  if (beside) griddepcontrol_wait();  // who waits for this kernel waits for decode attention too
}
