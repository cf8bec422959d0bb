// y = E[act(mu + sqrt(v) z)] over z ~ N(0, 1), with its derivatives in mu and, summed over rows, in
// v; and v.  docs/maths.md, section 7. Compiled once per instruction set; DIP_EXPECTATION and
// DIP_VARIANCE name the entry points. Plain loops that compilers vectorise; no STL (draw.h).
#include <cmath>

#include "../activation.h"
#include "convert.h"
#include "parallel.h"
#include "vector_math.h"

namespace dip {
namespace {

constexpr int kColumns = 256;  // of a tile: its coefficients stay in the first-level cache
constexpr int64_t kRows = 64;  // of a tile, and of a sum in the compute type
static_assert(kColumns <= kRun, "a row of a tile is one run");

// ---- one run of columns -------------------------------------------------------------------------

// What is known of a column, for each term: alpha, and with a = alpha mu the coefficients of
// polynomials in a^2: P's forward, those of the slope and of the curvature back. m: the mixture's
// d. kOdd: tanh, with a sign and without a term mu Phi.
template <int m, bool kOdd>
struct Numbers {
  static constexpr int kValues = kOdd || m ? m : 1, kSlopes = kOdd ? m + 1 : kValues,
                       kCurvatures = kValues + 1;
  static constexpr int kValue = 1, kSlope = kValue + kValues, kCurvature = kSlope + kSlopes,
                       kAll = kCurvature + kCurvatures;
};

// Number i of a term lies at [i * kStride + column of the tile]: not a multiple of 4096 bytes
// apart, of which a cache holds few.
constexpr int kStride = kColumns + 16;

// Recursive, as loops around a loop that is to be vectorised are not always unrolled.
template <class C, int n>
DIP_HD C polynomial(const C* coefficients, C t) {
  if constexpr (n == 1) return coefficients[0];
  else return fma_of(polynomial<C, n - 1>(coefficients + kStride, t), t, coefficients[0]);
}

// With T = sum of p Phi(-|a|) and sum of p = 1: tanh is sign(mu) (1 - 2 T) + sum of a phi(a) P, the
// others max(mu, 0) - |mu| T + sum of phi(a) P. Small terms are added to what is exact, however the
// p cancel.
template <class C, int kTerms, int m, bool kOdd, int t = 0>
DIP_HD void sum_terms(const C* p, const C* column, C mu, C& tails, C& rest) {
  using N = Numbers<m, kOdd>;
  C a = mu * column[0], density, tail;
  normal(a, &density, &tail);
  tails = fma_of(p[t], tail, tails);
  if constexpr (N::kValues > 0) {
    const C value = polynomial<C, N::kValues>(column + N::kValue * kStride, a * a);
    rest = fma_of(kOdd ? a * density : density, value, rest);
  }
  if constexpr (t + 1 < kTerms)
    sum_terms<C, kTerms, m, kOdd, t + 1>(p, column + N::kAll * kStride, mu, tails, rest);
}

template <class C, int kTerms, int m, bool kOdd>
DIP_HD void forward_run(
    const C* p, const C* __restrict columns, int n, const C* __restrict mu, C* __restrict y) {
  for (int i = 0; i < n; ++i) {
    const C x = mu[i];
    C tails = 0, rest = 0;
    sum_terms<C, kTerms, m, kOdd>(p, columns + i, x, tails, rest);
    if constexpr (kOdd) {
      const C size = C(1) - C(2) * tails;
      y[i] = (x < 0 ? -size : size) + rest;
    } else {
      C size = std::fabs(x);
      size = size > C(1e15) ? C(1e15) : size;  // of an infinity no NaN; a NaN stays one
      y[i] = fma_of(-size, tails, rest + (x > 0 ? x : C(0)));
    }
  }
}

// d/dmu, and d/dv = half of the second derivative in mu.
template <class C, int kTerms, int m, bool kOdd, int t = 0>
DIP_HD void sum_slopes(const C* p, const C* column, C mu, C& tails, C& dmu, C& dv) {
  using N = Numbers<m, kOdd>;
  C a = mu * column[0], density, tail;
  normal(a, &density, &tail);
  const C slope = polynomial<C, N::kSlopes>(column + N::kSlope * kStride, a * a);
  const C curvature = polynomial<C, N::kCurvatures>(column + N::kCurvature * kStride, a * a);
  const C odd = a * density;
  dmu = fma_of(kOdd ? density : odd, slope, dmu);
  dv = fma_of(kOdd ? odd : density, curvature, dv);
  if constexpr (!kOdd) tails = fma_of(p[t], tail, tails);
  if constexpr (t + 1 < kTerms)
    sum_slopes<C, kTerms, m, kOdd, t + 1>(p, column + N::kAll * kStride, mu, tails, dmu, dv);
}

template <class C, int kTerms, int m, bool kOdd>
DIP_HD void backward_run(
    const C* p, const C* __restrict columns, int n, const C* __restrict mu, const C* __restrict dy,
    C* __restrict dmu, C* __restrict dv) {
  for (int i = 0; i < n; ++i) {
    const C x = mu[i];
    C tails = 0, slope = 0, half_curvature = 0;
    sum_slopes<C, kTerms, m, kOdd>(p, columns + i, x, tails, slope, half_curvature);
    if constexpr (!kOdd) slope += x < 0 ? tails : C(1) - tails;
    dmu[i] = dy[i] * slope;
    dv[i] = fma_of(dy[i], half_curvature, dv[i]);
  }
}

// What of a term's P does not depend on v: of its coefficient l, the factor of (1 - beta)^i.
template <int m, bool kOdd>
struct Series {
  double factors[m + 1][m + 1] = {};

