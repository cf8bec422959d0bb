// h = (x - mean) * rstd;  u = h * (offset + weight) + bias + sigma * z, and back.  docs/maths.md,
// section 10. Compiled once per instruction set: DIP_LANES names the lane type, DIP_NORM the entry
// point.
#include <type_traits>

#include "vector_math.h"
#include "walk.h"

namespace dip {
namespace {

// ---- sums along a row ---------------------------------------------------------------------------
// In 32 lanes, whatever the vectors' width; runs of kRun, so that a lane takes 32 terms before they
// go to double.

constexpr int kSumLanes = 32;

template <class C>
DIP_HD double sum_lanes(C* lanes) {
  for (int i = 0; i < 16; ++i) lanes[i] += lanes[i + 16];
  for (int i = 0; i < 8; ++i) lanes[i] += lanes[i + 8];
  for (int i = 0; i < 4; ++i) lanes[i] += lanes[i + 4];
  return (static_cast<double>(lanes[0]) + lanes[2]) + (static_cast<double>(lanes[1]) + lanes[3]);
}

// A number as a lane type, for terms that are written once.
template <class C>
struct Scalar {
  static constexpr int kLanes = 1;
  using F = C;
  static DIP_HD F load(const C* p) { return *p; }
  static DIP_HD F splat_f(C a) { return a; }
  static DIP_HD F add(F a, F b) { return a + b; }
  static DIP_HD F sub(F a, F b) { return a - b; }
  static DIP_HD F mul(F a, F b) { return a * b; }
  static DIP_HD void store(C* p, F a) { *p = a; }
};

// The sum of term(lane type, i), the terms from number i on, i < n <= kRun.
template <class C, class F>
DIP_HD double sum_run(int n, F&& term) {
  using L = std::conditional_t<kInRegisters<C>, One, Scalar<C>>;
  constexpr int kParts = kSumLanes / L::kLanes;
  typename L::F part[kParts];
  DIP_UNROLL
  for (int p = 0; p < kParts; ++p) part[p] = L::splat_f(0);
  int i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes) {
    DIP_UNROLL
    for (int p = 0; p < kParts; ++p) part[p] = L::add(part[p], term(L{}, i + p * L::kLanes));
  }
  alignas(64) C lanes[kSumLanes];
  DIP_UNROLL
  for (int p = 0; p < kParts; ++p) L::store(lanes + p * L::kLanes, part[p]);
  for (int j = 0; i + j < n; ++j) lanes[j] += term(Scalar<C>{}, i + j);
  return sum_lanes(lanes);
}

// ---- the pass -----------------------------------------------------------------------------------

template <class C>
struct Row {
  C mean, rstd;
  // back: rstd times the means over the row of g and of g h, g = du (offset + weight)
  C shift, slope;
};

// Of n numbers that lie side by side. __restrict on arguments: a compiler that must tell so many
// arrays apart as it runs takes one number at a time (g++ 12, from eleven comparisons on).
template <class C>
DIP_HD void back_run(
    int n, const Row<C>& r, const C* __restrict x, const C* __restrict du, const C* __restrict w,
    C* __restrict dx, C* __restrict dweight, C* __restrict dbias) {
  const C mean = r.mean, rstd = r.rstd, shift = r.shift, slope = r.slope;
  for (int i = 0; i < n; ++i) {
    const C h = (x[i] - mean) * rstd;
    dx[i] = fma_of(-h, slope, fma_of(du[i] * w[i], rstd, -shift));
    dweight[i] = fma_of(du[i], h, dweight[i]);
    dbias[i] += du[i];
  }
}

// Columns from where one is written to where the next ones are asked for.
constexpr int kAhead = 256;

// A run of one row that lies in a tile.
struct Segment {
  int64_t row, col;
  int n;
};

template <class C>
struct Norm {
  const NormArgs& args;
  Generator generator;
  Groups groups;
  int64_t k;
  const C *scale, *weight, *bias;  // [features]: sigma; offset + weight; bias
  bool in_registers, streams, draws, row_tiles;

