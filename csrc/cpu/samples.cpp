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

// total += act(h), and what backward needs of sample s. Bytes by way of `wide`: a conditional byte beside a wider h is not
// vectorised.
template <int kKind>
void add_and_keep(
    const SamplesArgs& a, const Run& run, int64_t s, const float* __restrict h, float* __restrict total, int* __restrict wide) {
  const int64_t i = a.first + s;
  if (a.form == SlopeForm::kBits) {
    const int bit = 1 << i % 8, kept = s == 0 || bit == 1 ? 0 : -1;
    for (int j = 0; j < run.n; ++j) {
      total[j] += act<kKind>(h[j]).value;
      wide[j] = (wide[j] & kept) | (h[j] <= 0 ? 0 : bit);
    }
    if (bit != 128 && s + 1 < a.num_slopes) return;  // the next sample goes into the same byte
    uint8_t* __restrict bits = static_cast<uint8_t*>(a.slopes.data) + run.at(a.slopes, i / 8);
    for (int j = 0; j < run.n; ++j) bits[j] = static_cast<uint8_t>(bits[j] | wide[j]);
  } else if (a.form == SlopeForm::kCodes) {
    for (int j = 0; j < run.n; ++j) {
      const Act<float> y = act<kKind>(h[j]);
      const float code = fma_of(y.slope, kSlopeSteps, kSlopeZero + 0.5f);
      total[j] += y.value;
      wide[j] = static_cast<int>(y.slope != y.slope ? kSlopeNan : code);
    }
    uint8_t* __restrict codes = static_cast<uint8_t*>(a.slopes.data) + run.at(a.slopes, i);
    for (int j = 0; j < run.n; ++j) codes[j] = static_cast<uint8_t>(wide[j]);
  } else {
    compute_run(values(a.slopes), run.at(a.slopes, i), run.n, [&](float* __restrict slopes) {
      for (int j = 0; j < run.n; ++j) {
        const Act<float> y = act<kKind>(h[j]);
        total[j] += y.value;
        slopes[j] = y.slope;
      }
    });
  }
}

template <int kKind>
void forward(const SamplesArgs& a, const Run& run) {
  alignas(64) float buffer[kRun];
  alignas(64) int wide[kRun];
  float* __restrict total = a.total + run.outer * a.inner + run.inner;
  for (int64_t s = 0; s < a.samples; ++s) {
    if (s + 1 < a.samples) prefetch_run<0>(values(a.h), run.at(a.h, s + 1), run.n);
    const float* __restrict h = load(run, a.h, s, buffer);
    if (s < a.num_slopes) {
      add_and_keep<kKind>(a, run, s, h, total, wide);
      continue;
    }
    for (int j = 0; j < run.n; ++j) total[j] += act<kKind>(h[j]).value;
  }
  write_out(a, run, total);
}

// ---- back: dy and the slopes come by rows and are transposed here -------------------------------------------------------------

constexpr int kLines = 32, kLine = 256;  // of a tile: 32 numbers of 16 bits are a cache line

