// The CPU kernels without torch, on random cases in memory whose every edge is watched.
// docs/reliability.md.
//
//   sanitize_kernels CASES SEED THREADS       values, edges, gaps, and the same bits on every
//                                             instruction set and thread count
//   sanitize_kernels CASES SEED THREADS fail  the same with an allocation of the kernel failing:
//                                             an error, no crash, no leak
//
// Every buffer has the tensor's exact extent: it ends, or starts, at a page that nobody may touch
// (under a sanitizer, whose own margins do that, it comes from malloc). Gaps between rows and all
// that a kernel has to leave alone hold a pattern.
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "../../csrc/activation.h"
#include "../../csrc/cpu/convert.h"
#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/launch.h"
#include "../../csrc/noise.h"

using namespace dip;

// ---- allocation that fails on demand ------------------------------------------------------------
// The linker sends the kernels' malloc and calloc here (--wrap).

static thread_local bool in_kernel = false;
// allocations of the kernel until one fails; negative: none does
static std::atomic<int> fail_after{-1};
static std::atomic<int> failed{0};

static bool fails() {
  if (!in_kernel || fail_after.load() < 0) return false;
  if (fail_after.fetch_sub(1) != 0) return false;
  fail_after.store(0);  // and all that follow
  ++failed;
  return true;
}
extern "C" void* __real_malloc(size_t n);
extern "C" void* __real_calloc(size_t n, size_t m);
extern "C" void* __wrap_malloc(size_t n) { return fails() ? nullptr : __real_malloc(n); }
extern "C" void* __wrap_calloc(size_t n, size_t m) {
  return fails() ? nullptr : __real_calloc(n, m);
}

// ---- randomness of the cases, not of the kernels ------------------------------------------------

struct Dice {
  uint64_t state;
  uint64_t next() {
    state += 0x9E3779B97F4A7C15ull;
    uint64_t z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  }
  int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(next() % static_cast<uint64_t>(high - low + 1));
  }
  bool coin() { return next() & 1; }
  double real() { return static_cast<double>(next() >> 11) / 9007199254740992.0 * 4 - 2; }
};

// ---- buffers ------------------------------------------------------------------------------------

// `bytes` long; its last byte, or its first, lies at the edge of what may be touched.
struct Buffer {
  char* data = nullptr;
  size_t bytes = 0;
  void* mapped = nullptr;
  size_t mapped_bytes = 0;

  Buffer(size_t size, bool at_the_end) : bytes(size) {
#ifdef DIP_SANITIZED
    (void)at_the_end;
    data = static_cast<char*>(std::malloc(size ? size : 1));
#else
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)),
                 inside = (size + page - 1) / page * page;
    mapped_bytes = inside + 2 * page;
    mapped = mmap(nullptr, mapped_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char* first = static_cast<char*>(mapped) + page;
    if (mapped == MAP_FAILED || (inside && mprotect(first, inside, PROT_READ | PROT_WRITE)))
      std::perror("mmap"), std::exit(3);
    data = at_the_end ? first + inside - size : first;
#endif
    std::memset(data, 0xA5, bytes);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
#ifdef DIP_SANITIZED
    std::free(data);
#else
    munmap(mapped, mapped_bytes);
#endif
  }
};

static double get(const Operand& o, int64_t at) {
  switch (o.dtype) {
    case DType::kFloat32: return static_cast<float*>(o.data)[at];
    case DType::kFloat64: return static_cast<double*>(o.data)[at];
    case DType::kFloat16: return float16_to_float(static_cast<uint16_t*>(o.data)[at]);
    default: return bfloat16_to_float(static_cast<uint16_t*>(o.data)[at]);
  }
}
static void put(const Operand& o, int64_t at, double value) {
  switch (o.dtype) {
    case DType::kFloat32: static_cast<float*>(o.data)[at] = static_cast<float>(value); return;
    case DType::kFloat64: static_cast<double*>(o.data)[at] = value; return;
    case DType::kFloat16:
      static_cast<uint16_t*>(o.data)[at] = float_to_float16(static_cast<float>(value));
      return;
    default:
      static_cast<uint16_t*>(o.data)[at] = float_to_bfloat16(static_cast<float>(value));
      return;
  }
}

