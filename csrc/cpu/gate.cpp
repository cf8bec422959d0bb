// u = act(a) * b + sigma * z;  da = du * b * act'(a), db = du * act(a), dsigma = sum over rows of
// du * z.  docs/maths.md, section 10. Compiled once per instruction set: DIP_LANES names the lane
// type, DIP_GATE the entry point.
#include <type_traits>

#include "act.h"
#include "walk.h"

namespace dip {
namespace {

// ---- n <= kTile numbers that lie side by side ---------------------------------------------------

template <int kKind, class C>
void forward_run(int n, const C* __restrict a, const C* __restrict b, C* __restrict y) {
  if (b) {
    for (int i = 0; i < n; ++i) y[i] = act_value<kKind>(a[i]) * b[i];
  } else {
    for (int i = 0; i < n; ++i) y[i] = act_value<kKind>(a[i]);
  }
}

template <int kKind, class C>
void backward_run(
    int n, const C* __restrict a, const C* __restrict b, const C* __restrict du, C* __restrict da,
    C* __restrict db) {
  if (b) {
    for (int i = 0; i < n; ++i) {
      da[i] = times_slope<kKind>(du[i] * b[i], a[i]);
      db[i] = du[i] * act<kKind>(a[i]).value;
    }
  } else {
    for (int i = 0; i < n; ++i) da[i] = times_slope<kKind>(du[i], a[i]);
  }
}

template <class C>
struct Functions {
  void (*forward)(int n, const C* a, const C* b, C* y);
  void (*backward)(int n, const C* a, const C* b, const C* du, C* da, C* db);

  static Functions of(int kind) {
    Functions found{nullptr, nullptr};
    with_activation(kind, [&](auto known) {
      found = {forward_run<known.kind, C>, backward_run<known.kind, C>};
    });
    return found;
  }
};

// ---- the pass -----------------------------------------------------------------------------------

constexpr int kPart = 512;  // columns of a tile

template <class C>
struct Job {
  const GateArgs& args;
  Functions<C> functions;
  bool dense, in_registers, streams, draws;
  bool is_relu;  // alone and of one dtype, for relu_tile

  explicit Job(const GateArgs& g) : args(g), functions(Functions<C>::of(g.activation)) {
    dense = is_dense(g, g.a) && is_dense(g, g.b) && is_dense(g, g.u) && is_dense(g, g.du) &&
            is_dense(g, g.da) && is_dense(g, g.db);
    draws = g.u.data || g.dsigma;
    const DType dtype = g.u.data ? g.u.dtype : g.du.dtype;
    in_registers = kInRegisters<C> && g.inner == 1 && dense && draws &&
                   (dtype == DType::kFloat32 || dtype == DType::kBFloat16);
    streams = in_registers && streams_to(g.u, g.outer * g.features);
    is_relu = g.activation == kReluActivation && !g.b.data && g.a.dtype == dtype &&
              (!g.da.data || g.da.dtype == dtype);
  }

  DIP_HD void prefetch(const Place& p, int n) const {
    prefetch_run<0>(args.a, p.at(args.a), n);
    prefetch_run<0>(args.b, p.at(args.b), n);
    prefetch_run<0>(args.du, p.at(args.du), n);
    prefetch_run<1>(args.u, p.at(args.u), n);
    prefetch_run<1>(args.da, p.at(args.da), n);
    prefetch_run<1>(args.db, p.at(args.db), n);
  }

  void values(const Place& p, int n, C* y) const {
    alignas(64) C buffer[kRun], gate[kRun];
    const C* a = load_run<C>(args.a, p.at(args.a), n, buffer);
    functions.forward(n, a, args.b.data ? load_run<C>(args.b, p.at(args.b), n, gate) : nullptr, y);
  }

  void gradients(const Place& p, int n) const {
    alignas(64) C buffer[kRun], gate[kRun], gradient[kRun], target[kRun], other[kRun];
    const C* a = load_run<C>(args.a, p.at(args.a), n, buffer);
    const C* du = load_run<C>(args.du, p.at(args.du), n, gradient);
    const C* b = args.b.data ? load_run<C>(args.b, p.at(args.b), n, gate) : nullptr;
    C* da = run_target<C>(args.da, p.at(args.da), target);
    C* db = b ? run_target<C>(args.db, p.at(args.db), other) : nullptr;
    functions.backward(n, a, b, du, da, db);
    store_run<C>(args.da, p.at(args.da), n, da);
    if (b) store_run<C>(args.db, p.at(args.db), n, db);
  }

  template <bool kChannel>
  void run(const Place& p, int n, const C* scale, C* acc, const float* z) const {
    if (!args.u.data) {
      gradients(p, n);
      if (!acc) return;
      alignas(64) C gradient[kRun];
      const C* du = load_run<C>(args.du, p.at(args.du), n, gradient);
      for (int i = 0; i < n; ++i) acc[i] = fma_of(du[i], static_cast<C>(z[i]), acc[i]);
      return;
    }
    alignas(64) C y[kRun], target[kRun];
    values(p, n, y);
    C* u = run_target<C>(args.u, p.at(args.u), target);
    const C one = *scale;
    for (int i = 0; i < n; ++i)
      u[i] = fma_of(kChannel ? one : scale[i], static_cast<C>(z[i]), y[i]);
    store_run<C>(args.u, p.at(args.u), n, u);
  }

