// The passes of dipkernels/ops/row_blocks.py on a CPU: draws of several samples, their activations
// summed, and back.
#include "activation_named.h"
#include "cpu/parallel.h"
#include "torch.h"

namespace dip {
namespace {

constexpr int64_t kDrawn = 32 * 1024;  // numbers of a draw that a thread takes at a time, about

// Draws beside one another, of the samples from `sample` on: u_s = x + factor sigma z_s, or z_s
// without x and sigma.
void draw_samples(
    Tensor u, std::optional<Tensor> x, std::optional<Tensor> sigma, Tensor seed, int64_t row0,
    int64_t col0, int64_t sample, double factor) {
  STD_TORCH_CHECK(
      u.dim() == 3 && u.is_contiguous(), "u: expected shape (samples, rows, K), contiguous");
  const int64_t samples = u.size(0), k = u.size(2);
  STD_TORCH_CHECK(bool(x) == bool(sigma), "x, sigma: expected both or none of them");
  if (x) {
    check_device(*x, "x", u);
    STD_TORCH_CHECK(
        x->dim() == 2 && x->size(0) == u.size(1) && x->size(1) == k && x->is_contiguous(),
        "x: expected shape (rows, K) of u, contiguous");
  }
  int64_t dim = -1;
  STD_TORCH_CHECK(
      sample <= 65536 - samples, "sample: expected sample + num_samples <= 65536, got ", sample,
      " + ", samples);
  PerturbArgs first{};
  first.draw = draw_of(u, sigma ? &*sigma : nullptr, seed, &dim, row0, col0, sample, factor, false);
  first.outer = u.size(1);
  first.features = k;
  first.inner = 1;
  const auto operand = [&](const Tensor& t) {
    return Operand{const_cast<void*>(t.const_data_ptr()), dtype_of(t.scalar_type(), "data"), k, 1};
  };
  first.u = operand(u);
  if (x) first.x = operand(*x);
  // Threads share out blocks of rows of the samples: there may be more threads than samples.
  const int64_t block = larger(64, kDrawn / larger(1, k));
  const int64_t blocks = ceil_div(first.outer, block), size = first.outer * k;
  const ParallelFor here = [](int64_t total, int64_t, void (*f)(int64_t, int64_t, void*),
                              void* context) { f(0, total, context); };
  const auto move = [](Operand& t, int64_t elements) {
    if (t.data) t.data = static_cast<char*>(t.data) + elements * size_of(t.dtype);
  };
  const char* error = nullptr;
  run_parallel(parallel_for, samples * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t s = i / blocks, row = i % blocks * block, at = row * k;
      PerturbArgs a = first;
      a.outer = smaller(block, first.outer - row);
      a.draw.sample += static_cast<int32_t>(s);
      a.draw.row0 += row;
      move(a.x, at);
      move(a.u, s * size + at);
      if (const char* wrong = perturb_cpu(a, here))
        __atomic_store_n(&error, wrong, __ATOMIC_RELAXED);
    }
  });
  check_done(error);
}

Operand matrix_of(const Tensor& t, const char* name, int64_t a, int64_t b) {
  STD_TORCH_CHECK(
      t.dim() == 2 && t.size(0) == a && t.size(1) == b && (t.stride(1) == 1 || b <= 1), name,
      ": expected shape (", a, ", ", b, ") and elements side by side");
  return {const_cast<void*>(t.const_data_ptr()), dtype_of(t.scalar_type(), name), t.stride(0), 1};
}

SamplesArgs start_samples(
    const Tensor& total, const Tensor& h, const std::string& activation,
    const std::optional<Tensor>& out, double factor) {
  STD_TORCH_CHECK(
      total.dim() == 2 && total.is_contiguous() && total.scalar_type() == ScalarType::Float,
      "total: expected shape (outer, inner), contiguous, float32");
  STD_TORCH_CHECK(
      h.scalar_type() != ScalarType::Double,
      "h: expected float32, float16 or bfloat16, got float64");
  SamplesArgs a{};
  a.outer = total.size(0);
  a.inner = total.size(1);
  STD_TORCH_CHECK(
      h.dim() == 3 && h.size(1) == a.outer && h.size(2) == a.inner &&
          (h.stride(2) == 1 || a.inner <= 1 || h.numel() == 0),
      "h: expected shape (samples, ", a.outer, ", ", a.inner, ") and elements side by side");
  a.samples = h.size(0);
  a.activation = activation == "identity" ? kIdentity : activation_named(activation);
  a.h = operand_of(h);
  a.h.outer_stride = h.stride(1);
  a.sample_stride = h.stride(0);
  a.total = static_cast<float*>(total.mutable_data_ptr());
  a.factor = static_cast<float>(factor);
  if (out) a.out = matrix_of(*out, "out", a.outer, a.inner);
  return a;
}

// Rows that follow one another are one.
void join_rows(SamplesArgs& a) {
  const auto dense = [&](const void* data, int64_t stride) { return !data || stride == a.inner; };
  if (!dense(a.h.data, a.h.outer_stride) || !dense(a.dy.data, a.dy.outer_stride) ||
      !dense(a.out.data, a.out.outer_stride))
    return;
  a.inner *= a.outer;
  a.outer = 1;
}

void act_add(
    Tensor total, Tensor h, std::string activation, std::optional<Tensor> out, double factor) {
  SamplesArgs a = start_samples(total, h, activation, out, factor);
  join_rows(a);
  check_done(samples_cpu(a, parallel_for));
}

void act_add_bwd(
    Tensor total, Tensor h, Tensor dy, std::string activation, std::optional<Tensor> out,
    double factor) {
  SamplesArgs a = start_samples(total, h, activation, out, factor);
  STD_TORCH_CHECK(dy.scalar_type() == h.scalar_type(), "dy: expected h's dtype");
  a.dy = matrix_of(dy, "dy", a.outer, a.inner);
  a.back = true;
  join_rows(a);
  check_done(samples_cpu(a, parallel_for));
}

}  // namespace
}  // namespace dip

STABLE_TORCH_LIBRARY_IMPL(dipkernels, CPU, m) {
  m.impl("act_add", TORCH_BOX(&dip::act_add));
  m.impl("act_add_bwd", TORCH_BOX(&dip::act_add_bwd));
  m.impl("draw_samples", TORCH_BOX(&dip::draw_samples));
}
