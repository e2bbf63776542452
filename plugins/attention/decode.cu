// Attention of one query token per sequence over the paged KV cache.
//
// The heads that share a KV head are the columns of one product (16 at most: larger groups are cut into several), tokens
// or dimensions of the output its 16 rows. A unit is such a group of heads of a sequence; its context is cut into tiles of
// TILE tokens. All tiles of all units, in one line, are dealt out to the blocks in equal runs, so that one long context and
// many short ones fill the machine alike; a unit counts as `unit_cost` tiles more than it has, for its merge takes time too.
// The dealing depends on sequence_lengths only and is done on the device, so the grid is fixed under a CUDA graph.
// Inside a block the warps take tiles in turn and know nothing of each other: each warp has its own ring of slots that
// TMA fills with K and V tiles in turn, running ahead into the next unit, and its own running maximum, sum and output.
// At the end of a unit (or of the run) the warps are merged. Of a unit that spans several blocks, the block in which it
// begins joins the results in the order of the context, as they arrive: words that are their own flags. Blocks have runs
// in reverse order, so whoever waits, waits for a block that was started before.
// The running maximum is an integer (base 2), so rescaling is exact. With an FP8 cache P is rounded to e4m3 as p * 256.
//
// Rotary embedding, quantization and the write of the new token are part of it: before a unit begins, the block makes the
// unit's queries and the newest key and value in shared memory, from a row that was sent for while the unit before was at
// work; the warp that has the last tile of a context puts the newest token into the slot where its page has arrived, and
// into the cache. (A kernel of its own cost 11 us of 156 at 64 x 1024 with 32 KV heads, for single bytes of transposed
// values in sectors that the L2 cache did not hold yet, and 1.4 of 9.4 at 1 x 1024 with 8.)
// The first tiles are sent for before griddepcontrol.wait: a layer of llama-7B's decode step takes 67.8 instead of 70.1 us at
// 1 x 1024, 77.5 (79.3) at 8, 99.1 (100.4) at 16.
// One sequence: a unit is padded to whole runs, for a block with parts of two units goes through everything twice: a layer at
// 1 x 1088 takes 63.7 instead of 69.1 us, 61.0 (65.7) at 1 x 300.
//
// What brought reading near the memory's rate, us at 64 x 1024 and 1024 x 192 with 8 KV heads, and at 64 x 4096 with 32:
// 37.3, 167, 544 at first; tokens instead of heads as rows of the products, half of them, and values in boxes of 128 bytes
// instead of 64: 36.2, 158, 525; slots refilled out of registers by all lanes: 35.7, 140, 521; the next unit's row ahead of
// time: 35.7, 123, 520; what the kernel before does not write asked for before it ends, and four blocks at 1024 sequences:
// 34.8, 119, 519; three warps with two slots each instead of two with three: 34.7, 118.5, 518. Of the 36.2, 158 and 525, the
// products were 1.6, 28 and 6, and the newest token's write 0.9, 7 and 8.
// Words instead of partial results, a counter and its fences, and up to 132 units in blocks of eight warps, one on a
// multiprocessor: a layer of llama-7B at 1 x 300 takes 59.2 instead of 60.6 us, at 2 x 1088 64.4 (66.3), at 4 67.5 (70.1); of
// llama-3.1-8B at 1 x 1088 62.9 (63.7), at 2 66.6 (68.3), at 8 68.7 (71.3).
// Tried, no gain: clusters of 2, 4 or 8 blocks that join through distributed shared memory (st.async): no faster than the
// words, and only 30 clusters of four find a multiprocessor for each block; the others, and all that comes after, wait.
// Also sending for the first unit's row of qkv before the first tiles (9.4 instead of 10.0 us at 1 x 1024 with
// 32 KV heads, but 8.2 instead of 7.9 with 8); pieces of the line drawn by tickets instead of equal runs, by blocks of one
// warp (64 x 1024 with 32 KV heads 139 instead of 144, but 58 instead of 48 with 8, 1024 x 192 146 instead of 142); blocks
// of one warp (40 instead of 35); the newest token's whole page of values written back instead of its bytes (139 instead of
// 138, 126 instead of 119); 256 instead of 512 values merged at a time by blocks of four warps (1 x 1024 5.3 instead of 5.0);
// L2 hints to evict keys and values first (nothing but what a benchmark's sets in turn leave).
//
// Constants: HEAD_DIM, KV_HEADS, GROUP, FP8_CACHE, DTYPE (of qkv and the output, and of the cache if not FP8), ROTARY_DIM
// (0 = none), VEC (divides ROTARY_DIM / 2), QUANT_OUT, SOFTMAX_SCALE, WARPS, SLOTS, BLOCKS_PER_SM.
#include "fp8/ex2.cuh"
#include "fp8/mbarrier.cuh"
#include "fp8/mma.cuh"
#include "fp8/rows.cuh"
#include "fp8/sync.cuh"
#include "fp8/tma.cuh"
#include "fp8/words.cuh"
#include "rotary.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int PAGE = 64;                       // tokens
constexpr int TILE = FP8_CACHE ? 64 : 32;      // tokens: 8 KB of keys or values for a head of 128
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
static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "head_dim");

