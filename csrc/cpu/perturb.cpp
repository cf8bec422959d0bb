// u = x + factor * sigma * z;  dsigma = factor * sum over rows of du * z.  docs/maths.md, sections 1, 5 and 6.
// Compiled once per instruction set: DIP_LANES names the lane type, DIP_PERTURB the entry point. No STL here: an inline function
// of the library, compiled with this file's flags, could be linked into code that runs on an older machine.
#include <cstdlib>

#include "convert.h"
#include "parallel.h"
#include "vector_math.h"

namespace dip {
namespace {

using V = DIP_LANES;
using One = V::One;

constexpr int kTileGroups = 128;  // Philox calls of one tile: the same on every instruction set, so that sums associate alike
constexpr int kTile = 8 * kTileGroups;  // elements
constexpr int64_t kMaxBlocks = 32;      // row blocks of the two-stage sum
constexpr int64_t kGrainTiles = 16;     // 16384 elements: about the cost of waking a thread
#ifndef DIP_STREAM_BYTES
#define DIP_STREAM_BYTES (1 << 24)  // the sanitizers set less, for their small tensors
#endif
constexpr int64_t kStreamBytes = DIP_STREAM_BYTES;  // of float32: in bfloat16 the draw takes longer than memory
static_assert(kTile == kRun && kTileGroups % V::kLanes == 0, "a tile is whole vectors");

// ---- the draw ------------------------------------------------------------------------------------------------------

struct Counters {
  alignas(64) uint32_t group[kTileGroups], row_lo[kTileGroups], row_hi[kTileGroups];
};

struct Draw {
  PhiloxKeys keys;
  uint32_t first;  // stream and first sample
  int num_samples;
};

// Word t of counter i: in groups at words[4 * i + t], up to the order of V::store_words; planar at words[kTileGroups * t + i].
template <bool kPlanar>
DIP_HD void store_words(const typename V::Wide ctr[4], int i, uint32_t* words) {
  typename V::U w[4];
  DIP_UNROLL
  for (int t = 0; t < 4; ++t) w[t] = V::narrow(ctr[t]);
  if constexpr (kPlanar)
    for (int t = 0; t < 4; ++t) V::store(words + kTileGroups * t + i, w[t]);
  else V::store_words(words + 4 * i, w);
}

template <bool kPlanar>
void draw_words(const Counters& c, const PhiloxKeys& keys, uint32_t stream_sample, int count, uint32_t* words) {
  const int last = kTileGroups - 1;
  if (!kPlanar && c.row_lo[0] == c.row_lo[last] && c.row_hi[0] == c.row_hi[last]) {
    const PhiloxRow row(static_cast<uint64_t>(c.row_hi[0]) << 32 | c.row_lo[0], stream_sample, keys);
    for (int i = 0; i < count; i += V::kLanes) {
      typename V::Wide ctr[4];
      philox4x32_10<V>(V::load_counters(c.group + i), row, keys, ctr);
      store_words<kPlanar>(ctr, i, words);
    }
    return;
  }
  const auto load = [&](const uint32_t* p) { return V::widen(kPlanar ? V::load(p) : V::load_counters(p)); };
  for (int i = 0; i < count; i += V::kLanes) {
    typename V::Wide ctr[4] = {load(c.group + i), load(c.row_lo + i), load(c.row_hi + i), V::widen(V::splat(stream_sample))};
    philox4x32_10<V>(ctr, keys);
    store_words<kPlanar>(ctr, i, words);
  }
}

// A draw before its last step, cos_sin. A loop for each step: all of them at once are one long chain of dependent instructions
// per vector, and too few such chains fit into what a core looks ahead.
struct Polar {
  alignas(64) uint32_t words[4 * kTileGroups];  // in the order of store_words
  alignas(64) float radii[4 * kTileGroups];
};

template <bool kPlanar>
void draw_polar(const Counters& counters, const Draw& draw, int sample, int count, Polar* out) {
  draw_words<kPlanar>(counters, draw.keys, draw.first + static_cast<uint32_t>(sample), count, out->words);
  const int rows = kPlanar ? 4 : 1, width = kPlanar ? count : 4 * count;
  for (int t = 0; t < rows; ++t)
    for (int i = kTileGroups * t; i < kTileGroups * t + width; i += V::kLanes)
      V::store(out->radii + i, radius<V>(V::load(out->words + i)));
}

template <bool kPlanar>
void normal_sample(const Counters& counters, const Draw& draw, int sample, int count, float* out) {
  Polar polar;
  draw_polar<kPlanar>(counters, draw, sample, count, &polar);
  const int rows = kPlanar ? 4 : 1, width = kPlanar ? count : 4 * count;
  for (int t = 0; t < rows; ++t)
    for (int i = 0; i < width; i += V::kLanes) {
      typename V::F even, odd;
      cos_sin<V>(V::load(polar.words + kTileGroups * t + i), V::load(polar.radii + kTileGroups * t + i), &even, &odd);
      if constexpr (kPlanar) {
        V::store(out + kTileGroups * 2 * t + i, even);
        V::store(out + kTileGroups * (2 * t + 1) + i, odd);
      } else {
        V::zip(even, odd, [&](int j, One::F a, One::F b) { One::store_pair(out + 2 * i + j, a, b); });
      }
    }
}

// z of the first `count` counters, rounded up to whole vectors. Groups: out[8 * i + t] for counter i. Planar: out[kTileGroups * t
// + i].
template <bool kPlanar>
void normal_tile(const Counters& counters, const Draw& draw, int count, float* out) {
  normal_sample<kPlanar>(counters, draw, 0, count, out);
  if (draw.num_samples == 1) return;
  alignas(64) float next[kTile];
  const float share = 1.0f / static_cast<float>(draw.num_samples);
  const int rows = kPlanar ? 8 : 1, width = kPlanar ? count : 8 * count;
  for (int s = 1; s < draw.num_samples; ++s) {
    normal_sample<kPlanar>(counters, draw, s, count, next);
    for (int t = 0; t < rows; ++t)
      for (int i = 0; i < width; ++i) out[kTileGroups * t + i] += next[kTileGroups * t + i];
  }
  for (int t = 0; t < rows; ++t)
    for (int i = 0; i < width; ++i) out[kTileGroups * t + i] *= share;
}

// ---- a run: n elements that lie side by side -------------------------------------------------------------------------

template <class C>
struct Pass {
  const PerturbArgs* args;
  Draw draw;
  const C* scale;  // [features + kTile]: factor * sigma, continued periodically
};

// kChannel: one sigma for the whole run.
template <class C, bool kChannel>
DIP_HD void apply_run(
    const PerturbArgs& a, int64_t x_at, int64_t u_at, int64_t z_at, int64_t du_at, const C* scale, C* acc, const float* z,
    int n) {
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
  if (a.z.data) {
    C* to = run_target<C>(a.z, z_at, target);
    for (int i = 0; i < n; ++i) to[i] = static_cast<C>(z[i]);
    store_run<C>(a.z, z_at, n, to);
  }
  if (acc) {
    const C* du = load_run<C>(a.du, du_at, n, buffer);
    for (int i = 0; i < n; ++i) acc[i] = fma_of(du[i], static_cast<C>(z[i]), acc[i]);
  }
}

// ---- a whole tile of one sample, used in the registers of its last step -------------------------------------------------
// Loads, conversions and stores fit in between.

template <class T, bool kWrite, bool kSum, bool kNoise, bool kStream>
void use_tile(const Polar& polar, const T* x, const T* du, T* u, T* z, const float* scale, float* acc) {
  for (int i = 0; i < 4 * kTileGroups; i += V::kLanes) {
    typename V::F even, odd;
    cos_sin<V>(V::load(polar.words + i), V::load(polar.radii + i), &even, &odd);
    V::zip(even, odd, [&](int j, One::F a, One::F b) {
      const int at = 2 * i + j, next = at + One::kLanes;
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
      if constexpr (kNoise) One::store_pair(z + at, a, b);
    });
  }
}

// ---- rows: [M, K], columns side by side ------------------------------------------------------------------------------

template <class C>
struct Rows {
  const Pass<C>& pass;
  int64_t k, phase, first_group, groups;  // groups of one row; the first one's leading `phase` columns are outside
  bool linear;                            // rows follow one another: a tile is one run, whatever K is
  bool fused;                             // a whole tile stays in registers: run_tile
  bool streams;                           // u is larger than a cache, and written past it
  bool prefetches_u;
  DType dtype;  // of what a fused tile reads and writes

