// The operations of dipkernels/ops.py through torch's stable ABI: checks, layouts, allocation, dispatch. The only file that sees
// torch.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <atomic>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#ifdef DIP_CUDA_ARCHS
#include <dlfcn.h>
#endif

#include "activation.h"
#include "cpu/dispatch.h"
#include "launch.h"

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace dip {
namespace {

// ---- checks: what keeps a kernel inside its buffers; ops.py says the same with Python's exceptions --------------------

DType dtype_of(ScalarType type, const char* name) {
  switch (type) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: STD_TORCH_CHECK(false, name, ": expected float32, float64, float16 or bfloat16");
  }
}

// What a kernel returned: null, or what went wrong.
void check_done(const char* error) { STD_TORCH_CHECK(error == nullptr, "dipkernels: ", error); }

void check_seed(const Tensor& seed) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long, "seed: expected dtype int64");
  STD_TORCH_CHECK(seed.dim() == 1 && seed.size(0) == 2, "seed: expected shape (2,) = (key, stream)");
  STD_TORCH_CHECK(seed.stride(0) == 1, "seed: expected stride 1, got ", seed.stride(0));
}

int64_t check_where(int64_t ndim, int64_t dim, int64_t row0, int64_t col0, int64_t sample, int64_t num_samples) {
  STD_TORCH_CHECK(-ndim <= dim && dim < ndim, "dim: expected a dimension of a tensor of ", ndim, ", got ", dim);
  // ops.py stops at 2^62, from where row_blocks.py counts on.
  const auto fits = [](int64_t origin) { return origin >= 0 && origin <= 3 * (int64_t{1} << 61); };
  STD_TORCH_CHECK(fits(row0) && fits(col0), "row0, col0: expected 0 to 2^62, got ", row0, ", ", col0);
  STD_TORCH_CHECK(num_samples >= 1 && num_samples <= 65536, "num_samples: expected 1 to 65536, got ", num_samples);
  STD_TORCH_CHECK(sample >= 0 && sample <= 65536 - num_samples, "sample: expected sample + num_samples <= 65536, got ", sample);
  return dim < 0 ? dim + ndim : dim;
}

void check_sigma(const Tensor& sigma, int64_t k) {
  STD_TORCH_CHECK(sigma.dim() == 1 && sigma.size(0) == k, "sigma: expected shape (K,) = (", k, ",)");
  const ScalarType type = sigma.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "sigma: expected float32 or float64");
}

void check_same(const Tensor& a, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(a.is_cuda() == x.is_cuda() && a.get_device() == x.get_device(), name, ": expected the device of the data");
}

// ---- layouts ---------------------------------------------------------------------------------------------------------

// Dimensions [first, last) as one of a single stride, or nothing. A dimension of size 1 has no say.
std::optional<int64_t> collapse(const Tensor& t, int64_t first, int64_t last, int64_t skip) {
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t stride = -1, next = 0;
  for (int64_t d = last - 1; d >= first; --d) {
    if (d == skip || sizes[d] == 1) continue;
    if (stride < 0) stride = strides[d];
    else if (strides[d] != next) return std::nullopt;
    next = strides[d] * sizes[d];
  }
  return stride < 0 ? 0 : stride;
}

std::optional<Operand> as_rows(const Tensor& t, int64_t dim) {
  if (t.size(dim) != 1 && t.stride(dim) != 1) return std::nullopt;
  const auto stride = collapse(t, 0, t.dim(), dim);
  if (!stride) return std::nullopt;
  return Operand{nullptr, dtype_of(t.scalar_type(), "data"), *stride, 1};
}

std::optional<Operand> as_channels(const Tensor& t, int64_t dim) {
  const auto outer = collapse(t, 0, dim, dim), inner = collapse(t, dim + 1, t.dim(), dim);
  if (!outer || inner != 1) return std::nullopt;  // an expanded one has stride 0
  return Operand{nullptr, dtype_of(t.scalar_type(), "data"), *outer, t.stride(dim)};
}