// What a block has of a unit that began in another block: all bits of floats inverted, so that zero is none of them.
struct Partial {
  uint4 o[ROWS][HEAD_DIM / 4];
  uint2 m_l[ROWS][HEAD_DIM / 4];  // maximum and sum, for each four columns again
};

struct Problem {
  const int* block_tables;
  const u16* counts;  // of each sequence: places in one of its units
  int max_blocks;
  int nothing;  // places behind the tiles of a unit
  int end;  // of this block's run of places
};

// A place in the line of tiles.
struct Cursor {
  int index, sequence, unit, tile;
  int places;  // of the unit

  // `before`: places in the sequences before `sequence`, which has this place.
  __device__ __forceinline__ void seek(const Problem& p, int place, int in, int before) {
    index = place;
    sequence = in;
    unit = tile = places = 0;
    if (place >= p.end) return;
    places = p.counts[in];
    unit = (place - before) / places;
    tile = place - before - unit * places;
  }
  __device__ __forceinline__ int tiles(const Problem& p) const { return places - p.nothing; }
  __device__ __forceinline__ void advance(const Problem& p, int steps) {
    index += steps;
    tile += steps;
    if (index >= p.end) return;
    while (tile >= places) {
      tile -= places;
      if (++unit < UNITS) continue;
      unit = 0;
      do places = p.counts[++sequence];
      while (places == 0);
    }
  }
  // On to the next tile, in steps of `step`, if there is none at this place.
  __device__ __forceinline__ void skip_nothing(const Problem& p, int step) {
    while (index < p.end && tile >= tiles(p)) advance(p, step);
  }
};

// Fills a warp's slots, in order: keys and values of its first tile, of its second, ... All lanes keep it, one sends.
struct Producer {
  Cursor at;
  int page;  // asked for a tile ahead

  __device__ __forceinline__ void start(const Problem& p, const Cursor& first, int steps) {
    at = first;
    at.advance(p, steps);
    at.skip_nothing(p, WARPS);
    look_up(p);
  }
  __device__ __forceinline__ void look_up(const Problem& p) {
    if (at.index < p.end) page = __ldg(p.block_tables + at.sequence * p.max_blocks + at.tile * TILE / PAGE);
  }
  __device__ __forceinline__ void fill(const Problem& p, const TensorMap* k_map, const TensorMap* v_map, u32 slot,
                                       u32 full, bool values) {
    if (at.index >= p.end) return;
    const int head = page * KV_HEADS + at.unit / PARTS;
    const int row = head * PAGE + at.tile * TILE % PAGE;
    if (threadIdx.x % 32 == 0) {
      mbarrier_arrive_expect_tx(full, SLOT_BYTES);
      if (FP8_CACHE) {
        if (values) tma_load_2d(slot, v_map, full, 0, head * (HEAD_DIM / 2));
        else tma_load_2d(slot, k_map, full, 0, row);
      } else {
#pragma unroll
        for (int half = 0; half < HEAD_DIM / 64; half++)
          tma_load_2d(slot + half * TILE * 128, values ? v_map : k_map, full, half * 64, row);
      }
    }
    if (values) {
      at.advance(p, WARPS);
      at.skip_nothing(p, WARPS);
      look_up(p);
    }
  }
};

// Of a unit, as in the cache: queries, the newest key, the newest value. The padding spreads rows over the banks.
struct Fresh {
  alignas(16) u8 rows[ROWS + 2][HEAD_DIM * BYTES + 16];
  Cursor at;   // of the unit. What a warp needs once a tile or seldom is here: the products need the registers
  int length;  // of the context
  int slot;  // of the newest token; negative: it is not written
  int head;  // of keys and values
  bool writes;  // this unit writes it into the cache: the first of those that share its head
};

