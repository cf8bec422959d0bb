// The activations with their slopes, as functions of one number.  No STL (draw.h).
#pragma once
#include "../activation.h"
#include "../launch.h"
#include "vector_math.h"

namespace dip {
namespace {

template <class C>
struct Act {
  C value, slope;  // who uses one alone pays for one
};

template <int kKind>
DIP_HD Act<float> act(float x) {
  if constexpr (kKind == kIdentity) {
    return {x, 1.0f};
  } else if constexpr (kKind == kReluActivation) {
    return {x <= 0 ? 0.0f : x, x <= 0 ? 0.0f : 1.0f};  // a NaN stays one
  } else if constexpr (kKind == kGeluActivation) {
    float a = x, density, tail;
    normal(a, &density, &tail);
    tail = __builtin_fabsf(x) >= 12.5f ? 0.0f : tail;
    const float cdf = x < 0 ? tail : 1.0f - tail;
    return {x * cdf, fma_of(a, density, cdf)};
  } else if constexpr (kKind == kGeluTanhActivation) {
    constexpr float c = 1.5957691216057308f;  // 2 sqrt(2 / pi)
    float rest;
    const float x2 = x * x, s = logistic(x * fma_of(x2, 0.044715f * c, c), &rest);
    return {x * s, fma_of(x * rest, s * fma_of(x2, 0.134145f * c, c), s)};
  } else if constexpr (kKind == kSiluActivation) {
    float rest;
    const float s = logistic(x, &rest);
    return {x * s, s * fma_of(x, rest, 1.0f)};
  } else {
    const float t = hyperbolic_tangent(x);
    return {t, fma_of(-t, t, 1.0f)};
  }
}

template <int kKind>
DIP_HD Act<double> act(double x) {
  if constexpr (kKind == kReluActivation) {
    return {x <= 0 ? 0.0 : x, x <= 0 ? 0.0 : 1.0};  // a NaN stays one
  } else if constexpr (kKind == kGeluActivation) {
    const double density = 0.39894228040143267794 * std::exp(-0.5 * x * x),
                 cdf = 0.5 * std::erfc(-0.70710678118654752440 * x);
    return {x * cdf, fma_of(x, density, cdf)};
  } else if constexpr (kKind == kGeluTanhActivation) {
    constexpr double c = 1.59576912160573071176;  // 2 sqrt(2 / pi)
    const double x2 = x * x, s = 1 / (1 + std::exp(-x * fma_of(x2, 0.044715 * c, c)));
    return {x * s, fma_of(x * (1 - s), s * fma_of(x2, 0.134145 * c, c), s)};
  } else if constexpr (kKind == kSiluActivation) {
    const double s = 1 / (1 + std::exp(-x));
    return {x * s, s * fma_of(x, 1 - s, 1.0)};
  } else {
    const double t = std::tanh(x);
    return {t, fma_of(-t, t, 1.0)};
  }
}

// act(x).value alone.
template <int kKind, class C>
DIP_HD C act_value(C x) {
  if constexpr (kKind == kGeluActivation && sizeof(C) == 4) return x * normal_cdf(x);
  else return act<kKind>(x).value;
}

}  // namespace
}  // namespace dip