// ---- threads: at::parallel_for's contract on plain threads --------------------------------------

static int num_threads = 1;

// What each case runs on: one thread, and where there are more, all.
static std::vector<int> thread_counts() {
  return num_threads == 1 ? std::vector<int>{1} : std::vector<int>{1, num_threads};
}

static void parallel_for(
    int64_t total, int64_t grain, void (*f)(int64_t, int64_t, void*), void* context) {
  const int64_t parts = grain > 0 ? (total + grain - 1) / grain : total,
                n = parts < num_threads ? parts : num_threads;
  if (n <= 1) {
    if (total > 0) f(0, total, context);
    return;
  }
  const int64_t step = (total + n - 1) / n;
  std::vector<std::thread> threads;
  const bool inside = in_kernel;
  in_kernel = false;  // a thread's own memory is not the kernel's
  for (int64_t begin = 0; begin < total; begin += step)
    threads.emplace_back([=] {
      in_kernel = inside;
      f(begin, begin + step < total ? begin + step : total, context);
      in_kernel = false;
    });
  for (std::thread& t : threads) t.join();
  in_kernel = inside;
}

[[noreturn]] static void die(int64_t number, const char* what, double got = 0, double want = 0) {
  std::fprintf(stderr, "case %" PRId64 ": %s (got %.9g, expected %.9g)\n", number, what, got, want);
  std::exit(1);
}

// ---- perturb ------------------------------------------------------------------------------------

static std::vector<std::unique_ptr<Buffer>> alive;
static Buffer& allocate(size_t bytes, Dice& dice) {
  alive.push_back(std::make_unique<Buffer>(bytes, dice.coin()));
  return *alive.back();
}

struct Shape {
  int64_t outer, features, inner;
  bool packed = false;  // planes of all operands follow one another
};

static Operand operand(const Shape& s, DType type, Dice& dice, int64_t* elements) {
  Operand o;
  o.dtype = type;
  if (s.inner == 1) {
    o.feature_stride = 1;
    o.outer_stride = s.features + (dice.coin() ? 0 : dice.between(0, 9));
    *elements = s.outer && s.features ? (s.outer - 1) * o.outer_stride + s.features : 0;
  } else {
    const int64_t pad = s.packed || dice.coin() ? 0 : dice.between(0, 5),
                  gap = dice.coin() ? 0 : dice.between(0, 7);
    if (s.packed || dice.coin()) {
      o.feature_stride = s.inner + pad;
      o.outer_stride = s.features * o.feature_stride + gap;
    } else {
      o.outer_stride = s.inner + pad;
      o.feature_stride = s.outer * o.outer_stride + gap;
    }
    *elements = s.outer && s.features
                    ? (s.outer - 1) * o.outer_stride + (s.features - 1) * o.feature_stride + s.inner
                    : 0;
  }
  return o;
}

static int64_t at(const Operand& o, const Shape& s, int64_t row, int64_t j) {
  return row / s.inner * o.outer_stride + j * o.feature_stride + row % s.inner;
}

// Each allocation of a kernel fails in turn, at most `limit`: it says so, or ends without having
// asked for as many.
template <class F>
static void fail_each_allocation(int64_t number, int limit, F&& run) {
  for (int after = 0; after < limit; ++after) {
    failed = 0;
    fail_after = after;
    in_kernel = true;
    const char* error = run();
    in_kernel = false;
    fail_after = -1;
    if (!failed) return;
    if (!error || std::strcmp(error, "out of memory"))
      die(number, "a failed allocation went unreported");
  }
  die(number, "a kernel that allocates without end");
}