  explicit Series(const double* d) {
    // E (x + s z)^n has n! / ((n - 2 i)! i! 2^i) x^(n - 2 i) s^(2 i)
    for (int j = 0; j < m; ++j) {
      const int n = 2 * j + (kOdd ? 1 : 0);
      double factor = d[j];
      for (int i = 0; i <= j; ++i) {
        factors[j - i][i] = factor;
        factor *= (n - 2 * i) * (n - 2 * i - 1) / (2.0 * (i + 1));
      }
    }
  }
};

// The coefficients of one term for a column of variance v; relu is the limit c = infinity.
// docs/maths.md, section 7.
template <int m, bool kOdd>
struct Term {
  using N = Numbers<m, kOdd>;
  double alpha, value[N::kValues + 2] = {}, slope[N::kSlopes + 2] = {},
                                   curvature[N::kCurvatures] = {};

  Term(double c, double p, const Series<m, kOdd>& series, double v, bool is_relu) {
    const double beta = is_relu ? 0 : 1 / (1 + c * c * v);
    alpha = is_relu ? 1 / std::sqrt(v < 1e-30 ? 1e-30 : v) : c * std::sqrt(beta);
    double power = kOdd ? beta : std::sqrt(beta);
    for (int l = 0; l < m; ++l, power *= beta) {
      for (int i = m - 1 - l; i >= 0; --i) value[l] = value[l] * (1 - beta) + series.factors[l][i];
      value[l] *= power;
    }
    if (kOdd) {
      product_rule(value, slope, N::kSlopes, alpha, 2 * p);
      bell_rule(slope, curvature, N::kCurvatures, alpha / 2);
    } else {
      bell_rule(value, slope, N::kSlopes, alpha);
      slope[0] += p * beta;
      value[0] += p * v * alpha;
      product_rule(slope, curvature, N::kCurvatures, alpha / 2, p);
    }
    if (v == 0)
      for (double& h : curvature) h = 0;  // the plain activation has its own
  }

  // phi(a) from(t), t = a^2, by mu: a phi(a) to(t)
  static void bell_rule(const double* from, double* to, int n, double factor) {
    for (int l = 0; l < n; ++l) to[l] = factor * (2 * (l + 1) * from[l + 1] - from[l]);
  }
  // a phi(a) from(t) by mu, and more phi(a): phi(a) to(t)
  static void product_rule(const double* from, double* to, int n, double factor, double more) {
    for (int l = 0; l < n; ++l)
      to[l] = factor * ((2 * l + 1) * from[l] - (l ? from[l - 1] : 0) + (l ? 0 : more));
  }
};

// ---- columns without variance: the activation itself --------------------------------------------

struct Plain {
  double value, slope, half_curvature;
};

Plain plain(int kind, double x) {
  switch (kind) {
    case kReluActivation: return {x <= 0 ? 0.0 : x, x <= 0 ? 0.0 : 1.0, 0.0};
    case kGeluActivation: {
      const double density = 0.39894228040143267794 * std::exp(-0.5 * x * x),
                   cdf = 0.5 * std::erfc(-0.70710678118654752440 * x);
      return {x * cdf, cdf + x * density, 0.5 * density * (2 - x * x)};
    }
    case kGeluTanhActivation: {
      const double c = 0.79788456080286535588, d1 = c * (1 + 0.134145 * x * x),
                   d2 = c * 0.26829 * x;
      const double s = 1 / (1 + std::exp(-2 * c * (x + 0.044715 * x * x * x))),
                   ds = 2 * s * (1 - s) * d1;
      return {x * s, s + x * ds, ds + 0.5 * x * (2 * (1 - 2 * s) * d1 * ds + 2 * s * (1 - s) * d2)};
    }
    case kSiluActivation:
    case kQuickGeluActivation: {
      const double c = kind == kSiluActivation ? 1 : kQuickGeluScale;
      const double s = 1 / (1 + std::exp(-c * x)), ds = c * s * (1 - s);
      return {x * s, s + x * ds, ds + 0.5 * c * x * ds * (1 - 2 * s)};
    }
    default: {
      const double t = std::tanh(x);
      return {t, 1 - t * t, -t * (1 - t * t)};
    }
  }
}

double variance_at(const ExpectationArgs& a, int64_t j) {
  return a.v_is_double ? static_cast<const double*>(a.v)[j] : static_cast<const float*>(a.v)[j];
}

// ---- the passes ---------------------------------------------------------------------------------

template <class C, int kTerms, int m, bool kOdd>
struct Pass {
  const ExpectationArgs& args;
  const C* columns;  // [tiles, terms, numbers, kStride]
  C p[kTerms];
  bool any_plain;