struct Shared {
  alignas(1024) u8 ring[WARPS * SLOTS][SLOT_BYTES];
  alignas(16) float o[WARPS][ROWS][PITCH];
  float m[WARPS][ROWS], l[WARPS][ROWS];
  alignas(8) u64 full[WARPS * SLOTS];
  Fresh fresh;
  int run;
  int sums[WARPS];
  int first, before;  // the sequence that has the first place of the block's run, and the places in those before it
  u16 counts[2];  // [sequences]: places in a unit
};

// Where TMA's swizzle has put 16-byte unit `chunk` of a row of Span bytes, row < 8; the pattern repeats every 8 rows.
template <int Span> DEVICE u32 swizzled(int row, int chunk) {
  return row * Span + ((chunk ^ (Span == 128 ? row : row / 2)) << 4);
}
// Of 16-byte unit `chunk` < 4 of the transposed values' row d: a row of TMA's box holds two of them.
DEVICE u32 swizzled_values(int d, int chunk) { return d / 16 * 1024 + swizzled<128>(d / 2 % 8, d % 2 * 4 + chunk); }

// d += a b over 32 bytes of a row of the cache: step k of b, and in e4m3 also the step after it. As rows of 16 bytes,
// ldmatrix's matrices hold rows 0-7 and 8-15 of the first half, then of the second.
template <int N> DEVICE void multiply_16(float (&d)[COLUMN_TILES][4], const u32 (&a)[4], const u32 (&b)[COLUMN_TILES][N][2],
                                         int k) {
  if (FP8_CACHE) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      u32 c[4];
      e4m3x4_to_f16(a[2 * half], c[0], c[2]);
      e4m3x4_to_f16(a[2 * half + 1], c[1], c[3]);
#pragma unroll
      for (int n = 0; n < COLUMN_TILES; n++) mma_m16n8k16<OPERAND>(d[n], c, b[n][(k + half) % N][0], b[n][(k + half) % N][1]);
    }
  } else {
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; n++) mma_m16n8k16<OPERAND>(d[n], a, b[n][k][0], b[n][k][1]);
  }
}

// s = K Q^T over a tile of keys: rows are tokens, columns heads.
DEVICE void multiply_keys(float (&s)[S_TILES][COLUMN_TILES][4], const u32 (&q)[COLUMN_TILES][STEPS][2], u32 keys) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < S_TILES; j++) {
    __syncwarp();  // keeps the compiler from loading all fragments at once
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; n++) s[j][n][0] = s[j][n][1] = s[j][n][2] = s[j][n][3] = 0.0f;
    const u32 rows = keys + (2 * j + lane / 8 % 2) * 8 * SPAN;
#pragma unroll
    for (int k = 0; k < STEPS; k += 2 / BYTES) {
      const int chunk = k * BYTES + lane / 16;
      u32 a[4];
      ldmatrix_x4(rows + chunk / 8 * TILE * 128 + swizzled<SPAN>(lane % 8, chunk % 8), a);
      multiply_16(s[j], a, q, k);
    }
  }
}

// o^T += V^T P^T over a tile of values. The e4m3 values lie transposed, their tokens in an order by which 32 bits of a row,
// taken apart, are what a thread needs of tokens 2c, 2c + 1 and 2c + 8, 2c + 9.
DEVICE void multiply_values(float (&o)[O_TILES][COLUMN_TILES][4], const u32 (&p)[COLUMN_TILES][S_TILES][2], u32 values) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < O_TILES; i++) {
    if (i % 2 == 0) __syncwarp();  // as above
#pragma unroll
    for (int k = 0; k < S_TILES; k += 2 / BYTES) {
      u32 a[4];
      if (FP8_CACHE) {
        ldmatrix_x4(values + i * 1024 + swizzled_values(lane % 16, k + lane / 16), a);
      } else {
        const int chunk = 2 * i + lane / 8 % 2;
        const u32 half = chunk / 8 * TILE * 128 + (2 * k + lane / 16) * 8 * 128;
        ldmatrix_x4_trans(values + half + swizzled<128>(lane % 8, chunk % 8), a);
      }
      multiply_16(o[i], a, p, k);
    }
  }
}

