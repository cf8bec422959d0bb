// The operations of dipkernels/ops/perturb.py through torch's stable ABI, and what library.py asks
// of the library.
#include "torch.h"

#include <atomic>
#include <tuple>

#ifdef DIP_CUDA_ARCHS
#include <dlfcn.h>
#endif

#include "cpu/dispatch.h"

namespace dip {
namespace {

// ---- launch -------------------------------------------------------------------------------------

#ifdef DIP_HAS_CPU
void launch_cpu(const Tensor&, const PerturbArgs& a) { check_done(perturb_cpu(a, parallel_for)); }
#endif

#ifdef DIP_CUDA_ARCHS
// Bits of CudaForm that `make gpu-check` times: 1 writes_from_end, 2 sums_from_end, 4 one_launch.
// The first changes no bit and costs no instruction; the others wait to be measured.
constexpr int kDefaultForms = 1;
std::atomic<int>& cuda_forms() {
  static std::atomic<int> forms{kDefaultForms};
  return forms;
}

// The one CUDA function of torch's that the stable headers lack before 2.13. Looked up, so that a
// CPU-only torch loads this library.
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
    partials = torch::stable::new_empty(
        x, IntHeaderOnlyArrayRef(&bytes, 1), std::optional<ScalarType>(ScalarType::Byte));
  }
  check_done(perturb_cuda(a, form, partials ? partials->mutable_data_ptr() : nullptr, stream));
}
#endif

using Launch = void (*)(const Tensor& x, const PerturbArgs& a);

// ---- the operations, for any device -------------------------------------------------------------

template <Launch kLaunch>
Tensor noise(
    Tensor seed, std::vector<int64_t> shape, int64_t dim, int64_t row0, int64_t col0,
    int64_t sample) {
  for (const int64_t size : shape)
    STD_TORCH_CHECK(size >= 0, "shape: expected sizes >= 0, got ", size);
  Tensor z = new_empty(seed, shape);
  PerturbArgs a{};
  a.draw = draw_of(z, nullptr, seed, &dim, row0, col0, sample, 1.0, false);
  in_one_layout(a, dim, {{&z, &a.u, true}}, [&] { kLaunch(z, a); });
  return z;
}

template <Launch kLaunch>
Tensor perturb(
    Tensor x, Tensor sigma, Tensor seed, int64_t dim, int64_t row0, int64_t col0, int64_t sample,
    double factor, bool log_variance, std::optional<ScalarType> out_dtype) {
  PerturbArgs a{};
  a.draw = draw_of(x, &sigma, seed, &dim, row0, col0, sample, factor, log_variance);
  Tensor u = empty_like(x, out_dtype.value_or(x.scalar_type()));
  in_one_layout(a, dim, {{&x, &a.x}, {&u, &a.u, true}}, [&] { kLaunch(x, a); });
  return u;
}

template <Launch kLaunch>
Tensor perturb_bwd(
    Tensor du, Tensor sigma, Tensor seed, int64_t dim, int64_t row0, int64_t col0, int64_t sample,
    double factor, bool log_variance) {
  PerturbArgs a{};
  a.draw = draw_of(du, &sigma, seed, &dim, row0, col0, sample, factor, log_variance);
  Tensor dsigma = empty_vector(sigma, du.size(dim));
  a.dsigma = dsigma.mutable_data_ptr();
  in_one_layout(a, dim, {{&du, &a.du}}, [&] { kLaunch(du, a); });
  return dsigma;
}

template <Launch kLaunch>
std::tuple<Tensor, Tensor> perturb_replay(
    Tensor du, Tensor x, Tensor sigma, Tensor seed, int64_t dim, int64_t row0, int64_t col0,
    int64_t sample, double factor, bool log_variance, std::optional<ScalarType> out_dtype) {
  check_alike(du, "du", x, "x");
  PerturbArgs a{};
  a.draw = draw_of(x, &sigma, seed, &dim, row0, col0, sample, factor, log_variance);
  Tensor dsigma = empty_vector(sigma, x.size(dim));
  a.dsigma = dsigma.mutable_data_ptr();
  Tensor u = empty_like(x, out_dtype.value_or(x.scalar_type()));
  in_one_layout(a, dim, {{&x, &a.x}, {&u, &a.u, true}, {&du, &a.du}}, [&] { kLaunch(x, a); });
  return {u, dsigma};
}

}  // namespace
}  // namespace dip

// The schemas are Python's: an operation exists without this library too.
#ifdef DIP_HAS_CPU
STABLE_TORCH_LIBRARY_IMPL(dipkernels, CPU, m) {
  m.impl("noise", TORCH_BOX(&dip::noise<dip::launch_cpu>));
  m.impl("perturb", TORCH_BOX(&dip::perturb<dip::launch_cpu>));
  m.impl("perturb_bwd", TORCH_BOX(&dip::perturb_bwd<dip::launch_cpu>));
  m.impl("perturb_replay", TORCH_BOX(&dip::perturb_replay<dip::launch_cpu>));
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

// What library.py asks by ctypes.
#define DIP_EXPORT extern "C" __attribute__((visibility("default")))

#ifdef DIP_HAS_CPU
DIP_EXPORT int dip_cpu_capability() { return dip::cpu_capability(); }
DIP_EXPORT int dip_set_cpu_capability(int capability) {
  return dip::set_cpu_capability(capability);
}
#endif
#ifdef DIP_CUDA_ARCHS
// How every later call of the process does it, see cuda_forms: dsigma may differ in its last bits,
// u does not.
DIP_EXPORT void dip_set_cuda_forms(int forms) {
  dip::cuda_forms().store(forms, std::memory_order_relaxed);
}
DIP_EXPORT int dip_cuda_forms() { return dip::cuda_forms().load(std::memory_order_relaxed); }
#endif
// interface: library.INTERFACE, of the schemas that these sources implement.
DIP_EXPORT const char* dip_build_info() {
  return "interface=4"
         "\ncpu="
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