int32_t code_of(DType type) {
  switch (type) {
    case DType::kFloat32: return aoti_torch_dtype_float32();
    case DType::kFloat64: return aoti_torch_dtype_float64();
    case DType::kFloat16: return aoti_torch_dtype_float16();
    default: return aoti_torch_dtype_bfloat16();
  }
}

// The shim keeps torch's own words for stderr.
void check_allocated(int32_t error, IntHeaderOnlyArrayRef sizes) {
  if (error == AOTI_TORCH_SUCCESS) return;
  std::string shape;
  for (const int64_t size : sizes) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
  STD_TORCH_CHECK(false, "dipkernels: out of memory: no result of shape (", shape, ") could be allocated");
}

// Straight from the allocator's shim: the dispatcher would cost a small layer microseconds.
Tensor empty_strided(const Tensor& like, IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides, DType type) {
  AtenTensorHandle handle;
  const int32_t device = like.is_cuda() ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
  const auto rank = static_cast<int64_t>(sizes.size());
  check_allocated(
      aoti_torch_empty_strided(rank, sizes.data(), strides.data(), code_of(type), device, like.get_device_index(), &handle),
      sizes);
  return Tensor(handle);
}

Tensor empty_vector(const Tensor& like, int64_t size) {
  const int64_t stride = 1;
  return empty_strided(like, {&size, 1}, {&stride, 1}, dtype_of(like.scalar_type(), "sigma"));
}

// torch.empty_like: x's strides where x is dense.
Tensor empty_like(const Tensor& t, ScalarType type) {
  if (t.is_contiguous()) return empty_strided(t, t.sizes(), t.strides(), dtype_of(type, "dtype"));
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{
      from(t),           from(std::optional<ScalarType>(type)), from(std::nullopt), from(std::nullopt), from(std::nullopt),
      from(std::nullopt)};
  check_allocated(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION), t.sizes());
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// torch::stable::new_empty, float32, that says what failed.
Tensor new_empty(const Tensor& like, const std::vector<int64_t>& shape) {
  try {
    return torch::stable::new_empty(like, shape, std::optional<ScalarType>(ScalarType::Float));
  } catch (const std::exception&) {
    check_allocated(!AOTI_TORCH_SUCCESS, shape);
    throw;
  }
}

struct View {
  const Tensor* tensor;
  Operand* operand;
};

// Gives every operand its strides in one layout that all tensors have; false where there is none.
bool lay_out(PerturbArgs& a, int64_t dim, const std::vector<View>& views) {
  const Tensor& first = *views[0].tensor;
  const auto fit = [&](auto&& layout) {
    for (const View& v : views) {
      const auto operand = layout(*v.tensor, dim);
      if (!operand) return false;
      *v.operand = *operand;
      v.operand->data = const_cast<void*>(v.tensor->const_data_ptr());
    }
    return true;
  };
  const auto sizes = first.sizes();
  a.features = sizes[dim];
  a.outer = a.inner = 1;
  for (int64_t d = 0; d < first.dim(); ++d)
    if (d != dim) (d < dim ? a.outer : a.inner) *= sizes[d];
  if (first.numel() == 0) {  // its strides say nothing
    for (const View& v : views)
      *v.operand = {const_cast<void*>(v.tensor->const_data_ptr()), dtype_of(v.tensor->scalar_type(), "data"), 0, 1};
    a.outer *= a.inner;
    a.inner = 1;
    return true;
  }
  if (fit(as_rows)) {
    a.outer *= a.inner;
    a.inner = 1;
    return true;
  }
  return a.inner > 1 && fit(as_channels);
}

// ---- launch ----------------------------------------------------------------------------------------------------------

void parallel_for(int64_t total, int64_t grain, void (*f)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) { f(begin, end, context); });
}

#ifdef DIP_HAS_CPU
void launch_cpu(const Tensor&, const PerturbArgs& a) { check_done(perturb_cpu(a, parallel_for)); }
#endif

