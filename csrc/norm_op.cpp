// The operations of dipkernels/ops/norm.py on a CPU: LayerNorm and RMSNorm with noise, and back.
#include <cstring>
#include <tuple>

#include "torch.h"

namespace dip {
namespace {

bool is_centred(const std::string& kind) {
  STD_TORCH_CHECK(kind == "layer" || kind == "rms", "kind: expected layer or rms, got ", kind);
  return kind == "layer";
}

// [..., K] as rows; x itself where its memory is of them.
struct RowsOf {
  Tensor tensor;
  Operand operand;

  explicit RowsOf(const Tensor& x) : tensor(x) {
    auto laid = as_rows(x, x.dim() - 1);
    if (!laid) tensor = torch::stable::contiguous(x), laid = as_rows(tensor, x.dim() - 1);
    operand = *laid;
    operand.data = const_cast<void*>(tensor.const_data_ptr());
  }
};

// A vector of the features, or null.
Operand column_of(std::optional<Tensor>& t, const char* name, const Tensor& x) {
  if (!t) return {};
  check_device(*t, name, x);
  STD_TORCH_CHECK(
      t->dim() == 1 && t->size(0) == x.size(-1), name, ": expected shape (K,) = (", x.size(-1),
      ",)");
  t = torch::stable::contiguous(*t);
  return operand_of(*t);
}

NormArgs start_norm(
    const Tensor& x, std::optional<Tensor>& weight, std::optional<Tensor>& bias, const Draw& draw,
    int64_t dim, const std::string& kind, double offset) {
  STD_TORCH_CHECK(dim == x.dim() - 1, "dim: expected the last dimension, got ", dim);
  NormArgs a{};
  a.features = x.size(-1);
  a.rows = 1;  // of no features too
  for (int64_t d = 0; d < dim; ++d) a.rows *= x.size(d);
  a.centred = is_centred(kind);
  a.offset = offset;
  a.draw = draw;
  a.weight = column_of(weight, "weight", x);
  a.bias = column_of(bias, "bias", x);
  return a;
}

DType stats_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? DType::kFloat64 : DType::kFloat32;
}

void set_stats(NormArgs& a, const Tensor& stats, const Tensor& x) {
  STD_TORCH_CHECK(
      stats.dim() == 2 && stats.size(0) == (a.centred ? 2 : 1) && stats.size(1) == a.rows &&
          stats.is_contiguous() && dtype_of(stats.scalar_type(), "stats") == stats_type(x),
      "stats: expected those of the forward pass");
  char* data = static_cast<char*>(const_cast<void*>(stats.const_data_ptr()));
  a.mean = a.centred ? data : nullptr;
  a.rstd = a.centred ? data + a.rows * static_cast<int64_t>(stats.element_size()) : data;
}

std::tuple<Tensor, Tensor> norm(
    Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias, Tensor sigma, Tensor seed,
    int64_t dim, int64_t row0, int64_t col0, int64_t sample, double factor, bool log_variance,
    std::string kind, double eps, double offset, std::optional<ScalarType> out_dtype) {
  const Draw draw = draw_of(x, &sigma, seed, &dim, row0, col0, sample, factor, log_variance);
  NormArgs a = start_norm(x, weight, bias, draw, dim, kind, offset);
  a.eps = eps;
  const std::array<int64_t, 2> sizes{a.centred ? 2 : 1, a.rows}, strides{a.rows, 1};
  const Tensor stats = empty_strided(x, {sizes.data(), 2}, {strides.data(), 2}, stats_type(x));
  set_stats(a, stats, x);
  if (!a.features)  // of nothing
    std::memset(
        stats.mutable_data_ptr(), 0, static_cast<size_t>(stats.numel()) * stats.element_size());
  const RowsOf rows(x);
  const Tensor u = empty_dense(x, out_dtype.value_or(x.scalar_type()));
  a.x = rows.operand;
  a.u = RowsOf(u).operand;
  check_done(norm_cpu(a, parallel_for));
  return {u, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_bwd(
    Tensor du, Tensor x, Tensor stats, std::optional<Tensor> weight, std::optional<Tensor> bias,
    std::optional<Tensor> sigma, Tensor seed, int64_t dim, int64_t row0, int64_t col0,
    int64_t sample, double factor, bool log_variance, std::string kind, double offset) {
  check_alike(du, "du", x, "x");
  const Draw draw =
      draw_of(x, sigma ? &*sigma : nullptr, seed, &dim, row0, col0, sample, factor, log_variance);
  NormArgs a = start_norm(x, weight, bias, draw, dim, kind, offset);
  set_stats(a, stats, x);
  const auto gradient = [&](const std::optional<Tensor>& t) {
    return t ? empty_vector(*t, a.features) : empty_gradient(x);
  };
  const Tensor dweight = gradient(weight), dbias = gradient(bias), dsigma = gradient(sigma);
  if (weight) a.dweight = operand_of(dweight);
  if (bias) a.dbias = operand_of(dbias);
  if (sigma) a.dsigma = const_cast<void*>(dsigma.const_data_ptr());
  const RowsOf rows(x), du_rows(du);
  const Tensor dx = empty_dense(x, x.scalar_type());
  a.x = rows.operand;
  a.du = du_rows.operand;
  a.dx = RowsOf(dx).operand;
  check_done(norm_cpu(a, parallel_for));
  return {dx, dweight, dbias, dsigma};
}

}  // namespace
}  // namespace dip

STABLE_TORCH_LIBRARY_IMPL(dipkernels, CPU, m) {
  m.impl("norm", TORCH_BOX(&dip::norm));
  m.impl("norm_bwd", TORCH_BOX(&dip::norm_bwd));
}