  explicit Rows(const Pass<C>& p) : pass(p) {
    const PerturbArgs& a = *p.args;
    k = a.features;
    phase = a.col0 % 8;
    first_group = a.col0 / 8;
    groups = ceil_div(phase + k, 8);
    const auto dense = [&](const Operand& o) { return !o.data || o.outer_stride == k; };
    linear = phase == 0 && k % 8 == 0 && dense(a.x) && dense(a.u) && dense(a.z) && dense(a.du);
    dtype = a.u.data ? a.u.dtype : a.z.data ? a.z.dtype : a.du.dtype;
    const auto same = [&](const Operand& o) { return !o.data || o.dtype == dtype; };
    fused = V::kLanes > 1 && sizeof(C) == 4 && linear && p.draw.num_samples == 1 && (a.x.data || !a.u.data) && same(a.x) &&
            same(a.z) && same(a.du) && (dtype == DType::kFloat32 || dtype == DType::kBFloat16);
    streams = fused && a.u.data && !a.z.data && !a.dsigma && dtype == DType::kFloat32 && a.outer * k * 4 >= kStreamBytes &&
              reinterpret_cast<uintptr_t>(a.u.data) % 64 == 0;
    prefetches_u = !streams && !(fused && dtype == DType::kBFloat16);  // half as many bytes come in time by themselves
  }