#ifdef DIP_CUDA_ARCHS
// Bits of CudaForm that `make gpu-check` times: 1 writes_from_end, 2 sums_from_end, 4 one_launch. The first changes no bit and
// costs no instruction; the others wait to be measured.
constexpr int kDefaultForms = 1;
std::atomic<int>& cuda_forms() {
  static std::atomic<int> forms{kDefaultForms};
  return forms;
}

// The one CUDA function of torch's that the stable headers lack before 2.13. Looked up, so that a CPU-only torch loads this
// library.
using FindStream = int32_t (*)(int32_t device, void** stream);
FindStream find_stream() {
  void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  void* function = torch_cuda ? dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream") : nullptr;
  STD_TORCH_CHECK(function != nullptr, "dipkernels: CUDA tensors need a torch built for CUDA");
  return reinterpret_cast<FindStream>(function);
}

void launch_cuda(const Tensor& x, const PerturbArgs& a) {
  static const FindStream current_stream = find_stream();
  const int forms = cuda_forms().load(std::memory_order_relaxed);
  const CudaForm form{(forms & 1) != 0, (forms & 2) != 0, (forms & 4) != 0};
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STD_TORCH_CHECK(current_stream(device, &stream) == 0, "dipkernels: no current CUDA stream");
  // From torch's allocator, so that a captured graph owns it; freed in stream order.
  std::optional<Tensor> partials;
  if (const int64_t bytes = perturb_cuda_scratch(a, form)) {
    partials = torch::stable::new_empty(x, IntHeaderOnlyArrayRef(&bytes, 1), std::optional<ScalarType>(ScalarType::Byte));
  }
  check_done(perturb_cuda(a, form, partials ? partials->mutable_data_ptr() : nullptr, stream));
}
#endif

using Launch = void (*)(const Tensor& x, const PerturbArgs& a);

// ---- the operations, for any device ----------------------------------------------------------------------------------

struct Where {
  int64_t dim, row0, col0, sample, num_samples;
};

PerturbArgs start(const Tensor& seed, const Tensor& x, const Where& w, int64_t* dim) {
  check_seed(seed);
  check_same(seed, "seed", x);
  *dim = check_where(x.dim(), w.dim, w.row0, w.col0, w.sample, w.num_samples);
  PerturbArgs a{};
  a.seed = static_cast<const int64_t*>(seed.const_data_ptr());
  a.row0 = w.row0;
  a.col0 = w.col0;
  a.sample = static_cast<int32_t>(w.sample);
  a.num_samples = static_cast<int32_t>(w.num_samples);
  a.factor = 1.0;
  return a;
}

Tensor set_sigma(PerturbArgs& a, const Tensor& sigma, const Tensor& x, int64_t dim, double factor, bool log_variance) {
  check_same(sigma, "sigma", x);
  check_sigma(sigma, x.size(dim));
  const Tensor dense = sigma.stride(0) == 1 || sigma.size(0) == 1 ? sigma : torch::stable::contiguous(sigma);
  a.sigma = dense.const_data_ptr();
  a.sigma_is_double = sigma.scalar_type() == ScalarType::Double;
  a.factor = factor;
  a.log_variance = log_variance;
  return dense;
}

void check_same_shape(const Tensor& a, const char* name, const Tensor& x, const char* like) {
  bool same = a.dim() == x.dim();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = a.size(d) == x.size(d);
  STD_TORCH_CHECK(same, name, ": expected the shape of ", like);
}

template <Launch kLaunch>
Tensor noise(
    Tensor seed, std::vector<int64_t> shape, int64_t dim, int64_t row0, int64_t col0, int64_t sample, int64_t num_samples) {
  Tensor z = new_empty(seed, shape);
  PerturbArgs a = start(seed, z, {dim, row0, col0, sample, num_samples}, &dim);
  STD_TORCH_CHECK(lay_out(a, dim, {{&z, &a.u}}), "noise: no layout");  // a new tensor is contiguous, so there is one
  kLaunch(z, a);
  return z;
}