// A warp's running state: thread t has heads 2 (t % 4) and the next of every tile of columns, and of the output dimensions
// t / 4 and t / 4 + 8 of every tile of rows; l is the thread's own part of the sum.
struct State {
  float m[COLUMN_TILES][2], l[COLUMN_TILES][2];
  float o[O_TILES][COLUMN_TILES][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; n++) {
      m[n][0] = m[n][1] = __int_as_float(0xFF800000);
      l[n][0] = l[n][1] = 0.0f;
#pragma unroll
      for (int i = 0; i < O_TILES; i++) o[i][n][0] = o[i][n][1] = o[i][n][2] = o[i][n][3] = 0.0f;
    }
  }

  // Turns scores into p (times 256 for an FP8 cache), as operands of the next product, and rescales the state to the new
  // maximum.
  __device__ __forceinline__ void soften(u32 (&p)[COLUMN_TILES][S_TILES][2], float (&s)[S_TILES][COLUMN_TILES][4],
                                         float scale, int valid) {
    const float NONE = __int_as_float(0xFF800000);
    if (valid < TILE) {
#pragma unroll
      for (int j = 0; j < S_TILES; j++)
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
          for (int i = 0; i < 4; i++)
            if (16 * j + threadIdx.x % 32 / 4 + i / 2 * 8 >= valid) s[j][n][i] = NONE;
    }
    float factor[COLUMN_TILES][2];
    bool same = true;
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
      for (int h = 0; h < PAIR; h++) {
        float top = NONE;
#pragma unroll
        for (int j = 0; j < S_TILES; j++) top = fmaxf(top, fmaxf(s[j][n][h], s[j][n][h + 2]));
#pragma unroll
        for (int d = 4; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
        const float now = fmaxf(m[n][h], ceilf(top * scale));
        factor[n][h] = exp2f(m[n][h] - now);
        same &= m[n][h] == now;
        m[n][h] = now;
        l[n][h] *= factor[n][h];
        const float shift = (FP8_CACHE ? 8.0f : 0.0f) - now;
#pragma unroll
        for (int j = 0; j < S_TILES; j++)
#pragma unroll
          for (int i = h; i < 4; i += 2) {
            s[j][n][i] = ex2_approx(fmaf(s[j][n][i], scale, shift));
            l[n][h] += s[j][n][i];
          }
      }
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
      for (int j = 0; j < S_TILES; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const float left = s[j][n][2 * i], right = PAIR > 1 ? s[j][n][2 * i + 1] : 0.0f;
          p[n][j][i] = movmatrix_trans(FP8_CACHE ? e4m3x2_to_f16(e4m3x2(left, right)) : from_float2<OPERAND>(left, right));
        }
    if (!__all_sync(~0u, same)) {
#pragma unroll
      for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
        for (int i = 0; i < O_TILES; i++)
#pragma unroll
          for (int j = 0; j < 4; j++)
            if (j % 2 < PAIR) o[i][n][j] *= factor[n][j % 2];
    }
  }
};

// Heads of a unit: of all the heads of a KV head, units take ROWS each, and the last one the rest.
DEVICE int rows_of(int unit) { return GROUP % ROWS == 0 ? ROWS : min(ROWS, GROUP - unit % PARTS * ROWS); }
DEVICE int first_head(int unit) { return unit / PARTS * GROUP + unit % PARTS * ROWS; }

struct Inputs {
  const u16* qkv;
  const int *lengths, *slots, *positions;
  const float *cos, *sin, *q_scale, *k_scale, *v_scale;
};

// A unit's part of its row of qkv, on its way. A thread takes the same pairs of every STEP-th row.
struct Incoming {
  static constexpr int STEP = THREADS / Pairs<VEC>::COUNT, EACH = (ROWS + 2 + STEP - 1) / STEP;
  static_assert(THREADS % Pairs<VEC>::COUNT == 0);
  Raw<VEC> left[EACH], right[EACH];
  float c[VEC], s[VEC], scales[3];
  int length, slot;