  void run_tile(const Counters& counters, int64_t offset, const C* scale, C* acc) const {
    if constexpr (V::kLanes > 1 && sizeof(C) == 4) {
      Polar polar;
      draw_polar<false>(counters, pass.draw, 0, kTileGroups, &polar);
      if (streams) run_tile_of<float, true>(polar, offset, scale, acc);
      else if (dtype == DType::kFloat32) run_tile_of<float, false>(polar, offset, scale, acc);
      else run_tile_of<BFloat16Bits, false>(polar, offset, scale, acc);
    }
  }

  template <class T, bool kStream>
  void run_tile_of(const Polar& polar, int64_t offset, const float* scale, float* acc) const {
    const PerturbArgs& a = *pass.args;
    const T *x = static_cast<const T*>(a.x.data) + offset, *du = static_cast<const T*>(a.du.data) + offset;
    T *u = static_cast<T*>(a.u.data) + offset, *z = static_cast<T*>(a.z.data) + offset;
    if (!acc && !a.z.data) use_tile<T, true, false, false, kStream>(polar, x, du, u, z, scale, acc);
    else if (!acc && !a.u.data) use_tile<T, false, false, true, false>(polar, x, du, u, z, scale, acc);
    else if (!acc) use_tile<T, true, false, true, false>(polar, x, du, u, z, scale, acc);
    else if (!a.u.data) use_tile<T, false, true, false, false>(polar, x, du, u, z, scale, acc);
    else use_tile<T, true, true, false, false>(polar, x, du, u, z, scale, acc);
  }

