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

// x, or the end of [-bound, bound], beyond which a slope is that of the end; a NaN stays one.
template <class C>
DIP_HD C within(C x, C bound) {
  const C near = x > bound ? bound : x;
  return near < -bound ? -bound : near;
}

template <int kKind>
DIP_HD Act<float> act(float x) {
  if constexpr (kKind == kIdentity) {
    return {x, 1.0f};
  } else if constexpr (kKind == kReluActivation) {
    return {x <= 0 ? 0.0f : x, x <= 0 ? 0.0f : 1.0f};  // a NaN stays one
  } else if constexpr (kKind == kGeluActivation) {
    float a = x, density, tail;
    normal(a, &density, &tail);
    const float cdf = x < 0 ? tail : 1.0f - tail;
    return {x * cdf, fma_of(a, density, cdf)};
  } else if constexpr (kKind == kGeluTanhActivation) {
    constexpr float c = 1.5957691216057308f;  // 2 sqrt(2 / pi)
    float rest;
    const float s = logistic(x * fma_of(x * x, 0.044715f * c, c), &rest), near = within(x, 8.0f);
    return {x * s, fma_of(near * rest, s * fma_of(near * near, 0.134145f * c, c), s)};
  } else if constexpr (kKind == kSiluActivation || kKind == kQuickGeluActivation) {
    const float inner = kKind == kSiluActivation ? x : static_cast<float>(kQuickGeluScale) * x;
    float rest;
    const float s = logistic(inner, &rest);
    return {x * s, s * fma_of(within(inner, 87.0f), rest, 1.0f)};
  } else {
    static_assert(kKind == kTanhActivation);
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
    const double s = 1 / (1 + std::exp(-x * fma_of(x * x, 0.044715 * c, c)));
    const double near = within(x, 12.0);
    return {x * s, fma_of(near * (1 - s), s * fma_of(near * near, 0.134145 * c, c), s)};
  } else if constexpr (kKind == kSiluActivation || kKind == kQuickGeluActivation) {
    const double inner = kKind == kSiluActivation ? x : kQuickGeluScale * x;
    const double s = 1 / (1 + std::exp(-inner));
    return {x * s, s * fma_of(within(inner, 800.0), 1 - s, 1.0)};
  } else {
    static_assert(kKind == kTanhActivation);
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

// dy * act'(x). Relu's is 0 where x <= 0, whatever dy is: of infinity too, and not -0.
template <int kKind, class C>
DIP_HD C times_slope(C dy, C x) {
  if constexpr (kKind == kReluActivation) return x <= 0 ? 0 : dy;
  else return dy * act<kKind>(x).slope;
}

template <int kKind>
struct Known {
  static constexpr int kind = kKind;
};

// Calls f with the Known of an activation; false where there is none.
template <int kKind = 0, class F>
bool with_activation(int kind, F&& f) {
  if constexpr (kKind == kNumActivations) return false;
  else return kind == kKind ? (f(Known<kKind>{}), true) : with_activation<kKind + 1>(kind, f);
}

}  // namespace
}  // namespace dip
