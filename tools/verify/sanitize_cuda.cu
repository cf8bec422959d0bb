// Every CUDA kernel on a GPU without torch, each tensor in memory of its own of exactly its size.
// docs/gpu.md.
//
//   sanitize_cuda guards [plant]  a pattern before and behind every tensor is looked at after each
//                                 launch
//   sanitize_cuda exact [plant]   no margin at all: for compute-sanitizer, which sees reads too
//
// plant: an error that has to be found, so that finding none says something. overrun: u, or dsigma,
// is one element short; uninitialised: x is never written; race: a kernel of this file that forgets
// a barrier. Exit code 1: an error was found here. Without a GPU what nvcc makes of it runs on
// tests/ptx: tests/test_sanitize_cuda.py.
#include <cuda_runtime.h>

#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <string>
#include <vector>

#include "../../csrc/launch.h"

using namespace dip;

namespace {

constexpr size_t kMargin = 256;
constexpr unsigned char kPattern = 0xA5;
bool guarded = false;
std::string planted;

[[noreturn]] void die(const std::string& where, const char* what) {
  std::fprintf(stderr, "sanitize_cuda: %s: %s\n", where.c_str(), what);
  std::exit(1);
}

void require(cudaError_t error, const char* what) {
  if (error != cudaSuccess) die(what, cudaGetErrorString(error));
}

// Device memory of one tensor.
class Buffer {
 public:
  Buffer(std::string name, size_t bytes)
      : name_(std::move(name)), bytes_(bytes), margin_(guarded ? kMargin : 0) {
    if (!bytes && !guarded) return;
    require(cudaMalloc(reinterpret_cast<void**>(&memory_), bytes + 2 * margin_), "cudaMalloc");
    if (guarded) require(cudaMemset(memory_, kPattern, bytes + 2 * margin_), "cudaMemset");
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { cudaFree(memory_); }

  void* data() const { return bytes_ ? memory_ + margin_ : nullptr; }
  void write(const void* from) {
    require(cudaMemcpy(memory_ + margin_, from, bytes_, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  void fill(int byte) { require(cudaMemset(memory_ + margin_, byte, bytes_), "cudaMemset"); }
  std::vector<unsigned char> read() const {
    std::vector<unsigned char> found(bytes_ + 2 * margin_);
    require(cudaMemcpy(found.data(), memory_, found.size(), cudaMemcpyDeviceToHost), "cudaMemcpy");
    for (size_t i = 0; i < margin_; ++i)
      if (found[i] != kPattern || found[margin_ + bytes_ + i] != kPattern)
        die(name_, "written outside of the tensor");
    return {
        found.begin() + static_cast<ptrdiff_t>(margin_),
        found.end() - static_cast<ptrdiff_t>(margin_)};
  }

 private:
  std::string name_;
  size_t bytes_, margin_;
  unsigned char* memory_ = nullptr;
};

// Small numbers: a quarter of a byte, which every type holds. Their values do not matter here,
// tests/gpu looks at those.
std::vector<unsigned char> numbers(DType type, size_t count) {
  std::vector<unsigned char> out(count * size_of(type));
  for (size_t i = 0; i < count; ++i) {
    const float value = static_cast<float>(i * 7 % 16 + 1) / 4;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const double wide = value;
    // 4-bit mantissas: the upper half of a float32 is the bfloat16, and a float16 has its exponent
    // moved.
    const uint16_t half =
        type == DType::kBFloat16
            ? static_cast<uint16_t>(bits >> 16)
            : static_cast<uint16_t>(((bits >> 13) & 0x3FF) | ((((bits >> 23) & 0xFF) - 112) << 10));
    const void* from = type == DType::kFloat64   ? static_cast<const void*>(&wide)
                       : type == DType::kFloat32 ? static_cast<const void*>(&bits)
                                                 : &half;
    std::memcpy(out.data() + i * size_of(type), from, size_of(type));
  }
  return out;
}

struct Shape {
  int64_t outer, features, inner, pad;  // pad: elements between rows, or between channels
};

Operand operand(const Shape& s, DType type, size_t* count) {
  Operand o;
  o.dtype = type;
  o.feature_stride = s.inner == 1 ? 1 : s.inner + s.pad;
  o.outer_stride = s.inner == 1 ? s.features + s.pad : s.features * o.feature_stride;
  *count = static_cast<size_t>(
      (s.outer - 1) * o.outer_stride + (s.features - 1) * o.feature_stride + s.inner);
  return o;
}

enum class Form { kNoise, kP, kQ, kPQ };

// Every element is written, and nothing between rows: u held NaNs.
void check_written(
    const std::vector<unsigned char>& u, const Operand& o, const Shape& s,
    const std::string& where) {
  const size_t size = size_of(o.dtype);
  std::vector<bool> inside(u.size() / size, false);
  for (int64_t i = 0; i < s.outer; ++i)
    for (int64_t j = 0; j < s.features; ++j)
      for (int64_t k = 0; k < s.inner; ++k)
        inside[static_cast<size_t>(i * o.outer_stride + j * o.feature_stride + k)] = true;
  for (size_t e = 0; e < inside.size(); ++e) {
    bool untouched = true;
    for (size_t b = 0; b < size; ++b) untouched = untouched && u[e * size + b] == 0xFF;
    if (inside[e] && untouched) die(where, "an element was not written");
    if (!inside[e] && !untouched) die(where, "an element between rows was written");
  }
}

struct Types {
  DType x, u, du;
};

void launch(
    const Shape& s, const Types& types, Form form, const CudaForm& how, bool wide_sigma,
    const std::string& where) {
  const bool write = form != Form::kQ, sum = form == Form::kQ || form == Form::kPQ,
             reads_x = form == Form::kP || form == Form::kPQ;
  PerturbArgs a{};
  a.outer = s.outer, a.features = s.features, a.inner = s.inner;
  a.draw.factor = 1.0, a.draw.row0 = 5, a.draw.sigma_is_double = wide_sigma;
  size_t nx = 0, nu = 0, ndu = 0;
  a.x = operand(s, types.x, &nx), a.u = operand(s, types.u, &nu), a.du = operand(s, types.du, &ndu);
  const size_t sigma_bytes = static_cast<size_t>(s.features) * (wide_sigma ? 8 : 4);
  const size_t short_u = planted == "overrun" && write ? size_of(types.u) : 0,
               short_sum = planted == "overrun" && !write ? 4 : 0;

  Buffer seed("seed", 16), sigma("sigma", sigma_bytes), x("x", nx * size_of(types.x)),
      du("du", ndu * size_of(types.du));
  Buffer u("u of " + where, nu * size_of(types.u) - short_u),
      dsigma("dsigma of " + where, sigma_bytes - short_sum);
  const int64_t key[2] = {0x0123456789ABCDEF, 7};
  seed.write(key);
  sigma.write(
      numbers(wide_sigma ? DType::kFloat64 : DType::kFloat32, static_cast<size_t>(s.features))
          .data());
  if (planted != "uninitialised") x.write(numbers(types.x, nx).data());
  du.write(numbers(types.du, ndu).data());
  u.fill(0xFF), dsigma.fill(0xFF);

  a.draw.seed = static_cast<const int64_t*>(seed.data());
  if (form != Form::kNoise) a.draw.sigma = sigma.data();
  a.x.data = reads_x ? x.data() : nullptr;
  a.u.data = write ? u.data() : nullptr;
  a.du.data = sum ? du.data() : nullptr;
  a.dsigma = sum ? dsigma.data() : nullptr;
  Buffer partials("partial sums of " + where, static_cast<size_t>(perturb_cuda_scratch(a, how)));
  if (const char* error = perturb_cuda(a, how, partials.data(), nullptr)) die(where, error);
  require(cudaDeviceSynchronize(), where.c_str());

  if (guarded)  // else initcheck would see a copy of what nobody has written
    for (const Buffer* buffer : {&seed, &sigma, &x, &du, &partials}) buffer->read();
  const auto written = u.read(), total = dsigma.read();
  if (write && planted.empty()) check_written(written, a.u, s, where);
  if (sum && planted.empty())
    check_written(
        total, {nullptr, wide_sigma ? DType::kFloat64 : DType::kFloat32, 0, 1},
        {1, s.features, 1, 0}, where);
}

// Aligned and not, one element, one past a group, gaps between rows; and so many rows that a thread
// takes several.
std::vector<Shape> shapes(bool tall) {
  int device = 0, count = 1;
  require(cudaGetDevice(&device), "cudaGetDevice");
  require(
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
      "cudaDeviceGetAttribute");
  std::vector<Shape> out{{33, 40, 1, 0}, {5, 23, 1, 0}, {9, 16, 1, 3}, {1, 1, 1, 0},
                         {2, 24, 8, 0},  {2, 13, 7, 0}, {2, 8, 12, 5}};
  if (tall)
    out.push_back({int64_t{count} * 1800, 8, 1, 0}),
        out.push_back({int64_t{count} * 110, 8, 16, 0});
  return out;
}

int run() {
  constexpr DType f32 = DType::kFloat32, f64 = DType::kFloat64, f16 = DType::kFloat16,
                  bf16 = DType::kBFloat16;
  const Types types[] = {{bf16, bf16, bf16}, {f16, f16, f16}, {f32, f32, f32}, {f32, bf16, bf16},
                         {f32, f16, f16},    {f64, f64, f64}, {f64, f32, f16}};
  const char* const forms[] = {"noise", "P", "Q", "P and Q"};
  int launches = 0;
  for (size_t t = 0; t < sizeof(types) / sizeof(types[0]); ++t)
    for (const Shape& s : shapes(planted.empty() && (t == 0 || t == 5)))
      for (const CudaForm& how : {CudaForm{true, false, false}, CudaForm{true, true, true}})
        for (const Form form : {Form::kNoise, Form::kP, Form::kQ, Form::kPQ}) {
          char where[160];
          std::snprintf(
              where, sizeof(where), "%s%s, [%" PRId64 ", %" PRId64 ", %" PRId64 "], types %zu",
              how.one_launch ? "one launch, " : "", forms[static_cast<int>(form)], s.outer,
              s.features, s.inner, t);
          // drawn as float32 or float64 alone, or bfloat16
          if (form == Form::kNoise && (t == 1 || t == 3 || t == 4)) continue;
          launch(s, types[t], form, how, types[t].x == f64, where);
          ++launches;
        }
  return launches;
}

// ---- a race, for racecheck ----------------------------------------------------------------------

struct RaceParams {
  int* out;
};

__global__ void forgetful_sum_kernel(const RaceParams p) {
  __shared__ int values[128];
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  // Here a barrier is missing, on purpose.
  if (threadIdx.x == 0) {
    int sum = 0;
    for (int i = 0; i < 128; ++i) sum += values[i];
    *p.out = sum;
  }
}

void race() {
  Buffer out("out", 4);
  RaceParams params{static_cast<int*>(out.data())};
  void* arguments[] = {&params};
  require(
      cudaLaunchKernel(
          reinterpret_cast<const void*>(&forgetful_sum_kernel), dim3(1), dim3(128), arguments, 0,
          nullptr),
      "race");
  require(cudaDeviceSynchronize(), "race");
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  planted = argc > 2 ? argv[2] : "";
  const bool known =
      planted.empty() || planted == "overrun" || planted == "uninitialised" || planted == "race";
  if ((mode != "guards" && mode != "exact") || !known) {
    std::fprintf(stderr, "usage: sanitize_cuda guards|exact [overrun|uninitialised|race]\n");
    return 2;
  }
  guarded = mode == "guards";
  if (planted == "race") race();
  const int launches = run();
  std::printf("sanitize_cuda: %d calls\n", launches);
  return 0;
}
