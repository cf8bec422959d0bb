// Runs perturb_cuda on cases from standard input and writes u and dsigma to standard output; tests/test_cuda_emulated.py speaks to it.
// Buffers are as small as their tensors, so that -fsanitize=address sees any access outside; outputs start as NaN.
#include "../../csrc/cuda/perturb.cu"

namespace {

struct Case {
  int64_t outer, features, inner, row0, col0, sample, num_samples, sigma_dtype, log_variance, exact, order, multiprocessors;
  double factor;
  int64_t seed[2];
  struct {
    int64_t dtype, outer_stride, feature_stride, bytes, misalignment;  // dtype -1: absent
  } x, u, du;
};
static_assert(sizeof(Case) == 30 * 8);

bool read_all(void* p, size_t n) { return std::fread(p, 1, n, stdin) == n; }

struct Buffer {
  std::unique_ptr<char[]> memory;
  char* data = nullptr;
  size_t bytes;
  Buffer(size_t bytes, size_t misalignment, bool filled) : memory(new char[bytes + misalignment]), data(memory.get() + misalignment), bytes(bytes) {
    std::memset(memory.get(), 0xFF, bytes + misalignment);
    if (filled && !read_all(data, bytes)) std::exit(3);
  }
  void write() const { std::fwrite(data, 1, bytes, stdout); }
};

template <class S>
dip::Operand operand(const S& s, const Buffer& b) {
  return {b.data, static_cast<dip::DType>(s.dtype), s.outer_stride, s.feature_stride};
}

}  // namespace

int main() {
  Case c;
  while (read_all(&c, sizeof(c))) {
    dip::PerturbArgs a{};
    a.outer = c.outer, a.features = c.features, a.inner = c.inner;
    a.row0 = c.row0, a.col0 = c.col0;
    a.sample = static_cast<int32_t>(c.sample), a.num_samples = static_cast<int32_t>(c.num_samples);
    a.log_variance = c.log_variance, a.factor = c.factor;
    a.sigma_is_double = c.sigma_dtype == 1;
    const size_t sigma_bytes = c.sigma_dtype < 0 ? 0 : c.features * (a.sigma_is_double ? 8 : 4);
    const Buffer x(c.x.bytes, c.x.misalignment, true), du(c.du.bytes, c.du.misalignment, true), sigma(sigma_bytes, 0, true);
    const Buffer u(c.u.bytes, c.u.misalignment, false), dsigma(c.du.dtype < 0 ? 0 : sigma_bytes, 0, false);
    const Buffer seed(16, 0, false);
    std::memcpy(seed.data, c.seed, 16);
    a.seed = reinterpret_cast<const int64_t*>(seed.data);
    if (c.sigma_dtype >= 0) a.sigma = sigma.data;
    if (c.x.dtype >= 0) a.x = operand(c.x, x);
    if (c.u.dtype >= 0) a.u = operand(c.u, u);
    if (c.du.dtype >= 0) a.du = operand(c.du, du), a.dsigma = dsigma.data;
    emulator::order = static_cast<emulator::Order>(c.order);
    emulator::multiprocessors = static_cast<int>(c.multiprocessors);
    const Buffer partials(dip::perturb_cuda_scratch(a), 0, false);
    if (const char* error = dip::perturb_cuda(a, c.exact, partials.data, nullptr)) {
      std::fprintf(stderr, "%s\n", error);
      return 2;
    }
    u.write();
    dsigma.write();
  }
}
