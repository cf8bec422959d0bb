// y = E[act(mu + sqrt(v) z)] over z ~ N(0, 1), with its derivatives in mu and, summed over rows, in v; and v.  docs/maths.md,
// section 7. Compiled once per instruction set; DIP_ACTIVATION and DIP_VARIANCE name the entry points. Plain loops that compilers
// vectorise; no STL (perturb.cpp).
#include <cmath>
#include <cstdlib>

#include "../activation.h"
#include "convert.h"
#include "parallel.h"
#include "vector_math.h"

namespace dip {
namespace {

constexpr int kColumns = 256;       // of a tile: its coefficients stay in the first-level cache
constexpr int64_t kRows = 64;       // of a tile, and of a sum in the compute type
constexpr int64_t kMaxBlocks = 32;  // row blocks of the two-stage sum
static_assert(kColumns <= kRun, "a row of a tile is one run");

// ---- one run of columns ----------------------------------------------------------------------------------------------

// Of the columns, for each term t at [t * stride + column]: alpha = c / sqrt(1 + c^2 v), gamma = p alpha, beta = 1 / (1 + c^2 v).
template <class C>
struct Coefficients {
  const C *alpha, *beta, *gamma, *v;
  int64_t stride;
  C p[10];
};

// With T = sum of p Phi(-|a|), a = alpha mu, and sum of p = 1: tanh (kOdd) is sign(mu) (1 - 2 T), the others
// max(mu, 0) - |mu| T + v sum of gamma phi(a). Small terms are added to what is exact, however the p cancel.
template <class C, int kTerms, bool kOdd, int t = 0>
DIP_HD void sum_terms(const Coefficients<C>& k, int64_t at, C mu, C& tails, C& densities) {
  C a = mu * k.alpha[t * k.stride + at], density, tail;
  normal(a, &density, &tail);
  tails = fma_of(k.p[t], tail, tails);
  if constexpr (!kOdd) densities = fma_of(k.gamma[t * k.stride + at], density, densities);
  if constexpr (t + 1 < kTerms) sum_terms<C, kTerms, kOdd, t + 1>(k, at, mu, tails, densities);
}

template <class C, int kTerms, bool kOdd>
DIP_HD void forward_run(const Coefficients<C>& k, int64_t first, int n, const C* __restrict mu, C* __restrict y) {
  for (int i = 0; i < n; ++i) {
    const C x = mu[i];
    C tails = 0, densities = 0;
    sum_terms<C, kTerms, kOdd>(k, first + i, x, tails, densities);
    if constexpr (kOdd) {
      const C size = C(1) - C(2) * tails;
      y[i] = x < 0 ? -size : size;
    } else {
      C size = std::fabs(x);
      size = size > C(1e15) ? C(1e15) : size;  // of an infinity no NaN; a NaN stays one
      y[i] = fma_of(-size, tails, fma_of(k.v[first + i], densities, x > 0 ? x : C(0)));
    }
  }
}

// d/dmu, and d/dv = half of the second derivative in mu.
template <class C, int kTerms, bool kOdd, int t = 0>
DIP_HD void sum_slopes(const Coefficients<C>& k, int64_t at, C mu, C& tails, C& dmu, C& dv) {
  const int64_t column = t * k.stride + at;
  const C alpha = k.alpha[column], gamma = k.gamma[column];
  C a = mu * alpha, density, tail;
  normal(a, &density, &tail);
  const C slope = gamma * density;
  if constexpr (kOdd) {
    dmu += slope + slope;
    dv = fma_of(-alpha * a, slope, dv);
  } else {
    const C beta = k.beta[column];
    tails = fma_of(k.p[t], tail, tails);
    dmu = fma_of(k.p[t] * beta * a, density, dmu);
    dv = fma_of(C(0.5) * slope, fma_of(beta, fma_of(-a, a, C(1)), C(1)), dv);
  }
  if constexpr (t + 1 < kTerms) sum_slopes<C, kTerms, kOdd, t + 1>(k, at, mu, tails, dmu, dv);
}

template <class C, int kTerms, bool kOdd>
DIP_HD void backward_run(
    const Coefficients<C>& k, int64_t first, int n, const C* __restrict mu, const C* __restrict dy, C* __restrict dmu,
    C* __restrict dv) {
  for (int i = 0; i < n; ++i) {
    const C x = mu[i];
    C tails = 0, slope = 0, half_curvature = 0;
    sum_slopes<C, kTerms, kOdd>(k, first + i, x, tails, slope, half_curvature);
    if constexpr (!kOdd) slope += x < 0 ? tails : C(1) - tails;
    dmu[i] = dy[i] * slope;
    dv[i] = fma_of(dy[i], half_curvature, dv[i]);
  }
}

// ---- columns without variance: the activation itself -----------------------------------------------------------------

struct Plain {
  double value, slope, half_curvature;
};

Plain plain(int kind, double x) {
  switch (kind) {
    case kReluActivation: return {x <= 0 ? 0.0 : x, x <= 0 ? 0.0 : 1.0, 0.0};
    case kGeluActivation: {
      const double density = 0.39894228040143267794 * std::exp(-0.5 * x * x), cdf = 0.5 * std::erfc(-0.70710678118654752440 * x);
      return {x * cdf, cdf + x * density, 0.5 * density * (2 - x * x)};
    }
    case kGeluTanhActivation: {
      const double c = 0.79788456080286535588, d1 = c * (1 + 0.134145 * x * x), d2 = c * 0.26829 * x;
      const double s = 1 / (1 + std::exp(-2 * c * (x + 0.044715 * x * x * x))), ds = 2 * s * (1 - s) * d1;
      return {x * s, s + x * ds, ds + 0.5 * x * (2 * (1 - 2 * s) * d1 * ds + 2 * s * (1 - s) * d2)};
    }
    case kSiluActivation: {
      const double s = 1 / (1 + std::exp(-x)), ds = s * (1 - s);
      return {x * s, s + x * ds, ds + 0.5 * x * ds * (1 - 2 * s)};
    }
    default: {
      const double t = std::tanh(x);
      return {t, 1 - t * t, -t * (1 - t * t)};
    }
  }
}

// ---- the passes ------------------------------------------------------------------------------------------------------

template <class C, int kTerms, bool kOdd>
struct Pass {
  const ActivationArgs& args;
  Coefficients<C> k;
  bool any_plain;

