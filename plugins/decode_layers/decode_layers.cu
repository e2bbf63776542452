// Layers of a decode step of one token, in one launch: [attention, o, norm, gate_up and SwiGLU, down, norm, qkv] of each layer
// but for the last one's norm and qkv.
//
// A block on each multiprocessor. One warp streams all that the layers read, the weights and the cache's tiles, through
// one ring and knows of no step's end: nothing of it depends on what is computed. The consumers take a step's x as words that
// are their own flags (Exchange), multiply, and go on. So the memory is at work while blocks wait for each other's words, as
// long as the ring has room. WINDOW stages at most are on their way: a deeper queue would hold up the words.
//
// Tries on an H200: a step of eight layers, embedding and lm_head at 1 x 1088, us of llama-7B and llama-3.1-8B:
//   a launch for each step of the plan              548.8   735.8
//   one for the layers, STAGES 13 (8B: 12), WINDOW 3  511.2   713.2
//   WINDOW 2, 4                                     531.0, 518.9   732.8, 726.9
//   two stages less, four                           517.4, 529.3   715.6, 733.2
// Before that, us a layer in a chain of eight, llama-7B (60.8 for separate launches): a tile of attention by a warp with mma.sync
// and a first look at one word before the others 58.6, without the look 57.1; WINDOW 12 65.1; no attention at all 48.6 (53.1),
// which is the rate of a copy; one warpgroup that multiplies 51.1 where two take 50.5. From o to qkv in one launch and attention
// as its own kernel beside it 58.8 (59.1).
//
// Two ranks (sums.cuh), eight layers of llama-7B and Llama-2-70B, each with half of them, on two H200s, us of a step:
//   a launch for each step of the plan              348.9   982.2
//   one for the layers, STAGES 13 (70B: 11), WINDOW 2  302.5   1027.9
//   WINDOW 3                                        305.3   980.4
//   WINDOW 4, 5                                             1009.2, 1028.6
// A consumer awaits two units of every rank's share at a time: four 313.0 (WINDOW 3, 4, 6: 318.3, 328.1, 344.1; 12 and 11 stages,
// WINDOW 3: 321.7, 323.4), one 304.0. With four: a rank's share after the other 316.0, a pause between two looks 317.1, codes that
// are there not asked for again 325.0. To its own memory first, a finisher is no slower (302.2).
//
// Several tokens in one launch, each of its own sequence of 1088, were right and slower than a launch for each step: wgmma's eight
// columns are theirs, a warp sends for x chunk by chunk, a block has the same rows of o and down and norms them itself, from
// sums of squares of all blocks. Eight layers as above, us at 2, 4 and 8 tokens, and beside them separate launches in the same run:
//                                        llama-7B                          llama-3.1-8B
//   x in memory, flags behind fences   626, 666 (551, 575)               849, 857 (749, 758)
//   a chunk's flags by acquiring loads   658, 697, 776 (565, 590, 664)     911, 910, 926 (767, 779, 795)
//   gate_up's flags by a warp of their own, the norms' codes as words with tags, of which a block polls 64 KB for 8 tokens
//                                      811, 874, 999 (542, 563, 637)     1055, 1064, 1117 (730, 738, 758)
// By time stamps of the first (8B, 2 tokens): 2.5 us from a norm's codes to the next x (a fence, a flag, a look, a copy), 1 more
// to its last chunk; a fence for each unit of gate_up takes longer than the unit (29.5 us for 21 us of streaming); 5 us until a
// sequence's last part is joined. Of the last: 8 to 10 us from the norm's sums to the next x. Without any fence as slow.
//
// Constants: HIDDEN, MLP, KV_HEADS, GROUP, DTYPE, EPSILON, SOFTMAX_SCALE, LAYERS, GRID; HEAD_DIM,
// FP8_CACHE, ROTARY_DIM (128, 1, 128); STAGES, WINDOW, WARPGROUPS; of several ranks those of sums.cuh.
#include "join.cuh"
#include "products.cuh"
#include "x.cuh"

