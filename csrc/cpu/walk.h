// How passes with a draw walk through the layouts of docs/maths.md, section 6, and sum over rows,
// section 5. A job says what is done with a run or a tile: perturb.cpp, gate.cpp. No STL (draw.h).
#pragma once
#include "draw.h"

namespace dip {
namespace {

constexpr int64_t kGrainTiles = 16;  // 16384 elements: about the cost of waking a thread

struct Space {
  int64_t outer, features, inner;
};

// The first element of a run.
struct Place {
  int64_t outer, feature, inner;

  int64_t at(const Operand& o) const {
    return outer * o.outer_stride + feature * o.feature_stride + inner;
  }
};

// Whether rows follow one another; in channels, the planes of an image.
template <class Args>
bool is_dense(const Args& a, const Operand& o) {
  return !o.data || (a.inner == 1 ? o.outer_stride == a.features : o.feature_stride == a.inner);
}

// A job of the compute type C has
//   bool dense          all its operands are (is_dense)
//   bool in_registers   a whole tile of dense rows is for tile()
//   bool streams        tile() writes past the caches
//   bool draws          z is wanted; else run() is given none
//   void prefetch(place, n)   in channels; DIP_HD, as g++ drops calls of what does nothing else
//   void run<kChannel>(place, n, scale, acc, z)   n <= kTile elements that lie side by side, of one
//                                                 feature if kChannel
//   void tile(place, polar, scale, acc)           kTile elements of dense rows
// scale: factor * sigma, from the run's first feature on. acc: sums of the run's columns, or null.
template <class C>
struct Pass {
  Space space;
  const Draw& draw;
  Generator generator;
  const C* scale;  // [features + kTile], continued periodically
};

// ---- rows: [M, K], columns side by side ---------------------------------------------------------

template <class C, class Job>
struct Rows {
  const Pass<C>& pass;
  const Job& job;
  Groups groups;
  int64_t k;
  bool gaps;    // some groups have columns that are outside
  bool linear;  // rows follow one another: a tile is one run, whatever K is

  Rows(const Pass<C>& pass, const Job& job)
      : pass(pass), job(job), groups(pass.draw, pass.space.features), k(pass.space.features) {
    gaps = groups.phase || k % 8;
    // A long row is run enough by itself: close_gaps costs more than it saves.
    linear = job.dense && (!gaps || k < 64);
  }

  // Takes the columns that are outside out of z, `count` groups from group g of a row on. Returns
  // how many numbers stay.
  int close_gaps(int64_t g, int count, float* z) const {
    int n = 0;
    for (int i = 0; i < count;) {
      const int here = static_cast<int>(smaller(count - i, groups.count - g));
      const int64_t col = larger(0, 8 * g - groups.phase),
                    col_end = smaller(k, 8 * (g + here) - groups.phase);
      const float* from = z + 8 * i + (col + groups.phase - 8 * g);
      for (int j = 0; j < col_end - col; j += 8) {  // the next row covers what is too much
        float eight[8];
        std::memcpy(eight, from + j, sizeof eight);
        std::memcpy(z + n + j, eight, sizeof eight);
      }
      n += static_cast<int>(col_end - col);
      i += here;
      g = 0;
    }
    return n;
  }

