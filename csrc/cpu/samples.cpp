// Samples behind an activation, summed: total += sum over s of act(h_s), and back.  docs/maths.md, section 4.
// Compiled once per instruction set; DIP_SAMPLES names the entry point. Plain loops that compilers vectorise; no STL
// (draw.h).
#include "act.h"
#include "convert.h"
#include "parallel.h"

namespace dip {
namespace {

// n elements that lie side by side.
struct Run {
  int64_t outer, inner;  // of its first one
  int n;

  int64_t at(const Samples& t, int64_t sample) const { return sample * t.sample_stride + outer * t.outer_stride + inner; }
};

Operand values(const Samples& t) { return {t.data, t.dtype, 0, 1}; }

const float* load(const Run& run, const Samples& t, int64_t sample, float* buffer) {
  return load_run<float>(values(t), run.at(t, sample), run.n, buffer);
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
  compute_run(a.out, run.outer * a.out.outer_stride + run.inner, run.n, [&](float* __restrict out) {
    for (int j = 0; j < run.n; ++j) out[j] = a.factor * total[j];
  });
}

template <int kKind>
void forward(const SamplesArgs& a, const Run& run) {
  alignas(64) float buffer[kRun];
  float* __restrict total = a.total + run.outer * a.inner + run.inner;
  for (int64_t s = 0; s < a.samples; ++s) {
    if (s + 1 < a.samples) prefetch_run<0>(values(a.h), run.at(a.h, s + 1), run.n);
    const float* __restrict h = load(run, a.h, s, buffer);
    for (int j = 0; j < run.n; ++j) total[j] += act<kKind>(h[j]).value;
  }
  write_out(a, run, total);
}

// ---- back: dy comes by rows and is transposed here ---------------------------------------------------------------------------

constexpr int kLines = 32, kLine = 256;  // of a tile: 32 numbers of 16 bits are a cache line

struct Tile {
  alignas(64) unsigned char data[kLines * kLine * sizeof(float)];
};

// Square blocks of numbers, a row of one in a 64-bit word: halves of words change places, then halves of those.
template <class T>
DIP_HD void transpose_block(uint64_t (&words)[8 / sizeof(T)]) {
  constexpr int kSide = 8 / sizeof(T);
  for (int half = kSide / 2; half; half /= 2) {
    const int shift = 8 * static_cast<int>(sizeof(T)) * half;
    const uint64_t mask = shift == 32 ? 0x00000000FFFFFFFFu : shift == 16 ? 0x0000FFFF0000FFFFu : 0x00FF00FF00FF00FFu;
    for (int i = 0; i < kSide; ++i) {
      if (i & half) continue;
      const uint64_t change = (words[i] >> shift ^ words[i + half]) & mask;
      words[i + half] ^= change;
      words[i] ^= change << shift;
    }
  }
}

// to[l][j] = from[j][l]
template <class T>
void transpose(const void* from, int64_t stride, int lines, int n, void* tile) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words are put together from the low end");
  constexpr int kSide = 8 / sizeof(T), kAhead = 32;
  const T* rows = static_cast<const T*>(from);
  T* to = static_cast<T*>(tile);
  const int whole_lines = lines / kSide * kSide, whole_n = n / kSide * kSide;
  for (int j = 0; j < whole_n; j += kSide) {
    for (int i = 0; i < kSide && j + i + kAhead < n; ++i)
      for (int l = 0; l < lines; l += 64 / static_cast<int>(sizeof(T)))
        __builtin_prefetch(rows + (j + i + kAhead) * stride + l, 0, 2);
    for (int l = 0; l < whole_lines; l += kSide) {
      uint64_t words[kSide];
      for (int i = 0; i < kSide; ++i) std::memcpy(words + i, rows + (j + i) * stride + l, 8);
      transpose_block<T>(words);
      for (int i = 0; i < kSide; ++i) std::memcpy(to + (l + i) * kLine + j, words + i, 8);
    }
  }
  for (int j = 0; j < n; ++j)
    for (int l = j < whole_n ? whole_lines : 0; l < lines; ++l) to[l * kLine + j] = rows[j * stride + l];
}

// The lines from that of `run` on of t, whose element (inner, outer) lies `stride` apart from the next inner one.
void transpose_lines(const Operand& t, int64_t offset, int64_t stride, const Run& run, int lines, void* tile) {
  const int64_t at = offset + run.inner * stride + run.outer;
  if (t.dtype == DType::kFloat32) transpose<uint32_t>(static_cast<const uint32_t*>(t.data) + at, stride, lines, run.n, tile);
  else transpose<uint16_t>(static_cast<const uint16_t*>(t.data) + at, stride, lines, run.n, tile);
}

template <int kKind>
void back(const SamplesArgs& a, const Run& first, int lines) {
  alignas(64) float buffer[kLine], gradient[kLine];
  float bias_buffer[1];
  Tile dy_tile;
  const int n = first.n;
  transpose_lines(a.dy, 0, a.dy.outer_stride, first, lines, dy_tile.data);
  for (int l = 0; l < lines; ++l) {
    const Run run{first.outer + l, first.inner, n};
    float* __restrict total = a.total + run.outer * a.inner + run.inner;
    const float* __restrict dy = load_run<float>({dy_tile.data, a.dy.dtype, 0, 1}, l * kLine, n, gradient);
    const float bias = a.bias.data ? *load_run<float>(a.bias, run.outer, 1, bias_buffer) : 0.0f;
    for (int64_t s = 0; s < a.samples; ++s) {
      if (s + 1 < a.samples) {
        prefetch_run<0>(values(a.h), run.at(a.h, s + 1), n);
        prefetch_run<1>(values(a.dh), run.at(a.dh, s + 1), n);
      }
      compute_run(values(a.dh), run.at(a.dh, s), n, [&](float* __restrict dh) {
        const float* __restrict h = load(run, a.h, s, buffer);
        for (int j = 0; j < n; ++j) dh[j] = dy[j] * act<kKind>(h[j] + bias).slope;
        for (int j = 0; j < n; ++j) total[j] += dh[j];
      });
    }
    write_out(a, run, total);
  }
}

template <int kKind>
void sum(const SamplesArgs& a, ParallelFor parallel_for) {
  const bool is_back = a.dh.data;
  const int64_t length = is_back ? kLine : kRun, lines = is_back ? kLines : 1, runs = ceil_div(a.inner, length);
  const int64_t work = larger(1, smaller(a.inner, length) * lines * a.samples), grain = larger(1, 16 * kRun / work);
  run_parallel(parallel_for, ceil_div(a.outer, lines) * runs, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t outer = i / runs * lines, inner = i % runs * length;
      const Run run{outer, inner, static_cast<int>(smaller(length, a.inner - inner))};
      if (is_back) back<kKind>(a, run, static_cast<int>(smaller(lines, a.outer - outer)));
      else forward<kKind>(a, run);
    }
  });
}

}  // namespace

const char* DIP_SAMPLES(const SamplesArgs& a, ParallelFor parallel_for) {
  switch (a.kind) {
    case kIdentity: sum<kIdentity>(a, parallel_for); break;
    case kReluActivation: sum<kReluActivation>(a, parallel_for); break;
    case kGeluActivation: sum<kGeluActivation>(a, parallel_for); break;
    case kGeluTanhActivation: sum<kGeluTanhActivation>(a, parallel_for); break;
    case kSiluActivation: sum<kSiluActivation>(a, parallel_for); break;
    case kTanhActivation: sum<kTanhActivation>(a, parallel_for); break;
    default: return "activation: unknown";
  }
  return nullptr;
}

}  // namespace dip