// Sends for all that the block reads of the layers, in the order in which it is used. By one thread.
DEVICE void produce(const Params& p, const Ring& ring, const Run& run) {
  Place place, behind;
  int sent = 0;
  const auto next = [&] {  // the barrier of the stage to fill
    const u32 full = ring.full + place.stage * 8;
    if (sent >= STAGES) mbarrier_wait(ring.empty + place.stage * 8, place.parity ^ 1);
    if (WINDOW < STAGES && sent >= WINDOW) mbarrier_wait(ring.full + behind.stage * 8, behind.parity), behind.advance();
    mbarrier_arrive_expect_tx(full, STAGE);
    return full;
  };
  const auto done = [&] { place.advance(), sent++; };
#pragma unroll 1
  for (int i = 0; i < LAYERS; i++) {
    const Layer& layer = p.layers[i];
    int head = run.begin / max(run.tiles, 1), tile = run.begin - head * run.tiles;
    int page = run.count ? p.block_tables[tile] : 0;
#pragma unroll 1
    for (int k = 0; k < run.count; k++) {
      const int row = page * KV_HEADS + head;
      if (++tile == run.tiles) tile = 0, head++;
      if (k + 1 < run.count) page = p.block_tables[tile];
      const u32 full = next(), to = ring.data + place.stage * STAGE;
      tma_load_2d(to, &layer.keys, full, 0, row * TILE);
      tma_load_2d(to + KEYS_BYTES, &layer.values, full, 0, row * (HEAD_DIM / 2));
      done();
    }
#pragma unroll 1
    for (int op = 0; op < (i + 1 < LAYERS ? OPS : NEXT_QKV); op++) {
      const int units = op == O || op == DOWN ? units_of(O) : op == GATE_UP ? units_of(GATE_UP) : units_of(NEXT_QKV);
      const int steps = op == O ? steps_of(O) : op == DOWN ? steps_of(DOWN) : steps_of(GATE_UP);
      prefetch_tensormap(layer.weights + op);
#pragma unroll 1
      for (int unit = first_unit(op); unit < units; unit += GRID)
#pragma unroll 1
        for (int k = 0; k < steps; k++) {
          const u32 full = next();
          tma_load_3d_evict_first(ring.data + place.stage * STAGE, layer.weights + op, full, 0, unit * UNIT, k * (STAGE_K / ATOM));
          done();
        }
    }
  }
  griddepcontrol_launch_dependents();
}

// What a layer's ops read beside weights, ahead of time: scales, gains, and the table's entry of the layer itself.
DEVICE void prefetch_layer(const Layer& layer, bool last) {
  prefetch_scales<O>(layer), prefetch_scales<GATE_UP>(layer), prefetch_scales<DOWN>(layer);
  if (!last) prefetch_scales<NEXT_QKV>(layer);
  const int lane = threadIdx.x % 32;
  if (blockIdx.x < 2 && (blockIdx.x == 0 || !last) && lane == 0) prefetch_l2(layer.gain[blockIdx.x], HIDDEN * 2);
}

// Finishes the sums of all layers. By one warp.
DEVICE void finish_all(const Params& p, const float* sums, u32 before) {
  int buffer = 0;
  barrier_arrive(FREE, CONSUMERS + 32);
  barrier_arrive(FREE + 1, CONSUMERS + 32);
#pragma unroll 1
  for (int i = 0; i < LAYERS; i++) {
    const Layer& layer = p.layers[i];
    const bool last = i + 1 == LAYERS;
    const u32 tag = (before + i + 1) << 16;
    if (!last) prefetch_layer(p.layers[i + 1], i + 2 == LAYERS);
    finish<O>(p, layer, buffer, sums, tag, i == 0, last);
    finish<GATE_UP>(p, layer, buffer, sums, tag, i == 0, last);
    finish<DOWN>(p, layer, buffer, sums, tag, i == 0, last);
    if (!last) finish<NEXT_QKV>(p, layer, buffer, sums, tag, i == 0, last);
  }
  // Whoever has a part of down's y knew all of gate_up's, of which every block has a part: all have read the count.
  if (first_unit(DOWN) == 0 && threadIdx.x % 32 == 0) store_words(launches_of(p), before + LAYERS);
}