  // Items are groups counted through the rows; [begin, end). acc: [k + kTile], or null.
  void walk(int64_t begin, int64_t end, C* acc, double* sum) const {
    alignas(64) float z[kTile + 8];  // close_gaps reads eight at a time
    Counters counters;
    const int64_t count_of_row = groups.count, phase = groups.phase;
    // In float32 an entry of acc takes 32 terms, one from each tile or from each row; then they go
    // to double.
    const int64_t flush_every = linear ? larger(32, count_of_row * 32 / kTileGroups) : 32;
    int64_t terms = 0;
    const auto flush = [&] {
      for (int64_t j = 0; j < k; ++j) sum[j] += acc[j];
      for (int64_t j = 0, col = 0; linear && j < kTile; ++j, col = col + 1 == k ? 0 : col + 1)
        sum[col] += acc[k + j];
      std::memset(acc, 0, sizeof(C) * static_cast<size_t>(linear ? k + kTile : k));
      terms = 0;
    };
    const int64_t tile_rows = kTileGroups / count_of_row, tile_groups = kTileGroups % count_of_row;
    int64_t row = begin / count_of_row, g = begin % count_of_row;
    for (int64_t item = begin; item < end; item += kTileGroups) {
      const int count = static_cast<int>(smaller(kTileGroups, end - item));
      const Place place{row, larger(0, 8 * g - phase), 0};
      if (job.draws) groups.fill(counters, row, g, count);
      const bool in_registers = job.in_registers && !gaps && count == kTileGroups;
      if (job.draws && !in_registers) normal_tile<false>(counters, pass.generator, count, z);
      if (linear) {
        const int n = gaps ? close_gaps(g, count, z) : 8 * count;
        C* at = acc ? acc + place.feature : nullptr;
        const C* scale = pass.scale + place.feature;
        if (in_registers) {
          if constexpr (kInRegisters<C>) {
            Polar polar;
            draw_polar<false>(counters, pass.generator, kTileGroups, &polar);
            job.tile(place, polar, scale, at);
          }
        } else {
          job.template run<false>(place, n, scale, at, z);
        }
        row += tile_rows;
        g += tile_groups;
        if (g >= count_of_row) g -= count_of_row, ++row;
        if (acc && ++terms == flush_every) flush();
      } else {
        for (int done = 0; done < count;) {
          const int64_t here = smaller(count - done, count_of_row - g);
          const int64_t col = larger(0, 8 * g - phase),
                        col_end = smaller(k, 8 * (g + here) - phase);
          job.template run<false>(
              Place{row, col, 0}, static_cast<int>(col_end - col), pass.scale + col,
              acc ? acc + col : nullptr, z + 8 * done + (col + phase - 8 * g));
          done += static_cast<int>(here);
          g += here;
          if (g < count_of_row) continue;
          g = 0, ++row;
          if (acc && ++terms == flush_every) flush();
        }
      }
    }
    if (acc) flush();
    if (job.streams) One::end_stream();
  }
};

// ---- channels: [N, C, inner], rows side by side -------------------------------------------------

// In lanes, which add side by side.
template <class C>
double sum_in_lanes(const C* numbers, int n) {
  double lanes[16] = {}, sum = 0;
  int i = 0;
  for (; i + 16 <= n; i += 16)
    for (int lane = 0; lane < 16; ++lane) lanes[lane] += numbers[i + lane];
  for (int lane = 0; lane < 16; ++lane) sum += lanes[lane];
  for (; i < n; ++i) sum += numbers[i];
  return sum;
}

template <class C, class Job>
struct Channels {
  const Pass<C>& pass;
  const Job& job;
  Groups groups;
  int64_t rows;
  int width;  // rows that are added up at a time: an image's, where a tile is of whole ones
  int tile_rows;

  Channels(const Pass<C>& pass, const Job& job)
      : pass(pass),
        job(job),
        groups(pass.draw, pass.space.features),
        rows(pass.space.outer * pass.space.inner),
        width(width_of(pass.space, job)),
        tile_rows(rows_of_tile(pass.space, job)) {}

  static int width_of(const Space& s, const Job& job) {
    return job.dense && s.inner <= kTileGroups / 2 ? static_cast<int>(s.inner) : kTileGroups;
  }
  static int rows_of_tile(const Space& s, const Job& job) {
    return kTileGroups / width_of(s, job) * width_of(s, job);
  }

  // A group's channels that are inside, and what the walk through their rows has at hand.
  struct Group {
    int64_t channel;     // the first one
    int skipped, count;  // how many before it are outside; how many are inside
    double* sum;         // [features], or null
    int terms = 0;       // of an entry of acc, in float32
    Counters counters;
  };

