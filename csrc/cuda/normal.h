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
#else
  static DIP_DEVICE float log2(float a) { return static_cast<float>(std::log2(static_cast<double>(a))); }
  static DIP_DEVICE float sqrt(float a) { return static_cast<float>(std::sqrt(static_cast<double>(a))); }
  static DIP_DEVICE float cos(float a) { return static_cast<float>(std::cos(static_cast<double>(a))); }
  static DIP_DEVICE float sin(float a) { return static_cast<float>(std::sin(static_cast<double>(a))); }
  static DIP_DEVICE float larger(float a, float b) { return a > b ? a : b; }
#endif

  // -2 ln u is the larger of two lower bounds: the series in d = 1 - u, best near u = 1, and the unit's logarithm less 3.6e-7,
  // more than the 3.3e-7 by which it may be off. So near u = 1, where the root enlarges an error, the series always wins.
  static DIP_DEVICE float radius(uint32_t w) {
    using V = ScalarLane;
    const float one_and_u = V::as_float(((w >> 9) & 0x7FFFF8u) | 0x3F800004u);  // 1 + u, exact
    const float u = V::sub(one_and_u, 1.0f), d = V::sub(2.0f, one_and_u);
    const float series = V::mul(V::fma(V::fma(d, 2.0f / 3.0f, 1.0f), d, 2.0f), d);
    return sqrt(larger(series, V::fma(log2(u), -1.3862943611198906f, -3.6e-7f)));
  }

  static DIP_DEVICE void normal_pair(uint32_t w, float* even, float* odd) {
    using V = ScalarLane;
    const float r = radius(w);
    const float turns = V::as_float(((w << 11) & 0x7FF800u) | 0x3F800400u);  // 1 + a / 2 pi, exact
    // a - pi: the unit is at its best in [-pi, pi], and the sign of both results flips. The constants are 2 pi and -3 pi, each one
    // ulp off: that cancels the truncation of the unit's own division by 2 pi, and leaves 1.9e-7 of the angle's error instead of 5.6e-7.
    const float angle = V::fma(turns, 6.283185958862305f, -9.424778938293457f);
    *even = V::mul(-r, cos(angle));
    *odd = V::mul(-r, sin(angle));
  }
};

// What one thread needs of the seed.
struct Draw {
  PhiloxKey key;
  uint32_t first;  // stream and first sample
};

// z[t]: column 8 * group + t of one row.
template <class Tier>
DIP_DEVICE void draw_group(const Draw& draw, uint32_t sample, uint32_t group, uint64_t row, float z[8]) {
  uint64_t ctr[4] = {group, static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), draw.first + sample};
  philox4x32_10<ScalarLane>(ctr, draw.key);
  DIP_UNROLL
  for (int t = 0; t < 4; ++t) Tier::normal_pair(static_cast<uint32_t>(ctr[t]), &z[2 * t], &z[2 * t + 1]);
}

}  // namespace dip