template <Launch kLaunch>
Tensor perturb(
    Tensor x, Tensor sigma, Tensor seed, int64_t dim, int64_t row0, int64_t col0, int64_t sample, int64_t num_samples,
    double factor, bool log_variance, std::optional<ScalarType> out_dtype) {
  PerturbArgs a = start(seed, x, {dim, row0, col0, sample, num_samples}, &dim);
  const Tensor keep = set_sigma(a, sigma, x, dim, factor, log_variance);
  const ScalarType type = out_dtype.value_or(x.scalar_type());
  Tensor u = empty_like(x, type);
  if (lay_out(a, dim, {{&x, &a.x}, {&u, &a.u}})) {
    kLaunch(x, a);
    return u;
  }
  const Tensor dense = torch::stable::contiguous(x);
  Tensor dense_u = empty_like(dense, type);
  lay_out(a, dim, {{&dense, &a.x}, {&dense_u, &a.u}});
  kLaunch(x, a);
  return torch::stable::copy_(u, dense_u);
}

template <Launch kLaunch>
Tensor perturb_bwd(
    Tensor du, Tensor sigma, Tensor seed, int64_t dim, int64_t row0, int64_t col0, int64_t sample, int64_t num_samples,
    double factor, bool log_variance) {
  PerturbArgs a = start(seed, du, {dim, row0, col0, sample, num_samples}, &dim);
  const Tensor keep = set_sigma(a, sigma, du, dim, factor, log_variance);
  Tensor dsigma = empty_vector(sigma, du.size(dim));
  a.dsigma = dsigma.mutable_data_ptr();
  Tensor dense = du;
  if (!lay_out(a, dim, {{&dense, &a.du}})) {
    dense = torch::stable::contiguous(du);
    lay_out(a, dim, {{&dense, &a.du}});
  }
  kLaunch(du, a);
  return dsigma;
}

template <Launch kLaunch>
std::tuple<Tensor, Tensor> perturb_replay(
    Tensor du, Tensor x, Tensor sigma, Tensor seed, int64_t dim, int64_t row0, int64_t col0, int64_t sample, int64_t num_samples,
    double factor, bool log_variance, std::optional<ScalarType> out_dtype) {
  check_same(du, "du", x);
  check_same_shape(du, "du", x, "x");
  PerturbArgs a = start(seed, x, {dim, row0, col0, sample, num_samples}, &dim);
  const Tensor keep = set_sigma(a, sigma, x, dim, factor, log_variance);
  const ScalarType type = out_dtype.value_or(x.scalar_type());
  Tensor dsigma = empty_vector(sigma, x.size(dim));
  a.dsigma = dsigma.mutable_data_ptr();
  Tensor u = empty_like(x, type);
  if (lay_out(a, dim, {{&x, &a.x}, {&u, &a.u}, {&du, &a.du}})) {
    kLaunch(x, a);
    return {u, dsigma};
  }
  const Tensor dense = torch::stable::contiguous(x), dense_du = torch::stable::contiguous(du);
  Tensor dense_u = empty_like(dense, type);
  lay_out(a, dim, {{&dense, &a.x}, {&dense_u, &a.u}, {&dense_du, &a.du}});
  kLaunch(x, a);
  torch::stable::copy_(u, dense_u);
  return {u, dsigma};
}

// ---- the expectation of an activation ------------------------------------------------------------------------------------

#ifdef DIP_HAS_CPU
int activation_named(const std::string& name) {
  for (int kind = 0; kind < kNumActivations; ++kind)
    if (name == kActivationNames[kind]) return kind;
  STD_TORCH_CHECK(false, "activation: expected relu, gelu, gelu_tanh, silu or tanh, got ", name);
}

