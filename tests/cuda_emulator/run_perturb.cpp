// Runs perturb_cuda on cases from standard input and writes u and dsigma to standard output; tests/test_cuda_emulated.py speaks to it.
// Buffers are as small as their tensors, so that -fsanitize=address sees any access outside; outputs start as NaN. With several
// streams the case runs once on each, their blocks interleaved, and every run must give the same bytes.
#include "../../csrc/cuda/perturb.cu"

namespace {

struct Case {
  int64_t outer, features, inner, row0, col0, sample, num_samples, sigma_dtype, log_variance, exact, order, multiprocessors;
  int64_t forms, streams, capture;  // forms: bits as in ops.cpp. capture: 1: streams capture, 2: there are no tickets left
  double factor;
  int64_t seed[2];
  struct {
    int64_t dtype, outer_stride, feature_stride, bytes, misalignment;  // dtype -1: absent
  } x, u, du;
};
static_assert(sizeof(Case) == 33 * 8);

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
  bool equals(const Buffer& other) const { return bytes == other.bytes && !std::memcmp(data, other.data, bytes); }
};

template <class S>
dip::Operand operand(const S& s, const Buffer& b) {
  return {b.data, static_cast<dip::DType>(s.dtype), s.outer_stride, s.feature_stride};
}

struct Run {
  Buffer u, dsigma;
};

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
    const Buffer seed(16, 0, false);
    std::memcpy(seed.data, c.seed, 16);
    a.seed = reinterpret_cast<const int64_t*>(seed.data);
    if (c.sigma_dtype >= 0) a.sigma = sigma.data;
    if (c.x.dtype >= 0) a.x = operand(c.x, x);
    emulator::order = static_cast<emulator::Order>(c.order);
    emulator::multiprocessors = static_cast<int>(c.multiprocessors);
    emulator::is_capturing = c.capture != 0;
    emulator::is_queueing = c.streams > 1;
    emulator::launches = 0;
    emulator::first_read = nullptr;
    const dip::CudaForm form{(c.forms & 1) != 0, (c.forms & 2) != 0, (c.forms & 4) != 0};
    while (c.capture == 2 && dip::take_tickets(nullptr, dip::kStreamTickets) >= 0) continue;
    std::vector<Run> runs;
    std::vector<Buffer> scratch;
    for (int64_t i = 0; i < c.streams; ++i) {
      Run& run = runs.emplace_back(
          Run{Buffer(c.u.bytes, c.u.misalignment, false), Buffer(c.du.dtype < 0 ? 0 : sigma_bytes, 0, false)});
      if (c.u.dtype >= 0) a.u = operand(c.u, run.u);
      if (c.du.dtype >= 0) a.du = operand(c.du, du), a.dsigma = run.dsigma.data;
      const Buffer& partials = scratch.emplace_back(dip::perturb_cuda_scratch(a, form), 0, false);
      if (const char* error = dip::perturb_cuda(a, form, partials.data, reinterpret_cast<void*>(i))) {
        std::fprintf(stderr, "%s\n", error);
        return 2;
      }
    }
    emulator::run_queued();
    for (const Run& run : runs)
      if (!run.u.equals(runs[0].u) || !run.dsigma.equals(runs[0].dsigma)) emulator::fail("streams differ");
    for (unsigned ticket : dip::tickets)
      if (ticket) emulator::fail("a ticket is not zero again");
    runs[0].u.write();
    runs[0].dsigma.write();
    const char* first = static_cast<const char*>(emulator::first_read);
    const int64_t said[] = {emulator::launches, first ? first - (c.du.dtype >= 0 && c.x.dtype < 0 ? du : x).data : 0};
    std::fwrite(said, sizeof(said), 1, stdout);
  }
}