  // Rows [begin, end) of the channels of group g, from the first of a tile on. sum: as Group's.
  void walk(int64_t g, int64_t begin, int64_t end, double* sum) const {
    const int64_t first = 8 * g - groups.phase;
    Group group;
    group.channel = larger(0, first);
    group.skipped = static_cast<int>(group.channel - first);
    group.count = static_cast<int>(smaller(pass.space.features, first + 8) - group.channel);
    group.sum = sum;
    for (uint32_t& id : group.counters.group) id = static_cast<uint32_t>(groups.first + g);
    if (width < kTileGroups) walk_images(group, begin, end);
    else walk_planes(group, begin, end);
  }

  // Planes are short and follow one another: those of an image are one run.
  void walk_images(Group& group, int64_t begin, int64_t end) const {
    alignas(64) float z[kTile + 16];  // gather reads 16 at a time
    alignas(64) C acc[kTile / 2], scale[kTile / 2];
    const int length = group.count * width;
    if (group.sum) std::memset(acc, 0, sizeof acc);
    for (int t = 0; t < group.count; ++t)
      for (int i = 0; i < width; ++i) scale[width * t + i] = pass.scale[group.channel + t];
    for (int64_t row = begin; row < end; row += tile_rows) {
      const int images = static_cast<int>(smaller(tile_rows, end - row)) / width;
      const int64_t image = row / width;
      fill(group.counters, row);
      const auto place = [&](int i) { return Place{image + i, group.channel, 0}; };
      for (int i = 0; i < images; ++i) job.prefetch(place(i), length);
      if (job.draws) normal_tile<true>(group.counters, pass.generator, images * width, z);
      for (int i = 0; i < images; ++i) {
        alignas(64) float together[kTile / 2 + 16];
        if (job.draws)
          gather(z + kTileGroups * group.skipped + width * i, group.count, width, together);
        job.template run<false>(place(i), length, scale, group.sum ? acc : nullptr, together);
        if (group.sum && ++group.terms == 32) flush(group, acc);
      }
    }
    if (group.sum) flush(group, acc);
  }

  // A tile's part of a plane is a run, or several where images end in it.
  void walk_planes(Group& group, int64_t begin, int64_t end) const {
    alignas(64) float z[kTile];
    alignas(64) C acc[kTile];
    const int64_t inner = pass.space.inner;
    if (group.sum) std::memset(acc, 0, sizeof acc);
    for (int64_t row = begin; row < end; row += tile_rows) {
      const int n = static_cast<int>(smaller(tile_rows, end - row));
      const int64_t image = row / inner, pixel = row % inner;
      fill(group.counters, row);
      // Planes far apart: a processor's own prefetching does not follow, and waits longest for what
      // is to be written.
      for (int t = 0; t < group.count; ++t)
        job.prefetch(
            Place{image, group.channel + t, pixel}, static_cast<int>(smaller(n, inner - pixel)));
      if (job.draws) normal_tile<true>(group.counters, pass.generator, n, z);
      for (int t = 0; t < group.count; ++t) {
        Place place{image, group.channel + t, pixel};
        for (int done = 0; done < n;) {
          const int here = static_cast<int>(smaller(n - done, inner - place.inner));
          job.template run<true>(
              place, here, pass.scale + place.feature, group.sum ? acc + width * t + done : nullptr,
              z + kTileGroups * (group.skipped + t) + done);
          done += here;
          place = {place.outer + 1, place.feature, 0};
        }
      }
      if (group.sum && ++group.terms == 32) flush(group, acc);
    }
    if (group.sum) flush(group, acc);
  }

  // Rows of a tile.
  void fill(Counters& counters, int64_t row) const {
    for (int i = 0; i < kTileGroups; ++i) {
      const uint64_t r = static_cast<uint64_t>(pass.draw.row0 + row + i);
      counters.row_lo[i] = static_cast<uint32_t>(r);
      counters.row_hi[i] = static_cast<uint32_t>(r >> 32);
    }
  }

  // to: `count` pieces of n numbers each, from z on and kTileGroups apart, one behind the other.
  static void gather(const float* z, int count, int n, float* to) {
    for (int t = 0; t < count; ++t)
      for (int i = 0; i < n; i += 16)  // the next piece covers what is too much
        std::memcpy(to + n * t + i, z + kTileGroups * t + i, 16 * sizeof(float));
  }