ActivationArgs start_activation(const Tensor& mu, const Tensor& v, const std::string& activation) {
  check_same(v, "v", mu);
  STD_TORCH_CHECK(mu.dim() >= 1 && v.dim() == 1 && v.size(0) == mu.size(-1), "v: expected shape (N,), N of mu's last dimension");
  const ScalarType type = v.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "v: expected float32 or float64");
  ActivationArgs a{};
  a.kind = activation_named(activation);
  a.features = v.size(0);
  a.rows = a.features ? mu.numel() / a.features : 0;
  a.v = v.const_data_ptr();
  a.v_is_double = type == ScalarType::Double;
  return a;
}

Operand operand_of(const Tensor& t) { return {const_cast<void*>(t.const_data_ptr()), dtype_of(t.scalar_type(), "data"), 0, 1}; }

Tensor activation(Tensor mu, Tensor v, std::string activation) {
  mu = torch::stable::contiguous(mu);
  v = torch::stable::contiguous(v);
  ActivationArgs a = start_activation(mu, v, activation);
  Tensor y = empty_like(mu, mu.scalar_type());
  a.mu = operand_of(mu);
  a.y = operand_of(y);
  check_done(activation_cpu(a, parallel_for));
  return y;
}

VarianceArgs start_variance(const Tensor& weight, const Tensor& sigma, bool log_variance) {
  check_same(sigma, "sigma", weight);
  STD_TORCH_CHECK(weight.dim() == 2, "weight: expected shape (N, K)");
  check_sigma(sigma, weight.size(1));
  VarianceArgs a{};
  a.rows = weight.size(0);
  a.features = weight.size(1);
  a.weight = operand_of(weight);
  a.sigma = sigma.const_data_ptr();
  a.is_double = sigma.scalar_type() == ScalarType::Double;
  a.log_variance = log_variance;
  return a;
}

Tensor activation_variance(Tensor weight, Tensor sigma, bool log_variance) {
  weight = torch::stable::contiguous(weight);
  sigma = torch::stable::contiguous(sigma);
  VarianceArgs a = start_variance(weight, sigma, log_variance);
  Tensor v = empty_vector(sigma, weight.size(0));
  a.v = v.mutable_data_ptr();
  check_done(variance_cpu(a, parallel_for));
  return v;
}

std::tuple<Tensor, Tensor> activation_variance_bwd(
    Tensor dv, Tensor weight, Tensor sigma, bool log_variance, std::optional<Tensor> given) {
  weight = torch::stable::contiguous(weight);
  sigma = torch::stable::contiguous(sigma);
  dv = torch::stable::contiguous(dv);
  VarianceArgs a = start_variance(weight, sigma, log_variance);
  check_same(dv, "dv", weight);
  STD_TORCH_CHECK(
      dv.dim() == 1 && dv.size(0) == weight.size(0) && dv.scalar_type() == sigma.scalar_type(),
      "dv: expected shape (N,) and sigma's dtype");
  Tensor dweight = empty_like(weight, weight.scalar_type()), dsigma = empty_vector(sigma, sigma.size(0));
  a.dv = dv.const_data_ptr();
  if (given) {
    check_same(*given, "given", weight);
    check_same_shape(*given, "given", weight, "weight");
    given = torch::stable::contiguous(*given);
    a.given = operand_of(*given);
  }
  a.dweight = operand_of(dweight);
  a.dsigma = dsigma.mutable_data_ptr();
  check_done(variance_cpu(a, parallel_for));
  return {dweight, dsigma};
}

std::tuple<Tensor, Tensor, Tensor> activation_bwd(Tensor dy, Tensor mu, Tensor v, std::string activation) {
  check_same(dy, "dy", mu);
  dy = torch::stable::contiguous(dy);
  mu = torch::stable::contiguous(mu);
  v = torch::stable::contiguous(v);
  ActivationArgs a = start_activation(mu, v, activation);
  check_same_shape(dy, "dy", mu, "mu");
  Tensor dmu = empty_like(mu, mu.scalar_type()), dv = empty_vector(v, v.size(0)), sum = empty_vector(v, v.size(0));
  a.mu = operand_of(mu);
  a.dy = operand_of(dy);
  a.dmu = operand_of(dmu);
  a.dv = dv.mutable_data_ptr();
  a.sum = sum.mutable_data_ptr();
  check_done(activation_cpu(a, parallel_for));
  return {dmu, dv, sum};
}