  // What does not come from the kernel before.
  __device__ __forceinline__ void load_facts(const Inputs& in, const Cursor& at) {
    const Pairs<VEC> pairs(threadIdx.x % Pairs<VEC>::COUNT);
    if (ROTARY_DIM) pairs.load_angles(c, s, in.cos, in.sin, in.positions[at.sequence]);
    scales[0] = FP8_CACHE ? *in.q_scale : 1.0f;
    scales[1] = FP8_CACHE ? *in.k_scale : 1.0f;
    scales[2] = FP8_CACHE ? *in.v_scale : 1.0f;
    length = in.lengths[at.sequence], slot = in.slots[at.sequence];
  }
  __device__ __forceinline__ void load_row(const Inputs& in, const Cursor& at) {
    const Pairs<VEC> pairs(threadIdx.x % Pairs<VEC>::COUNT);
    const u16* token = in.qkv + (u64)at.sequence * (HEADS + 2 * KV_HEADS) * HEAD_DIM;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int row = threadIdx.x / Pairs<VEC>::COUNT + i * STEP, of_kv = row - ROWS;
      if (row >= ROWS + 2 || of_kv < 0 && row >= rows_of(at.unit)) continue;
      const int head = of_kv < 0 ? first_head(at.unit) + row : HEADS + of_kv * KV_HEADS + at.unit / PARTS;
      left[i].load(token + head * HEAD_DIM + pairs.first);
      right[i].load(token + head * HEAD_DIM + pairs.second);
    }
  }

  // Rotated and in the cache's type.
  __device__ __forceinline__ void store(Fresh& fresh, const Cursor& at) const {
    const Pairs<VEC> pairs(threadIdx.x % Pairs<VEC>::COUNT);
    if (threadIdx.x == 0) {
      fresh.at = at;
      fresh.length = length, fresh.slot = slot;
      fresh.head = at.unit / PARTS, fresh.writes = at.unit % PARTS == 0;
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int row = threadIdx.x / Pairs<VEC>::COUNT + i * STEP;
      if (row >= ROWS + 2) continue;
      float a[VEC], b[VEC];
      left[i].convert(a);
      right[i].convert(b);
      if (row <= ROWS) pairs.rotate(a, b, c, s);
      const Divisor d(row < ROWS ? scales[0] : row == ROWS ? scales[1] : scales[2]);
      const auto divided = [&](float x) { return d.divide(x); };
      store_codes(fresh.rows[row] + pairs.first * BYTES, a, divided);
      store_codes(fresh.rows[row] + pairs.second * BYTES, b, divided);
    }
  }
};

// As operands of products over 16 of the head dimension. In e4m3 32 bits of a row, taken apart, serve for dimensions
// 2c, 2c + 1 and 2c + 8, 2c + 9: the order within a product is free, so long as keys are taken apart in the same way.
DEVICE void load_queries(u32 (&q)[COLUMN_TILES][STEPS][2], const Fresh& fresh, int rows) {
  const int column = threadIdx.x % 4 * 4;  // bytes
#pragma unroll
  for (int n = 0; n < COLUMN_TILES; n++) {
    const int r = 8 * n + threadIdx.x % 32 / 4;
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
      const u32* from = (const u32*)&fresh.rows[r < rows ? r : 0][column + 16 * BYTES * k];
      if (FP8_CACHE) {
        e4m3x4_to_f16(r < rows ? *from : 0u, q[n][k][0], q[n][k][1]);
      } else {
        q[n][k][0] = r < rows ? from[0] : 0u;
        q[n][k][1] = r < rows ? from[4] : 0u;
      }
    }
  }
}

// Puts the newest token, `row` in its tile, into a slot of keys or of values, and into the cache. Run by a warp.
template <bool VALUES> DEVICE void add_newest(const Fresh& fresh, u8* cache, u32 slot, int row) {
  if (fresh.slot < 0) return;
  const int lane = threadIdx.x % 32, token = fresh.slot % PAGE;
  const u64 head = (u64)(fresh.slot / PAGE) * KV_HEADS + fresh.head;
  const u8* from = fresh.rows[ROWS + VALUES];
  if (FP8_CACHE && VALUES) {
    const int place = value_place(token);
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 32; i++) {
      const int d = 32 * i + lane;
      const u8 code = from[d];
      *(u8*)shared_pointer(slot + swizzled_values(d, place / 16) + place % 16) = code;
      if (fresh.writes) cache[(head * HEAD_DIM + d) * PAGE + place] = code;
    }
  } else {
#pragma unroll
    for (int i = lane; i < HEAD_DIM * BYTES / 4; i += 32) {
      const u32 word = *(const u32*)(from + 4 * i);
      const int chunk = i / 4;  // of 16 bytes
      const u32 start = slot + chunk / 8 * TILE * 128 + row / 8 * 8 * SPAN;
      *(u32*)shared_pointer(start + swizzled<SPAN>(row % 8, chunk % 8) + i % 4 * 4) = word;
      if (fresh.writes) *(u32*)(cache + (head * PAGE + token) * HEAD_DIM * BYTES + 4 * i) = word;
    }
  }
  fence_proxy_async();  // TMA will fill the slot again
  __syncwarp();
}

struct Output {
  void* y;
  float v_scale, out_scale;  // 1 where there is none

  // Four columns: o / l, in the cache's scale, rounded or quantized.
  __device__ __forceinline__ void store(u64 at, float4 o, float l) const {
    const float factor = v_scale / l;
    o.x *= factor, o.y *= factor, o.z *= factor, o.w *= factor;
    if (QUANT_OUT) {
      const Divisor d(out_scale);
      *(u32*)((u8*)y + at) = e4m3x4(d.divide(o.x), d.divide(o.y), d.divide(o.z), d.divide(o.w));
    } else {
      *(uint2*)((u16*)y + at) = make_uint2(from_float2<DTYPE>(o.x, o.y), from_float2<DTYPE>(o.z, o.w));
    }
  }
};

