// u = x + factor * sigma * z;  dsigma = factor * sum over rows of du * z.  docs/maths.md, sections 1, 5 and 6.
// Compiled once per instruction set: DIP_LANES names the lane type, DIP_PERTURB the entry point. No STL here: an inline function
// of the library, compiled with this file's flags, could be linked into code that runs on an older machine.
#include <cstdlib>

#include "convert.h"

namespace dip {
namespace {

using V = DIP_LANES;
using One = V::One;

constexpr int kTileGroups = 64;  // Philox calls of one tile: the same on every instruction set, so that sums associate alike
constexpr int kTile = 8 * kTileGroups;  // elements
constexpr int64_t kChunk = 128;         // rows of a chunk of channels
constexpr int64_t kMaxBlocks = 32;      // row blocks of the two-stage sum
constexpr int64_t kGrainTiles = 32;     // 16384 elements: about the cost of waking a thread
#ifndef DIP_STREAM_BYTES
#define DIP_STREAM_BYTES (1 << 24)  // the sanitizers set less, for their small tensors
#endif
constexpr int64_t kStreamBytes = DIP_STREAM_BYTES;  // of float32: in bfloat16 the draw takes longer than memory
static_assert(kTile == kRun && kTileGroups % V::kLanes == 0 && kChunk % V::kLanes == 0, "a tile is whole vectors");

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- the draw ------------------------------------------------------------------------------------------------------

struct Counters {
  alignas(64) uint32_t group[kTileGroups], row_lo[kTileGroups], row_hi[kTileGroups];
};

struct Draw {
  PhiloxKeys keys;
  uint32_t first;  // stream and first sample
  int num_samples;
};

// z of the first `count` counters, rounded up to whole vectors. Groups: out[8 * i + t] for counter i. Planar: out[kChunk * t +
// i]. kMean apart, or the compiler keeps z in memory for the sake of a loop that one sample does not run.
template <bool kPlanar, bool kMean>
inline void normal_tile(const Counters& counters, const Draw& draw, int count, float* out) {
  for (int i = 0; i < count; i += V::kLanes) {
    const auto load = [&](const uint32_t* p) { return kPlanar ? V::load(p + i) : V::load_interleaved(p + i); };
    const typename V::U group = load(counters.group), lo = load(counters.row_lo), hi = load(counters.row_hi);
    typename V::F z[8];
    standard_normal_group<V>(group, lo, hi, draw.first, draw.keys, z);
    if constexpr (kMean) {
      for (int s = 1; s < draw.num_samples; ++s) {
        typename V::F next[8];
        standard_normal_group<V>(group, lo, hi, draw.first + s, draw.keys, next);
        for (int t = 0; t < 8; ++t) z[t] = V::add(z[t], next[t]);
      }
      const typename V::F share = V::splat_f(1.0f / static_cast<float>(draw.num_samples));
      for (int t = 0; t < 8; ++t) z[t] = V::mul(z[t], share);
    }
    if constexpr (kPlanar)
      for (int t = 0; t < 8; ++t) V::store(out + kChunk * t + i, z[t]);
    else V::in_order(z, [&](int j, One::F a, One::F b) { One::store_pair(out + 8 * i + j, a, b); });
  }
}

template <bool kPlanar>
inline void normal_tile(const Counters& counters, const Draw& draw, int count, float* out) {
  if (draw.num_samples == 1) normal_tile<kPlanar, false>(counters, draw, count, out);
  else normal_tile<kPlanar, true>(counters, draw, count, out);
}

// ---- a run: n elements that lie side by side -------------------------------------------------------------------------

template <class C>
struct Pass {
  const PerturbArgs* args;
  Draw draw;
  const C* scale;  // [features + kTile]: factor * sigma, continued periodically
};

DIP_HD float fma_of(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
DIP_HD double fma_of(double a, double b, double c) { return __builtin_fma(a, b, c); }

// kChannel: one sigma for the whole run.
template <class C, bool kChannel>
DIP_HD void apply_run(
    const PerturbArgs& a, int64_t x_at, int64_t u_at, int64_t du_at, const C* scale, C* acc, const float* z, int n) {
  alignas(64) C buffer[kRun], target[kRun];
  if (a.u.data) {
    C* u = run_target<C>(a.u, u_at, target);
    if (a.x.data) {
      const C* x = load_run<C>(a.x, x_at, n, buffer);
      for (int i = 0; i < n; ++i) u[i] = fma_of(scale[kChannel ? 0 : i], static_cast<C>(z[i]), x[i]);
    } else {
      for (int i = 0; i < n; ++i) u[i] = scale[kChannel ? 0 : i] * static_cast<C>(z[i]);
    }
    store_run<C>(a.u, u_at, n, u);
  }
  if (acc) {
    const C* du = load_run<C>(a.du, du_at, n, buffer);
    for (int i = 0; i < n; ++i) acc[i] = fma_of(du[i], static_cast<C>(z[i]), acc[i]);
  }
}

// ---- a whole tile of one sample, used in the registers it was drawn in ------------------------------------------------
// The arithmetic of the draw waits more than it works: loads, conversions and stores fit in between.

template <class T, bool kWrite, bool kSum, bool kStream>
struct Tile {
  const T *x, *du;
  T* u;
  const float* scale;
  float* acc;

  // Asks for the same part of the next tile, so that memory works while the draw does.
  DIP_HD void prefetch_next(int first) const {
    constexpr int kLine = 64 / sizeof(T);
    for (int at = first + kTile; at < first + kTile + 8 * V::kLanes; at += kLine) {
      if constexpr (kWrite) __builtin_prefetch(x + at, 0);
      if constexpr (kWrite && !kStream) __builtin_prefetch(u + at, 1);
      if constexpr (kSum) __builtin_prefetch(du + at, 0);
    }
  }

  DIP_HD void use(const V::F z[8], int first) const {
    prefetch_next(first);
    V::in_order(z, [&](int j, One::F a, One::F b) {
      const int at = first + j, next = at + One::kLanes;
      if constexpr (kSum) {
        One::store(acc + at, One::fma(One::load(du + at), a, One::load(acc + at)));
        One::store(acc + next, One::fma(One::load(du + next), b, One::load(acc + next)));
      }
      if constexpr (kWrite) {
        const One::F here = One::fma(One::load(scale + at), a, One::load(x + at));
        const One::F beside = One::fma(One::load(scale + next), b, One::load(x + next));
        if constexpr (kStream) One::stream_pair(u + at, here, beside);
        else One::store_pair(u + at, here, beside);
      }
    });
  }

  // Apart, and not inlined: in one function the compiler spills more.
  __attribute__((noinline)) void run_rows(const Counters& counters, const Draw& draw) const {
    for (int i = 0; i < kTileGroups; i += V::kLanes) {
      typename V::F z[8];
      standard_normal_group<V>(
          V::load_interleaved(counters.group + i), V::load_interleaved(counters.row_lo + i),
          V::load_interleaved(counters.row_hi + i), draw.first, draw.keys, z);
      use(z, 8 * i);
    }
  }
  __attribute__((noinline)) void run_row(const Counters& counters, const PhiloxRow& row, const PhiloxKeys& keys) const {
    for (int i = 0; i < kTileGroups; i += V::kLanes) {
      typename V::F z[8];
      standard_normal_group<V>(V::load_interleaved(counters.group + i), row, keys, z);
      use(z, 8 * i);
    }
  }

  void run(const Counters& counters, const Draw& draw) const {
    const uint32_t lo = counters.row_lo[0], hi = counters.row_hi[0];
    const int last = kTileGroups - 1;
    if (lo == counters.row_lo[last] && hi == counters.row_hi[last])
      run_row(counters, PhiloxRow(static_cast<uint64_t>(hi) << 32 | lo, draw.first, draw.keys), draw.keys);
    else run_rows(counters, draw);
  }
};

// ---- rows: [M, K], columns side by side ------------------------------------------------------------------------------

template <class C>
struct Rows {
  const Pass<C>& pass;
  int64_t k, phase, first_group, groups;  // groups of one row; the first one's leading `phase` columns are outside
  bool linear;                            // rows follow one another: a tile is one run, whatever K is
  bool fused;                             // a whole tile stays in registers: run_tile
  bool streams;                           // u is larger than a cache, and written past it

  explicit Rows(const Pass<C>& p) : pass(p) {
    const PerturbArgs& a = *p.args;
    k = a.features;
    phase = a.col0 % 8;
    first_group = a.col0 / 8;
    groups = ceil_div(phase + k, 8);
    const auto dense = [&](const Operand& o) { return !o.data || o.outer_stride == k; };
    linear = phase == 0 && k % 8 == 0 && dense(a.x) && dense(a.u) && dense(a.du);
    const DType dtype = a.u.data ? a.u.dtype : a.du.dtype;
    const auto same = [&](const Operand& o) { return !o.data || o.dtype == dtype; };
    fused = V::kLanes > 1 && sizeof(C) == 4 && linear && p.draw.num_samples == 1 && (a.x.data || !a.u.data) && same(a.x) &&
            same(a.du) && (dtype == DType::kFloat32 || dtype == DType::kBFloat16);
    streams = fused && a.u.data && !a.dsigma && dtype == DType::kFloat32 && a.outer * k * 4 >= kStreamBytes &&
              reinterpret_cast<uintptr_t>(a.u.data) % 64 == 0;
  }

  void run_tile(const Counters& counters, int64_t offset, const C* scale, C* acc) const {
    if constexpr (V::kLanes > 1 && sizeof(C) == 4) {
      if (streams) run_tile_of<float, true>(counters, offset, scale, acc);
      else if ((pass.args->u.data ? pass.args->u : pass.args->du).dtype == DType::kFloat32)
        run_tile_of<float, false>(counters, offset, scale, acc);
      else run_tile_of<BFloat16Bits, false>(counters, offset, scale, acc);
    }
  }

  template <class T, bool kStream>
  void run_tile_of(const Counters& counters, int64_t offset, const float* scale, float* acc) const {
    const PerturbArgs& a = *pass.args;
    const T *x = static_cast<const T*>(a.x.data) + offset, *du = static_cast<const T*>(a.du.data) + offset;
    T* u = static_cast<T*>(a.u.data) + offset;
    if (!acc) Tile<T, true, false, kStream>{x, du, u, scale, acc}.run(counters, pass.draw);
    else if (!a.u.data) Tile<T, false, true, false>{x, du, u, scale, acc}.run(counters, pass.draw);
    else Tile<T, true, true, false>{x, du, u, scale, acc}.run(counters, pass.draw);
  }

  // Counters of one tile, from group g of row `row` on.
  void fill(Counters& c, int64_t row, int64_t g) const {
    const int64_t start = pass.args->row0 + row;
    if (groups >= kTileGroups) {
      const uint64_t r0 = static_cast<uint64_t>(start), r1 = r0 + 1;
      for (int i = 0; i < kTileGroups; ++i) {
        const bool next = g + i >= groups;
        c.group[i] = static_cast<uint32_t>(first_group + g + i - (next ? groups : 0));
        c.row_lo[i] = static_cast<uint32_t>(next ? r1 : r0);
        c.row_hi[i] = static_cast<uint32_t>((next ? r1 : r0) >> 32);
      }
      return;
    }
    if (g == 0 && kTileGroups % groups == 0) {  // a narrow layer, where every tile begins a row
      const int shift = __builtin_ctzll(static_cast<uint64_t>(groups));
      for (int i = 0; i < kTileGroups; ++i) {
        const uint64_t r = static_cast<uint64_t>(start) + (i >> shift);
        c.group[i] = static_cast<uint32_t>(first_group + (i & (groups - 1)));
        c.row_lo[i] = static_cast<uint32_t>(r);
        c.row_hi[i] = static_cast<uint32_t>(r >> 32);
      }
      return;
    }
    uint64_t r = static_cast<uint64_t>(start);
    for (int i = 0; i < kTileGroups; ++i) {
      c.group[i] = static_cast<uint32_t>(first_group + g);
      c.row_lo[i] = static_cast<uint32_t>(r);
      c.row_hi[i] = static_cast<uint32_t>(r >> 32);
      if (++g == groups) g = 0, ++r;
    }
  }

  // Items are groups counted through the rows; [begin, end). acc: [k + kTile], or null.
  void walk(int64_t begin, int64_t end, C* acc, double* sum) const {
    const PerturbArgs& a = *pass.args;
    alignas(64) float z[kTile];
    Counters counters;
    // In float32 an entry of acc takes 32 terms; then they go to double.
    const int64_t flush_every = larger(32, groups * 32 / kTileGroups);
    int64_t row = begin / groups, g = begin % groups, tiles = 0;
    for (int64_t item = begin; item < end; item += kTileGroups) {
      const int count = static_cast<int>(smaller(kTileGroups, end - item));
      if (linear && !fused) {
        prefetch_run<0>(a.x, 8 * item, 8 * count);
        prefetch_run<1>(a.u, 8 * item, 8 * count);
        prefetch_run<0>(a.du, 8 * item, 8 * count);
      }
      fill(counters, row, g);
      const bool in_registers = fused && count == kTileGroups;
      if (!in_registers) normal_tile<false>(counters, pass.draw, count, z);
      if (linear) {
        C* at = acc ? acc + 8 * g : nullptr;
        const C* scale = pass.scale + 8 * g;
        const int64_t offset = 8 * item;
        if (in_registers) run_tile(counters, offset, scale, at);
        else if (count == kTileGroups) apply_run<C, false>(a, offset, offset, offset, scale, at, z, kTile);
        else apply_run<C, false>(a, offset, offset, offset, scale, at, z, 8 * count);
        g += count;
        row += g / groups;
        g %= groups;
      } else {
        for (int done = 0; done < count;) {
          const int64_t here = smaller(count - done, groups - g);
          const int64_t col = larger(0, 8 * g - phase), col_end = smaller(k, 8 * (g + here) - phase);
          apply_run<C, false>(
              a, row * a.x.outer_stride + col, row * a.u.outer_stride + col, row * a.du.outer_stride + col, pass.scale + col,
              acc ? acc + col : nullptr, z + 8 * done + (col + phase - 8 * g), static_cast<int>(col_end - col));
          done += static_cast<int>(here);
          g += here;
          if (g == groups) g = 0, ++row;
        }
      }
      if (acc && (++tiles == flush_every || item + kTileGroups >= end)) {
        for (int64_t j = 0; j < k; ++j) sum[j] += acc[j];
        for (int64_t j = 0, col = 0; linear && j < kTile; ++j, col = col + 1 == k ? 0 : col + 1) sum[col] += acc[k + j];
        std::memset(acc, 0, sizeof(C) * static_cast<size_t>(k + kTile));
        tiles = 0;
      }
    }
    if (streams) One::end_stream();
  }
};

// ---- channels: [N, C, inner], rows side by side ----------------------------------------------------------------------

template <class C>
struct Channels {
  const Pass<C>& pass;
  int64_t rows, phase, first_group, groups;

  explicit Channels(const Pass<C>& p) : pass(p) {
    const PerturbArgs& a = *p.args;
    rows = a.outer * a.inner;
    phase = a.col0 % 8;
    first_group = a.col0 / 8;
    groups = ceil_div(phase + a.features, 8);
  }

  // Rows [begin, end) of the 8 channels of group g. sum: [8], or null.
  void walk(int64_t g, int64_t begin, int64_t end, double* sum) const {
    const PerturbArgs& a = *pass.args;
    alignas(64) float z[8 * kChunk];
    alignas(64) C acc[8 * kChunk] = {};
    Counters counters;
    for (int i = 0; i < kTileGroups; ++i) counters.group[i] = static_cast<uint32_t>(first_group + g);
    for (int64_t row = begin; row < end; row += kChunk) {
      const int n = static_cast<int>(smaller(kChunk, end - row));
      for (int part = 0; part < n; part += kTileGroups) {
        for (int i = 0; i < kTileGroups; ++i) {
          const uint64_t r = static_cast<uint64_t>(a.row0 + row + part + i);
          counters.row_lo[i] = static_cast<uint32_t>(r);
          counters.row_hi[i] = static_cast<uint32_t>(r >> 32);
        }
        normal_tile<true>(counters, pass.draw, static_cast<int>(smaller(kTileGroups, n - part)), z + part);
      }
      for (int t = 0; t < 8; ++t) {
        const int64_t channel = 8 * g + t - phase;
        if (channel < 0 || channel >= a.features) continue;
        int64_t outer = row / a.inner, inner = row % a.inner;
        for (int done = 0; done < n;) {
          const int here = static_cast<int>(smaller(n - done, a.inner - inner));
          const auto at = [&](const Operand& o) { return outer * o.outer_stride + channel * o.feature_stride + inner; };
          apply_run<C, true>(
              a, at(a.x), at(a.u), at(a.du), pass.scale + channel, sum ? acc + kChunk * t + done : nullptr, z + kChunk * t + done,
              here);
          done += here;
          inner = 0;
          ++outer;
        }
      }
    }
    if (sum)
      for (int t = 0; t < 8; ++t)
        for (int i = 0; i < kChunk; ++i) sum[t] += acc[kChunk * t + i];
  }
};

// ---- threads and the two-stage sum -----------------------------------------------------------------------------------

// f(begin, end) over parts of [0, total) of `grain`. Every thread takes the next part when it is done with one: a thread that
// wakes late, or shares its core, keeps nobody waiting.
template <class F>
void run_parallel(ParallelFor parallel_for, int64_t total, int64_t grain, F&& f) {
  struct Work {
    F& f;
    int64_t total, grain, next;
  } work{f, total, grain, 0};
  const auto take = [](int64_t, int64_t, void* context) {
    Work& w = *static_cast<Work*>(context);
    for (int64_t at; (at = __atomic_fetch_add(&w.next, w.grain, __ATOMIC_RELAXED)) < w.total;)
      w.f(at, smaller(w.total, at + w.grain));
  };
  parallel_for(total, grain, take, &work);
}

// partials: [blocks, width] double; the blocks depend on the sizes alone, so that the sum does not depend on the threads.
template <class C>
const char* sum_rows(const Pass<C>& pass, ParallelFor parallel_for, double* partials, int64_t blocks, int64_t block_rows) {
  const Rows<C> rows(pass);
  const int64_t m = pass.args->outer;
  bool failed = false;
  run_parallel(
      parallel_for, blocks, larger(1, kGrainTiles * kTileGroups / (rows.groups * block_rows)), [&](int64_t begin, int64_t end) {
        C* acc = static_cast<C*>(std::calloc(static_cast<size_t>(rows.k + kTile), sizeof(C)));
        if (!acc) {
          __atomic_store_n(&failed, true, __ATOMIC_RELAXED);  // by several threads, maybe
          return;
        }
        for (int64_t b = begin; b < end; ++b)
          rows.walk(b * block_rows * rows.groups, smaller(m, (b + 1) * block_rows) * rows.groups, acc, partials + b * rows.k);
        std::free(acc);
      });
  return failed ? "out of memory" : nullptr;
}

template <class C>
void sum_channels(const Pass<C>& pass, ParallelFor parallel_for, double* partials, int64_t blocks, int64_t block_rows) {
  const Channels<C> channels(pass);
  const int64_t k = pass.args->features;
  run_parallel(parallel_for, blocks * channels.groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / channels.groups, g = i % channels.groups;
      double sum[8] = {};
      channels.walk(g, b * block_rows, smaller(channels.rows, (b + 1) * block_rows), sum);
      for (int64_t t = 0; t < 8; ++t) {
        const int64_t channel = 8 * g + t - channels.phase;
        if (channel >= 0 && channel < k) partials[b * k + channel] = sum[t];
      }
    }
  });
}

template <class C>
void write_only(const Pass<C>& pass, ParallelFor parallel_for) {
  const PerturbArgs& a = *pass.args;
  if (a.inner == 1) {
    const Rows<C> rows(pass);
    const int64_t items = a.outer * rows.groups;
    run_parallel(parallel_for, ceil_div(items, kTileGroups), kGrainTiles, [&](int64_t begin, int64_t end) {
      rows.walk(begin * kTileGroups, smaller(items, end * kTileGroups), nullptr, nullptr);
    });
    return;
  }
  const Channels<C> channels(pass);
  const int64_t chunks = ceil_div(channels.rows, kChunk);
  run_parallel(parallel_for, chunks * channels.groups, kGrainTiles / 2, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / channels.groups * kChunk;
      channels.walk(i % channels.groups, row, smaller(channels.rows, row + kChunk), nullptr);
    }
  });
}