static void perturb_case(int64_t number, Dice& dice, bool fail) {
  Shape s{dice.between(0, 40), dice.between(0, 70), 1};
  if (dice.coin()) s = {dice.between(0, 6), dice.between(0, 30), dice.between(2, 70), dice.coin()};
  // several blocks of the sum, several threads
  if (number % 16 == 0) s.outer *= 30;
  if (number % 16 == 8 && s.inner == 1) s.features += 1000;  // a row of several tiles
  const int64_t rows = s.outer * s.inner;
  const DType kinds[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};
  const int mode = static_cast<int>(dice.between(0, 3));  // noise, P, Q, both

  PerturbArgs a{};
  a.outer = s.outer, a.features = s.features, a.inner = s.inner;
  const int64_t starts[] = {0, 5, (int64_t{1} << 32) - 3, (int64_t{1} << 33) + 7, int64_t{1} << 62};
  a.draw.row0 = starts[dice.between(0, 4)], a.draw.col0 = dice.coin() ? 0 : dice.between(0, 40);
  a.draw.sample = static_cast<int32_t>(dice.between(0, 9));
  a.draw.factor = mode && dice.coin() ? 0.5 : 1.0;
  a.draw.log_variance = mode && dice.coin(), a.draw.sigma_is_double = mode && dice.coin();
  Buffer& seed = allocate(16, dice);
  const int64_t numbers[2] = {static_cast<int64_t>(dice.next()), dice.between(-5, 70000)};
  std::memcpy(seed.data, numbers, 16);
  a.draw.seed = reinterpret_cast<const int64_t*>(seed.data);
  if (mode) {
    Buffer& sigma =
        allocate(static_cast<size_t>(s.features) * (a.draw.sigma_is_double ? 8 : 4), dice);
    for (int64_t j = 0; j < s.features; ++j) {
      const double value = a.draw.log_variance ? dice.real() : std::fabs(dice.real());
      if (a.draw.sigma_is_double) reinterpret_cast<double*>(sigma.data)[j] = value;
      else reinterpret_cast<float*>(sigma.data)[j] = static_cast<float>(value);
    }
    a.draw.sigma = sigma.data;
  }
  int64_t n = 0;
  Buffer *u = nullptr, *dsigma = nullptr;
  if (mode == 1 || mode == 3) {
    a.x = operand(s, kinds[dice.between(0, 3)], dice, &n);
    a.x.data = allocate(static_cast<size_t>(n * size_of(a.x.dtype)), dice).data;
    for (int64_t i = 0; i < n; ++i) put(a.x, i, dice.real());
  }
  if (mode != 2) {
    a.u = operand(s, kinds[dice.between(0, 3)], dice, &n);
    u = &allocate(static_cast<size_t>(n * size_of(a.u.dtype)), dice);
    a.u.data = u->data;
  }
  if (mode >= 2) {
    a.du = operand(s, kinds[dice.between(0, 3)], dice, &n);
    a.du.data = allocate(static_cast<size_t>(n * size_of(a.du.dtype)), dice).data;
    for (int64_t i = 0; i < n; ++i) put(a.du, i, dice.real());
    dsigma = &allocate(static_cast<size_t>(s.features) * (a.draw.sigma_is_double ? 8 : 4), dice);
    a.dsigma = dsigma->data;
  }

  if (fail) return fail_each_allocation(number, 40, [&] { return perturb_cpu(a, parallel_for); });

  // ---- on every instruction set and several thread counts: the same bits
  std::vector<char> first_u, first_dsigma;
  for (int capability = 0; capability < 3; ++capability) {
    if (set_cpu_capability(capability)) continue;
    for (const int threads : thread_counts()) {
      const int before = num_threads;
      num_threads = threads;
      if (u) std::memset(u->data, 0xA5, u->bytes);
      if (dsigma) std::memset(dsigma->data, 0xA5, dsigma->bytes);
      const char* error = perturb_cpu(a, parallel_for);
      num_threads = before;
      if (error) die(number, error);
      if (first_u.empty() && first_dsigma.empty()) {
        if (u) first_u.assign(u->data, u->data + u->bytes);
        if (dsigma) first_dsigma.assign(dsigma->data, dsigma->data + dsigma->bytes);
      }
      if (u && u->bytes && std::memcmp(u->data, first_u.data(), u->bytes))
        die(number, "u differs by instruction set or threads", capability, threads);
      if (dsigma && dsigma->bytes && std::memcmp(dsigma->data, first_dsigma.data(), dsigma->bytes))
        die(number, "dsigma differs by instruction set or threads", capability, threads);
    }
  }

  // ---- against the contract, one element at a time
  const bool wide = (a.x.data    ? a.x.dtype
                     : a.du.data ? a.du.dtype
                                 : DType::kFloat32) == DType::kFloat64;
  const auto sigma_of = [&](int64_t j) -> double {
    if (!a.draw.sigma) return 1;
    if (a.draw.sigma_is_double)
      return a.draw.log_variance ? std::exp(0.5 * static_cast<const double*>(a.draw.sigma)[j])
                                 : static_cast<const double*>(a.draw.sigma)[j];
    const float v = static_cast<const float*>(a.draw.sigma)[j];
    return a.draw.log_variance ? std::exp(0.5f * v) : v;
  };
  std::vector<char> touched(u ? u->bytes : 0, 0);
  std::vector<double> sum(static_cast<size_t>(s.features), 0),
      bulk(static_cast<size_t>(s.features), 0);
  for (int64_t row = 0; row < rows; ++row) {
    float z[8];
    int64_t drawn = -1;
    for (int64_t j = 0; j < s.features; ++j) {
      const int64_t group = (a.draw.col0 + j) / 8;
      if (group != drawn) {
        const uint64_t r = static_cast<uint64_t>(a.draw.row0 + row);
        uint64_t words[4] = {
            static_cast<uint32_t>(group), static_cast<uint32_t>(r), static_cast<uint32_t>(r >> 32),
            stream_sample(a.draw.seed, static_cast<uint32_t>(a.draw.sample))};
        philox4x32_10<ScalarLane>(words, philox_key(a.draw.seed));
        for (int t = 0; t < 4; ++t)
          standard_normal_pair<ScalarLane>(
              static_cast<uint32_t>(words[t]), &z[2 * t], &z[2 * t + 1]);
        drawn = group;
      }
      const float draw = z[(a.draw.col0 + j) % 8];
      const double scale = a.draw.factor * sigma_of(j);
      if (u) {
        const int64_t where = at(a.u, s, row, j);
        const double x = a.x.data ? get(a.x, at(a.x, s, row, j)) : 0;
        const double exact = wide
                                 ? std::fma(scale, draw, x)
                                 : std::fma(static_cast<float>(scale), draw, static_cast<float>(x));
        char cell[8];
        const Operand one{cell, a.u.dtype, 0, 1};
        put(one, 0, exact);
        const double got = get(a.u, where), want = get(one, 0);
        if (!(got == want)) die(number, "u is not x + factor * sigma * z", got, want);
        std::memset(
            touched.data() + where * size_of(a.u.dtype), 1,
            static_cast<size_t>(size_of(a.u.dtype)));
      }
      if (dsigma) {
        const double g = get(a.du, at(a.du, s, row, j));
        sum[static_cast<size_t>(j)] += g * draw,
            bulk[static_cast<size_t>(j)] += std::fabs(g * draw);
      }
    }
  }
  for (size_t i = 0; i < touched.size(); ++i)
    if (!touched[i] && u->data[i] != static_cast<char>(0xA5))
      die(number, "a gap between rows was written");
  for (int64_t j = 0; dsigma && j < s.features; ++j) {
    const double slope = a.draw.log_variance ? a.draw.factor * 0.5 * sigma_of(j) : a.draw.factor,
                 want = slope * sum[static_cast<size_t>(j)];
    const double got = a.draw.sigma_is_double ? static_cast<double*>(a.dsigma)[j]
                                              : static_cast<float*>(a.dsigma)[j];
    if (!(std::fabs(got - want) <= 3e-6 * slope * bulk[static_cast<size_t>(j)] + 1e-12))
      die(number, "dsigma is not the sum over rows", got, want);
  }
}