  Norm(const NormArgs& a, const C* scale, const C* weight, const C* bias)
      : args(a),
        generator(a.draw),
        groups(a.draw, a.features),
        k(a.features),
        scale(scale),
        weight(weight),
        bias(bias) {
    draws = a.u.data || a.dsigma;
    // Whole steps of write_tile and back_tile: of 2 * V::kLanes columns, 64 at most.
    const DType data = a.x.dtype, other = a.u.data ? a.u.dtype : a.du.dtype;
    in_registers = kInRegisters<C> && draws && groups.phase == 0 && k % 64 == 0 &&
                   (data == DType::kFloat32 || data == DType::kBFloat16) &&
                   (other == data || (data == DType::kFloat32 && other == DType::kBFloat16)) &&
                   (!a.dx.data || a.dx.dtype == data);
    streams = in_registers && streams_to(a.u, a.rows * k) && a.u.outer_stride % 16 == 0;
    // Tiles of one row draw faster, unless too much of their vectors is for nothing.
    const int64_t drawn = ceil_div(groups.count, V::kLanes) * V::kLanes;
    row_tiles = 10 * drawn <= 11 * groups.count;
  }

  int64_t at(const Operand& o, int64_t row, int64_t col) const {
    return row * o.outer_stride + col;
  }

  // Calls f(first, n) for the runs of a row.
  template <class F>
  DIP_HD void for_runs(F&& f) const {
    for (int64_t first = 0; first < k; first += kRun)
      f(first, static_cast<int>(smaller(kRun, k - first)));
  }

  // ---- what a row needs first

  Row<C> moments(int64_t row) const {
    alignas(64) C buffer[kRun];
    Row<C> r{};
    double sum = 0;
    if (args.centred) {
      for_runs([&](int64_t first, int n) {
        const C* x = load_run<C>(args.x, at(args.x, row, first), n, buffer);
        sum += sum_run<C>(n, [&](auto lanes, int i) { return lanes.load(x + i); });
      });
      r.mean = static_cast<C>(sum / static_cast<double>(k));
    }
    double square = 0;
    for_runs([&](int64_t first, int n) {
      const C* x = load_run<C>(args.x, at(args.x, row, first), n, buffer);
      square += sum_run<C>(n, [&](auto lanes, int i) {
        const auto centred = lanes.sub(lanes.load(x + i), lanes.splat_f(r.mean));
        return lanes.mul(centred, centred);
      });
    });
    r.rstd = static_cast<C>(1 / __builtin_sqrt(square / static_cast<double>(k) + args.eps));
    if (args.mean) static_cast<C*>(args.mean)[row] = r.mean;
    static_cast<C*>(args.rstd)[row] = r.rstd;
    return r;
  }

  Row<C> projections(int64_t row) const {
    alignas(64) C buffer[kRun], gradient[kRun];
    Row<C> r{
        args.mean ? static_cast<const C*>(args.mean)[row] : C(0),
        static_cast<const C*>(args.rstd)[row], 0, 0};
    double sum = 0, product = 0;
    for_runs([&](int64_t first, int n) {
      const C* x = load_run<C>(args.x, at(args.x, row, first), n, buffer);
      const C* du = load_run<C>(args.du, at(args.du, row, first), n, gradient);
      const C* w = weight + first;
      const auto g = [&](auto lanes, int i) {
        return lanes.mul(lanes.load(du + i), lanes.load(w + i));
      };
      if (args.centred) sum += sum_run<C>(n, g);
      product += sum_run<C>(n, [&](auto lanes, int i) {
        return lanes.mul(g(lanes, i), lanes.sub(lanes.load(x + i), lanes.splat_f(r.mean)));
      });
    });
    r.shift = static_cast<C>(r.rstd * (sum / static_cast<double>(k)));
    r.slope = static_cast<C>(r.rstd * (r.rstd * product / static_cast<double>(k)));
    return r;
  }

  // ---- a segment with z in memory

