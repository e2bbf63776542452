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
// Where a context ends, keys come in boxes of 16 tokens, as many as it has: with 1016 sequences of 129 to 256 tokens and eight
// prompts of 128 a step takes 31.1 instead of 31.3 ms, with 590 of 2049 to 4096 and 434 tokens of a prompt 42.2 instead of 42.6.
// Transposed values come whole: half of the tokens would be 32 bytes of every 64.
// One sequence: a unit is padded to whole runs, for a block with parts of two units goes through everything twice: a layer at
// 1 x 1088 takes 63.7 instead of 69.1 us, 61.0 (65.7) at 1 x 300. The step's facts are loaded all at once, before lengths are
// counted, and a unit of many is cut evenly, into runs of 5 tiles or more, instead of runs of 8 and what is left: 8 layers of
// llama-7B take 552.2 (facts) and 544.4 us (and even runs) instead of 558.8 at 1 x 1024, 544.4, 543.6 (546.9) at 1 x 1088, 551.8,
// 546.8 (556.4) at 1 x 1500, 550.7, 551.6 (557.5) at 1 x 2040, 527.8 (530.0) at 1 x 300. With the 8 units of llama-3.1-8B even
// runs are slower, 745.4 instead of 737.5 at 1 x 1088, of 3 tiles 751.6; blocks of 5, 6 or 4 warps there: 743.5, 743.1, 734.0.
//
// What brought reading near the memory's rate, us at 64 x 1024 and 1024 x 192 with 8 KV heads, and at 64 x 4096 with 32:
// 37.3, 167, 544 at first; tokens instead of heads as rows of the products, half of them, and values in boxes of 128 bytes
// instead of 64: 36.2, 158, 525; slots refilled out of registers by all lanes: 35.7, 140, 521; the next unit's row ahead of
// time: 35.7, 123, 520; what the kernel before does not write asked for before it ends, and four blocks at 1024 sequences:
// 34.8, 119, 519; three warps with two slots each instead of two with three: 34.7, 118.5, 518. Of the 36.2, 158 and 525, the
// products were 1.6, 28 and 6, and the newest token's write 0.9, 7 and 8.
// Values of 16 tokens together, which a new one makes 16 lines dirty of, and not 64 (read without L2 promotion): us at 16, 32 and
// 64 x 1088 with 32 KV heads 34.9, 73.0, 141.5 before, 34.4, 71.3, 137.0 since, 36.0 and 35.0 at 64 x 1088 with 8, 126.0 and
// 124.4 at 64 x 4096, 506 and 497 with 32. Before, 7% at 64 x 1088 with 32 KV heads were the newest token's write, 5% with 8.
// Words instead of partial results, a counter and its fences, and up to 132 units in blocks of eight warps, one on a
// multiprocessor: a layer of llama-7B at 1 x 300 takes 59.2 instead of 60.6 us, at 2 x 1088 64.4 (66.3), at 4 67.5 (70.1); of
// llama-3.1-8B at 1 x 1088 62.9 (63.7), at 2 66.6 (68.3), at 8 68.7 (71.3).
// The kernel before holds an SM's shared memory to its end, so that the memory has nothing to do from there to a block's first
// tiles. Contexts of one length are dealt without counts and barriers, a unit to each block or to several in even runs; facts are
// sent for before the tiles, where registers allow; nine warps take up to 18 tiles in two rounds; and few units' keys and values
// are the first to leave the L2 cache, for what all layers need. A layer of llama-3.1-8B in a chain, us less at 8, 16, 32 and 64
// x 1088, one after the other: 1.2, 0.2, 0.2, 0.4; facts 0.5, 0.1, 0, -0.7 (not there); leaving first 0.4, 0.8, 0, -2.9 (not
// there); nine warps instead of eight 0.3, 0.8. Without gain: lengths, tables and angles loaded to stay in the L2 cache (-0.3 to
// 0.1), keys alone sent for before the wait (-0.4 to 0.3).
// Tried, no gain: clusters of 2, 4 or 8 blocks that join through distributed shared memory (st.async): no faster than the
// words, and only 30 clusters of four find a multiprocessor for each block; the others, and all that comes after, wait.
// Also sending for the first unit's row of qkv before the first tiles (9.4 instead of 10.0 us at 1 x 1024 with
// 32 KV heads, but 8.2 instead of 7.9 with 8); pieces of the line drawn by tickets instead of equal runs, by blocks of one
// warp (64 x 1024 with 32 KV heads 139 instead of 144, but 58 instead of 48 with 8, 1024 x 192 146 instead of 142); blocks
// of one warp (40 instead of 35); the newest token's whole page of values written back instead of its bytes (139 instead of
// 138, 126 instead of 119); 256 instead of 512 values merged at a time by blocks of four warps (1 x 1024 5.3 instead of 5.0);
// L2 hints to evict keys and values first (nothing but what a benchmark's sets in turn leave); warps that go on to the next unit
// while one of them merges what all have left of the last (0); units always cut (-1 to +2%).
//
// Constants: HEAD_DIM, KV_HEADS, GROUP, FP8_CACHE, DTYPE (of qkv and the output, and of the cache if not FP8), ROTARY_DIM
// (0 = none), VEC (divides ROTARY_DIM / 2), QUANT_OUT, SOFTMAX_SCALE, WARPS, SLOTS, BLOCKS_PER_SM, LEAST (tiles of a run of
// one sequence).
#include "decode_merge.cuh"
#include "decode_newest.cuh"