  const C* tile(int64_t first) const {
    return columns + first / kColumns * kTerms * Numbers<m, kOdd>::kAll * kStride;
  }

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
    forward_run<C, kTerms, m, kOdd>(p, tile(first), n, mu, y);
    for (int i = 0; any_plain && i < n; ++i)
      if (variance_at(args, first + i) == 0)
        y[i] = static_cast<C>(plain(args.activation, mu[i]).value);
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
    backward_run<C, kTerms, m, kOdd>(p, tile(first), n, mu, dy, dmu, dv);
    for (int i = 0; any_plain && i < n; ++i) {
      if (variance_at(args, first + i) != 0)
        continue;  // there the curvature is 0, so dv has nothing of it yet
      const Plain f = plain(args.activation, mu[i]);
      dmu[i] = dy[i] * static_cast<C>(f.slope);
      dv[i] += dy[i] * static_cast<C>(f.half_curvature);
    }
    for (int i = 0; i < n; ++i) sum[i] += dmu[i];
    store_run<C>(args.dmu, at, n, dmu);
  }

  void write_only(ParallelFor parallel_for) const {
    const int64_t tiles = ceil_div(args.features, kColumns);
    run_parallel(
        parallel_for, ceil_div(args.rows, kRows) * tiles, 1, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            const int64_t first = i % tiles * kColumns, row = i / tiles * kRows;
            const int n = static_cast<int>(smaller(kColumns, args.features - first));
            for (int64_t r = row; r < smaller(row + kRows, args.rows); ++r) forward(r, first, n);
          }
        });
  }

  // partials: [2, blocks, features], of d/dv and of dmu; each is a sum over its rows in their
  // order, whatever runs it.
  void sum_rows(ParallelFor parallel_for, double* partials, const Blocks& blocks) const {
    const int64_t tiles = ceil_div(args.features, kColumns);
    run_parallel(parallel_for, blocks.count * tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % tiles * kColumns, block = i / tiles;
        const int n = static_cast<int>(smaller(kColumns, args.features - first));
        double *dv = partials + block * args.features + first,
               *sum = dv + blocks.count * args.features;
        for (int64_t row = block * blocks.rows; row < smaller((block + 1) * blocks.rows, args.rows);
             row += kRows) {
          alignas(64) C dv_part[kColumns] = {}, part[kColumns] = {};
          for (int64_t r = row; r < smaller(row + kRows, args.rows); ++r)
            backward(r, first, n, dv_part, part);
          for (int j = 0; j < n; ++j) dv[j] += dv_part[j], sum[j] += part[j];
        }
      }
    });
  }
};

template <class C, int kTerms, int m, bool kOdd>
const char* run(const ExpectationArgs& a, const Mixture& mixture, ParallelFor parallel_for) {
  using N = Numbers<m, kOdd>;
  const int64_t n = a.features, tiles = ceil_div(n, kColumns);
  const Blocks blocks(a.rows, kRows);
  const Memory<C> columns(tiles * kTerms * N::kAll * kStride);
  const Memory<double> partials(a.dv ? 2 * blocks.count * n : 0, true);
  if (columns.failed || partials.failed) return kOutOfMemory;
  Pass<C, kTerms, m, kOdd> pass{a, columns.data, {}, false};
  for (int t = 0; t < kTerms; ++t) {
    pass.p[t] = static_cast<C>(mixture.p[t]);
    const Series<m, kOdd> series(mixture.d[t]);
    for (int64_t j = 0; j < n; ++j) {
      const double v = variance_at(a, j);
      pass.any_plain |= v == 0;
      const Term<m, kOdd> term(
          mixture.c[t], mixture.p[t], series, v, a.activation == kReluActivation);
      C* column = columns.data + (j / kColumns * kTerms + t) * N::kAll * kStride + j % kColumns;
      const auto put = [&](int first, const double* from, int size) {
        for (int i = 0; i < size; ++i) column[(first + i) * kStride] = static_cast<C>(from[i]);
      };
      put(0, &term.alpha, 1);
      put(N::kValue, term.value, N::kValues);
      put(N::kSlope, term.slope, N::kSlopes);
      put(N::kCurvature, term.curvature, N::kCurvatures);
    }
  }
  if (!a.dv) {
    pass.write_only(parallel_for);
    return nullptr;
  }
  pass.sum_rows(parallel_for, partials.data, blocks);
  const auto one = [](int64_t) { return 1.0; };
  double* of_dmu = partials.data + blocks.count * n;
  sum_blocks(partials.data, blocks.count, n, a.v_is_double, a.dv, one);
  sum_blocks(of_dmu, blocks.count, n, a.v_is_double, a.sum, one);
  return nullptr;
}

