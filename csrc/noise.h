// z from words: the values of the noise contract.  docs/maths.md, section 3.
// Any edit here changes users' random numbers. Every a * b + c is an explicit fma: compilers
// contract silently.
#pragma once
#include <cmath>
#include <cstring>

#include "philox.h"

#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || \
    __FINITE_MATH_ONLY__
#error "fast arithmetic changes the noise: build without -ffast-math, which this compiler adds"
#endif

namespace dip {

// One lane: a GPU thread, or plain C++.
struct ScalarLane {
  static constexpr int kLanes = 1;
  using F = float;
  using U = uint32_t;
  using Wide = uint64_t;
  static DIP_HD Wide widen(U a) { return a; }
  static DIP_HD U narrow(Wide a) { return static_cast<U>(a); }
  static DIP_HD Wide high(Wide a) { return a >> 32; }
  static DIP_HD Wide xor2(Wide a, uint64_t c) { return a ^ c; }
  static DIP_HD Wide xor3(Wide a, Wide b, uint64_t c) { return a ^ b ^ c; }
  static DIP_HD U splat(uint32_t a) { return a; }
  static DIP_HD F splat_f(float a) { return a; }
  static DIP_HD U and_(U a, U b) { return a & b; }
  static DIP_HD U xor_and(U a, U b, U c) { return a ^ (b & c); }
  static DIP_HD U and_or(U a, U b, U c) { return (a & b) | c; }
  static DIP_HD U sub_u(U a, U b) { return a - b; }
  template <int kBits>
  static DIP_HD U shift_left(U a) {
    return a << kBits;
  }
  template <int kBits>
  static DIP_HD U shift_right(U a) {
    return a >> kBits;
  }
  static DIP_HD F add(F a, F b) { return a + b; }
  static DIP_HD F sub(F a, F b) { return a - b; }
  static DIP_HD F mul(F a, F b) { return a * b; }
#ifdef __CUDA_ARCH__
  // One instruction; from the C++ below nvcc makes a 64-bit product and adds the zeros of its other
  // half.
  static DIP_HD Wide multiply(Wide a, uint32_t m) {
    Wide product;
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(static_cast<U>(a)), "r"(m));
    return product;
  }
  static DIP_HD F as_float(U a) { return __uint_as_float(a); }
  static DIP_HD U as_uint(F a) { return __float_as_uint(a); }
  static DIP_HD F int_to_float(U a) { return __int2float_rn(static_cast<int>(a)); }
  static DIP_HD F fma(F a, F b, F c) { return __fmaf_rn(a, b, c); }
  // Equal to the correctly rounded root on the contract's radii; see sqrt_corrected in
  // docs/maths.md, section 3.
  static DIP_HD F sqrt(F a) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(a));
    const float g = __fmul_rn(a, y);
    return __fmaf_rn(__fmaf_rn(-g, g, a), __fmul_rn(0.5f, y), g);
  }
#else
  static DIP_HD Wide multiply(Wide a, uint32_t m) {
    return static_cast<Wide>(static_cast<U>(a)) * m;
  }
  static DIP_HD F as_float(U a) {
    F f;
    std::memcpy(&f, &a, 4);
    return f;
  }
  static DIP_HD U as_uint(F a) {
    U u;
    std::memcpy(&u, &a, 4);
    return u;
  }
  static DIP_HD F int_to_float(U a) { return static_cast<float>(static_cast<int32_t>(a)); }
  static DIP_HD F fma(F a, F b, F c) { return __builtin_fmaf(a, b, c); }
  static DIP_HD F sqrt(F a) { return __builtin_sqrtf(a); }
#endif
};