// Rows of sequences without context, as in padding, are zero.
DEVICE void clear_empty(const u16* counts, int sequences, void* y) {
  constexpr int WORDS = HEADS * HEAD_DIM * (QUANT_OUT ? 1 : 2) / 16;
  for (int i = blockIdx.x; i < sequences; i += gridDim.x)
    if (counts[i] == 0)
      for (int j = threadIdx.x; j < WORDS; j += THREADS) ((uint4*)y)[(u64)i * WORDS + j] = make_uint4(0, 0, 0, 0);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
decode(const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
       const __grid_constant__ TensorMap k_end_map, const u16* qkv, const int* position_ids, const int* slot_mapping,
       const int* block_tables, const int* sequence_lengths, const float* cos, const float* sin, u8* key_cache,
       u8* value_cache, const float* q_scale, const float* k_scale, const float* v_scale, const float* out_scale, void* y,
       Partial* partials, int sequences, int max_blocks, int unit_cost, int prompts, int parts) {
  extern __shared__ __align__(1024) u8 memory[];
  Shared& shared = *(Shared*)memory;
  if (!prompts) griddepcontrol_launch_dependents();
  const int warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    prefetch_tensormap(&k_map);
    prefetch_tensormap(&v_map);
    prefetch_tensormap(&k_end_map);
    for (int i = 0; i < WARPS * SLOTS; i++) mbarrier_init(shared_address(&shared.full[i]), 1);
    fence_mbarrier_init();
  }
  const Inputs inputs = {qkv, sequence_lengths, slot_mapping, position_ids, cos, sin, q_scale, k_scale, v_scale};
  Incoming incoming;
  if (sequences == 1) incoming.load_facts(inputs, 0);  // all at once: nothing has to be found before
  const float scale = (float)(SOFTMAX_SCALE * 1.4426950408889634) * (FP8_CACHE ? *q_scale * *k_scale : 1.0f);

  // What a step takes in and the cache's older tokens were there before the step's first kernel: the tiles that hold them
  // are sent for while the kernel before is still at work.
  // One sequence: its units end where a block's run ends, for a block with parts of two takes twice as long, and are cut
  // evenly.
  int nothing = unit_cost, least = WARPS;  // tiles of a run
  if (sequences == 1 && unit_cost == 0) {
    const int most = (sequence_lengths[0] + TILE - 1) / TILE, each = max(1, (int)gridDim.x / UNITS);
    least = max(LEAST, (most + each - 1) / each);
    nothing = (least - most % least) % least;
  }
  // Later blocks have earlier runs: who waits for a result waits for a block that was started before.
  const int mine = gridDim.x - 1 - blockIdx.x;
  Cursor at;
  int total, run, begin;
  const int tiles = tiles_of_all(sequence_lengths, sequences, parts);
  if (tiles) {
    run = parts > 1 ? max(least, (tiles + parts - 1) / parts) : tiles;
    const int runs = (tiles + run - 1) / run, unit = parts > 1 ? mine / runs : mine;
    at.places = runs * run, nothing = at.places - tiles;
    total = at.places * UNITS * sequences;
    at.index = begin = min(total, mine * run);
    at.sequence = unit / UNITS, at.unit = unit % UNITS, at.tile = (mine - unit * runs) * run;
  } else {
    int places;  // in a unit of each sequence
    const Share share = count_places(shared, sequence_lengths, sequences, nothing, places);
    total = places * UNITS;
    run = max(least, (total + (int)gridDim.x - 1) / (int)gridDim.x);
    const int unit = shared.counts[0], whole = unit ? (run + unit - 1) / unit * unit : run;
    // Contexts of one length: no unit is cut, if little is lost by it.
    if (unit * sequences == places && whole - run <= run / 8) run = whole;
    begin = min(total, mine * run);
    locate(shared, share, begin);
  }
  const Maps maps = {&k_map, &v_map, &k_end_map};
  const Problem p = {block_tables, sequence_lengths, shared.counts, max_blocks, nothing, min(total, begin + run)};
  if (threadIdx.x == 0) shared.run = run;  // read again at the end of a unit, by warps that may have had no tile
  __syncthreads();

  Producer producer;
  u32 slot = warp * SLOTS, parity = 0;  // the slot to read next, of all the block's
  auto ring = [&](u32 i) { return shared_address(shared.ring) + i * SLOT_BYTES; };
  auto full = [&](u32 i) { return shared_address(shared.full) + i * 8; };
  if (!tiles) at.seek(p, begin, shared.first, shared.before);
  producer.start(p, at, (warp - begin % WARPS + WARPS) % WARPS);  // tile i is warp i % WARPS's
  Cursor first = at;
  first.skip_nothing(p, 1);
  if (FACTS_FIRST && sequences > 1 && first.index < p.end) incoming.load_facts(inputs, first.sequence);
#pragma unroll
  for (int i = 0; i < SLOTS; i++) producer.fill(p, maps, ring(slot + i), full(slot + i), i % 2);
  at = first;
  if (!FACTS_FIRST && sequences > 1 && at.index < p.end) incoming.load_facts(inputs, at.sequence);
  const Output output = {y, FP8_CACHE ? *v_scale : 1.0f, QUANT_OUT ? *out_scale : 1.0f};
  griddepcontrol_wait();
  // Attention of prompts takes this as the end of the kernels before: it starts where blocks leave a multiprocessor.
  if (prompts) griddepcontrol_launch_dependents();
  if (at.index < p.end) incoming.load_row(inputs, at);
  if (!tiles) clear_empty(shared.counts, sequences, y);

  auto wait = [&] {
    mbarrier_wait(full(slot), parity);
    return ring(slot);
  };
  auto release = [&](bool values) {  // all lanes have read the slot: fill it again
    __syncwarp();
    producer.fill(p, maps, ring(slot), full(slot), values);
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
    if (AHEAD && at.index < p.end) incoming.load_facts(inputs, at.sequence), incoming.load_row(inputs, at);
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
    if (!AHEAD && at.index < p.end) incoming.load_facts(inputs, at.sequence), incoming.load_row(inputs, at);
    const u64 first = (u64)(done.sequence * HEADS + first_head(done.unit)) * HEAD_DIM;
    const int origin = done.index - done.tile;  // of the unit, in the line of tiles
    const int last = (origin + done.tiles(p) - 1) / shared.run;  // run that has tiles of it
    merge(shared, state, rows_of(done.unit), origin / shared.run == mine ? last - mine : -1, output, first, partials, mine);
  }
}
