// The draw of z: tiles of counters, their words and their normals.  docs/maths.md, section 3.
// For files that are compiled once per instruction set: DIP_LANES names the lane type. No STL here:
// an inline function of the library, compiled with such a file's flags, could be linked into code
// that runs on an older machine.
#pragma once
#include <cmath>

#include "convert.h"
#include "parallel.h"

namespace dip {
namespace {

using V = DIP_LANES;
using One = V::One;

// Philox calls of one tile: the same on every instruction set, so that sums associate alike.
constexpr int kTileGroups = 128;
constexpr int kTile = 8 * kTileGroups;  // elements
static_assert(kTile == kRun && kTileGroups % V::kLanes == 0, "a tile is whole vectors");

// ---- a tile -------------------------------------------------------------------------------------

#ifndef DIP_STREAM_BYTES
#define DIP_STREAM_BYTES (1 << 24)  // the sanitizers set less, for their small tensors
#endif

// Whether u, of n elements, is written past the caches: it is larger than they are. Not in
// bfloat16, where the draw takes longer than memory.
inline bool streams_to(const Operand& u, int64_t n) {
  return u.data && u.dtype == DType::kFloat32 && n * 4 >= DIP_STREAM_BYTES &&
         reinterpret_cast<uintptr_t>(u.data) % 64 == 0;
}

struct Counters {
  alignas(64) uint32_t group[kTileGroups], row_lo[kTileGroups], row_hi[kTileGroups];
  bool one_row = false;  // only the first row_lo and row_hi are set
};

// What turns a draw's counters into words.
struct Generator {
  PhiloxKeys keys;
  uint32_t last_word;  // of every counter: stream and sample

  explicit Generator(const Draw& draw)
      : keys(philox_key(draw.seed)),
        last_word(stream_sample(draw.seed, static_cast<uint32_t>(draw.sample))) {}
};

// Word t of counter i: in groups at words[4 * i + t], up to the order of V::store_words; planar at
// words[kTileGroups * t + i].
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
void draw_words(const Counters& c, const Generator& generator, int count, uint32_t* words) {
  const PhiloxKeys& keys = generator.keys;
  if (!kPlanar && c.one_row) {
    const PhiloxRow row(
        static_cast<uint64_t>(c.row_hi[0]) << 32 | c.row_lo[0], generator.last_word, keys);
    for (int i = 0; i < count; i += V::kLanes) {
      typename V::Wide ctr[4];
      philox4x32_10<V>(V::load_counters(c.group + i), row, keys, ctr);
      store_words<kPlanar>(ctr, i, words);
    }
    return;
  }
  const auto load = [&](const uint32_t* p) {
    return V::widen(kPlanar ? V::load(p) : V::load_counters(p));
  };
  for (int i = 0; i < count; i += V::kLanes) {
    typename V::Wide ctr[4] = {
        load(c.group + i), load(c.row_lo + i), load(c.row_hi + i),
        V::widen(V::splat(generator.last_word))};
    philox4x32_10<V>(ctr, keys);
    store_words<kPlanar>(ctr, i, words);
  }
}

// A draw before its last step, cos_sin. A loop for each step: all of them at once are one long
// chain of dependent instructions per vector, and too few such chains fit into what a core looks
// ahead.
struct Polar {
  alignas(64) uint32_t words[4 * kTileGroups];  // in the order of store_words
  alignas(64) float radii[4 * kTileGroups];
};

template <bool kPlanar>
void draw_polar(const Counters& counters, const Generator& generator, int count, Polar* out) {
  draw_words<kPlanar>(counters, generator, count, out->words);
  const int rows = kPlanar ? 4 : 1, width = kPlanar ? count : 4 * count;
  for (int t = 0; t < rows; ++t)
    for (int i = kTileGroups * t; i < kTileGroups * t + width; i += V::kLanes)
      V::store(out->radii + i, radius<V>(V::load(out->words + i)));
}

// z of the first `count` counters, rounded up to whole vectors: of counter i out[8 * i + t], or
// planar out[kTileGroups * t + i].
template <bool kPlanar>
void normal_tile(const Counters& counters, const Generator& generator, int count, float* out) {
  Polar polar;
  draw_polar<kPlanar>(counters, generator, count, &polar);
  const int rows = kPlanar ? 4 : 1, width = kPlanar ? count : 4 * count;
  for (int t = 0; t < rows; ++t)
    for (int i = 0; i < width; i += V::kLanes) {
      typename V::F even, odd;
      cos_sin<V>(
          V::load(polar.words + kTileGroups * t + i), V::load(polar.radii + kTileGroups * t + i),
          &even, &odd);
      if constexpr (kPlanar) {
        V::store(out + kTileGroups * 2 * t + i, even);
        V::store(out + kTileGroups * (2 * t + 1) + i, odd);
      } else {
        V::zip(
            even, odd, [&](int j, One::F a, One::F b) { One::store_pair(out + 2 * i + j, a, b); });
      }
    }
}

// Asks for the lines of the columns that one step of a loop over V's lanes takes: a tile's at once
// would fill what a core can ask for, and stop it. What is read comes into the second-level cache,
// since the first holds no two rows of all operands.
template <int kWrite, class T>
DIP_HD void prefetch_step(const T* p) {
  for (int i = 0; i < 2 * V::kLanes * static_cast<int>(sizeof(T)); i += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + i, kWrite, kWrite ? 3 : 2);
}

// ---- a whole tile, used in the registers of its last step ---------------------------------------

// Whether there is such a form: for vectors, of float.
template <class C>
constexpr bool kInRegisters = V::kLanes > 1 && sizeof(C) == 4;

enum class Writes { kNothing, kNoise, kProjection };  // into u: z, or x + scale * z

// Loads, conversions and stores fit in between, as does what also(i) does for a step's columns,
// from i on. x(at): One::kLanes numbers from column `at` on.
template <class T, Writes kWrites, bool kSum, bool kStream, class X, class F>
void use_tile(
    const Polar& polar, X&& x, const T* du, T* u, const float* scale, float* acc, F&& also,
    int begin = 0, int end = kTile) {
  const auto store = [&](int at, One::F a, One::F b) {
    if constexpr (kStream) One::stream_pair(u + at, a, b);
    else One::store_pair(u + at, a, b);
  };
  for (int i = begin / 2; i < end / 2; i += V::kLanes) {
    typename V::F even, odd;
    cos_sin<V>(V::load(polar.words + i), V::load(polar.radii + i), &even, &odd);
    also(2 * i);
    V::zip(even, odd, [&](int j, One::F a, One::F b) {
      const int at = 2 * i + j, next = at + One::kLanes;
      if constexpr (kSum) {
        One::store(acc + at, One::fma(One::load(du + at), a, One::load(acc + at)));
        One::store(acc + next, One::fma(One::load(du + next), b, One::load(acc + next)));
      }
      if constexpr (kWrites == Writes::kNoise) store(at, a, b);
      if constexpr (kWrites == Writes::kProjection) {
        const One::F here = One::fma(One::load(scale + at), a, x(at));
        store(at, here, One::fma(One::load(scale + next), b, x(next)));
      }
    });
  }
}

// ---- rows of groups, and sigma of their columns -------------------------------------------------

// The groups of the columns of a matrix, row by row.
struct Groups {
  const Draw& draw;
  int64_t first, count;  // count: of a row
  int64_t phase;         // the first group's leading columns that are outside