// ---- the variance of a pre-activation: v_n = sum over k of s_k^2 W_nk^2 -------------------------

// Rows of the weight in parallel. Sums go to 32 lanes in order, whatever the vectors' width.
template <class C>
void variance_rows(const VarianceArgs& a, const C* s2, ParallelFor parallel_for) {
  run_parallel(
      parallel_for, a.rows, larger(1, 16384 / larger(1, a.features)),
      [&](int64_t begin, int64_t end) {
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
    const VarianceArgs& a, const C* s2, ParallelFor parallel_for, double* partials,
    const Blocks& blocks) {
  const int64_t tiles = ceil_div(a.features, kColumns);
  run_parallel(parallel_for, blocks.count * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % tiles * kColumns, block = i / tiles;
      const int n = static_cast<int>(smaller(kColumns, a.features - first));
      double* sums = partials + block * a.features + first;
      for (int64_t row = block * blocks.rows; row < smaller((block + 1) * blocks.rows, a.rows);
           row += kRows) {
        alignas(64) C acc[kColumns] = {};
        for (int64_t r = row; r < smaller(row + kRows, a.rows); ++r) {
          alignas(64) C buffer[kRun], more[kRun], target[kRun];
          const int64_t at = r * a.features + first;
          const C dv = static_cast<C>(
              a.is_double ? static_cast<const double*>(a.dv)[r]
                          : static_cast<const float*>(a.dv)[r]);
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
  const Blocks blocks(a.rows, kRows);
  const Memory<C> squares(k);
  const Memory<double> partials(a.dv ? blocks.count * k : 0, true);
  if (squares.failed || partials.failed) return kOutOfMemory;
  C* s2 = squares.data;
  const auto sigma = [&](int64_t j) {
    return a.is_double ? static_cast<const double*>(a.sigma)[j]
                       : static_cast<const float*>(a.sigma)[j];
  };
  const auto square = [&](int64_t j) {
    return a.log_variance ? std::exp(sigma(j)) : sigma(j) * sigma(j);
  };
  for (int64_t j = 0; j < k; ++j) s2[j] = static_cast<C>(square(j));
  if (!a.dv) {
    variance_rows(a, s2, parallel_for);
    return nullptr;
  }
  variance_slopes(a, s2, parallel_for, partials.data, blocks);
  const auto slope = [&](int64_t j) { return a.log_variance ? square(j) : 2.0 * sigma(j); };
  sum_blocks(partials.data, blocks.count, k, a.is_double, a.dsigma, slope);
  return nullptr;
}

template <class C, int tier>
const char* choose_terms(const ExpectationArgs& a, ParallelFor parallel_for) {
  constexpr const Mixture &gelu_tanh = kGeluTanh[tier], &silu = kSilu[tier], &tanh = kTanh[tier];
  switch (a.activation) {
    case kReluActivation:
    case kGeluActivation: return run<C, 1, 0, false>(a, kGelu[tier], parallel_for);
    case kGeluTanhActivation:
      return run<C, gelu_tanh.terms, gelu_tanh.m, false>(a, gelu_tanh, parallel_for);
    case kSiluActivation: return run<C, silu.terms, silu.m, false>(a, silu, parallel_for);
    case kQuickGeluActivation:
      return run<C, silu.terms, silu.m, false>(a, kQuickGelu[tier], parallel_for);
    case kTanhActivation: return run<C, tanh.terms, tanh.m, true>(a, tanh, parallel_for);
    default: return "activation: unknown";
  }
}

}  // namespace

const char* DIP_EXPECTATION(const ExpectationArgs& a, ParallelFor parallel_for) {
  switch (a.mu.dtype) {
    case DType::kFloat64: return choose_terms<double, 2>(a, parallel_for);
    case DType::kFloat32: return choose_terms<float, 1>(a, parallel_for);
    default: return choose_terms<float, 0>(a, parallel_for);
  }
}

const char* DIP_VARIANCE(const VarianceArgs& a, ParallelFor parallel_for) {
  const bool is_double = a.weight.dtype == DType::kFloat64;
  return is_double ? variance<double>(a, parallel_for) : variance<float>(a, parallel_for);
}

}  // namespace dip