// ---- activation and variance: edges, and the same bits for any number of threads ----------------

static void activation_case(int64_t number, Dice& dice, bool fail) {
  const DType kinds[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};
  const int64_t rows = dice.between(0, number % 8 ? 40 : 900),
                k = dice.between(0, number % 8 == 4 ? 600 : 70);
  const bool backward = dice.coin(), is_double = dice.coin(), variance = dice.coin();
  const DType type = kinds[dice.between(0, 3)];
  const auto matrix = [&](bool fill) {
    Operand o{nullptr, type, k, 1};
    o.data = allocate(static_cast<size_t>(rows * k * size_of(type)), dice).data;
    for (int64_t i = 0; fill && i < rows * k; ++i) put(o, i, dice.real());
    return o;
  };
  const auto vector = [&](int64_t size, bool fill) {
    Buffer& b = allocate(static_cast<size_t>(size) * (is_double ? 8 : 4), dice);
    const Operand o{b.data, is_double ? DType::kFloat64 : DType::kFloat32, 0, 1};
    for (int64_t i = 0; fill && i < size; ++i)
      put(o, i, dice.between(0, 6) ? std::fabs(dice.real()) : 0);
    return b.data;
  };
  ExpectationArgs a{};
  VarianceArgs v{};
  std::vector<Buffer*> written;
  if (variance) {
    v.rows = rows, v.features = k, v.is_double = is_double, v.log_variance = dice.coin();
    v.weight = matrix(true), v.sigma = vector(k, true);
    if (backward) {
      v.dv = vector(rows, true);
      if (dice.coin()) v.given = matrix(true);
      v.dweight = matrix(false), written.push_back(alive.back().get());
      v.dsigma = vector(k, false), written.push_back(alive.back().get());
    } else {
      v.v = vector(rows, false), written.push_back(alive.back().get());
    }
  } else {
    a.rows = rows, a.features = k,
    a.activation = static_cast<int>(dice.between(0, kNumActivations - 1)),
    a.v_is_double = is_double;
    a.v = vector(k, true), a.mu = matrix(true);
    if (backward) {
      a.dy = matrix(true);
      a.dmu = matrix(false), written.push_back(alive.back().get());
      a.dv = vector(k, false), written.push_back(alive.back().get());
      a.sum = vector(k, false), written.push_back(alive.back().get());
    } else {
      a.y = matrix(false), written.push_back(alive.back().get());
    }
  }
  const auto run = [&] {
    return variance ? variance_cpu(v, parallel_for) : expectation_cpu(a, parallel_for);
  };
  if (fail) return fail_each_allocation(number, 60, run);
  for (int capability = 0; capability < 3; ++capability) {
    if (set_cpu_capability(capability)) continue;
    std::vector<std::vector<char>> first;
    for (const int threads : thread_counts()) {
      const int before = num_threads;
      num_threads = threads;
      // NaN: what was not written shows
      for (Buffer* b : written) std::memset(b->data, 0xFF, b->bytes);
      const char* error = run();
      num_threads = before;
      if (error) die(number, error);
      if (first.empty())
        for (Buffer* b : written) first.emplace_back(b->data, b->data + b->bytes);
      for (size_t i = 0; i < written.size(); ++i)
        if (written[i]->bytes && std::memcmp(written[i]->data, first[i].data(), written[i]->bytes))
          die(number, "a result depends on the threads");
    }
    for (size_t i = 0; i < written.size(); ++i) {
      const bool is_vector = variance ? !backward || i == 1 : backward && i >= 1;
      const Operand o{
          written[i]->data, is_vector ? (is_double ? DType::kFloat64 : DType::kFloat32) : type, 0,
          1};
      for (size_t e = 0; e < written[i]->bytes / static_cast<size_t>(size_of(o.dtype)); ++e)
        if (!std::isfinite(get(o, static_cast<int64_t>(e))))
          die(number, "an element was not written, or is not finite");
    }
  }
}