  // Counters of one tile, from group g of row `row` on.
  void fill(Counters& c, int64_t row, int64_t g) const {
    const uint64_t r0 = static_cast<uint64_t>(pass.args->row0 + row), r1 = r0 + 1;
    const uint32_t lo = static_cast<uint32_t>(r0), hi = static_cast<uint32_t>(r0 >> 32),
                   first = static_cast<uint32_t>(first_group);
    if (groups >= kTileGroups) {
      const uint32_t next_lo = static_cast<uint32_t>(r1), next_hi = static_cast<uint32_t>(r1 >> 32);
      const uint32_t here = first + static_cast<uint32_t>(g), there = here - static_cast<uint32_t>(groups);
      const int left = static_cast<int>(smaller(kTileGroups, groups - g));
      for (int i = 0; i < kTileGroups; ++i) {
        c.group[i] = (i < left ? here : there) + static_cast<uint32_t>(i);
        c.row_lo[i] = i < left ? lo : next_lo;
        c.row_hi[i] = i < left ? hi : next_hi;
      }
      return;
    }
    if (g == 0 && kTileGroups % groups == 0) {  // a narrow layer, where every tile begins a row
      const uint32_t shift = static_cast<uint32_t>(__builtin_ctzll(static_cast<uint64_t>(groups)));
      const uint32_t mask = static_cast<uint32_t>(groups - 1);
      for (uint32_t i = 0; i < kTileGroups; ++i) {
        const uint32_t at = lo + (i >> shift);
        c.group[i] = first + (i & mask);
        c.row_lo[i] = at;
        c.row_hi[i] = hi + (at < lo);  // the carry
      }
      return;
    }
    uint64_t r = r0;
    for (int i = 0; i < kTileGroups; ++i) {
      c.group[i] = first + static_cast<uint32_t>(g);
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
    const int64_t tile_rows = kTileGroups / groups, tile_groups = kTileGroups % groups;
    int64_t row = begin / groups, g = begin % groups, tiles = 0;
    for (int64_t item = begin; item < end; item += kTileGroups) {
      const int count = static_cast<int>(smaller(kTileGroups, end - item));
      if (linear) {
        prefetch_run<0>(a.x, 8 * item, 8 * count);
        if (prefetches_u) prefetch_run<1>(a.u, 8 * item, 8 * count);
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
        else if (count == kTileGroups) apply_run<C, false>(a, offset, offset, offset, offset, scale, at, z, kTile);
        else apply_run<C, false>(a, offset, offset, offset, offset, scale, at, z, 8 * count);
        row += tile_rows;
        g += tile_groups;
        if (g >= groups) g -= groups, ++row;
      } else {
        for (int done = 0; done < count;) {
          const int64_t here = smaller(count - done, groups - g);
          const int64_t col = larger(0, 8 * g - phase), col_end = smaller(k, 8 * (g + here) - phase);
          apply_run<C, false>(
              a, row * a.x.outer_stride + col, row * a.u.outer_stride + col, row * a.z.outer_stride + col,
              row * a.du.outer_stride + col, pass.scale + col, acc ? acc + col : nullptr, z + 8 * done + (col + phase - 8 * g),
              static_cast<int>(col_end - col));
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
    alignas(64) float z[kTile];
    alignas(64) C acc[kTile] = {};
    Counters counters;
    for (int i = 0; i < kTileGroups; ++i) counters.group[i] = static_cast<uint32_t>(first_group + g);
    for (int64_t row = begin; row < end; row += kTileGroups) {
      const int n = static_cast<int>(smaller(kTileGroups, end - row));
      for (int i = 0; i < kTileGroups; ++i) {
        const uint64_t r = static_cast<uint64_t>(a.row0 + row + i);
        counters.row_lo[i] = static_cast<uint32_t>(r);
        counters.row_hi[i] = static_cast<uint32_t>(r >> 32);
      }
      const int64_t image = row / a.inner, pixel = row % a.inner;
      const int first_run = static_cast<int>(smaller(n, a.inner - pixel));
      const int from = static_cast<int>(larger(0, phase - 8 * g)), to = static_cast<int>(smaller(8, a.features + phase - 8 * g));
      // Planes far apart: a processor's own prefetching does not follow, and waits longest for what is to be written.
      for (int t = from; t < to; ++t) {
        const auto at = [&](const Operand& o) { return image * o.outer_stride + (8 * g + t - phase) * o.feature_stride + pixel; };
        prefetch_run<0>(a.x, at(a.x), first_run);
        prefetch_run<1>(a.u, at(a.u), first_run);
        prefetch_run<0>(a.du, at(a.du), first_run);
      }
      normal_tile<true>(counters, pass.draw, n, z);
      for (int t = from; t < to; ++t) {
        const int64_t channel = 8 * g + t - phase;
        int64_t outer = image, inner = pixel;
        for (int done = 0; done < n;) {
          const int here = static_cast<int>(smaller(n - done, a.inner - inner));
          const auto at = [&](const Operand& o) { return outer * o.outer_stride + channel * o.feature_stride + inner; };
          apply_run<C, true>(
              a, at(a.x), at(a.u), 0, at(a.du), pass.scale + channel, sum ? acc + kTileGroups * t + done : nullptr,
              z + kTileGroups * t + done, here);
          done += here;
          inner = 0;
          ++outer;
        }
      }
    }
    if (sum)
      for (int t = 0; t < 8; ++t)
        for (int i = 0; i < kTileGroups; ++i) sum[t] += acc[kTileGroups * t + i];
  }
};

// ---- the two-stage sum -----------------------------------------------------------------------------------------------

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
  const int64_t chunks = ceil_div(channels.rows, kTileGroups);
  run_parallel(parallel_for, chunks * channels.groups, kGrainTiles, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / channels.groups * kTileGroups;
      channels.walk(i % channels.groups, row, smaller(channels.rows, row + kTileGroups), nullptr);
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
  const int64_t unit = a.inner == 1 ? 64 : kTileGroups;
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
