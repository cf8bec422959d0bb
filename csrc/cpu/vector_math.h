// Functions of one number that compilers vectorise: no branches, no calls in float32.  No STL
// (draw.h).
#pragma once
#include <cmath>

#include "../noise.h"

namespace dip {
namespace {

DIP_HD float fma_of(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
DIP_HD double fma_of(double a, double b, double c) { return __builtin_fma(a, b, c); }

// phi(a) and Phi(-|a|), both 0 from |a| = 8 on, to where a is brought back. There Phi is 6e-16, far
// from a subnormal number, on which arithmetic takes a processor a hundred cycles; a smaller one
// times a gradient would be one, and the matrix products behind it up to a hundred times slower.
DIP_HD void normal(float& a, float* density, float* tail) {
  a = a > 8.0f ? 8.0f : a;
  a = a < -8.0f ? -8.0f : a;
  const float x = __builtin_fabsf(a);
  const float t = x * x * -0.72134752044448170f;  // phi(a) = 2^t / sqrt(2 pi)
  const float shifted = t + 12582912.0f;          // the integer nearest to t, in the low bits
  const float f = t - (shifted - 12582912.0f);
  float e = fma_of(f, 0.0005296452488186387f, 0.003859971572640952f);
  e = fma_of(e, f, 0.022144143759068344f);
  e = fma_of(e, f, 0.09583439458007795f);
  e = fma_of(e, f, 0.27652563169478506f);
  e = fma_of(e, f, 0.3989423089303472f);
  e = ScalarLane::as_float(ScalarLane::as_uint(e) + (ScalarLane::as_uint(shifted) << 23));
  *density = x >= 8.0f ? 0.0f : e;
  // The ratio Phi(-x) / phi(x) by a polynomial in 1 / (1 + 0.28 x), fitted for the least error of
  // (1 + x) Phi(-x): 1.5e-8.
  const float r = 1.0f / fma_of(x, 0.28f, 1.0f);
  float q = fma_of(r, -0.26708350881075804f, 0.9849908563345496f);
  q = fma_of(q, r, -0.6067879639947539f);
  q = fma_of(q, r, 0.6844901636210934f);
  q = fma_of(q, r, 0.16494403532913238f);
  q = fma_of(q, r, 0.2927605180310524f);
  *tail = *density * (q * r);
}

DIP_HD void normal(double& a, double* density, double* tail) {
  a = a > 20.0 ? 20.0 : a;
  a = a < -20.0 ? -20.0 : a;
  const bool far = std::fabs(a) >= 20.0;
  *density = far ? 0.0 : 0.39894228040143267794 * std::exp(-0.5 * a * a);
  *tail = far ? 0.0 : 0.5 * std::erfc(0.70710678118654752440 * std::fabs(a));
}

// e^x = *power * (1 + *rest), power the nearest power of two; both exact enough for e^x - 1 to 2e-7
// of itself. |x| <= 87.
DIP_HD void exp_parts(float x, float* power, float* rest) {
  // the integer nearest to x / ln 2, in the low bits
  const float shifted = fma_of(x, 1.4426950408889634f, 12582912.0f);
  const float k = shifted - 12582912.0f;
  const float f = fma_of(k, -1.42860677e-6f, fma_of(k, -0.693145752f, x));  // ln 2 in two parts
  float p = fma_of(f, 0.0013888872927054763f, 0.008369140326976776f);
  p = fma_of(p, f, 0.041667137295007706f);
  p = fma_of(p, f, 0.16666506230831146f);
  p = fma_of(p, f, 0.4999999701976776f);
  p = fma_of(p, f, 1.0f);
  *rest = p * f;
  *power = ScalarLane::as_float((ScalarLane::as_uint(shifted) << 23) + 0x3F800000u);
}

// 2^t to 1.3e-7 of itself, given the integer nearest to t in the low bits of 12582912 + t, and what
// t is more.
DIP_HD float power_of_two(float shifted, float f) {
  float p = fma_of(f, 0.0013264729641377926f, 0.009671512991189957f);
  p = fma_of(p, f, 0.05550733581185341f);
  p = fma_of(p, f, 0.24022242426872253f);
  p = fma_of(p, f, 0.6931470036506653f);
  p = fma_of(p, f, 1.0f);
  return ScalarLane::as_float((ScalarLane::as_uint(shifted) << 23) + ScalarLane::as_uint(p));
}

// 1 / (1 + e^-x), 0 where that is no normal number, and what it lacks of 1.
DIP_HD float logistic(float x, float* complement) {
  float near = x > 87.0f ? 87.0f : x;
  near = near < -87.0f ? -87.0f : near;
  const float shifted = fma_of(near, -1.4426950408889634f, 12582912.0f);
  const float e = power_of_two(shifted, fma_of(near, -1.4426950408889634f, 12582912.0f - shifted));
  const float s = 1.0f / (1.0f + e);
  *complement = e * s;
  return x < -87.0f ? 0.0f : s;
}

// Phi(x), to 9e-8 and times |x| too: Phi(-|x|) = 2^q(|x|) with a polynomial of the least error of
// (1 + |x|) Phi(-|x|), and 0 from 5.7 on, where it is less than 6e-9.
DIP_HD float normal_cdf(float x) {
  const float size = __builtin_fabsf(x), a = size > 5.7f ? 5.7f : size;
  float t = fma_of(a, 6.122426839283435e-06f, -3.196616307832301e-05f);
  t = fma_of(t, a, -0.0004991134046576917f);
  t = fma_of(t, a, 0.007521697320044041f);
  t = fma_of(t, a, -0.05280270427465439f);
  t = fma_of(t, a, -0.459109902381897f);
  t = fma_of(t, a, -1.1511170864105225f);
  t = fma_of(t, a, -0.9999997615814209f);
  const float shifted = t + 12582912.0f;
  float tail = power_of_two(shifted, t - (shifted - 12582912.0f));
  tail = size >= 5.7f ? 0.0f : tail;
  return x < 0 ? tail : 1.0f - tail;
}

DIP_HD float hyperbolic_tangent(float x) {
  float twice = 2.0f * __builtin_fabsf(x), power, rest;
  twice = twice > 40.0f ? 40.0f : twice;
  exp_parts(twice, &power, &rest);
  const float less_one = fma_of(power, rest, power - 1.0f);  // e^2|x| - 1
  return __builtin_copysignf(less_one / (less_one + 2.0f), x);
}

}  // namespace
}  // namespace dip
