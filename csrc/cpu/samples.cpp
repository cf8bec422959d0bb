// Samples behind an activation, summed: total += sum over s of act(h_s), and back.  docs/maths.md,
// section 4. Compiled once per instruction set; DIP_SAMPLES names the entry point. Plain loops that
// compilers vectorise; no STL (draw.h).
#include "act.h"
#include "convert.h"
#include "parallel.h"

namespace dip {
namespace {

// n elements that lie side by side.
struct Run {
  int64_t outer, inner;  // of its first one
  int n;

  int64_t at(const Operand& o) const { return outer * o.outer_stride + inner; }
};

// No DIP_HD: inlined into every activation's passes it would make the file's code larger by a
// third.
const float* load(const Operand& o, int64_t offset, int n, float* buffer) {
  return load_run<float>(o, offset, n, buffer);
}

// Calls f with where a run at `offset` is computed, and stores it.
template <class F>
void compute_run(const Operand& t, int64_t offset, int n, F&& f) {
  alignas(64) float buffer[kRun];
  float* out = run_target<float>(t, offset, buffer);
  f(out);
  store_run<float>(t, offset, n, out);
}

void write_out(const SamplesArgs& a, const Run& run, const float* __restrict total) {
  if (!a.out.data) return;
  compute_run(a.out, run.at(a.out), run.n, [&](float* __restrict out) {
    for (int j = 0; j < run.n; ++j) out[j] = a.factor * total[j];
  });
}

template <int kKind>
void forward(const SamplesArgs& a, const Run& run) {
  alignas(64) float buffer[kRun];
  float* __restrict total = a.total + run.outer * a.inner + run.inner;
  int64_t at = run.at(a.h);
  for (int64_t s = 0; s < a.samples; ++s, at += a.sample_stride) {
    if (s + 1 < a.samples) prefetch_run<0>(a.h, at + a.sample_stride, run.n);
    const float* __restrict h = load(a.h, at, run.n, buffer);
    for (int j = 0; j < run.n; ++j) total[j] += act_value<kKind>(h[j]);
  }
  write_out(a, run, total);
}

template <int kKind>
void back(const SamplesArgs& a, const Run& run) {
  alignas(64) float buffer[kRun], gradient[kRun], dh[kRun];
  float* __restrict total = a.total + run.outer * a.inner + run.inner;
  const float* __restrict dy = load(a.dy, run.at(a.dy), run.n, gradient);
  int64_t at = run.at(a.h);
  for (int64_t s = 0; s < a.samples; ++s, at += a.sample_stride) {
    if (s + 1 < a.samples) prefetch_run<1>(a.h, at + a.sample_stride, run.n);
    const float* h = load(a.h, at, run.n, buffer);
    for (int j = 0; j < run.n; ++j) dh[j] = times_slope<kKind>(dy[j], h[j]);
    for (int j = 0; j < run.n; ++j) total[j] += dh[j];
    compute_run(a.h, at, run.n, [&](float* __restrict out) {
      for (int j = 0; j < run.n; ++j) out[j] = dh[j];
    });
  }
  write_out(a, run, total);
}

template <int kKind>
void sum(const SamplesArgs& a, ParallelFor parallel_for) {
  const int64_t runs = ceil_div(a.inner, kRun);
  const int64_t work = larger(1, smaller(a.inner, kRun) * a.samples),
                grain = larger(1, 16 * kRun / work);
  run_parallel(parallel_for, a.outer * runs, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t outer = i / runs, inner = i % runs * kRun;
      const Run run{outer, inner, static_cast<int>(smaller(kRun, a.inner - inner))};
      if (a.back) back<kKind>(a, run);
      else forward<kKind>(a, run);
    }
  });
}

}  // namespace

const char* DIP_SAMPLES(const SamplesArgs& a, ParallelFor parallel_for) {
  const auto of_kind = [&](auto known) { sum<known.kind>(a, parallel_for); };
  if (a.activation == kIdentity) of_kind(Known<kIdentity>{});
  else if (!with_activation(a.activation, of_kind)) return "activation: unknown";
  return nullptr;
}

}  // namespace dip