// ---- the mean behind an activation ---------------------------------------------------------------------------------------

// Draws beside one another: u_s = x + factor sigma z_s and z_s of the samples from `sample` on, into what is given.
void draw_samples(
    std::optional<Tensor> u, std::optional<Tensor> z, Tensor x, Tensor sigma, Tensor seed, int64_t row0, int64_t col0,
    int64_t sample, double factor) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "x: expected shape (rows, K), contiguous");
  STD_TORCH_CHECK(u || z, "u, z: expected one of them at least");
  const int64_t samples = (u ? *u : *z).size(0), size = x.numel();
  const auto check = [&](const std::optional<Tensor>& t, const char* name) {
    if (!t) return;
    check_same(*t, name, x);
    STD_TORCH_CHECK(
        t->dim() == 3 && t->size(0) == samples && t->size(1) == x.size(0) && t->size(2) == x.size(1) && t->is_contiguous(), name,
        ": expected shape (samples, rows, K), contiguous");
  };
  check(u, "u");
  check(z, "z");
  int64_t dim = -1;
  PerturbArgs first = start(seed, x, {-1, row0, col0, sample, samples}, &dim);
  const Tensor keep = set_sigma(first, sigma, x, dim, factor, false);
  first.num_samples = 1;
  first.outer = x.size(0);
  first.features = x.size(1);
  first.inner = 1;
  const auto operand = [&](const Tensor& t) {
    return Operand{const_cast<void*>(t.const_data_ptr()), dtype_of(t.scalar_type(), "data"), first.features, 1};
  };
  if (u) first.x = operand(x), first.u = operand(*u);
  if (z) first.z = operand(*z);
  struct Job {
    const PerturbArgs& first;
    int64_t size, bytes_u, bytes_z;
    ParallelFor inside;
    const char* error;
  } job{first,        size,   u ? static_cast<int64_t>(u->element_size()) : 0, z ? static_cast<int64_t>(z->element_size()) : 0,
        parallel_for, nullptr};
  const auto draw = [](int64_t begin, int64_t end, void* context) {
    Job& j = *static_cast<Job*>(context);
    for (int64_t s = begin; s < end; ++s) {
      PerturbArgs a = j.first;
      a.sample += static_cast<int32_t>(s);
      if (a.u.data) a.u.data = static_cast<char*>(a.u.data) + s * j.size * j.bytes_u;
      if (a.z.data) a.z.data = static_cast<char*>(a.z.data) + s * j.size * j.bytes_z;
      if (const char* error = perturb_cpu(a, j.inside)) __atomic_store_n(&j.error, error, __ATOMIC_RELAXED);
    }
  };
  if (samples < 2) {
    draw(0, samples, &job);
  } else {  // a thread for a sample: handing out parts of each would take as long as a small one
    job.inside = [](int64_t total, int64_t, void (*f)(int64_t, int64_t, void*), void* context) { f(0, total, context); };
    parallel_for(samples, 1, draw, &job);
  }
  check_done(job.error);
}

// t as [samples, a, b], whatever its strides but the last.
Samples samples_of(const Tensor& t, const char* name, int64_t a, int64_t b, DType dtype) {
  STD_TORCH_CHECK(
      t.dim() == 3 && t.size(1) == a && t.size(2) == b && (t.stride(2) == 1 || b <= 1 || t.numel() == 0), name,
      ": expected shape (samples, ", a, ", ", b, ") and elements side by side");
  return {const_cast<void*>(t.const_data_ptr()), dtype, t.stride(0), t.stride(1)};
}

Operand matrix_of(const Tensor& t, const char* name, int64_t a, int64_t b) {
  STD_TORCH_CHECK(
      t.dim() == 2 && t.size(0) == a && t.size(1) == b && (t.stride(1) == 1 || b <= 1), name, ": expected shape (", a, ", ", b,
      ") and elements side by side");
  return {const_cast<void*>(t.const_data_ptr()), dtype_of(t.scalar_type(), name), t.stride(0), 1};
}

