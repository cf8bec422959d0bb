// Samples behind an activation, summed: total += sum over s of act(h_s), and back.  docs/maths.md, section 4.
// Compiled once per instruction set; DIP_SAMPLES names the entry point. Plain loops that compilers vectorise; no STL
// (perturb.cpp).
#include "../activation.h"
#include "convert.h"
#include "parallel.h"
#include "vector_math.h"

namespace dip {
namespace {

// The activation's value, or its slope.
template <int kKind, bool kSlope>
DIP_HD float act(float x) {
  if constexpr (kKind == kReluActivation) {
    return x <= 0 ? 0.0f : kSlope ? 1.0f : x;  // a NaN stays one
  } else if constexpr (kKind == kGeluActivation) {
    float a = x, density, tail;
    normal(a, &density, &tail);
    tail = __builtin_fabsf(x) >= 12.5f ? 0.0f : tail;
    const float cdf = x < 0 ? tail : 1.0f - tail;
    return kSlope ? fma_of(a, density, cdf) : x * cdf;
  } else if constexpr (kKind == kGeluTanhActivation) {
    constexpr float c = 1.5957691216057308f;  // 2 sqrt(2 / pi)
    float rest;
    const float x2 = x * x, s = logistic(x * fma_of(x2, 0.044715f * c, c), &rest);
    return kSlope ? fma_of(x * rest, s * fma_of(x2, 0.134145f * c, c), s) : x * s;
  } else if constexpr (kKind == kSiluActivation) {
    float rest;
    const float s = logistic(x, &rest);
    return kSlope ? s * fma_of(x, rest, 1.0f) : x * s;
  } else {
    const float t = hyperbolic_tangent(x);
    return kSlope ? fma_of(-t, t, 1.0f) : t;
  }
}

// body(first, n) for every run of [0, size).
template <class F>
void for_each_run(ParallelFor parallel_for, int64_t size, F&& body) {
  run_parallel(parallel_for, ceil_div(size, kRun), 16, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kRun; first < smaller(size, end * kRun); first += kRun)
      body(first, static_cast<int>(smaller(kRun, size - first)));
  });
}

template <int kKind>
void sum(const SamplesArgs& a, ParallelFor parallel_for) {
  for_each_run(parallel_for, a.size, [&](int64_t first, int n) {
    alignas(64) float buffer[kRun], gradient[kRun], target[kRun];
    float* __restrict total = static_cast<float*>(a.total) + first;
    for (int64_t s = 0; s < a.samples; ++s) {
      const int64_t at = s * a.size + first;
      const float* __restrict h = load_run<float>(a.h, at, n, buffer);
      if (!a.dh.data) {
        for (int i = 0; i < n; ++i) total[i] += act<kKind, false>(h[i]);
        continue;
      }
      const float* __restrict dy = load_run<float>(a.dy, first, n, gradient);
      float* __restrict dh = run_target<float>(a.dh, at, target);
      for (int i = 0; i < n; ++i) {
        dh[i] = dy[i] * act<kKind, true>(h[i]);
        total[i] += dh[i];
      }
      store_run<float>(a.dh, at, n, dh);
    }
  });
}

// relu of one sample by signs: a bit says h > 0, and backward needs no more.
template <class C>
void sum_by_signs(const SamplesArgs& a, ParallelFor parallel_for) {
  for_each_run(parallel_for, a.size, [&](int64_t first, int n) {
    alignas(64) C buffer[kRun], target[kRun];
    const int bit = a.bit;
    C* __restrict total = static_cast<C*>(a.total) + first;
    uint8_t* __restrict signs = a.signs + first;
    if (!a.dh.data) {
      const C* __restrict h = load_run<C>(a.h, first, n, buffer);
      for (int i = 0; i < n; ++i) total[i] += h[i] <= 0 ? C(0) : h[i];  // a NaN stays one
      int set[kRun];  // of its own: a conditional byte beside a wider h is not vectorised
      for (int i = 0; i < n; ++i) set[i] = h[i] <= 0 ? 0 : bit;
      for (int i = 0; i < n; ++i) signs[i] = static_cast<uint8_t>(signs[i] | set[i]);
      return;
    }
    const C* __restrict dy = load_run<C>(a.dy, first, n, buffer);
    C* __restrict dh = run_target<C>(a.dh, first, target);
    for (int i = 0; i < n; ++i) dh[i] = signs[i] & bit ? dy[i] : C(0);
    for (int i = 0; i < n; ++i) total[i] += dh[i];
    store_run<C>(a.dh, first, n, dh);
  });
}

}  // namespace

const char* DIP_SAMPLES(const SamplesArgs& a, ParallelFor parallel_for) {
  if (a.signs) {
    if (a.total_is_double) sum_by_signs<double>(a, parallel_for);
    else sum_by_signs<float>(a, parallel_for);
    return nullptr;
  }
  switch (a.kind) {
    case kReluActivation: sum<kReluActivation>(a, parallel_for); break;
    case kGeluActivation: sum<kGeluActivation>(a, parallel_for); break;
    case kGeluTanhActivation: sum<kGeluTanhActivation>(a, parallel_for); break;
    case kSiluActivation: sum<kSiluActivation>(a, parallel_for); break;
    case kTanhActivation: sum<kTanhActivation>(a, parallel_for); break;
    default: return "activation: unknown";
  }
  return nullptr;
}

}  // namespace dip