  // Relu in the loop that draws. The others in parts, so that what is computed of one is still at
  // hand for the next step, and the next one's lines come in the meantime.
  void tile(const Place& p, const Polar& polar, const float* scale, float* acc) const {
    const DType dtype = args.u.data ? args.u.dtype : args.du.dtype;
    if (is_relu) {
      if (dtype == DType::kFloat32) relu_tile<float>(p, polar, scale, acc);
      else relu_tile<BFloat16Bits>(p, polar, scale, acc);
      return;
    }
    for (int begin = 0; begin < kTile; begin += kPart) {
      const Place part{p.outer, p.feature + begin, p.inner};
      if (!args.u.data) {
        gradients(part, kPart);
        if (dtype == DType::kFloat32) sum_of<float>(p, polar, begin, scale, acc);
        else sum_of<BFloat16Bits>(p, polar, begin, scale, acc);
        continue;
      }
      alignas(64) C y[kPart];
      values(part, kPart, y);
      if (streams) write_of<float, true>(p, polar, begin, y, scale);
      else if (dtype == DType::kFloat32) write_of<float, false>(p, polar, begin, y, scale);
      else write_of<BFloat16Bits, false>(p, polar, begin, y, scale);
    }
  }

  template <class T>
  void relu_tile(const Place& p, const Polar& polar, const float* scale, float* acc) const {
    const T* a = static_cast<const T*>(args.a.data) + p.at(args.a);
    if (args.u.data) {
      const auto nothing = [](int) {};
      T* u = static_cast<T*>(args.u.data) + p.at(args.u);
      const auto y = [a](int at) {
        const One::F x = One::load(a + at);
        return One::where_positive(x, x);
      };
      if constexpr (sizeof(T) == 4) {
        if (streams)
          return use_tile<T, Writes::kProjection, false, true>(
              polar, y, nullptr, u, scale, nullptr, nothing);
      }
      return use_tile<T, Writes::kProjection, false, false>(
          polar, y, nullptr, u, scale, nullptr, nothing);
    }
    const T* du = static_cast<const T*>(args.du.data) + p.at(args.du);
    T* da = static_cast<T*>(args.da.data) + p.at(args.da);
    const auto gradient = [&](int at) {
      return One::where_positive(One::load(a + at), One::load(du + at));
    };
    use_tile<T, Writes::kNothing, true, false>(polar, nullptr, du, nullptr, scale, acc, [&](int i) {
      for (int at = i; at < i + 2 * V::kLanes; at += 2 * One::kLanes)
        One::store_pair(da + at, gradient(at), gradient(at + One::kLanes));
    });
  }

  // The lines of the next part that lie where columns i on of the tile at p lie in this one.
  DIP_HD void prefetch_next(const Place& p, int i) const {
    const auto step = [&](const Operand& o, auto write) {
      if (!o.data) return;
      const int64_t at = p.at(o) + kPart + i;
      if (o.dtype == DType::kFloat32)
        prefetch_step<write.value>(static_cast<const float*>(o.data) + at);
      else prefetch_step<write.value>(static_cast<const uint16_t*>(o.data) + at);
    };
    const std::integral_constant<int, 0> read;
    const std::integral_constant<int, 1> write;
    step(args.a, read);
    step(args.b, read);
    step(args.du, read);
    if (!streams) step(args.u, write);
    step(args.da, write);
    step(args.db, write);
  }

  template <class T>
  void sum_of(const Place& p, const Polar& polar, int begin, const float* scale, float* acc) const {
    const T* du = static_cast<const T*>(args.du.data) + p.at(args.du);
    const auto ahead = [&](int i) { prefetch_next(p, i); };
    use_tile<T, Writes::kNothing, true, false>(
        polar, nullptr, du, nullptr, scale, acc, ahead, begin, begin + kPart);
  }

  template <class T, bool kStream>
  void write_of(
      const Place& p, const Polar& polar, int begin, const float* y, const float* scale) const {
    T* u = static_cast<T*>(args.u.data) + p.at(args.u);
    const auto x = [&](int at) { return One::load(y + at - begin); };
    const auto ahead = [&](int i) { prefetch_next(p, i); };
    use_tile<T, Writes::kProjection, false, kStream>(
        polar, x, nullptr, u, scale, nullptr, ahead, begin, begin + kPart);
  }
};

template <class C>
const char* gate(const GateArgs& g, ParallelFor parallel_for) {
  const Job<C> job(g);
  if (!job.functions.forward) return "activation: unknown";
  return walk<C>({g.outer, g.features, g.inner}, g.draw, g.dsigma, job, parallel_for);
}

}  // namespace

const char* DIP_GATE(const GateArgs& g, ParallelFor parallel_for) {
  return g.a.dtype == DType::kFloat64 ? gate<double>(g, parallel_for)
                                      : gate<float>(g, parallel_for);
}

}  // namespace dip