// radius = sqrt(-2 ln u), u = (w[31:12] + 1/2) / 2^20.
// The logarithm: u = 2^e (1 + f) with 1 + f in [0.707, 1.414), -2 ln u = -2 ln 2 e + f P(f).
template <class V>
DIP_HD typename V::F radius(typename V::U w) {
  using F = typename V::F;
  using U = typename V::U;
  // 1.0 + u - 2^0 is exact: the 20 bits and the half sit under the leading one.
  const U mantissa =
      V::and_or(V::template shift_right<9>(w), V::splat(0x7FFFF8u), V::splat(0x3F800004u));
  const F u = V::sub(V::as_float(mantissa), V::splat_f(1.0f));
  const U bits = V::as_uint(u);
  // e * 2^23
  const U exponent = V::and_(V::sub_u(bits, V::splat(0x3F3504F3u)), V::splat(0xFF800000u));
  const F f = V::sub(V::as_float(V::sub_u(bits, exponent)), V::splat_f(1.0f));
  F p = V::fma(f, V::splat_f(0.20756372809410095f), V::splat_f(-0.3267586827278137f));
  p = V::fma(p, f, V::splat_f(0.3442501127719879f));
  p = V::fma(p, f, V::splat_f(-0.39768528938293457f));
  p = V::fma(p, f, V::splat_f(0.49943113327026367f));
  p = V::fma(p, f, V::splat_f(-0.6667121648788452f));
  p = V::fma(p, f, V::splat_f(1.000006914138794f));
  p = V::fma(p, f, V::splat_f(-1.9999998807907104f));
  const F minus_2_ln_u = V::fma(
      V::int_to_float(exponent), V::splat_f(-1.3862943611198906f / 8388608.0f), V::mul(p, f));
  return V::sqrt(minus_2_ln_u);
}

// cos and sin of a = 2 pi (w[11:0] + 1/2) / 2^12, as (c - s) and (c + s) about the middle of a
// quadrant, signs by quadrant: quadrant 0 (c - s, c + s), 1 (-(c + s), c - s): an odd quadrant
// flips s and the cosine; 2 and 3 flip both.
template <class V>
DIP_HD void cos_sin(typename V::U w, typename V::F r, typename V::F* even, typename V::F* odd) {
  using F = typename V::F;
  using U = typename V::U;
  const U sign = V::splat(0x80000000u);
  const U mantissa =
      V::and_or(V::template shift_left<13>(w), V::splat(0x7FE000u), V::splat(0x3F801000u));
  const F t = V::sub(V::as_float(mantissa), V::splat_f(1.5f));  // (j mod 1024 + 1/2) / 1024 - 1/2
  const F t2 = V::mul(t, t);
  F c = V::fma(t2, V::splat_f(-0.014430979266762733f), V::splat_f(0.17932136356830597f));
  c = V::fma(c, t2, V::splat_f(-0.8723555207252502f));
  c = V::fma(c, t2, V::splat_f(0.7071067690849304f));
  F s = V::fma(t2, V::splat_f(0.05491918325424194f), V::splat_f(-0.4565873444080353f));
  s = V::fma(s, t2, V::splat_f(1.1107151508331299f));
  s = V::mul(s, t);
  const U odd_quadrant = V::template shift_left<21>(w);  // bit 10, at the sign
  const U upper_half = V::template shift_left<20>(w);    // bit 11, at the sign
  s = V::as_float(V::xor_and(V::as_uint(s), odd_quadrant, sign));
  const F r_sin = V::as_float(V::xor_and(V::as_uint(r), upper_half, sign));
  const F r_cos = V::as_float(V::xor_and(V::as_uint(r_sin), odd_quadrant, sign));
  *even = V::mul(r_cos, V::sub(c, s));
  *odd = V::mul(r_sin, V::add(c, s));
}

// Two columns, 2t and 2t + 1, from word t.
template <class V>
DIP_HD void standard_normal_pair(typename V::U w, typename V::F* even, typename V::F* odd) {
  cos_sin<V>(w, radius<V>(w), even, odd);
}

DIP_HD PhiloxKey philox_key(const int64_t seed[2]) {
  const uint64_t key = static_cast<uint64_t>(seed[0]);
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
}

DIP_HD uint32_t stream_sample(const int64_t seed[2], uint32_t sample) {
  return static_cast<uint32_t>(seed[1] & 0xFFFF) << 16 | sample;
}

}  // namespace dip
