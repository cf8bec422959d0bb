// u = x + factor * sigma * z;  dsigma = factor * sum over rows of du * z.  docs/maths.md, sections
// 1, 5 and 6.
#include <cuda_runtime.h>

#include <cstdio>
#include <type_traits>

#include "storage.h"
#include "tickets.h"

namespace dip {
namespace {

constexpr int kGroup = 8;      // columns of one Philox call
constexpr int kSumLanes = 32;  // partial rows that one block of the second stage reads at a time

// A block of a sum is large, so that few rows of partials are left; one that only writes is small,
// so that small problems spread.
template <bool kSum>
constexpr int kRowThreads = kSum ? 256 : 128;
constexpr int kChannelThreads = 128;
// Resident threads per multiprocessor: 768 leave 80 registers each, 512 leave 128, 384 leave 168.
constexpr int kMostResident = 768;
template <bool kAny, bool kBoth>
constexpr int kRowResident = kAny || kBoth ? 512 : kMostResident;
constexpr int kChannelResident = 384;

struct Params {
  PerturbArgs args;
  int64_t rows;    // outer * inner
  int64_t groups;  // of one row; the first one's leading `phase` columns are outside
  int64_t first_group;
  int phase;
  void* partials;       // [gridDim.y, features] of the compute type
  bool from_end;        // rows from the last to the first
  bool finish = false;  // the last block of a column of the grid adds the partials up
  int ticket = 0;       // that of the grid's first column, where a column has several blocks
};

// ---- device functions ---------------------------------------------------------------------------

DIP_DEVICE float fma_of(float a, float b, float c) { return ScalarLane::fma(a, b, c); }
DIP_DEVICE double fma_of(double a, double b, double c) { return fma(a, b, c); }

// The same value, which the compiler then holds in registers instead of computing it again in every
// turn of a loop; where registers are short, it may.
template <bool kHold = true, class T>
DIP_DEVICE T keep(T value) {
  if constexpr (kHold && sizeof(T) == 8) asm volatile("" : "+l"(value));
  else if constexpr (kHold) asm volatile("" : "+r"(value));
  return value;
}

// Whether 0 <= i < n. One comparison, for a negative i is a large number: a walk in either
// direction costs the same.
DIP_DEVICE bool inside(int64_t i, int64_t n) {
  return static_cast<uint64_t>(i) < static_cast<uint64_t>(n);
}
constexpr int64_t kNowhere = -(int64_t{1} << 62);  // no step leads from there to a row

// sigma as a standard deviation, without the factor.
template <class C>
DIP_DEVICE C sigma_at(const Draw& draw, int64_t j) {
  if (!draw.sigma) return C(1);
  const C s = static_cast<C>(
      draw.sigma_is_double ? static_cast<const double*>(draw.sigma)[j]
                           : static_cast<const float*>(draw.sigma)[j]);
  return draw.log_variance ? static_cast<C>(exp(C(0.5) * s)) : s;
}

// What multiplies z.
template <class C>
DIP_DEVICE C scale_at(const Draw& draw, int64_t j) {
  const C s = sigma_at<C>(draw, j);
  return draw.factor == 1.0
             ? s
             : static_cast<C>(draw.factor * s);  // double arithmetic is slow on most GPUs
}

// The block's key schedule. Every thread of the block calls this.
DIP_DEVICE void share_round_keys(const Draw& draw, RoundKeys* keys) {
  if (threadIdx.x == 0 && threadIdx.y == 0) make_round_keys(keys, philox_key(draw.seed));
  __syncthreads();
}

// Where a run of type R starts; null where the tensor is absent.
template <class R>
DIP_DEVICE char* place(const Operand& a, int64_t at) {
  return a.data ? static_cast<char*>(a.data) + R::bytes(a.dtype, at) : nullptr;
}

template <class R>
DIP_DEVICE R load_or_zero(const char* p, const Operand& a, int first, int last) {
  R run = {};
  if (!R::kMayBeAbsent || a.data) run.load(p, a.dtype, first, last);
  return run;
}

template <class C>
DIP_DEVICE void store_sum(const PerturbArgs& a, int64_t j, double sum) {
  sum *= a.draw.log_variance ? a.draw.factor * 0.5 * sigma_at<C>(a.draw, j) : a.draw.factor;
  if (a.draw.sigma_is_double) static_cast<double*>(a.dsigma)[j] = sum;
  else static_cast<float*>(a.dsigma)[j] = static_cast<float>(sum);
}

// dsigma of columns [first, first + width) from their partials: `threads / width` lanes take the
// rows of partials in turn, then their sums are added in order. Every thread of the block calls
// this; shared: a number for each.
template <class C>
DIP_DEVICE void add_partials(
    const PerturbArgs& a, const void* partials, int num_partials, int64_t first, int width,
    double* shared) {
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  const int lanes = static_cast<int>(blockDim.x * blockDim.y) / width, lane = thread / width;
  const int64_t col = first + thread % width;
  const bool is_used = inside(col, a.features);
  double sum = 0;
  if (is_used)
    for (int i = lane; i < num_partials; i += lanes)
      sum += static_cast<const C*>(partials)[i * a.features + col];
  shared[thread] = sum;
  __syncthreads();
  if (lane != 0 || !is_used) return;
  for (int i = 1; i < lanes; ++i) sum += shared[i * width + thread];
  store_sum<C>(a, col, sum);
}

// ---- kernels: rows, [M, K] with columns side by side --------------------------------------------
// Threads x: groups of eight columns, y: rows; a thread keeps its columns, and so its sigma and its
// sums, in registers.

template <class Types, bool kWrite, bool kSum>
__global__ void __launch_bounds__(
    kRowThreads<kSum>, kRowResident<Types::kAny, kWrite && kSum> / kRowThreads<kSum>)
    perturb_rows_kernel(const Params p) {
  using C = typename Types::Compute;
  using X = typename Types::X;
  using U = typename Types::U;
  using Du = typename Types::Du;
  const PerturbArgs& a = p.args;

  // where
  const int64_t group = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t col = kGroup * group - p.phase;
  const int first = col < 0 ? static_cast<int>(-col) : 0;
  const int last = a.features - col < kGroup ? static_cast<int>(a.features - col)
                                             : kGroup;  // [first, last) of the group is inside
  const int64_t stride = static_cast<int64_t>(gridDim.y) * blockDim.y,
                step = p.from_end ? -stride : stride;
  const bool is_used = group < p.groups;
  const uint32_t counter = keep(static_cast<uint32_t>(p.first_group + group));
  const uint32_t last_word = stream_sample(a.draw.seed, static_cast<uint32_t>(a.draw.sample));
  __shared__ RoundKeys keys;
  share_round_keys(a.draw, &keys);
  C scale[kGroup], sum[kGroup];
  DIP_UNROLL
  for (int t = 0; t < kGroup; ++t) {
    sum[t] = C(0);
    if constexpr (kWrite)
      scale[t] = is_used && first <= t && t < last ? scale_at<C>(a.draw, col + t) : C(0);
  }

  int64_t row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y;
  if (p.from_end) row = p.rows - 1 - row;
  char* x_at = place<X>(a.x, row * a.x.outer_stride + col);
  char* u_at = place<U>(a.u, row * a.u.outer_stride + col);
  char* du_at = place<Du>(a.du, row * a.du.outer_stride + col);
  const int64_t x_step = keep<!Types::kAny>(X::bytes(a.x.dtype, step * a.x.outer_stride));
  const int64_t u_step = keep<!Types::kAny>(U::bytes(a.u.dtype, step * a.u.outer_stride));
  const int64_t du_step = keep<!Types::kAny>(Du::bytes(a.du.dtype, step * a.du.outer_stride));
  if (!is_used) row = kNowhere;

  // n rows, `step` apart
  const auto tile = [&](auto count) {
    constexpr int n = decltype(count)::value;
    // load
    [[maybe_unused]] X x[n];
    [[maybe_unused]] Du du[n];
    DIP_UNROLL
    for (int i = 0; i < n; ++i) {
      if constexpr (kWrite) {
        x[i] = load_or_zero<X>(x_at, a.x, first, last);
        x_at += x_step;
      }
      if constexpr (kSum) {
        du[i].load(du_at, a.du.dtype, first, last);
        du_at += du_step;
      }
    }
    // compute
    float z[n][kGroup];
    draw_groups<n>(keys, last_word, counter, static_cast<uint64_t>(a.draw.row0 + row), step, z);
    DIP_UNROLL
    for (int i = 0; i < n; ++i) {
      if constexpr (kSum) {
        DIP_UNROLL
        for (int t = 0; t < kGroup; ++t) sum[t] = fma_of(C(du[i].get(t)), C(z[i][t]), sum[t]);
      }
      if constexpr (kWrite) {
        U u;
        DIP_UNROLL
        for (int t = 0; t < kGroup; t += 2)
          u.set(
              t, fma_of(scale[t], C(z[i][t]), C(x[i].get(t))),
              fma_of(scale[t + 1], C(z[i][t + 1]), C(x[i].get(t + 1))));
        // store
        u.store(u_at, a.u.dtype, first, last);
        u_at += u_step;
      }
    }
    row += n * step;
  };

  // Two rows in flight where a thread has them.
  if constexpr (!Types::kAny)
    while (inside(row + step, p.rows)) tile(std::integral_constant<int, 2>{});
  while (inside(row, p.rows)) tile(std::integral_constant<int, 1>{});

  // The block's rows meet in a tree, so that the order depends on the shape of the block alone.
  if constexpr (kSum) {
    __shared__ C shared[kRowThreads<kSum>][kGroup];
    C* mine = shared[threadIdx.y * blockDim.x + threadIdx.x];
    DIP_UNROLL
    for (int t = 0; t < kGroup; ++t) mine[t] = sum[t];
    for (unsigned half = blockDim.y / 2; half > 0; half /= 2) {
      __syncthreads();
      if (threadIdx.y < half) {
        const C* other = shared[(threadIdx.y + half) * blockDim.x + threadIdx.x];
        DIP_UNROLL
        for (int t = 0; t < kGroup; ++t) mine[t] += other[t];
      }
    }
    // Where, once more: kept over the loop it would spill.
    const int64_t strip = int64_t{keep(blockIdx.x)} * blockDim.x;
    const int64_t start = kGroup * (strip + threadIdx.x) - p.phase;
    if (threadIdx.y == 0) {
      C* partial = static_cast<C*>(p.partials) + blockIdx.y * a.features + start;
      DIP_UNROLL
      for (int t = 0; t < kGroup; ++t)
        if (inside(start + t, a.features)) partial[t] = mine[t];
    }
    __shared__ double lane_sums[kRowThreads<kSum>];
    __shared__ bool is_last;
    if (p.finish && is_last_block(&tickets[p.ticket + blockIdx.x], gridDim.y, &is_last)) {
      const int width = static_cast<int>(kGroup * blockDim.x);
      add_partials<C>(
          a, p.partials, static_cast<int>(gridDim.y), kGroup * strip - p.phase, width, lane_sums);
    }
  }
}

// ---- kernels: channels, [outer, K, inner] with the rows of one outer index side by side ---------
// Threads x: runs of adjacent rows ("pixels"), y: groups of eight channels, so that a Philox call
// still serves eight elements.

template <class Types, bool kWrite, bool kSum>
__global__ void __launch_bounds__(kChannelThreads, kChannelResident / kChannelThreads)
    perturb_channels_kernel(const Params p) {
  using C = typename Types::Compute;
  using X = typename Types::X;
  using U = typename Types::U;
  using Du = typename Types::Du;
  constexpr int kPixels = X::kElements, kPair = kPixels == 1 ? 1 : 2;
  const PerturbArgs& a = p.args;

  // where
  const int64_t group = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t channel = kGroup * group - p.phase;
  const int first = channel < 0 ? static_cast<int>(-channel) : 0;
  const int last = a.features - channel < kGroup ? static_cast<int>(a.features - channel) : kGroup;
  const bool is_used = group < p.groups;
  const int64_t stride = static_cast<int64_t>(gridDim.y) * blockDim.x * kPixels,
                step = p.from_end ? -stride : stride;
  const int64_t outer_step = step / a.inner, inner_step = step % a.inner;
  const int64_t wrap = p.from_end ? -a.inner : a.inner, turn = p.from_end ? -1 : 1;
  const uint32_t counter = static_cast<uint32_t>(p.first_group + group);
  const uint32_t last_word = stream_sample(a.draw.seed, static_cast<uint32_t>(a.draw.sample));
  __shared__ RoundKeys keys;
  share_round_keys(a.draw, &keys);
  C scale[kGroup], sum[kGroup];
  DIP_UNROLL
  for (int t = 0; t < kGroup; ++t) {
    sum[t] = C(0);
    if constexpr (kWrite)
      scale[t] = is_used && first <= t && t < last ? scale_at<C>(a.draw, channel + t) : C(0);
  }

  int64_t row = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * kPixels;
  if (p.from_end) row = p.rows - kPixels - row;
  int64_t outer = row / a.inner, inner = row % a.inner;
  if (!is_used) row = kNowhere;
  for (; inside(row, p.rows); row += step) {
    // load
    [[maybe_unused]] X x[kGroup];
    [[maybe_unused]] Du du[kGroup];
    const auto at = [&](const Operand& o, int t) {
      return outer * o.outer_stride + (channel + t) * o.feature_stride + inner;
    };
    DIP_UNROLL
    for (int t = 0; t < kGroup; ++t) {
      const bool is_channel = first <= t && t < last;
      if constexpr (kWrite)
        x[t] = is_channel ? load_or_zero<X>(place<X>(a.x, at(a.x, t)), a.x, 0, kPixels) : X{};
      if constexpr (kSum) {
        du[t] = {};
        if (is_channel) du[t].load(place<Du>(a.du, at(a.du, t)), a.du.dtype, 0, kPixels);
      }
    }
    // compute: two pixels at a time, which share a word of 16-bit storage
    [[maybe_unused]] U u[kGroup];
    DIP_UNROLL
    for (int i = 0; i < kPixels; i += kPair) {
      float z[kPair][kGroup];
      draw_groups<kPair>(
          keys, last_word, counter, static_cast<uint64_t>(a.draw.row0 + row + i), 1, z);
      DIP_UNROLL
      for (int t = 0; t < kGroup; ++t) {
        if constexpr (kSum) {
          DIP_UNROLL
          for (int j = 0; j < kPair; ++j) sum[t] = fma_of(C(du[t].get(i + j)), C(z[j][t]), sum[t]);
        }
        if constexpr (kWrite) {
          C value[kPair];
          DIP_UNROLL
          for (int j = 0; j < kPair; ++j)
            value[j] = fma_of(scale[t], C(z[j][t]), C(x[t].get(i + j)));
          u[t].set(i, value[0], value[kPair - 1]);
        }
      }
    }
    // store
    if constexpr (kWrite) {
      DIP_UNROLL
      for (int t = 0; t < kGroup; ++t)
        if (first <= t && t < last) u[t].store(place<U>(a.u, at(a.u, t)), a.u.dtype, 0, kPixels);
    }
    outer += outer_step;
    inner += inner_step;
    if (!inside(inner, a.inner)) inner -= wrap, outer += turn;
  }

  // A warp lies along x, so its lanes share their channels; then the block's warps meet in order.
  if constexpr (kSum) {
    __shared__ C shared[kChannelThreads / 32][kGroup];
    const int warp = (threadIdx.y * blockDim.x + threadIdx.x) / 32, warps = blockDim.x / 32;
    DIP_UNROLL
    for (int t = 0; t < kGroup; ++t) {
      for (int delta = 16; delta > 0; delta /= 2)
        sum[t] += __shfl_down_sync(0xFFFFFFFFu, sum[t], delta);
      if (threadIdx.x % 32 == 0) shared[warp][t] = sum[t];
    }
    __syncthreads();
    // Where, once more: kept over the loop it would spill.
    const int64_t start = kGroup * (int64_t{keep(blockIdx.x)} * blockDim.y) - p.phase;
    const int64_t column = start + kGroup * static_cast<int64_t>(threadIdx.y) + threadIdx.x;
    if (threadIdx.x < kGroup && inside(column, a.features)) {
      C total = C(0);
      for (int w = 0; w < warps; ++w) total += shared[threadIdx.y * warps + w][threadIdx.x];
      static_cast<C*>(p.partials)[blockIdx.y * a.features + column] = total;
    }
    __shared__ double lane_sums[kChannelThreads];
    __shared__ bool is_last;
    if (p.finish && is_last_block(&tickets[p.ticket + blockIdx.x], gridDim.y, &is_last)) {
      const int width = static_cast<int>(kGroup * blockDim.y);
      add_partials<C>(a, p.partials, static_cast<int>(gridDim.y), start, width, lane_sums);
    }
  }
}

// ---- kernels: the second stage of the sum, where the first does not finish it -------------------

struct SumParams {
  PerturbArgs args;
  const void* partials;  // [num_partials, features]
  int num_partials;
};

template <class C>
__global__ void __launch_bounds__(32 * kSumLanes) column_sum_kernel(const SumParams p) {
  __shared__ double lane_sums[32 * kSumLanes];
  add_partials<C>(
      p.args, p.partials, p.num_partials, static_cast<int64_t>(blockIdx.x) * 32, 32, lane_sums);
}

// ---- launch -------------------------------------------------------------------------------------

// What a kernel is compiled for. The pairs of types that training meets, all aligned, have their
// own; Any takes the rest.
template <class XT, class UT, class DuT, int N>
struct Exactly {
  enum : bool { kAny = false };  // a constant that a kernel may leave unused without a warning
  using Compute = float;
  using X = Run<XT, N>;
  using U = Run<UT, N>;
  using Du = Run<DuT, N>;
};
template <class C, int N>
struct Any {
  enum : bool { kAny = true };
  using Compute = C;
  using X = AnyRun<C, N>;
  using U = AnyRun<C, N>;
  using Du = AnyRun<C, N>;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

struct Plan {
  dim3 grid, block;
};

int num_multiprocessors() {
  static int known[kMaxDevices];
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (device < kMaxDevices && known[device]) return known[device];
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 1;
  if (device < kMaxDevices) known[device] = count;
  return count;
}

int power_of_two(int64_t n, int lowest, int highest) {
  int p = lowest;
  while (p < n && p < highest) p *= 2;
  return p;
}

int64_t num_groups(const PerturbArgs& a) {
  return ceil_div(a.draw.col0 % kGroup + a.features, kGroup);
}

// One wave of blocks, each striding over the rows. `pixels`: rows that one thread takes at a time;
// `resident`: threads that a multiprocessor holds. `narrow`: four columns of blocks or more where K
// allows, of a cache line each, so that little is left for the last block of each, which it adds up
// alone.
Plan make_plan(const PerturbArgs& a, int64_t pixels, int resident, bool narrow) {
  const bool rows_layout = a.inner == 1;
  const unsigned threads = !rows_layout ? kChannelThreads
                           : a.dsigma   ? kRowThreads<true>
                                        : kRowThreads<false>;
  const int64_t groups = num_groups(a), rows = ceil_div(a.outer * a.inner, pixels);
  int64_t col_blocks, row_blocks;
  Plan plan;
  if (rows_layout) {
    plan.block.x = narrow ? power_of_two(groups / 4, 1, 8) : power_of_two(groups, 1, 32);
    plan.block.y = threads / plan.block.x;
    col_blocks = ceil_div(groups, plan.block.x);
    row_blocks = ceil_div(rows, plan.block.y);
  } else {
    plan.block.x = power_of_two(rows, 32, threads);
    plan.block.y = threads / plan.block.x;
    col_blocks = ceil_div(groups, plan.block.y);
    row_blocks = ceil_div(rows, plan.block.x);
  }
  const int64_t blocks = int64_t{num_multiprocessors()} * (resident / threads);
  plan.grid.x = static_cast<unsigned>(col_blocks);
  plan.grid.y = static_cast<unsigned>(smaller(row_blocks, larger(1, blocks / col_blocks)));
  return plan;
}

const char* describe(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  static thread_local char message[256];
  std::snprintf(
      message, sizeof(message), "CUDA error %s: %s", cudaGetErrorName(error),
      cudaGetErrorString(error));
  cudaGetLastError();  // so that the next call does not meet it again
  return message;
}

template <class P>
const char* launch(void (*kernel)(P), const Plan& plan, P params, void* stream) {
  void* arguments[] = {&params};
  const cudaError_t error = cudaLaunchKernel(
      kernel, plan.grid, plan.block, arguments, 0, static_cast<cudaStream_t>(stream));
  return describe(error == cudaSuccess ? cudaGetLastError() : error);
}

struct Call {
  const PerturbArgs& args;
  CudaForm form;
  void* partials;
  void* stream;
};

template <class RowTypes, class ChannelTypes, bool kWrite, bool kSum>
const char* launch_pass(const Call& call) {
  const PerturbArgs& a = call.args;
  const bool narrow = kSum && call.form.one_launch;
  const Plan plan = a.inner == 1
                        ? make_plan(a, 1, kRowResident < RowTypes::kAny, kWrite && kSum >, narrow)
                        : make_plan(a, ChannelTypes::X::kElements, kChannelResident, narrow);
  const bool from_end = kSum ? call.form.sums_from_end : call.form.writes_from_end;
  const int phase = static_cast<int>(a.draw.col0 % kGroup);
  Params params{a,     a.outer * a.inner, num_groups(a), a.draw.col0 / kGroup,
                phase, call.partials,     from_end};
  const char* error = nullptr;
  if (params.rows) {
    if (narrow && plan.grid.y > 1)
      params.ticket =
          take_tickets(static_cast<cudaStream_t>(call.stream), static_cast<int>(plan.grid.x));
    params.finish = kSum && (plan.grid.y == 1 || (narrow && params.ticket >= 0));
    if (a.inner == 1)
      error = launch(&perturb_rows_kernel<RowTypes, kWrite, kSum>, plan, params, call.stream);
    else
      error =
          launch(&perturb_channels_kernel<ChannelTypes, kWrite, kSum>, plan, params, call.stream);
  }
  if constexpr (kSum) {
    using C = typename RowTypes::Compute;
    if (error || params.finish) return error;
    // As many lanes as the last block would have, so that it is the same sum.
    const unsigned width = kGroup * (a.inner == 1 ? plan.block.x : plan.block.y);
    const unsigned lanes = narrow ? plan.block.x * plan.block.y / width : kSumLanes;
    const Plan sum_plan{dim3(static_cast<unsigned>(ceil_div(a.features, 32))), dim3(32, lanes)};
    const SumParams sum{a, call.partials, params.rows ? static_cast<int>(plan.grid.y) : 0};
    error = launch(&column_sum_kernel<C>, sum_plan, sum, call.stream);
  }
  return error;
}

// Pixels that a channels kernel takes at a time; with twice as many, registers spill on one
// architecture or another.
template <class XT, class UT, bool kBoth>
constexpr int kPixels = kBoth || sizeof(XT) != sizeof(UT) ? 2 : 4;

// Whether every run of n elements, side by side in memory, lies on a boundary of its own size, at
// most 16 bytes.
bool aligned(const Operand& o, const PerturbArgs& a, int64_t n) {
  if (!o.data) return true;
  const int64_t size = size_of(o.dtype), bytes = smaller(16, n * size);
  const auto whole = [&](int64_t elements) { return elements * size % bytes == 0; };
  if (reinterpret_cast<uintptr_t>(o.data) % bytes || !whole(o.outer_stride)) return false;
  return a.inner == 1 || whole(o.feature_stride);
}

template <class XT, class UT, class DuT, bool kWrite, bool kSum>
bool fits(const PerturbArgs& a, DType x, DType u, DType du) {
  constexpr int n = kPixels < XT, UT, kWrite && kSum > ;
  if ((kWrite && (!a.x.data || a.x.dtype != x || a.u.dtype != u)) || (kSum && a.du.dtype != du))
    return false;
  if (a.inner == 1 ? a.draw.col0 % kGroup || a.features % kGroup : a.inner % n) return false;
  const int64_t run = a.inner == 1 ? kGroup : n;
  return (!kWrite || (aligned(a.x, a, run) && aligned(a.u, a, run))) &&
         (!kSum || aligned(a.du, a, run));
}

template <class XT, class UT, class DuT, bool kWrite, bool kSum>
const char* launch_exactly(const Call& call) {
  return launch_pass<
      Exactly<XT, UT, DuT, kGroup>, Exactly<XT, UT, DuT, kPixels<XT, UT, kWrite && kSum>>, kWrite,
      kSum>(call);
}

// Computed in double where the data are: x, or the gradient alone.
bool is_double(const PerturbArgs& a) {
  return (a.x.data ? a.x.dtype : a.du.data ? a.du.dtype : DType::kFloat32) == DType::kFloat64;
}

template <bool kWrite, bool kSum>
const char* launch_types(const Call& call) {
  const PerturbArgs& a = call.args;
  constexpr DType f32 = DType::kFloat32, f16 = DType::kFloat16, bf16 = DType::kBFloat16;
#define DIP_TRY(XT, x, UT, u, DuT, du)              \
  if (fits<XT, UT, DuT, kWrite, kSum>(a, x, u, du)) \
  return launch_exactly<XT, UT, DuT, kWrite, kSum>(call)
  DIP_TRY(BFloat16, bf16, BFloat16, bf16, BFloat16, bf16);
  DIP_TRY(Float16, f16, Float16, f16, Float16, f16);
  DIP_TRY(float, f32, float, f32, float, f32);
  if constexpr (kWrite) {  // autocast
    DIP_TRY(float, f32, BFloat16, bf16, BFloat16, bf16);
    DIP_TRY(float, f32, Float16, f16, Float16, f16);
  }
#undef DIP_TRY
  if (is_double(a)) return launch_pass<Any<double, kGroup>, Any<double, 1>, kWrite, kSum>(call);
  return launch_pass<Any<float, kGroup>, Any<float, 1>, kWrite, kSum>(call);
}

}  // namespace

int64_t perturb_cuda_scratch(const PerturbArgs& a, const CudaForm& form) {
  if (!a.dsigma || !a.features) return 0;
  // The most that any of the kernels asks for: one pixel at a time gives the most blocks.
  return int64_t{make_plan(a, 1, kMostResident, form.one_launch).grid.y} * a.features *
         (is_double(a) ? 8 : 4);
}

const char* perturb_cuda(const PerturbArgs& a, const CudaForm& form, void* partials, void* stream) {
  const Call call{a, form, partials, stream};
  if (!a.features) return nullptr;
  if (a.dsigma) return a.u.data ? launch_types<true, true>(call) : launch_types<false, true>(call);
  return launch_types<true, false>(call);
}

}  // namespace dip