// ---- samples behind an activation: every element, and nothing beside it -------------------------

// The activation's value, or its slope.
static double act(int kind, double x, bool slope) {
  const double c = 1.5957691216057308, inner = c * (x + 0.044715 * x * x * x);
  const double s = 1 / (1 + std::exp(kind == kGeluTanhActivation ? -inner : -x)), t = std::tanh(x);
  const double cdf = 0.5 * std::erfc(-0.70710678118654752440 * x);
  switch (kind) {
    case kIdentity: return slope ? 1 : x;
    case kReluActivation: return x > 0 ? (slope ? 1 : x) : 0;
    case kGeluActivation:
      return slope ? cdf + x * 0.39894228040143267794 * std::exp(-0.5 * x * x) : x * cdf;
    case kGeluTanhActivation:
      return slope ? s + x * s * (1 - s) * c * (1 + 0.134145 * x * x) : x * s;
    case kSiluActivation: return slope ? s * (1 + x * (1 - s)) : x * s;
    case kQuickGeluActivation: return act(kSiluActivation, 1.702 * x, slope) / (slope ? 1 : 1.702);
    default: return slope ? 1 - t * t : t;
  }
}

// A tensor [samples, a, b] with gaps, and which of its bytes a kernel may write.
struct Cube {
  Operand t;  // of the first sample
  int64_t sample_stride;
  Buffer* buffer;
  int size;
  std::vector<char> touched;