  // The processor's own prefetching does not follow short runs a row apart.
  template <int kWrite>
  void prefetch_row(const Operand& a, int64_t row, int64_t first, int n) const {
    if (row < args.rows) prefetch_run<kWrite>(a, row * args.features + first, n);
  }

  void forward(int64_t row, int64_t first, int n) const {
    alignas(64) C buffer[kRun], target[kRun];
    const int64_t at = row * args.features + first;
    prefetch_row<1>(args.y, row + 1, first, n);
    prefetch_row<0>(args.mu, row + 2, first, n);
    const C* mu = load_run<C>(args.mu, at, n, buffer);
    C* y = run_target<C>(args.y, at, target);
    forward_run<C, kTerms, kOdd>(k, first, n, mu, y);
    for (int i = 0; any_plain && i < n; ++i)
      if (k.v[first + i] == 0) y[i] = static_cast<C>(plain(args.kind, mu[i]).value);
    store_run<C>(args.y, at, n, y);
  }

  // Adds to the columns' sums of d/dv and of dmu.
  void backward(int64_t row, int64_t first, int n, C* __restrict dv, C* __restrict sum) const {
    alignas(64) C buffer[kRun], gradient[kRun], target[kRun];
    const int64_t at = row * args.features + first;
    prefetch_row<1>(args.dmu, row + 1, first, n);
    prefetch_row<0>(args.mu, row + 2, first, n);
    prefetch_row<0>(args.dy, row + 2, first, n);
    const C* mu = load_run<C>(args.mu, at, n, buffer);
    const C* dy = load_run<C>(args.dy, at, n, gradient);
    C* __restrict dmu = run_target<C>(args.dmu, at, target);
    backward_run<C, kTerms, kOdd>(k, first, n, mu, dy, dmu, dv);
    for (int i = 0; any_plain && i < n; ++i) {
      if (k.v[first + i] != 0) continue;  // there gamma is 0, so dv has nothing of it yet
      const Plain f = plain(args.kind, mu[i]);
      dmu[i] = dy[i] * static_cast<C>(f.slope);
      dv[i] += dy[i] * static_cast<C>(f.half_curvature);
    }
    for (int i = 0; i < n; ++i) sum[i] += dmu[i];
    store_run<C>(args.dmu, at, n, dmu);
  }