  void write(const Segment& s, const Row<C>& r, const float* z) const {
    alignas(64) C buffer[kRun], target[kRun];
    const C* x = load_run<C>(args.x, at(args.x, s.row, s.col), s.n, buffer);
    C* u = run_target<C>(args.u, at(args.u, s.row, s.col), target);
    const C *w = weight + s.col, *b = bias + s.col, *sigma = scale + s.col, mean = r.mean,
            rstd = r.rstd;
    for (int i = 0; i < s.n; ++i) {
      const C y = fma_of((x[i] - mean) * rstd, w[i], b[i]);
      u[i] = fma_of(sigma[i], static_cast<C>(z[i]), y);
    }
    store_run<C>(args.u, at(args.u, s.row, s.col), s.n, u);
  }

  // sums: [3, k], of du h, du and du z.
  void back(const Segment& s, const Row<C>& r, const float* z, C* sums) const {
    alignas(64) C buffer[kRun], gradient[kRun], target[kRun];
    const C* x = load_run<C>(args.x, at(args.x, s.row, s.col), s.n, buffer);
    const C* du = load_run<C>(args.du, at(args.du, s.row, s.col), s.n, gradient);
    C* dx = run_target<C>(args.dx, at(args.dx, s.row, s.col), target);
    C *dweight = sums + s.col, *dbias = dweight + k, *dsigma = dbias + k;
    back_run(s.n, r, x, du, weight + s.col, dx, dweight, dbias);
    if (draws)
      for (int i = 0; i < s.n; ++i) dsigma[i] = fma_of(du[i], static_cast<C>(z[i]), dsigma[i]);
    store_run<C>(args.dx, at(args.dx, s.row, s.col), s.n, dx);
  }

  // ---- a segment in the registers of its draw's last step: words [begin, end) of the tile

  template <class X, class T, bool kStream>
  void write_tile(
      const Segment& s, const Row<float>& r, const Polar& polar, int begin, int end) const {
    const X* x = static_cast<const X*>(args.x.data) + at(args.x, s.row, s.col) - 2 * begin;
    T* u = static_cast<T*>(args.u.data) + at(args.u, s.row, s.col) - 2 * begin;
    const int64_t col = s.col - 2 * begin;
    const float *w = weight + col, *b = bias + col, *sigma = scale + col;
    const One::F mean = One::splat_f(r.mean), rstd = One::splat_f(r.rstd);
    const auto compute = [&](int at, One::F z) {
      const One::F h = One::mul(One::sub(One::load(x + at), mean), rstd);
      return One::fma(One::load(sigma + at), z, One::fma(h, One::load(w + at), One::load(b + at)));
    };
    for (int i = begin; i < end; i += V::kLanes) {
      typename V::F even, odd;
      cos_sin<V>(V::load(polar.words + i), V::load(polar.radii + i), &even, &odd);
      prefetch_step<0>(x + args.x.outer_stride + 2 * i);  // of the next row
      if constexpr (!kStream) prefetch_step<1>(u + kAhead + 2 * i);
      V::zip(even, odd, [&](int j, One::F za, One::F zb) {
        const int at = 2 * i + j;
        const One::F here = compute(at, za), beside = compute(at + One::kLanes, zb);
        if constexpr (kStream) One::stream_pair(u + at, here, beside);
        else One::store_pair(u + at, here, beside);
      });
    }
  }

