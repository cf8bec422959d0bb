// z from words on a GPU: the two tiers of the noise contract.  docs/maths.md, section 3.
#pragma once
#include "../noise.h"

#if defined(__CUDACC__)
#define DIP_DEVICE __device__ __forceinline__
#else
#define DIP_DEVICE inline __attribute__((always_inline))
#endif

namespace dip {

// The polynomials of noise.h: the bits of every exact backend.
struct ExactTier {
  static DIP_DEVICE void normal_pair(uint32_t w, float* even, float* odd) { standard_normal_pair<ScalarLane>(w, even, odd); }
};

// The special-function unit: z within 4e-6 of the contract's real value.
struct FastTier {
#ifdef __CUDA_ARCH__
  static DIP_DEVICE float log2(float a) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(a));
    return y;
  }
  static DIP_DEVICE float sqrt(float a) {
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(a));
    return y;
  }
  static DIP_DEVICE float cos(float a) {
    float y;
    asm("cos.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(a));
    return y;
  }
  static DIP_DEVICE float sin(float a) {
    float y;
    asm("sin.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(a));
    return y;
  }
  static DIP_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
  // 1 + w / 2^32, truncated: the exponent of one above the word's upper 23 bits, in one funnel shift.
  static DIP_DEVICE float above_one(uint32_t w) { return __uint_as_float(__funnelshift_r(w, 127u, 9)); }
#else
  static DIP_DEVICE float log2(float a) { return static_cast<float>(std::log2(static_cast<double>(a))); }
  static DIP_DEVICE float sqrt(float a) { return static_cast<float>(std::sqrt(static_cast<double>(a))); }
  static DIP_DEVICE float cos(float a) { return static_cast<float>(std::cos(static_cast<double>(a))); }
  static DIP_DEVICE float sin(float a) { return static_cast<float>(std::sin(static_cast<double>(a))); }
  static DIP_DEVICE float larger(float a, float b) { return a > b ? a : b; }
  static DIP_DEVICE float above_one(uint32_t w) { return ScalarLane::as_float(w >> 9 | 127u << 23); }
#endif

  // -2 ln u is the larger of two lower bounds: the series in d = 1 - u, best near u = 1, and the unit's logarithm less 3.6e-7,
  // more than the 3.3e-7 by which it may be off. So near u = 1, where the root enlarges an error, the series always wins.
  static DIP_DEVICE float radius(uint32_t w) {
    using V = ScalarLane;
    const float one_and_u = above_one(w & 0xFFFFF000u);  // 1 + i / 2^20; the half is in the next constant
    const float u = V::sub(one_and_u, 1.0f - 0.5f / 1048576.0f), d = V::sub(1.0f, u);  // both exact
    const float series = V::mul(V::fma(V::fma(d, 2.0f / 3.0f, 1.0f), d, 2.0f), d);
    return sqrt(larger(series, V::fma(log2(u), -1.3862943611198906f, -3.6e-7f)));
  }

  static DIP_DEVICE void normal_pair(uint32_t w, float* even, float* odd) {
    using V = ScalarLane;
    const float r = radius(w);
    const float turns = above_one(w << 20);  // 1 + j / 2^12
    // a - pi: the unit is at its best in [-pi, pi], and the sign of both results flips.
    const float angle = V::fma(turns, 6.2831854820251465f, -9.42401123046875f);  // 2 pi; pi / 4096 - 3 pi
    *even = V::mul(-r, cos(angle));
    *odd = V::mul(-r, sin(angle));
  }
};

// The key schedule, made once a block: reading two rounds' keys from shared memory takes one issue slot, adding them four.
struct alignas(16) RoundKeys {
  uint32_t words[20];  // key of round i: words 2i, 2i + 1
};

DIP_DEVICE void make_round_keys(RoundKeys* keys, PhiloxKey key) {
  DIP_UNROLL
  for (int round = 0; round < 10; ++round) {
    keys->words[2 * round] = key.lo;
    keys->words[2 * round + 1] = key.hi;
    key = next_key(key);
  }
}

// Rounds 2i and 2i + 1. Volatile: hoisted out of a loop, the keys would hold twenty registers.
DIP_DEVICE void load_round_keys(const RoundKeys& keys, int i, PhiloxKey pair[2]) {
#ifdef __CUDA_ARCH__
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(pair[0].lo), "=r"(pair[0].hi), "=r"(pair[1].lo), "=r"(pair[1].hi)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(keys.words + 4 * i))));
#else
  pair[0] = {keys.words[4 * i], keys.words[4 * i + 1]};
  pair[1] = {keys.words[4 * i + 2], keys.words[4 * i + 3]};
#endif
}

// z[i][t]: column 8 * group + t of row `row + i * step`, for N rows in lockstep. last_word: stream and sample.
template <class Tier, int N>
DIP_DEVICE void draw_groups(
    const RoundKeys& keys, uint32_t last_word, uint32_t group, uint64_t row, uint64_t step, float z[N][8]) {
  uint64_t ctr[N][4];
  DIP_UNROLL
  for (int i = 0; i < N; ++i) {
    const uint64_t at = row + i * step;
    ctr[i][0] = group, ctr[i][1] = static_cast<uint32_t>(at), ctr[i][2] = at >> 32, ctr[i][3] = last_word;
  }
  DIP_UNROLL
  for (int round = 0; round < 10; round += 2) {
    PhiloxKey key[2];
    load_round_keys(keys, round / 2, key);
    DIP_UNROLL
    for (int i = 0; i < 2 * N; ++i) philox4x32_round<ScalarLane>(ctr[i % N], key[i / N]);
  }
  DIP_UNROLL
  for (int i = 0; i < N; ++i) {
    DIP_UNROLL
    for (int t = 0; t < 4; ++t) Tier::normal_pair(static_cast<uint32_t>(ctr[i][t]), &z[i][2 * t], &z[i][2 * t + 1]);
  }
}

}  // namespace dip