  void write_only(ParallelFor parallel_for) const {
    const int64_t tiles = ceil_div(args.features, kColumns);
    run_parallel(parallel_for, ceil_div(args.rows, kRows) * tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % tiles * kColumns, row = i / tiles * kRows;
        const int n = static_cast<int>(smaller(kColumns, args.features - first));
        for (int64_t r = row; r < smaller(row + kRows, args.rows); ++r) forward(r, first, n);
      }
    });
  }

  // partials: [2, blocks, features], of d/dv and of dmu; each is a sum over its rows in their order, whatever runs it.
  void sum_rows(ParallelFor parallel_for, double* partials, int64_t blocks, int64_t block_rows) const {
    const int64_t tiles = ceil_div(args.features, kColumns);
    run_parallel(parallel_for, blocks * tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % tiles * kColumns, block = i / tiles;
        const int n = static_cast<int>(smaller(kColumns, args.features - first));
        double *dv = partials + block * args.features + first, *sum = dv + blocks * args.features;
        for (int64_t row = block * block_rows; row < smaller((block + 1) * block_rows, args.rows); row += kRows) {
          alignas(64) C dv_part[kColumns] = {}, part[kColumns] = {};
          for (int64_t r = row; r < smaller(row + kRows, args.rows); ++r) backward(r, first, n, dv_part, part);
          for (int j = 0; j < n; ++j) dv[j] += dv_part[j], sum[j] += part[j];
        }
      }
    });
  }
};

// to[j] = factor(j) * the sum of partials [blocks, n] over the blocks, n numbers
template <class F>
void sum_blocks(const double* partials, int64_t blocks, int64_t n, bool is_double, void* to, F&& factor) {
  for (int64_t j = 0; j < n; ++j) {
    double sum = 0;
    for (int64_t b = 0; b < blocks; ++b) sum += partials[b * n + j];
    sum *= factor(j);
    if (is_double) static_cast<double*>(to)[j] = sum;
    else static_cast<float*>(to)[j] = static_cast<float>(sum);
  }
}

double variance_at(const ActivationArgs& a, int64_t j) {
  return a.v_is_double ? static_cast<const double*>(a.v)[j] : static_cast<const float*>(a.v)[j];
}