// a += b * factor.
DEVICE void add(float4& a, float4 b, float factor) {
  a.x += b.x * factor, a.y += b.y * factor, a.z += b.z * factor, a.w += b.w * factor;
}

// A result for four columns of a head.
struct Result {
  float m, l;
  float4 o;

  DEVICE_MEMBER void publish(Partial& partial, int r, int c) const {
    store_words(&partial.o[r][c / 4], make_uint4(~__float_as_uint(o.x), ~__float_as_uint(o.y), ~__float_as_uint(o.z), ~__float_as_uint(o.w)));
    store_words(&partial.m_l[r][c / 4], make_uint2(~__float_as_uint(m), ~__float_as_uint(l)));
  }
  // Adds `count` others in the order of the context, as they arrive, and leaves zeros.
  DEVICE_MEMBER void join(Partial* partials, int count, int r, int c) {
    constexpr int BATCH = WARPS < 4 ? 2 : 4;  // loads in flight: their latency is what this costs; small blocks lack registers
#pragma unroll 1
    for (int start = 0; start < count; start += BATCH) {
      uint4 outputs[BATCH];
      uint2 sums[BATCH];
      bool there;
      do {
        there = true;
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
          if (start + j >= count) continue;
          outputs[j] = load_words(&partials[start + j].o[r][c / 4]);
          sums[j] = load_words(&partials[start + j].m_l[r][c / 4]);
        }
#pragma unroll
        for (int j = 0; j < BATCH; j++)
          if (start + j < count) there &= outputs[j].x && outputs[j].y && outputs[j].z && outputs[j].w && sums[j].x && sums[j].y;
      } while (!there);
#pragma unroll
      for (int j = 0; j < BATCH; j++) {
        if (start + j >= count) continue;
        store_words(&partials[start + j].o[r][c / 4], make_uint4(0, 0, 0, 0));
        store_words(&partials[start + j].m_l[r][c / 4], make_uint2(0, 0));
        const float other = __uint_as_float(~sums[j].x), now = fmaxf(m, other);
        const float mine = exp2f(m - now), factor = exp2f(other - now);
        const float4 v = make_float4(__uint_as_float(~outputs[j].x), __uint_as_float(~outputs[j].y), __uint_as_float(~outputs[j].z), __uint_as_float(~outputs[j].w));
        m = now;
        l = l * mine + __uint_as_float(~sums[j].y) * factor;
        o = make_float4(o.x * mine, o.y * mine, o.z * mine, o.w * mine);
        add(o, v, factor);
      }
    }
  }
};

// Joins the warps' states, then those that `others` more blocks have of the unit, and stores the output. A block in which
// the unit does not begin (others < 0) leaves its result to the one in which it does.
DEVICE void merge(Shared& shared, const State& state, int rows, int others, const Output& y, u64 first, Partial* partials, int mine) {
  const int warp = threadIdx.x / 32, d = threadIdx.x % 32 / 4;
  const auto each_head = [&](auto body) {  // of those that the thread holds
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
      for (int h = 0; h < PAIR; h++) {
        const int row = 8 * n + threadIdx.x % 4 * 2 + h;
        if (row < rows) body(row, n, h);
      }
  };
  float l[COLUMN_TILES][2];
#pragma unroll
  for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
    for (int h = 0; h < PAIR; h++) {
      l[n][h] = state.l[n][h];
#pragma unroll
      for (int i = 4; i < 32; i *= 2) l[n][h] += __shfl_xor_sync(~0u, l[n][h], i);
    }
  each_head([&](int row, int n, int h) {
    if (d == 0) shared.m[warp][row] = state.m[n][h], shared.l[warp][row] = l[n][h];
  });
#pragma unroll
  for (int pass = 0; pass < HEAD_DIM / COLUMNS; pass++) {
    each_head([&](int row, int n, int h) {
#pragma unroll
      for (int i = 0; i < COLUMNS / 16; i++) {
        const float(&o)[4] = state.o[pass * COLUMNS / 16 + i][n];
        shared.o[warp][row][16 * i + d] = o[h];
        shared.o[warp][row][16 * i + d + 8] = o[h + 2];
      }
    });
    __syncthreads();
    for (int i = threadIdx.x; i < rows * (COLUMNS / 4); i += THREADS) {
      const int r = i / (COLUMNS / 4), c = i % (COLUMNS / 4) * 4;
      float m = shared.m[0][r];
#pragma unroll
      for (int w = 1; w < WARPS; w++) m = fmaxf(m, shared.m[w][r]);
      Result result = {m, 0.0f, {0.0f, 0.0f, 0.0f, 0.0f}};
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        const float factor = exp2f(shared.m[w][r] - m);
        result.l += shared.l[w][r] * factor;
        add(result.o, *(const float4*)&shared.o[w][r][c], factor);
      }
      const int at = pass * COLUMNS + c;
      if (others < 0) {
        result.publish(partials[mine], r, at);
      } else {
        result.join(partials + mine + 1, others, r, at);
        y.store(first + r * HEAD_DIM + at, result.o, result.l);
      }
    }
    __syncthreads();
  }
}