  template <class X, class T>
  void back_tile(
      const Segment& s, const Row<float>& r, const Polar& polar, int begin, int end,
      float* sums) const {
    const X* x = static_cast<const X*>(args.x.data) + at(args.x, s.row, s.col) - 2 * begin;
    const T* du = static_cast<const T*>(args.du.data) + at(args.du, s.row, s.col) - 2 * begin;
    X* dx = static_cast<X*>(args.dx.data) + at(args.dx, s.row, s.col) - 2 * begin;
    const int64_t col = s.col - 2 * begin;
    const float* w = weight + col;
    float *dweight = sums + col, *dbias = dweight + k, *dsigma = dbias + k;
    const One::F mean = One::splat_f(r.mean), rstd = One::splat_f(r.rstd),
                 minus_shift = One::splat_f(-r.shift), minus_slope = One::splat_f(-r.slope);
    const auto compute = [&](int at, One::F z) {
      const One::F h = One::mul(One::sub(One::load(x + at), mean), rstd), g = One::load(du + at);
      One::store(dweight + at, One::fma(g, h, One::load(dweight + at)));
      One::store(dbias + at, One::add(One::load(dbias + at), g));
      One::store(dsigma + at, One::fma(g, z, One::load(dsigma + at)));
      return One::fma(h, minus_slope, One::fma(One::mul(g, One::load(w + at)), rstd, minus_shift));
    };
    for (int i = begin; i < end; i += V::kLanes) {
      typename V::F even, odd;
      cos_sin<V>(V::load(polar.words + i), V::load(polar.radii + i), &even, &odd);
      prefetch_step<0>(x + args.x.outer_stride + 2 * i);  // of the next row
      prefetch_step<0>(du + args.du.outer_stride + 2 * i);
      prefetch_step<1>(dx + kAhead + 2 * i);
      V::zip(even, odd, [&](int j, One::F za, One::F zb) {
        const int at = 2 * i + j;
        const One::F here = compute(at, za), beside = compute(at + One::kLanes, zb);
        One::store_pair(dx + at, here, beside);
      });
    }
  }

  void segment_in_registers(
      const Segment& s, const Row<float>& r, const Polar& polar, int begin, int end,
      float* sums) const {
    const bool wide = args.x.dtype == DType::kFloat32;
    if (args.u.data) {
      if (streams) write_tile<float, float, true>(s, r, polar, begin, end);
      else if (!wide) write_tile<BFloat16Bits, BFloat16Bits, false>(s, r, polar, begin, end);
      else if (args.u.dtype == DType::kFloat32)
        write_tile<float, float, false>(s, r, polar, begin, end);
      else write_tile<float, BFloat16Bits, false>(s, r, polar, begin, end);
    } else {
      if (!wide) back_tile<BFloat16Bits, BFloat16Bits>(s, r, polar, begin, end, sums);
      else if (args.du.dtype == DType::kFloat32)
        back_tile<float, float>(s, r, polar, begin, end, sums);
      else back_tile<float, BFloat16Bits>(s, r, polar, begin, end, sums);
    }
  }

  // ---- rows [begin, end), tile by tile