SamplesArgs start_samples(
    const Tensor& total, const Tensor& h, const std::string& activation, const std::optional<Tensor>& slopes, int64_t first,
    int64_t samples, bool is_back, const std::optional<Tensor>& out, double factor) {
  STD_TORCH_CHECK(
      total.dim() == 2 && total.is_contiguous() && total.scalar_type() == ScalarType::Float,
      "total: expected shape (outer, inner), contiguous, float32");
  STD_TORCH_CHECK(h.scalar_type() != ScalarType::Double, "h: expected float32, float16 or bfloat16, got float64");
  SamplesArgs a{};
  a.outer = total.size(0);
  a.inner = total.size(1);
  a.samples = samples;
  a.kind = activation == "identity" ? kIdentity : activation_named(activation);
  a.h = samples_of(h, "h", a.outer, a.inner, dtype_of(h.scalar_type(), "h"));
  a.total = static_cast<float*>(total.mutable_data_ptr());
  a.factor = static_cast<float>(factor);
  if (out) a.out = matrix_of(*out, "out", a.outer, a.inner);
  if (!slopes) return a;
  const bool is_byte = slopes->scalar_type() == ScalarType::Byte, bits = a.kind == kReluActivation;
  STD_TORCH_CHECK(
      is_byte || (!bits && slopes->scalar_type() == h.scalar_type()), "slopes: expected uint8, or h's dtype but for relu");
  STD_TORCH_CHECK(first >= 0 && first <= 65536, "first: expected 0 to 65536, got ", first);
  const DType dtype = is_byte ? DType::kFloat32 : a.h.dtype;  // of bytes it says nothing
  a.slopes =
      is_back ? samples_of(*slopes, "slopes", a.inner, a.outer, dtype) : samples_of(*slopes, "slopes", a.outer, a.inner, dtype);
  a.form = bits ? SlopeForm::kBits : is_byte ? SlopeForm::kCodes : SlopeForm::kValues;
  a.first = first;
  const int64_t held = slopes->size(0) * (bits ? 8 : 1) - first;
  a.num_slopes = held < 0 ? 0 : held < samples ? held : samples;
  return a;
}

void run_samples(const SamplesArgs& a) { check_done(samples_cpu(a, parallel_for)); }

void act_add(
    Tensor total, Tensor h, std::string activation, std::optional<Tensor> slopes, int64_t first, std::optional<Tensor> out,
    double factor) {
  SamplesArgs a = start_samples(total, h, activation, slopes, first, h.size(0), false, out, factor);
  const auto dense = [&](bool absent, int64_t stride) { return absent || stride == a.inner; };
  if (dense(!a.h.data, a.h.outer_stride) && dense(!a.slopes.data, a.slopes.outer_stride) &&
      dense(!a.out.data, a.out.outer_stride)) {
    a.inner *= a.outer;  // rows that follow one another are one
    a.outer = 1;
  }
  run_samples(a);
}

Tensor act_add_bwd(
    Tensor total, Tensor h, std::optional<Tensor> bias, Tensor dy, std::string activation, std::optional<Tensor> slopes,
    int64_t first, int64_t samples, std::optional<Tensor> out, double factor) {
  STD_TORCH_CHECK(samples >= 1 && samples <= 65536, "num_samples: expected 1 to 65536, got ", samples);
  SamplesArgs a = start_samples(total, h, activation, slopes, first, samples, true, out, factor);
  STD_TORCH_CHECK(
      h.size(0) == samples - a.num_slopes, "h: expected the ", samples - a.num_slopes, " samples without slopes, got ",
      h.size(0));
  STD_TORCH_CHECK(dy.scalar_type() == h.scalar_type(), "dy: expected h's dtype");
  a.dy = matrix_of(dy, "dy", a.inner, a.outer);
  if (bias) {
    STD_TORCH_CHECK(
        bias->dim() == 1 && bias->size(0) == a.outer && bias->is_contiguous() && bias->scalar_type() != ScalarType::Double,
        "bias: expected shape (", a.outer, ",), contiguous, float32, float16 or bfloat16");
    a.bias = operand_of(*bias);
  }
  const std::array<int64_t, 3> sizes{a.outer, samples, a.inner}, strides{samples * a.inner, a.inner, 1};
  Tensor dh = empty_strided(h, {sizes.data(), 3}, {strides.data(), 3}, a.h.dtype);
  a.dh = {dh.mutable_data_ptr(), a.h.dtype, a.inner, samples * a.inner};
  run_samples(a);
  return dh;
}
#endif

}  // namespace
}  // namespace dip