// A thread's share of the sequences, neighbours: an odd number of pairs, so that threads beside each other read from
// different banks. `before` and `sum`: places in one unit of the sequences before them and of them.
struct Share {
  int begin, end, before, sum;
};

// Fills shared.counts; `total` becomes the sum over all sequences.
DEVICE Share count_places(Shared& shared, const int* sequence_lengths, int sequences, int nothing, int& total) {
  for (int i = threadIdx.x; i < sequences; i += THREADS) {
    const int tiles = (sequence_lengths[i] + TILE - 1) / TILE;
    shared.counts[i] = tiles ? tiles + nothing : 0;
  }
  __syncthreads();
  const int each = 2 * ((sequences + 2 * THREADS - 1) / (2 * THREADS) | 1);
  Share share;
  share.begin = min(sequences, (int)threadIdx.x * each);
  share.end = min(sequences, share.begin + each);
  share.sum = 0;
  for (int i = share.begin; i < share.end; i++) share.sum += shared.counts[i];
  int upto = share.sum;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int left = __shfl_up_sync(~0u, upto, d);
    if (threadIdx.x % 32 >= d) upto += left;
  }
  if (threadIdx.x % 32 == 31) shared.sums[threadIdx.x / 32] = upto;
  __syncthreads();
  share.before = upto - share.sum;
  total = 0;
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
    if (w < threadIdx.x / 32) share.before += shared.sums[w];
    total += shared.sums[w];
  }
  return share;
}

// Finds the sequence that has `place`; one thread does.
DEVICE void locate(Shared& shared, const Share& share, int place) {
  int before = share.before * UNITS;
  if (place < before || place >= before + share.sum * UNITS) return;
  int i = share.begin;
  while (place >= before + shared.counts[i] * UNITS) before += shared.counts[i++] * UNITS;
  shared.first = i, shared.before = before;
}