  // sums, totals: [3, k], back; of 32 rows in the compute type and of all.
  void walk(int64_t begin, int64_t end, C* sums, double* totals) const {
    if (k == 0) return;
    alignas(64) float z[kTile];
    Counters counters;
    Polar polar;
    Row<C> r{};
    int64_t row = begin, g = 0;
    while (row < end) {
      const int64_t rest = row_tiles ? groups.count - g : (end - row) * groups.count - g;
      const int count = static_cast<int>(smaller(kTileGroups, rest));
      const auto begin_row = [&] { r = args.u.data ? moments(row) : projections(row); };
      if (g == 0)
        begin_row();  // before the draw, which a processor begins while it waits for the sums
      if (draws) {
        groups.fill(counters, row, g, count);
        if (in_registers) draw_polar<false>(counters, generator, count, &polar);
        else normal_tile<false>(counters, generator, count, z);
      }
      for (int done = 0; done < count;) {
        if (g == 0 && done) begin_row();
        const int here = static_cast<int>(smaller(count - done, groups.count - g));
        const int64_t col = larger(0, 8 * g - groups.phase),
                      col_end = smaller(k, 8 * (g + here) - groups.phase);
        const Segment s{row, col, static_cast<int>(col_end - col)};
        if (in_registers) {
          if constexpr (kInRegisters<C>)
            segment_in_registers(s, r, polar, 4 * done, 4 * (done + here), sums);
        } else {
          const float* z_of = z + 8 * done + (col + groups.phase - 8 * g);
          if (args.u.data) write(s, r, z_of);
          else back(s, r, z_of, sums);
        }
        done += here;
        g += here;
        if (g < groups.count) continue;
        g = 0;
        ++row;
        if (sums && ((row - begin) % 32 == 0 || row == end)) {
          for (int64_t j = 0; j < 3 * k; ++j) totals[j] += sums[j];
          std::memset(sums, 0, sizeof(C) * static_cast<size_t>(3 * k));
        }
      }
    }
    if (streams) One::end_stream();
  }
};

// Puts n numbers, of any type, to be multiplied by factor(j).
template <class F>
void put_columns(const double* from, int64_t n, const Operand& to, F&& factor) {
  if (!to.data) return;
  for (int64_t first = 0; first < n; first += kRun) {
    double buffer[kRun];
    const int here = static_cast<int>(smaller(kRun, n - first));
    double* run = run_target<double>(to, first, buffer);
    for (int i = 0; i < here; ++i) run[i] = from[first + i] * factor(first + i);
    store_run<double>(to, first, here, run);
  }
}

// to[j] = offset + data[j], or `absent`.
template <class C>
void get_columns(const Operand& data, int64_t n, C offset, C absent, C* to) {
  for (int64_t first = 0; first < n; first += kRun) {
    C buffer[kRun];
    const int here = static_cast<int>(smaller(kRun, n - first));
    const C* run = data.data ? load_run<C>(data, first, here, buffer) : nullptr;
    for (int i = 0; i < here; ++i) to[first + i] = run ? offset + run[i] : absent;
  }
}

template <class C>
const char* run_back(const NormArgs& a, const Norm<C>& norm, ParallelFor parallel_for) {
  const int64_t k = a.features;
  const Blocks blocks(a.rows, 64);
  const Memory<double> memory(larger(1, blocks.count) * 3 * k, true);
  if (memory.failed) return kOutOfMemory;
  double* partials = memory.data;
  const int64_t grain = larger(1, kGrainTiles * kTile / larger(1, k * blocks.rows));
  const char* error = for_blocks<C>(parallel_for, blocks, grain, 3 * k, [&](int64_t b, C* sums) {
    norm.walk(b * blocks.rows, smaller(a.rows, (b + 1) * blocks.rows), sums, partials + 3 * b * k);
  });
  if (error) return error;
  add_blocks(partials, blocks.count, 3 * k);
  const auto one = [](int64_t) { return 1.0; };
  put_columns(partials, k, a.dweight, one);
  put_columns(partials + k, k, a.dbias, one);
  put_columns(
      partials + 2 * k, k,
      {a.dsigma, a.draw.sigma_is_double ? DType::kFloat64 : DType::kFloat32, 0, 1},
      [&](int64_t j) { return slope_at(a.draw, j); });
  return nullptr;
}

template <class C>
const char* run_norm(const NormArgs& a, ParallelFor parallel_for) {
  const int64_t k = a.features;
  const Memory<C> columns(3 * k);
  if (columns.failed) return kOutOfMemory;
  C *scale = columns.data, *weight = scale + k, *bias = weight + k;
  scales(a.draw, k, scale);
  get_columns<C>(a.weight, k, static_cast<C>(a.offset), 1, weight);
  get_columns<C>(a.bias, k, 0, 0, bias);
  const Norm<C> norm(a, scale, weight, bias);
  if (!a.u.data) return run_back<C>(a, norm, parallel_for);
  run_parallel(
      parallel_for, a.rows, larger(1, kGrainTiles * kTile / larger(1, k)),
      [&](int64_t begin, int64_t end) { norm.walk(begin, end, nullptr, nullptr); });
  return nullptr;
}

}  // namespace

const char* DIP_NORM(const NormArgs& a, ParallelFor parallel_for) {
  return a.x.dtype == DType::kFloat64 ? run_norm<double>(a, parallel_for)
                                      : run_norm<float>(a, parallel_for);
}

}  // namespace dip