// The schemas are ops.py's: an operation exists without this library too.
#ifdef DIP_HAS_CPU
STABLE_TORCH_LIBRARY_IMPL(dipkernels, CPU, m) {
  m.impl("noise", TORCH_BOX(&dip::noise<dip::launch_cpu>));
  m.impl("perturb", TORCH_BOX(&dip::perturb<dip::launch_cpu>));
  m.impl("perturb_bwd", TORCH_BOX(&dip::perturb_bwd<dip::launch_cpu>));
  m.impl("perturb_replay", TORCH_BOX(&dip::perturb_replay<dip::launch_cpu>));
  m.impl("activation", TORCH_BOX(&dip::activation));
  m.impl("activation_bwd", TORCH_BOX(&dip::activation_bwd));
  m.impl("activation_variance", TORCH_BOX(&dip::activation_variance));
  m.impl("activation_variance_bwd", TORCH_BOX(&dip::activation_variance_bwd));
  m.impl("act_add", TORCH_BOX(&dip::act_add));
  m.impl("act_add_bwd", TORCH_BOX(&dip::act_add_bwd));
  m.impl("draw_samples", TORCH_BOX(&dip::draw_samples));
}
#endif

#ifdef DIP_CUDA_ARCHS
STABLE_TORCH_LIBRARY_IMPL(dipkernels, CUDA, m) {
  m.impl("noise", TORCH_BOX(&dip::noise<dip::launch_cuda>));
  m.impl("perturb", TORCH_BOX(&dip::perturb<dip::launch_cuda>));
  m.impl("perturb_bwd", TORCH_BOX(&dip::perturb_bwd<dip::launch_cuda>));
  m.impl("perturb_replay", TORCH_BOX(&dip::perturb_replay<dip::launch_cuda>));
}
#endif

// What backends.py asks by ctypes.
#define DIP_EXPORT extern "C" __attribute__((visibility("default")))

#ifdef DIP_HAS_CPU
DIP_EXPORT int dip_cpu_capability() { return dip::cpu_capability(); }
DIP_EXPORT int dip_set_cpu_capability(int capability) { return dip::set_cpu_capability(capability); }
#endif
#ifdef DIP_CUDA_ARCHS
// How every later call of the process does it, see cuda_forms: dsigma may differ in its last bits, u does not.
DIP_EXPORT void dip_set_cuda_forms(int forms) { dip::cuda_forms().store(forms, std::memory_order_relaxed); }
DIP_EXPORT int dip_cuda_forms() { return dip::cuda_forms().load(std::memory_order_relaxed); }
// Null where the kernels can run on the current device, else what is missing, in one line: an older driver, an older GPU.
DIP_EXPORT const char* dip_cuda_problem() { return dip::cuda_problem(); }
#endif
DIP_EXPORT const char* dip_build_info() {
  return "cpu="
#ifdef DIP_HAS_CPU
         "portable"
#endif
#ifdef DIP_HAS_X86
         " avx2 avx512"
#endif
         "\ncuda="
#ifdef DIP_CUDA_ARCHS
      DIP_CUDA_ARCHS
#endif
         "\ntoolkit="
#ifdef DIP_CUDA_TOOLKIT
      DIP_CUDA_TOOLKIT
#endif
         "\ncompiler=" __VERSION__;
}