template <class C, int kTerms, bool kOdd>
const char* run(const ActivationArgs& a, const Mixture& mixture, ParallelFor parallel_for) {
  const int64_t n = a.features;
  const int64_t block_rows = larger(kRows, ceil_div(ceil_div(a.rows, kMaxBlocks), kRows) * kRows);
  const int64_t blocks = ceil_div(a.rows, block_rows);
  C* columns = static_cast<C*>(std::malloc(sizeof(C) * static_cast<size_t>((3 * kTerms + 1) * n + 1)));
  double* partials = a.dv ? static_cast<double*>(std::calloc(static_cast<size_t>(2 * blocks * n + 1), sizeof(double))) : nullptr;
  const char* error = !columns || (a.dv && !partials) ? "out of memory" : nullptr;
  if (!error) {
    C *alpha = columns, *beta = alpha + kTerms * n, *gamma = beta + kTerms * n, *v = gamma + kTerms * n;
    Pass<C, kTerms, kOdd> pass{a, {alpha, beta, gamma, v, n, {}}, false};
    for (int64_t j = 0; j < n; ++j) {
      v[j] = static_cast<C>(variance_at(a, j));
      pass.any_plain |= v[j] == 0;
    }
    for (int t = 0; t < kTerms; ++t) {
      const C c2 = static_cast<C>(mixture.c[t] * mixture.c[t]), c = static_cast<C>(mixture.c[t]),
              p = static_cast<C>(mixture.p[t]);
      pass.k.p[t] = p;
      for (int64_t j = 0; j < n; ++j) {
        C inverse = C(1) / fma_of(c2, v[j], C(1)), root = c * std::sqrt(inverse);
        if (a.kind == kReluActivation) {
          inverse = 0;
          root = C(1) / std::sqrt(v[j] < C(1e-30) ? C(1e-30) : v[j]);
        }
        alpha[t * n + j] = root;
        beta[t * n + j] = inverse;
        gamma[t * n + j] = v[j] == 0 ? C(0) : p * root;
      }
    }
    if (a.dv) {
      pass.sum_rows(parallel_for, partials, blocks, block_rows);
      const auto one = [](int64_t) { return 1.0; };
      sum_blocks(partials, blocks, n, a.v_is_double, a.dv, one);
      sum_blocks(partials + blocks * n, blocks, n, a.v_is_double, a.sum, one);
    } else {
      pass.write_only(parallel_for);
    }
  }
  std::free(columns);
  std::free(partials);
  return error;
}

// ---- the variance of a pre-activation: v_n = sum over k of s_k^2 W_nk^2 ----------------------------------------------------

// Rows of the weight in parallel. Sums go to 32 lanes in order, whatever the vectors' width.
template <class C>
void variance_rows(const VarianceArgs& a, const C* s2, ParallelFor parallel_for) {
  run_parallel(parallel_for, a.rows, larger(1, 16384 / larger(1, a.features)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      double v = 0;
      for (int64_t first = 0; first < a.features; first += kColumns) {
        alignas(64) C buffer[kRun], acc[32] = {};
        const int n = static_cast<int>(smaller(kColumns, a.features - first));
        const C* w = load_run<C>(a.weight, row * a.features + first, n, buffer);
        const C* s = s2 + first;
        int i = 0;
        for (; i + 32 <= n; i += 32)
          for (int j = 0; j < 32; ++j) acc[j] = fma_of(w[i + j] * w[i + j], s[i + j], acc[j]);
        for (int j = 0; i + j < n; ++j) acc[j] = fma_of(w[i + j] * w[i + j], s[i + j], acc[j]);
        for (int j = 0; j < 32; ++j) v += acc[j];
      }
      if (a.is_double) static_cast<double*>(a.v)[row] = v;
      else static_cast<float*>(a.v)[row] = static_cast<float>(v);
    }
  });
}

// dW = what is given + 2 dv s^2 W, and partials [blocks, features] of sum over rows of dv W^2.
template <class C>
void variance_slopes(
    const VarianceArgs& a, const C* s2, ParallelFor parallel_for, double* partials, int64_t blocks, int64_t block_rows) {
  const int64_t tiles = ceil_div(a.features, kColumns);
  run_parallel(parallel_for, blocks * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % tiles * kColumns, block = i / tiles;
      const int n = static_cast<int>(smaller(kColumns, a.features - first));
      double* sums = partials + block * a.features + first;
      for (int64_t row = block * block_rows; row < smaller((block + 1) * block_rows, a.rows); row += kRows) {
        alignas(64) C acc[kColumns] = {};
        for (int64_t r = row; r < smaller(row + kRows, a.rows); ++r) {
          alignas(64) C buffer[kRun], more[kRun], target[kRun];
          const int64_t at = r * a.features + first;
          const C dv = static_cast<C>(a.is_double ? static_cast<const double*>(a.dv)[r] : static_cast<const float*>(a.dv)[r]);
          const C* __restrict w = load_run<C>(a.weight, at, n, buffer);
          C* __restrict dw = run_target<C>(a.dweight, at, target);
          const C* s = s2 + first;
          for (int j = 0; j < n; ++j) {
            const C scaled = dv * w[j];
            dw[j] = (scaled + scaled) * s[j];
            acc[j] = fma_of(scaled, w[j], acc[j]);
          }
          if (a.given.data) {
            const C* __restrict given = load_run<C>(a.given, at, n, more);
            for (int j = 0; j < n; ++j) dw[j] += given[j];
          }
          store_run<C>(a.dweight, at, n, dw);
        }
        for (int j = 0; j < n; ++j) sums[j] += acc[j];
      }
    }
  });
}

