// u = x + factor * sigma * z;  dsigma = factor * sum over rows of du * z.  docs/maths.md, sections
// 1, 5 and 6. Compiled once per instruction set: DIP_LANES names the lane type, DIP_PERTURB the
// entry point.
#include "vector_math.h"
#include "walk.h"

namespace dip {
namespace {

template <class C>
struct Job {
  static constexpr bool draws = true;
  const PerturbArgs& args;
  bool dense, in_registers, streams;
  DType dtype;  // of what a tile in registers reads and writes

  explicit Job(const PerturbArgs& a) : args(a) {
    dense = is_dense(a, a.x) && is_dense(a, a.u) && is_dense(a, a.du);
    dtype = a.u.data ? a.u.dtype : a.du.dtype;
    const auto same = [&](const Operand& o) { return !o.data || o.dtype == dtype; };
    in_registers = kInRegisters<C> && a.inner == 1 && dense && same(a.x) && same(a.du) &&
                   (dtype == DType::kFloat32 || dtype == DType::kBFloat16);
    streams = in_registers && !a.dsigma && streams_to(a.u, a.outer * a.features);
  }

  DIP_HD void prefetch(const Place& p, int n) const {
    prefetch_run<0>(args.x, p.at(args.x), n);
    prefetch_run<1>(args.u, p.at(args.u), n);
    prefetch_run<0>(args.du, p.at(args.du), n);
  }

  template <bool kChannel>
  DIP_HD void run(const Place& p, int n, const C* scale, C* acc, const float* z) const {
    const PerturbArgs& a = args;
    alignas(64) C buffer[kRun], target[kRun];
    const auto scale_of = [&, one = *scale](int i) { return kChannel ? one : scale[i]; };
    if (a.u.data) {
      C* u = run_target<C>(a.u, p.at(a.u), target);
      if (a.x.data) {
        const C* x = load_run<C>(a.x, p.at(a.x), n, buffer);
        for (int i = 0; i < n; ++i) u[i] = fma_of(scale_of(i), static_cast<C>(z[i]), x[i]);
      } else {
        for (int i = 0; i < n; ++i) u[i] = static_cast<C>(z[i]);
      }
      store_run<C>(a.u, p.at(a.u), n, u);
    }
    if (acc) {
      const C* du = load_run<C>(a.du, p.at(a.du), n, buffer);
      for (int i = 0; i < n; ++i) acc[i] = fma_of(du[i], static_cast<C>(z[i]), acc[i]);
    }
  }

  void tile(const Place& p, const Polar& polar, const float* scale, float* acc) const {
    if (streams) tile_of<float, true>(p, polar, scale, acc);
    else if (dtype == DType::kFloat32) tile_of<float, false>(p, polar, scale, acc);
    else tile_of<BFloat16Bits, false>(p, polar, scale, acc);
  }

  template <class T, bool kStream>
  void tile_of(const Place& p, const Polar& polar, const float* scale, float* acc) const {
    const PerturbArgs& a = args;
    const T* du = static_cast<const T*>(a.du.data) + p.at(a.du);
    T* u = static_cast<T*>(a.u.data) + p.at(a.u);
    const auto x = [from = static_cast<const T*>(a.x.data) + p.at(a.x)](int at) {
      return One::load(from + at);
    };
    const auto nothing = [](int) {};
    if (!acc && a.x.data)
      use_tile<T, Writes::kProjection, false, kStream>(polar, x, du, u, scale, acc, nothing);
    else if (!acc)
      use_tile<T, Writes::kNoise, false, kStream>(polar, x, du, u, scale, acc, nothing);
    else if (!a.u.data)
      use_tile<T, Writes::kNothing, true, false>(polar, x, du, u, scale, acc, nothing);
    else use_tile<T, Writes::kProjection, true, false>(polar, x, du, u, scale, acc, nothing);
  }
};

template <class C>
const char* perturb(const PerturbArgs& a, ParallelFor parallel_for) {
  const Job<C> job(a);
  return walk<C>({a.outer, a.features, a.inner}, a.draw, a.dsigma, job, parallel_for);
}

}  // namespace

// Computed in double where the data are: x, or the gradient alone.
const char* DIP_PERTURB(const PerturbArgs& a, ParallelFor parallel_for) {
  const bool is_double = (a.x.data    ? a.x.dtype
                          : a.du.data ? a.du.dtype
                                      : DType::kFloat32) == DType::kFloat64;
  return is_double ? perturb<double>(a, parallel_for) : perturb<float>(a, parallel_for);
}

}  // namespace dip