  Cube(DType type, int bytes, int64_t samples, int64_t a, int64_t b, Dice& dice) : size(bytes) {
    const int64_t pad = dice.coin() ? 0 : dice.between(0, 5),
                  gap = dice.coin() ? 0 : dice.between(0, 7);
    t.dtype = type;
    if (dice.coin()) t.outer_stride = b + pad, sample_stride = a * t.outer_stride + gap;
    else sample_stride = b + pad, t.outer_stride = samples * sample_stride + gap;
    const int64_t n = samples && a && b ? at(samples - 1, a - 1, b - 1) + 1 : 0;
    buffer = &allocate(static_cast<size_t>(n * size), dice);
    t.data = buffer->data;
    touched.assign(buffer->bytes, 0);
  }
  int64_t at(int64_t s, int64_t i, int64_t j) const {
    return s * sample_stride + i * t.outer_stride + j;
  }
  double number(int64_t s, int64_t i, int64_t j) const { return get(t, at(s, i, j)); }
  uint8_t& byte(int64_t s, int64_t i, int64_t j) const {
    return static_cast<uint8_t*>(t.data)[at(s, i, j)];
  }
  void touch(int64_t s, int64_t i, int64_t j) {
    std::memset(touched.data() + at(s, i, j) * size, 1, static_cast<size_t>(size));
  }
  void check_gaps(int64_t number) const {
    for (size_t i = 0; i < touched.size(); ++i)
      if (!touched[i] && buffer->data[i] != static_cast<char>(0xA5))
        die(number, "a gap was written");
  }
};

static void samples_case(int64_t number, Dice& dice) {
  const DType kinds[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64};
  const bool backward = dice.coin(), with_out = dice.coin();
  const DType type = kinds[dice.between(0, 2)], out_type = kinds[dice.between(0, 3)];
  SamplesArgs a{};
  a.outer = dice.between(0, number % 16 == 7 ? 300 : 40),
  a.inner = dice.between(0, number % 32 == 15 ? 1100 : 70);
  a.samples = dice.between(backward, 9),
  a.activation = static_cast<int>(dice.between(kIdentity, kNumActivations - 1));
  a.factor = 0.25f;
  // x: what h holds before dh is written over it
  Cube h(type, size_of(type), a.samples, a.outer, a.inner, dice),
      x(type, size_of(type), a.samples, a.outer, a.inner, dice);
  Cube dy(type, size_of(type), 1, a.outer, a.inner, dice),
      out(out_type, size_of(out_type), 1, a.outer, a.inner, dice);
  a.h = h.t, a.sample_stride = h.sample_stride;
  if (with_out) a.out = out.t;
  if (backward) a.back = true, a.dy = dy.t;
  const Operand total{
      allocate(static_cast<size_t>(4 * a.outer * a.inner), dice).data, DType::kFloat32, 0, 1};
  a.total = static_cast<float*>(total.data);
  for (int64_t i = 0; i < a.outer; ++i)
    for (int64_t j = 0; j < a.inner; ++j) {
      put(dy.t, dy.at(0, i, j), dice.real());
      for (int64_t s = 0; s < a.samples; ++s)
        put(x.t, x.at(s, i, j), dice.between(0, 9) ? dice.real() : 0);
    }
  const double fine = 4e-6, rounding = type == DType::kBFloat16  ? 0.004
                                       : type == DType::kFloat16 ? 0.0005
                                                                 : fine;
  for (int capability = 0; capability < 3; ++capability) {
    if (set_cpu_capability(capability)) continue;
    for (int64_t i = 0; i < a.outer * a.inner; ++i) put(total, i, 1);
    for (int64_t s = 0; s < a.samples; ++s)
      for (int64_t i = 0; i < a.outer; ++i)
        for (int64_t j = 0; j < a.inner; ++j) {
          put(h.t, h.at(s, i, j), x.number(s, i, j));
          h.touch(s, i, j);
        }
    if (const char* error = samples_cpu(a, parallel_for)) die(number, error);
    for (int64_t i = 0; i < a.outer; ++i)
      for (int64_t j = 0; j < a.inner; ++j) {
        double sum = 1, size = 1;
        for (int64_t s = 0; s < a.samples; ++s) {
          const double g = dy.number(0, i, j), f = act(a.activation, x.number(s, i, j), backward);
          const double want = backward ? g * f : f;
          size += 1 + std::fabs(g) + std::fabs(want), sum += want;
          if (!backward) continue;
          const double got = h.number(s, i, j);
          if (!(std::fabs(got - want) <= rounding * std::fabs(want) + fine * std::fabs(g) + 1e-7))
            die(number, "dh is not dy times the slope", got, want);
        }
        const double got = get(total, i * a.inner + j);
        if (!(std::fabs(got - sum) <= fine * size))
          die(number, "total is not 1 + the sum", got, sum);
        if (!with_out) continue;
        out.touch(0, i, j);
        if (!(std::fabs(out.number(0, i, j) - 0.25 * got) <= 0.004 * std::fabs(got) + 1e-7))
          die(number, "out is not factor total");
      }
    h.check_gaps(number), out.check_gaps(number);
  }
}