  Groups(const Draw& draw, int64_t features)
      : draw(draw),
        first(draw.col0 / 8),
        count(ceil_div(draw.col0 % 8 + features, 8)),
        phase(draw.col0 % 8) {}

  // Counters of a tile's first `wanted` groups, from group g of row `row` on.
  void fill(Counters& c, int64_t row, int64_t g, int wanted) const {
    const uint64_t r0 = static_cast<uint64_t>(draw.row0 + row);
    const uint32_t lo = static_cast<uint32_t>(r0), hi = static_cast<uint32_t>(r0 >> 32),
                   start = static_cast<uint32_t>(first);
    c.one_row = g + wanted <= count;
    if (c.one_row) {
      const uint32_t here = start + static_cast<uint32_t>(g);
      for (uint32_t i = 0; i < kTileGroups; ++i) c.group[i] = here + i;
      c.row_lo[0] = lo;
      c.row_hi[0] = hi;
      return;
    }
    if (g == 0 && kTileGroups % count == 0) {  // a narrow layer, where every tile begins a row
      const uint32_t shift = static_cast<uint32_t>(__builtin_ctzll(static_cast<uint64_t>(count)));
      const uint32_t mask = static_cast<uint32_t>(count - 1);
      for (uint32_t i = 0; i < kTileGroups; ++i) {
        const uint32_t at = lo + (i >> shift);
        c.group[i] = start + (i & mask);
        c.row_lo[i] = at;
        c.row_hi[i] = hi + (at < lo);  // the carry
      }
      return;
    }
    // Row by row: loops that compilers vectorise, where a row is longer than a vector.
    uint64_t r = r0;
    for (int64_t i = 0; i < kTileGroups; g = 0, ++r) {
      const int64_t end = smaller(kTileGroups, i + count - g);
      const uint32_t here = start + static_cast<uint32_t>(g - i), r_lo = static_cast<uint32_t>(r),
                     r_hi = static_cast<uint32_t>(r >> 32);
      for (int64_t j = i; j < end; ++j) {
        c.group[j] = here + static_cast<uint32_t>(j);
        c.row_lo[j] = r_lo;
        c.row_hi[j] = r_hi;
      }
      i = end;
    }
  }
};

// The standard deviation of column j, without the factor.
inline double sigma_at(const Draw& draw, int64_t j) {
  if (!draw.sigma) return 1.0;
  if (draw.sigma_is_double) {
    const double s = static_cast<const double*>(draw.sigma)[j];
    return draw.log_variance ? std::exp(0.5 * s) : s;
  }
  const float s = static_cast<const float*>(draw.sigma)[j];
  return draw.log_variance ? std::exp(0.5f * s) : s;
}

// The derivative by what draw.sigma holds, factor and all.
inline double slope_at(const Draw& draw, int64_t j) {
  return draw.log_variance ? draw.factor * 0.5 * sigma_at(draw, j) : draw.factor;
}

// to[j] = factor * sigma_at(j), what multiplies z. A loop for each type: of one with exp in it no
// compiler makes vectors.
template <class C>
void scales(const Draw& draw, int64_t features, C* to) {
  const auto fill = [&, factor = draw.factor](auto sigma) {
    for (int64_t j = 0; j < features; ++j) to[j] = static_cast<C>(factor * sigma(j));
  };
  if (!draw.sigma || draw.log_variance) fill([&](int64_t j) { return sigma_at(draw, j); });
  else if (draw.sigma_is_double)
    fill([s = static_cast<const double*>(draw.sigma)](int64_t j) { return s[j]; });
  else fill([s = static_cast<const float*>(draw.sigma)](int64_t j) { return double{s[j]}; });
}

}  // namespace
}  // namespace dip
