// Whole numbers, memory, work for threads, and the two stages of sums over rows.  No STL (draw.h).
#pragma once
#include <cstdlib>

#include "../launch.h"

namespace dip {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

constexpr const char* kOutOfMemory = "out of memory";

// n numbers, until the end of the scope.
template <class T>
struct Memory {
  T* data = nullptr;
  bool failed;

  explicit Memory(int64_t n, bool zeros = false) {
    const size_t count = static_cast<size_t>(n);
    if (n)
      data =
          static_cast<T*>(zeros ? std::calloc(count, sizeof(T)) : std::malloc(count * sizeof(T)));
    failed = n && !data;
  }
  Memory(const Memory&) = delete;
  ~Memory() { std::free(data); }
};

// f(begin, end) over parts of [0, total) of `grain`. Every thread takes the next part when it is
// done with one: a thread that wakes late, or shares its core, keeps nobody waiting.
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

// The blocks of rows of the two-stage sum, docs/maths.md, section 5: of whole units of rows, by the
// sizes and the layout alone.
struct Blocks {
  int64_t rows, count;  // of each block but the last, which may have fewer; how many blocks

  Blocks(int64_t all_rows, int64_t unit)
      : rows(larger(unit, ceil_div(ceil_div(all_rows, 32), unit) * unit)),
        count(ceil_div(all_rows, rows)) {}
};

// f(b, acc) for every block b. acc: n numbers of the thread's own, zeros, as which f leaves them.
template <class C, class F>
const char* for_blocks(
    ParallelFor parallel_for, const Blocks& blocks, int64_t grain, int64_t n, F&& f) {
  bool failed = false;
  run_parallel(parallel_for, blocks.count, grain, [&](int64_t begin, int64_t end) {
    const Memory<C> acc(n, true);
    if (acc.failed) {
      __atomic_store_n(&failed, true, __ATOMIC_RELAXED);  // by several threads, maybe
      return;
    }
    for (int64_t b = begin; b < end; ++b) f(b, acc.data);
  });
  return failed ? kOutOfMemory : nullptr;
}

// Adds rows 1 .. blocks - 1 of partials [blocks, n] to row 0, in their order.
inline void add_blocks(double* partials, int64_t blocks, int64_t n) {
  for (int64_t b = 1; b < blocks; ++b)
    for (int64_t j = 0; j < n; ++j) partials[j] += partials[b * n + j];
}

// to[j] = factor(j) * the sum of partials [blocks, n] over the blocks, n numbers. Uses partials up.
template <class F>
void sum_blocks(double* partials, int64_t blocks, int64_t n, bool is_double, void* to, F&& factor) {
  add_blocks(partials, blocks, n);
  for (int64_t j = 0; j < n; ++j) {
    const double sum = blocks ? partials[j] * factor(j) : 0;
    if (is_double) static_cast<double*>(to)[j] = sum;
    else static_cast<float*>(to)[j] = static_cast<float>(sum);
  }
}

}  // namespace
}  // namespace dip