// ---- norms, activations and gates with noise ----------------------------------------------------
// Edges, gaps, and the same bits on every instruction set and for any threads.

// What a kernel writes, of a shape with gaps.
struct Written {
  Buffer* buffer;
  Operand o;
  Shape s;

  void check(int64_t number) const {
    std::vector<char> touched(buffer->bytes, 0);
    for (int64_t row = 0; row < s.outer * s.inner; ++row)
      for (int64_t j = 0; j < s.features; ++j) {
        const int64_t where = at(o, s, row, j);
        std::memset(
            touched.data() + where * size_of(o.dtype), 1, static_cast<size_t>(size_of(o.dtype)));
        if (!std::isfinite(get(o, where)))
          die(number, "an element was not written, or is not finite");
      }
    for (size_t i = 0; i < touched.size(); ++i)
      if (!touched[i] && buffer->data[i] != static_cast<char>(0xFF))
        die(number, "a gap was written");
  }
};

static void producer_case(int64_t number, Dice& dice, bool fail) {
  const DType kinds[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64};
  const bool is_norm = dice.coin(), backward = dice.coin(), draws = !backward || dice.between(0, 3);
  Shape s{dice.between(0, number % 8 ? 40 : 700), dice.between(0, 70), 1};
  if (number % 3 == 0) s.features = 64 * dice.between(0, 20);  // tiles in registers
  if (number % 8 == 2) s.features += 1000;                     // a row of several tiles
  if (!is_norm && dice.coin())
    s = {dice.between(0, 6), dice.between(0, 30), dice.between(2, 70), dice.coin()};
  const DType type = kinds[dice.between(0, 3)],
              other = dice.between(0, 3) ? type : kinds[dice.between(0, 3)];
  std::vector<Written> written;
  int64_t n = 0;
  const auto tensor = [&](DType dtype, bool fill) {
    Operand o = operand(s, dtype, dice, &n);
    Buffer& b = allocate(static_cast<size_t>(n * size_of(dtype)), dice);
    o.data = b.data;
    for (int64_t i = 0; fill && i < n; ++i) put(o, i, dice.real());
    if (!fill) written.push_back({&b, o, s});
    return o;
  };
  const auto vector = [&](int64_t size, DType dtype, bool fill) {
    Buffer& b = allocate(static_cast<size_t>(size * size_of(dtype)), dice);
    const Operand o{b.data, dtype, size, 1};
    for (int64_t i = 0; fill && i < size; ++i) put(o, i, std::fabs(dice.real()) + 0.1);
    if (!fill) written.push_back({&b, o, {1, size, 1}});
    return o;
  };
  Draw draw{};
  Buffer& seed = allocate(16, dice);
  const int64_t numbers[2] = {static_cast<int64_t>(dice.next()), dice.between(-5, 70000)};
  std::memcpy(seed.data, numbers, 16);
  draw.seed = reinterpret_cast<const int64_t*>(seed.data);
  draw.row0 = dice.coin() ? 0 : (int64_t{1} << 32) - 3,
  draw.col0 = dice.coin() ? 0 : dice.between(0, 40), draw.factor = 0.5;
  draw.sigma_is_double = dice.coin(), draw.log_variance = dice.coin();
  const DType sigma_type = draw.sigma_is_double ? DType::kFloat64 : DType::kFloat32;
  if (draws) draw.sigma = vector(s.features, sigma_type, true).data;
  void* const dsigma = backward && draws ? vector(s.features, sigma_type, false).data : nullptr;
  NormArgs m{};
  GateArgs g{};
  if (is_norm) {
    m.rows = s.outer, m.features = s.features, m.centred = dice.coin(), m.eps = 1e-3, m.offset = 1,
    m.draw = draw, m.dsigma = dsigma;
    m.x = tensor(type, true);
    if (dice.coin()) m.weight = vector(s.features, other, true);
    if (dice.coin()) m.bias = vector(s.features, other, true);
    const DType wide = type == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    if (m.centred) m.mean = vector(s.outer, wide, backward).data;
    m.rstd = vector(s.outer, wide, backward).data;
    if (backward) {
      m.du = tensor(other, true), m.dx = tensor(type, false);
      if (m.weight.data) m.dweight = vector(s.features, other, false);
      if (m.bias.data) m.dbias = vector(s.features, other, false);
    } else {
      m.u = tensor(other, false);
    }
  } else {
    g.outer = s.outer, g.features = s.features, g.inner = s.inner, g.draw = draw, g.dsigma = dsigma;
    g.activation = static_cast<int>(dice.between(0, kNumActivations - 1));
    g.a = tensor(type, true);
    const bool gated = dice.coin();
    if (gated) g.b = tensor(type, true);
    if (backward) {
      g.du = tensor(other, true), g.da = tensor(type, false);
      if (gated) g.db = tensor(type, false);
    } else {
      g.u = tensor(other, false);
    }
  }
  if (!backward && (!s.outer || !s.features)) return;  // whoever calls it has nothing to write
  const auto run = [&] { return is_norm ? norm_cpu(m, parallel_for) : gate_cpu(g, parallel_for); };
  if (fail) return fail_each_allocation(number, 60, run);
  std::vector<std::vector<char>> first;
  for (int capability = 0; capability < 3; ++capability) {
    if (set_cpu_capability(capability)) continue;
    for (const int threads : thread_counts()) {
      const int before = num_threads;
      num_threads = threads;
      // NaN: what was not written shows
      for (const Written& w : written) std::memset(w.buffer->data, 0xFF, w.buffer->bytes);
      const char* error = run();
      num_threads = before;
      if (error) die(number, error);
      if (first.empty())
        for (const Written& w : written)
          first.emplace_back(w.buffer->data, w.buffer->data + w.buffer->bytes);
      for (size_t i = 0; i < written.size(); ++i)
        if (written[i].buffer->bytes &&
            std::memcmp(written[i].buffer->data, first[i].data(), first[i].size()))
          die(number, "a result depends on the instruction set or the threads", capability,
              threads);
    }
  }
  for (const Written& w : written) w.check(number);
}

int main(int argc, char** argv) {
  if (argc < 4) return 2;
  const int64_t cases = std::atoll(argv[1]);
  const uint64_t seed = std::strtoull(argv[2], nullptr, 10);
  num_threads = std::atoi(argv[3]);
  const bool fail = argc > 4 && !std::strcmp(argv[4], "fail");
  int64_t perturbs = 0, activations = 0, samples = 0, producers = 0;
  for (int64_t number = 0; number < cases; ++number) {
    Dice dice{seed * 1000003 + static_cast<uint64_t>(number)};
    set_cpu_capability(fail ? static_cast<int>(number % 3) : -1);
    if (number % 8 == 7 && !fail)  // it allocates nothing
      samples_case(number, dice), ++samples;
    else if (number % 4 == 1) producer_case(number, dice, fail), ++producers;
    else if (number % 4 == 3) activation_case(number, dice, fail), ++activations;
    else perturb_case(number, dice, fail), ++perturbs;
    alive.clear();
  }
  std::printf(
      "%" PRId64 " cases of perturb, %" PRId64 " of activation and variance, %" PRId64
      " of samples, %" PRId64 " of producers\n",
      perturbs, activations, samples, producers);
  return 0;
}