extern "C" __global__ void __launch_bounds__(TOTAL, 1) decode_layers(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 shared[];
  __shared__ u64 full[STAGES], empty[STAGES];
  __shared__ float scratch[2][CONSUMERS / 32];
  __shared__ Attending attending[WARPGROUPS];
  u8* x = shared + STAGES * STAGE;
  float* sums = (float*)(x + X_BYTES);
  const Ring ring = {shared_address(shared), shared_address(full), shared_address(empty)};
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) mbarrier_init(ring.full + i * 8, 1), mbarrier_init(ring.empty + i * 8, CONSUMERS / 32);
    fence_mbarrier_init();
  }
  for (int i = threadIdx.x; i < X_BYTES / 16; i += TOTAL) ((uint4*)x)[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  // As in decode.cu: what a step takes in and the cache's older tokens were there before the step's first kernel.
  const Run run(*p.sequence_lengths);
  if (warp == PRODUCER) {
    if (threadIdx.x % 32 == 0) produce(p, ring, run);
    __syncwarp();
    return;
  }
  griddepcontrol_wait();
  const u32 before = load_words(launches_of(p));
  if (warp == FINISHER) {
    finish_all(p, sums, before);
    return;
  }
  const Token token(p);
  Residual residual(p);
  Place place;
  int buffer = 0;
  const auto ready = [&] {  // x, for wgmma
    fence_proxy_async();
    barrier_sync(EVERY, CONSUMERS);
  };
  const u32 x_at = shared_address(x);
#pragma unroll 1
  for (int i = 0; i < LAYERS; i++) {
    const Layer& layer = p.layers[i];
    const u32 tag = before + i + 1;
    attend(p, layer, run, token, ring, place, attending, i == 0, tag);
    place.advance(run.count);
    join(p, layer, run, attending, tag);
    barrier_sync(EVERY, CONSUMERS);
    if (first_unit(O) < units_of(O)) {
      codes_to_x<ATTENTION>(x, p.exchange->attention, tag << 16);
      ready();
      multiply<O>(ring, place, buffer, x_at, sums);
      barrier_sync(EVERY, CONSUMERS);
    }
    norm_to_x(x, scratch[0], Sums(p, residual, O), layer.gain[0], layer.out_scale[GATE_UP], tag << 16);
    ready();
    multiply<GATE_UP>(ring, place, buffer, x_at, sums);
    barrier_sync(EVERY, CONSUMERS);
    if (first_unit(DOWN) < units_of(DOWN)) {
      codes_to_x<MLP>(x, p.exchange->hidden, tag << 16);
      if (RANKS > 1 && i + 1 == LAYERS && first_unit(DOWN) == 0) residual.store(p);
      ready();
      multiply<DOWN>(ring, place, buffer, x_at, sums);
      barrier_sync(EVERY, CONSUMERS);
    }
    if (i + 1 < LAYERS && first_unit(NEXT_QKV) < units_of(NEXT_QKV)) {
      norm_to_x(x, scratch[1], Sums(p, residual, DOWN), layer.gain[1], layer.out_scale[NEXT_QKV], tag << 16);
      ready();
      multiply<NEXT_QKV>(ring, place, buffer, x_at, sums);
      barrier_sync(EVERY, CONSUMERS);
    } else if (RANKS > 1 && i + 1 < LAYERS) {
      residual.add(p, DOWN, tag << 16);
    }
  }
}
