#pragma once
// What the two ways into the cache share: rotary embedding of a row of qkv in float32, codes of the cache's type, and the
// place of a token among a page's transposed values.
//
// Constants: HEAD_DIM, ROTARY_DIM (0 = none), FP8_CACHE, DTYPE.
#include "fp8/convert.cuh"

constexpr int CACHE_BYTES = FP8_CACHE ? 1 : 2;  // of a cached value
static_assert(ROTARY_DIM % 2 == 0 && ROTARY_DIM <= HEAD_DIM);

template <int BYTES> struct Word;
template <> struct Word<16> { typedef uint4 type; };
template <> struct Word<8> { typedef uint2 type; };
template <> struct Word<4> { typedef u32 type; };
template <> struct Word<2> { typedef u16 type; };
template <> struct Word<1> { typedef u8 type; };

// N values of the model's type, not yet converted: half the registers while they are on their way.
template <int N> struct Raw {
  typename Word<2 * N>::type word;
  DEVICE_MEMBER void load(const u16* from) { word = *(const typename Word<2 * N>::type*)from; }
  DEVICE_MEMBER void convert(float (&x)[N]) const {
    union { typename Word<2 * N>::type word; u16 item[N]; } raw;
    raw.word = word;
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = to_float<DTYPE>(raw.item[i]);
  }
};

template <int N> DEVICE void load32(float (&x)[N], const float* from) {
#pragma unroll
  for (int i = 0; i < N; i += (N < 4 ? N : 4)) {
    union { typename Word<N < 4 ? 4 * N : 16>::type word; float item[N < 4 ? N : 4]; } raw;
    raw.word = *(const decltype(raw.word)*)(from + i);
#pragma unroll
    for (int k = 0; k < (N < 4 ? N : 4); k++) x[i + k] = raw.item[k];
  }
}

// N rotation pairs of a head: dimensions first + i and second + i. Pairs of the dimensions behind ROTARY_DIM pass.
template <int N> struct Pairs {
  static_assert((ROTARY_DIM / 2) % N == 0 && HEAD_DIM % (2 * N) == 0, "a thread's pairs are rotated all or none");
  static constexpr int COUNT = HEAD_DIM / (2 * N);
  int first, second;
  bool rotates;
  DEVICE_MEMBER explicit Pairs(int index) {
    const int at = index * N;
    rotates = at < ROTARY_DIM / 2;
    first = rotates ? at : ROTARY_DIM + at - ROTARY_DIM / 2;
    second = first + (rotates ? ROTARY_DIM / 2 : (HEAD_DIM - ROTARY_DIM) / 2);
  }
  DEVICE_MEMBER void load_angles(float (&c)[N], float (&s)[N], const float* cos, const float* sin, int position) const {
    if (!rotates) return;
    load32(c, cos + (u64)position * (ROTARY_DIM / 2) + first);
    load32(s, sin + (u64)position * (ROTARY_DIM / 2) + first);
  }
  // Each product and sum is rounded, as in the graph: no contraction to FMA.
  DEVICE_MEMBER void rotate(float (&a)[N], float (&b)[N], const float (&c)[N], const float (&s)[N]) const {
    if (!rotates) return;
#pragma unroll
    for (int i = 0; i < N; i++) {
      const float x = a[i], z = b[i];
      a[i] = __fsub_rn(__fmul_rn(c[i], x), __fmul_rn(s[i], z));
      b[i] = __fadd_rn(__fmul_rn(s[i], x), __fmul_rn(c[i], z));
    }
  }
};

// To the cache's type; `divided` quantizes.
template <int N, class Divided> DEVICE void store_codes(u8* to, const float (&x)[N], Divided divided) {
  union { typename Word<CACHE_BYTES * N>::type word; u8 code[CACHE_BYTES * N]; u16 item[(CACHE_BYTES * N + 1) / 2]; } raw;
  if constexpr (!FP8_CACHE) {
#pragma unroll
    for (int i = 0; i < N; i++) raw.item[i] = from_float<DTYPE>(x[i]);
  } else if constexpr (N == 1) {
    raw.code[0] = (u8)e4m3x2(divided(x[0]), 0.f);
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 2) raw.item[i / 2] = e4m3x2(divided(x[i]), divided(x[i + 1]));
  }
  *(decltype(raw.word)*)to = raw.word;
}

// The place of a page's token, < 64, in a row of its transposed e4m3 values. layout.py: PERMUTATION.
DEVICE int value_place(int token) { return (token & 48) | (token & 6) << 1 | (token & 8) >> 2 | (token & 1); }
// And in a page of a head, in bytes, of its first dimension: each further one comes VALUE_GROUP bytes later.
constexpr int VALUE_GROUP = 16;
DEVICE int value_offset(int token) {
  return value_place(token) / VALUE_GROUP * (HEAD_DIM * VALUE_GROUP) + value_place(token) % VALUE_GROUP;
}