  // acc: [count, width]
  void flush(Group& group, C* acc) const {
    for (int t = 0; t < group.count; ++t)
      group.sum[group.channel + t] += sum_in_lanes(acc + width * t, width);
    std::memset(acc, 0, sizeof(C) * static_cast<size_t>(group.count * width));
    group.terms = 0;
  }
};

// ---- the two-stage sum --------------------------------------------------------------------------

// partials: [blocks, features] double; the blocks depend on the sizes and the layout alone, so that
// the sum does not depend on the threads.
template <class C, class Job>
const char* sum_rows(
    const Pass<C>& pass, const Job& job, ParallelFor parallel_for, double* partials,
    const Blocks& blocks) {
  const Rows<C, Job> rows(pass, job);
  const int64_t m = pass.space.outer, groups = rows.groups.count;
  const int64_t grain = larger(1, kGrainTiles * kTileGroups / (groups * blocks.rows));
  return for_blocks<C>(parallel_for, blocks, grain, rows.k + kTile, [&](int64_t b, C* acc) {
    rows.walk(
        b * blocks.rows * groups, smaller(m, (b + 1) * blocks.rows) * groups, acc,
        partials + b * rows.k);
  });
}

template <class C, class Job>
void sum_channels(
    const Pass<C>& pass, const Job& job, ParallelFor parallel_for, double* partials,
    const Blocks& blocks) {
  const Channels<C, Job> channels(pass, job);
  const int64_t groups = channels.groups.count;
  run_parallel(parallel_for, blocks.count * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / groups;
      channels.walk(
          i % groups, b * blocks.rows, smaller(channels.rows, (b + 1) * blocks.rows),
          partials + b * pass.space.features);
    }
  });
}

template <class C, class Job>
void write_only(const Pass<C>& pass, const Job& job, ParallelFor parallel_for) {
  if (pass.space.inner == 1) {
    const Rows<C, Job> rows(pass, job);
    const int64_t items = pass.space.outer * rows.groups.count;
    run_parallel(
        parallel_for, ceil_div(items, kTileGroups), kGrainTiles, [&](int64_t begin, int64_t end) {
          rows.walk(begin * kTileGroups, smaller(items, end * kTileGroups), nullptr, nullptr);
        });
    return;
  }
  const Channels<C, Job> channels(pass, job);
  const int64_t size = channels.tile_rows, groups = channels.groups.count;
  const int64_t chunks = ceil_div(channels.rows, size);
  run_parallel(parallel_for, chunks * groups, kGrainTiles, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / groups * size;
      channels.walk(i % groups, row, smaller(channels.rows, row + size), nullptr);
    }
  });
}

// The job's pass over all elements, and where dsigma is set the sum over rows of what the job adds
// to its accumulators, times the factor, as the gradient of what sigma holds.
template <class C, class Job>
const char* walk(
    const Space& s, const Draw& draw, void* dsigma, const Job& job, ParallelFor parallel_for) {
  const int64_t k = s.features, m = s.outer * s.inner;
  const Blocks blocks(m, s.inner == 1 ? 64 : Channels<C, Job>::rows_of_tile(s, job));
  const Memory<C> scale(k + kTile);
  const Memory<double> partials(dsigma ? blocks.count * k : 0, true);
  if (scale.failed || partials.failed) return kOutOfMemory;
  scales(draw, k, scale.data);
  for (int64_t j = 0; k && j < kTile; ++j) scale.data[k + j] = scale.data[j];
  const Pass<C> pass{s, draw, Generator(draw), scale.data};
  const char* error = nullptr;
  if (m && k) {
    if (!dsigma) write_only(pass, job, parallel_for);
    else if (s.inner == 1) error = sum_rows(pass, job, parallel_for, partials.data, blocks);
    else sum_channels(pass, job, parallel_for, partials.data, blocks);
  }
  if (dsigma && !error)
    sum_blocks(partials.data, blocks.count, k, draw.sigma_is_double, dsigma, [&](int64_t j) {
      return slope_at(draw, j);
    });
  return error;
}

}  // namespace
}  // namespace dip