struct Tile {
  alignas(64) unsigned char data[kLines * kLine * sizeof(float)];  // or of several samples of fewer bytes
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

// The slopes of samples [begin, end), one below the other; of bits a byte is enough.
void transpose_slopes(const SamplesArgs& a, const Run& run, int lines, int64_t begin, int64_t end, Tile& tile) {
  const Samples& t = a.slopes;
  if (a.form == SlopeForm::kBits) begin /= 8, end = begin + 1;
  const int64_t size = a.form == SlopeForm::kValues ? size_of(t.dtype) : 1;
  for (int64_t i = begin; i < end; ++i) {
    unsigned char* to = tile.data + (i - begin) * kLines * kLine * size;
    const int64_t at = i * t.sample_stride;
    if (a.form == SlopeForm::kValues) {
      transpose_lines(values(t), at, t.outer_stride, run, lines, to);
    } else {
      const uint8_t* bytes = static_cast<const uint8_t*>(t.data) + at + run.inner * t.outer_stride + run.outer;
      transpose<uint8_t>(bytes, t.outer_stride, lines, run.n, to);
    }
  }
}

// How many samples from i on a tile has room for.
int64_t room(const SamplesArgs& a, int64_t i) {
  if (a.form == SlopeForm::kBits) return 8 - i % 8;
  return a.form == SlopeForm::kCodes ? 4 : 4 / size_of(a.slopes.dtype);
}

// dh = dy slope of sample i, for the line of the tile that begins with number `at`.
void back_by_slopes(
    const SamplesArgs& a, const Tile& tile, int at, int64_t i, int n, const float* __restrict dy, float* __restrict dh) {
  const uint8_t* __restrict bytes = tile.data + at;
  if (a.form == SlopeForm::kBits) {
    const int bit = 1 << i % 8;
    for (int j = 0; j < n; ++j) dh[j] = bytes[j] & bit ? dy[j] : 0.0f;
  } else if (a.form == SlopeForm::kCodes) {
    for (int j = 0; j < n; ++j) {
      const float slope = static_cast<float>(bytes[j] - kSlopeZero) * (1.0f / kSlopeSteps);
      dh[j] = dy[j] * (bytes[j] == kSlopeNan ? __builtin_nanf("") : slope);
    }
  } else {
    alignas(64) float buffer[kLine];
    const float* __restrict slopes =
        load_run<float>({const_cast<unsigned char*>(tile.data), a.slopes.dtype, 0, 1}, at, n, buffer);
    for (int j = 0; j < n; ++j) dh[j] = dy[j] * slopes[j];
  }
}

template <int kKind>
void back(const SamplesArgs& a, const Run& first, int lines) {
  alignas(64) float buffer[kLine], gradient[kLine];
  float bias_buffer[1];
  Tile dy_tile, slopes;
  const int n = first.n;
  transpose_lines(a.dy, 0, a.dy.outer_stride, first, lines, dy_tile.data);
  for (int64_t begin = 0, end; begin < a.samples; begin = end) {
    const int64_t fit = begin + room(a, a.first + begin), given = smaller(a.num_slopes, fit);
    end = a.num_slopes <= fit ? a.samples : fit;
    if (begin < given) transpose_slopes(a, first, lines, a.first + begin, a.first + given, slopes);
    for (int l = 0; l < lines; ++l) {
      const Run run{first.outer + l, first.inner, n};
      float* __restrict total = a.total + run.outer * a.inner + run.inner;
      const float* __restrict dy = load_run<float>({dy_tile.data, a.dy.dtype, 0, 1}, l * kLine, n, gradient);
      const float bias = a.bias.data ? *load_run<float>(a.bias, run.outer, 1, bias_buffer) : 0.0f;
      for (int64_t s = begin; s < end; ++s) {
        if (s + 1 < end) {
          if (s + 1 >= a.num_slopes) prefetch_run<0>(values(a.h), run.at(a.h, s + 1 - a.num_slopes), n);
          prefetch_run<1>(values(a.dh), run.at(a.dh, s + 1), n);
        }
        compute_run(values(a.dh), run.at(a.dh, s), n, [&](float* __restrict dh) {
          if (s < a.num_slopes) {
            const int sample = a.form == SlopeForm::kBits ? 0 : static_cast<int>(s - begin);
            back_by_slopes(a, slopes, (sample * kLines + l) * kLine, a.first + s, n, dy, dh);
          } else {
            const float* __restrict h = load(run, a.h, s - a.num_slopes, buffer);
            for (int j = 0; j < n; ++j) dh[j] = dy[j] * act<kKind>(h[j] + bias).slope;
          }
          for (int j = 0; j < n; ++j) total[j] += dh[j];
        });
      }
      if (end == a.samples) write_out(a, run, total);
    }
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