// Rows of sequences without context, as in padding, are zero.
DEVICE void clear_empty(const u16* counts, int sequences, void* y) {
  constexpr int WORDS = HEADS * HEAD_DIM * (QUANT_OUT ? 1 : 2) / 16;
  for (int i = blockIdx.x; i < sequences; i += gridDim.x)
    if (counts[i] == 0)
      for (int j = threadIdx.x; j < WORDS; j += THREADS) ((uint4*)y)[(u64)i * WORDS + j] = make_uint4(0, 0, 0, 0);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
decode(const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map, const u16* qkv,
       const int* position_ids, const int* slot_mapping, const int* block_tables, const int* sequence_lengths,
       const float* cos, const float* sin, u8* key_cache, u8* value_cache, const float* q_scale, const float* k_scale,
       const float* v_scale, const float* out_scale, void* y, Partial* partials, int sequences,
       int max_blocks, int unit_cost) {
  extern __shared__ __align__(1024) u8 memory[];
  Shared& shared = *(Shared*)memory;
  griddepcontrol_launch_dependents();
  const int warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    prefetch_tensormap(&k_map);
    prefetch_tensormap(&v_map);
    for (int i = 0; i < WARPS * SLOTS; i++) mbarrier_init(shared_address(&shared.full[i]), 1);
    fence_mbarrier_init();
  }
  const float scale = (float)(SOFTMAX_SCALE * 1.4426950408889634) * (FP8_CACHE ? *q_scale * *k_scale : 1.0f);

  // What a step takes in and the cache's older tokens were there before the step's first kernel: the tiles that hold them
  // are sent for while the kernel before is still at work.
  // One sequence: its units end where a block's run ends, for a block with parts of two takes twice as long.
  const bool even = sequences == 1 && unit_cost == 0;
  const int nothing = even ? (WARPS - (sequence_lengths[0] + TILE - 1) / TILE % WARPS) % WARPS : unit_cost;
  int places;  // in a unit of each sequence
  const Share share = count_places(shared, sequence_lengths, sequences, nothing, places);
  const int total = places * UNITS;
  // Later blocks have earlier runs: who waits for a result waits for a block that was started before.
  const int mine = gridDim.x - 1 - blockIdx.x;
  int run = max(WARPS, (total + (int)gridDim.x - 1) / (int)gridDim.x);
  const int unit = shared.counts[0], whole = unit ? (run + unit - 1) / unit * unit : run;
  // Contexts of one length: no unit is cut, if little is lost by it.
  if (unit * sequences == places && whole - run <= run / 8) run = whole;
  const int begin = min(total, mine * run);
  const Problem p = {block_tables, shared.counts, max_blocks, nothing, min(total, begin + run)};
  if (threadIdx.x == 0) shared.run = run;  // read again at the end of a unit, by warps that may have had no tile
  locate(shared, share, begin);
  __syncthreads();

  Producer producer;
  u32 slot = warp * SLOTS, parity = 0;  // the slot to read next, of all the block's
  auto ring = [&](u32 i) { return shared_address(shared.ring) + i * SLOT_BYTES; };
  auto full = [&](u32 i) { return shared_address(shared.full) + i * 8; };
  Cursor at;
  at.seek(p, begin, shared.first, shared.before);
  producer.start(p, at, (warp - begin % WARPS + WARPS) % WARPS);  // tile i is warp i % WARPS's
#pragma unroll
  for (int i = 0; i < SLOTS; i++) producer.fill(p, &k_map, &v_map, ring(slot + i), full(slot + i), i % 2);
  at.skip_nothing(p, 1);
  const Inputs inputs = {qkv, sequence_lengths, slot_mapping, position_ids, cos, sin, q_scale, k_scale, v_scale};
  Incoming incoming;
  if (at.index < p.end) incoming.load_facts(inputs, at);
  const Output output = {y, FP8_CACHE ? *v_scale : 1.0f, QUANT_OUT ? *out_scale : 1.0f};
  griddepcontrol_wait();
  if (at.index < p.end) incoming.load_row(inputs, at);
  clear_empty(shared.counts, sequences, y);

  auto wait = [&] {
    mbarrier_wait(full(slot), parity);
    return ring(slot);
  };
  auto release = [&](bool values) {  // all lanes have read the slot: fill it again
    __syncwarp();
    producer.fill(p, &k_map, &v_map, ring(slot), full(slot), values);
    if (++slot % SLOTS == 0) slot -= SLOTS, parity ^= 1;
  };

  State state;
  while (at.index < p.end) {
    incoming.store(shared.fresh, at);
    __syncthreads();
    u32 queries[COLUMN_TILES][STEPS][2];
    load_queries(queries, shared.fresh, rows_of(at.unit));
    const int stop = min(at.tiles(p), at.tile + p.end - at.index);
    int tile = at.tile + (warp - at.index % WARPS + WARPS) % WARPS;
    at.advance(p, min(at.places - at.tile, p.end - at.index));
    if (AHEAD && at.index < p.end) incoming.load_facts(inputs, at), incoming.load_row(inputs, at);
    state.clear();
    for (; tile < stop; tile += WARPS) {
      float s[S_TILES][COLUMN_TILES][4];
      u32 p_operand[COLUMN_TILES][S_TILES][2];
      const int valid = shared.fresh.length - tile * TILE;
      const u32 keys = wait();
      if (valid <= TILE) add_newest<false>(shared.fresh, key_cache, keys, valid - 1);
      multiply_keys(s, queries, keys);
      release(SLOTS % 2);
      state.soften(p_operand, s, scale, valid);
      const u32 values = wait();
      if (valid <= TILE) add_newest<true>(shared.fresh, value_cache, values, valid - 1);
      multiply_values(state.o, p_operand, values);
      release(SLOTS % 2 == 0);
    }
    const Cursor done = shared.fresh.at;
    if (!AHEAD && at.index < p.end) incoming.load_facts(inputs, at), incoming.load_row(inputs, at);
    const u64 first = (u64)(done.sequence * HEADS + first_head(done.unit)) * HEAD_DIM;
    const int origin = done.index - done.tile;  // of the unit, in the line of tiles
    const int last = (origin + done.tiles(p) - 1) / shared.run;  // run that has tiles of it
    merge(shared, state, rows_of(done.unit), origin / shared.run == mine ? last - mine : -1, output, first, partials, mine);
  }
}
