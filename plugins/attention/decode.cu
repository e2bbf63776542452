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
// tiles. Contexts of one length are dealt without counts and barriers, a unit to each block or to several in even runs; facts were
// sent for before the tiles, where registers allow; nine warps take up to 18 tiles in two rounds; and few units' keys and values
// are the first to leave the L2 cache, for what all layers need. A layer of llama-3.1-8B in a chain, us less at 8, 16, 32 and 64
// x 1088, one after the other: 1.2, 0.2, 0.2, 0.4; facts 0.5, 0.1, 0, -0.7 (not there); leaving first 0.4, 0.8, 0, -2.9 (not
// there); nine warps instead of eight 0.3, 0.8. Without gain: lengths, tables and angles loaded to stay in the L2 cache (-0.3 to
// 0.1), keys alone sent for before the wait (-0.4 to 0.3).
// By time stamps in a step at 64 x 1088 with 8 KV heads, from the linear's end: a block's first tiles were on their way at 3.4 us
// (its start at 0, then lengths, its page, positions and angles one after the other, 1.2 us each and more), its queries there
// at 7.5, when all rings were long full. With lengths, pages and numbers asked for at once, and scales once a block, at 1.6 and
// 5.8 us: 5.6 us less of a step of 8 layers. Where a block has one unit and few bytes are read, keys and values leave the L2 cache
// first: 7.3 more, at 16 x 1088 with 32 KV heads 8; but -18 at 64, -3 at 32, and chains of attention alone at 16 x 16384 1.7% longer
// (LEAVING in decode.py). The row of qkv in front of the first tiles, not behind them: at 8 and 16 with 8 KV heads 5 and 3 less
// at 1.8 GHz, 10 and 8 at 1.35 (chains of attention alone 7.8 instead of 7.4 us, at 32 19.1 instead of 17.1); with 32 KV heads,
// where the linear's blocks end further apart, -14 at 16, -8 at 8. All in all, steps of 8 layers at 1.8 GHz (at 1.38), us less of
// llama-3.1-8B at 2 to 64: 7.2 of 474, 5.0, 6.3, 3.0, 4.9, 12.3 of 782 (7.8, 6.6, 9.3, 8.5, 2.9, 13.1 of 825), of llama-7B at 4 to 64:
// 4.7, 0.5, 9.6, 5.1, 4.4 (2.0, 4.7, 5.4, 7.7, 5.0); of 8B with contexts of 600 to 1499 tokens at 8, 16 and 64: 8.7 of 529, 10.6, 16.2
// of 801 (7.1, 15.9, 18.3). Steady reading is not bound by clocks: 3 warps of a scheduler have a tile each 8500 clocks, of 900
// instructions.
// Without gain there (us less of 8 layers): early blocks that bring later ones' first tiles into the L2 cache (-7 to 0; of the
// tables 0), all columns merged at once in the rings' memory (-1), blocks of 12 warps (-9, with 32 KV heads -88), norm blocks that
// bring gate_up's weights behind its rings there while o_proj runs (-15 to 0), the last tile kept in the cache (-5).
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
       Partial* partials, int sequences, int max_blocks, int unit_cost, int prompts, int parts, int once) {
  extern __shared__ __align__(1024) u8 memory[];
  Shared& shared = *(Shared*)memory;
  if (!prompts) griddepcontrol_launch_dependents();
  const int warp = threadIdx.x / 32;
  const Inputs inputs = {qkv, sequence_lengths, slot_mapping, position_ids, cos, sin};
  // Later blocks have earlier runs: who waits for a result waits for a block that was started before. Where contexts have one
  // length, a unit is `parts` blocks', or -parts units a block's; of short ones, blocks without any come last. What the block's
  // first unit needs is asked for together with what tells whether that is so: each answer takes a microsecond and more.
  const int each = max(1, -parts), units = UNITS * sequences;  // units of a block, and of all
  const int used = parts > 1 ? parts * units : (units + each - 1) / each;
  int mine = (parts && once ? used : (int)gridDim.x) - 1 - (int)blockIdx.x;
  Guess guess = {sequences == 1 ? 0 : parts && mine >= 0 && mine < used ? mine * each / (max(1, parts) * UNITS) : -1, 0};
  Incoming incoming;
  guess.ask(block_tables, max_blocks);
  if (guess.sequence >= 0) incoming.load_numbers(inputs, guess.sequence);
  float stored = 1.0f;
  if (threadIdx.x < 4 && (threadIdx.x < 3 ? FP8_CACHE : QUANT_OUT))
    stored = *(threadIdx.x == 0 ? q_scale : threadIdx.x == 1 ? k_scale : threadIdx.x == 2 ? v_scale : out_scale);
  const int tiles = tiles_of_all(sequence_lengths, sequences, parts);
  if (!tiles) mine = gridDim.x - 1 - blockIdx.x;
  if (threadIdx.x == 0) {
    prefetch_tensormap(&k_map);
    prefetch_tensormap(&v_map);
    prefetch_tensormap(&k_end_map);
    for (int i = 0; i < WARPS * SLOTS; i++) mbarrier_init(shared_address(&shared.full[i]), 1);
    fence_mbarrier_init();
  }

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
  Cursor at;
  int total, run, begin;
  if (tiles) {
    run = parts > 1 ? max(least, (tiles + parts - 1) / parts) : tiles * each;
    const int runs = parts > 1 ? (tiles + run - 1) / run : 1, unit = parts > 1 ? mine / runs : mine * each;
    at.places = parts > 1 ? runs * run : tiles, nothing = at.places - tiles;
    total = at.places * units;
    if (each > 1)
      for (int i = threadIdx.x; i < sequences; i += THREADS) shared.counts[i] = at.places;
    at.index = begin = mine < 0 ? total : min(total, mine * run);
    at.sequence = unit / UNITS, at.unit = unit % UNITS, at.tile = parts > 1 ? (mine - unit * runs) * run : 0;
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
  const Problem p = {block_tables, sequence_lengths, shared.counts, max_blocks, nothing, min(total, begin + run), once};
  if (threadIdx.x < 4) shared.scales[threadIdx.x] = stored;
  if (threadIdx.x == 0) shared.run = run, shared.mine = mine;  // read again at the end of a unit, by warps that may have had no tile
  __syncthreads();

  Producer producer;
  u32 slot = warp * SLOTS, parity = 0;  // the slot to read next, of all the block's
  auto ring = [&](u32 i) { return shared_address(shared.ring) + i * SLOT_BYTES; };
  auto full = [&](u32 i) { return shared_address(shared.full) + i * 8; };
  if (!tiles) at.seek(p, begin, shared.first, shared.before);
  Cursor first = at;
  first.skip_nothing(p, 1);
  const bool any = first.index < p.end;
  if (any && first.sequence != guess.sequence) incoming.load_numbers(inputs, first.sequence);
  producer.start(p, at, (warp - begin % WARPS + WARPS) % WARPS, guess);  // tile i is warp i % WARPS's
  const auto load_first = [&] {
    if (any) incoming.load_angles(inputs);
    griddepcontrol_wait();
    if (any) incoming.load_row(inputs, first);
  };
  const bool wait_first = WAIT_FIRST && sequences > 1;
  if (wait_first) load_first();
#pragma unroll
  for (int i = 0; i < SLOTS; i++) producer.fill(p, maps, ring(slot + i), full(slot + i), i % 2);
  at = first;
  const float scale = (float)(SOFTMAX_SCALE * 1.4426950408889634) * (shared.scales[0] * shared.scales[1]);
  if (!wait_first) load_first();
  // Attention of prompts takes this as the end of the kernels before: it starts where blocks leave a multiprocessor.
  if (prompts) griddepcontrol_launch_dependents();
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

  auto load_next = [&](int before) {  // a unit that begins while that of sequence `before` is at work
    if (at.sequence != before) incoming.load_facts(inputs, at.sequence);
    incoming.load_row(inputs, at);
  };

  State state;
  while (at.index < p.end) {
    incoming.store(shared.fresh, at, shared.scales);
    __syncthreads();
    u32 queries[COLUMN_TILES][STEPS][2];
    load_queries(queries, shared.fresh, rows_of(at.unit));
    const int stop = min(at.tiles(p), at.tile + p.end - at.index);
    const int sequence = at.sequence;
    int tile = at.tile + (warp - at.index % WARPS + WARPS) % WARPS;
    at.advance(p, min(at.places - at.tile, p.end - at.index));
    if (AHEAD && at.index < p.end) load_next(sequence);
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
    if (!AHEAD && at.index < p.end) load_next(sequence);
    const u64 first = (u64)(done.sequence * HEADS + first_head(done.unit)) * HEAD_DIM;
    const int origin = done.index - done.tile;  // of the unit, in the line of tiles
    const int last = (origin + done.tiles(p) - 1) / shared.run;  // run that has tiles of it
    const int me = shared.mine;
    const Output output = {y, shared.scales[2], shared.scales[3]};
    merge(shared, state, rows_of(done.unit), origin / shared.run == me ? last - me : -1, output, first, partials, me);
  }
}