// sigma as a standard deviation, without the factor.
double sigma_at(const PerturbArgs& a, int64_t j) {
  if (!a.sigma) return 1.0;
  if (a.sigma_is_double) {
    const double s = static_cast<const double*>(a.sigma)[j];
    return a.log_variance ? std::exp(0.5 * s) : s;
  }
  const float s = static_cast<const float*>(a.sigma)[j];
  return a.log_variance ? std::exp(0.5f * s) : s;
}

template <class C>
const char* perturb(const PerturbArgs& a, ParallelFor parallel_for) {
  const int64_t k = a.features, m = a.outer * a.inner;
  const int64_t unit = a.inner == 1 ? 64 : kChunk;
  const int64_t block_rows = larger(unit, ceil_div(ceil_div(m, kMaxBlocks), unit) * unit), blocks = ceil_div(m, block_rows);
  C* scale = static_cast<C*>(std::malloc(sizeof(C) * static_cast<size_t>(k + kTile)));
  double* partials =
      a.dsigma ? static_cast<double*>(std::calloc(static_cast<size_t>(larger(1, blocks * k)), sizeof(double))) : nullptr;
  const char* error = !scale || (a.dsigma && !partials) ? "out of memory" : nullptr;
  if (!error) {
    for (int64_t j = 0; j < k; ++j) scale[j] = static_cast<C>(a.factor * sigma_at(a, j));
    for (int64_t j = 0; k && j < kTile; ++j) scale[k + j] = scale[j];
    const Pass<C> pass{
        &a, {PhiloxKeys(philox_key(a.seed)), stream_sample(a.seed, static_cast<uint32_t>(a.sample)), a.num_samples}, scale};
    if (m && k) {
      if (!a.dsigma) write_only(pass, parallel_for);
      else if (a.inner == 1) error = sum_rows(pass, parallel_for, partials, blocks, block_rows);
      else sum_channels(pass, parallel_for, partials, blocks, block_rows);
    }
    for (int64_t j = 0; a.dsigma && !error && j < k; ++j) {
      double sum = 0;
      for (int64_t b = 0; b < blocks; ++b) sum += partials[b * k + j];
      sum *= a.log_variance ? a.factor * 0.5 * sigma_at(a, j) : a.factor;
      if (a.sigma_is_double) static_cast<double*>(a.dsigma)[j] = sum;
      else static_cast<float*>(a.dsigma)[j] = static_cast<float>(sum);
    }
  }
  std::free(scale);
  std::free(partials);
  return error;
}

}  // namespace

// Computed in double where the data are: x, or the gradient alone.
const char* DIP_PERTURB(const PerturbArgs& a, ParallelFor parallel_for) {
  const bool is_double = (a.x.data ? a.x.dtype : a.du.data ? a.du.dtype : DType::kFloat32) == DType::kFloat64;
  return is_double ? perturb<double>(a, parallel_for) : perturb<float>(a, parallel_for);
}

}  // namespace dip