template <class C>
const char* variance(const VarianceArgs& a, ParallelFor parallel_for) {
  const int64_t k = a.features;
  const int64_t block_rows = larger(kRows, ceil_div(ceil_div(a.rows, kMaxBlocks), kRows) * kRows);
  const int64_t blocks = ceil_div(a.rows, block_rows);
  C* s2 = static_cast<C*>(std::malloc(sizeof(C) * static_cast<size_t>(k + 1)));
  double* partials = a.dv ? static_cast<double*>(std::calloc(static_cast<size_t>(blocks * k + 1), sizeof(double))) : nullptr;
  const char* error = !s2 || (a.dv && !partials) ? "out of memory" : nullptr;
  if (!error) {
    const auto sigma = [&](int64_t j) {
      return a.is_double ? static_cast<const double*>(a.sigma)[j] : static_cast<const float*>(a.sigma)[j];
    };
    const auto square = [&](int64_t j) { return a.log_variance ? std::exp(sigma(j)) : sigma(j) * sigma(j); };
    for (int64_t j = 0; j < k; ++j) s2[j] = static_cast<C>(square(j));
    if (a.dv) {
      variance_slopes(a, s2, parallel_for, partials, blocks, block_rows);
      const auto slope = [&](int64_t j) { return a.log_variance ? square(j) : 2.0 * sigma(j); };
      sum_blocks(partials, blocks, k, a.is_double, a.dsigma, slope);
    } else {
      variance_rows(a, s2, parallel_for);
    }
  }
  std::free(s2);
  std::free(partials);
  return error;
}

template <class C, int kGeluTanhTerms, int kLogisticTerms>
const char* choose_terms(const ActivationArgs& a, int tier, ParallelFor parallel_for) {
  switch (a.kind) {
    case kReluActivation:
    case kGeluActivation: return run<C, 1, false>(a, kGelu[tier], parallel_for);
    case kGeluTanhActivation: return run<C, kGeluTanhTerms, false>(a, kGeluTanh[tier], parallel_for);
    case kSiluActivation: return run<C, kLogisticTerms, false>(a, kSilu[tier], parallel_for);
    case kTanhActivation: return run<C, kLogisticTerms, true>(a, kTanh[tier], parallel_for);
    default: return "activation: unknown";
  }
}

}  // namespace

const char* DIP_ACTIVATION(const ActivationArgs& a, ParallelFor parallel_for) {
  switch (a.mu.dtype) {
    case DType::kFloat64: return choose_terms<double, kGeluTanh[2].terms, kSilu[2].terms>(a, 2, parallel_for);
    case DType::kFloat32: return choose_terms<float, kGeluTanh[1].terms, kSilu[1].terms>(a, 1, parallel_for);
    default: return choose_terms<float, kGeluTanh[0].terms, kSilu[0].terms>(a, 0, parallel_for);
  }
}

const char* DIP_VARIANCE(const VarianceArgs& a, ParallelFor parallel_for) {
  const bool is_double = a.weight.dtype == DType::kFloat64;
  return is_double ? variance<double>(a, parallel_for) : variance<float>(a, parallel_for);
}

}  // namespace dip
