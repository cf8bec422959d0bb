// The operations of dipkernels/ops/expectation.py on a CPU: the expectation of an activation, and
// its variance.
#include <cstring>
#include <tuple>

#include "activation_named.h"
#include "torch.h"

namespace dip {
namespace {

ExpectationArgs start_expectation(
    const Tensor& mu, const Tensor& v, const std::string& activation) {
  check_device(v, "v", mu);
  STD_TORCH_CHECK(
      mu.dim() >= 1 && v.dim() == 1 && v.size(0) == mu.size(-1),
      "v: expected shape (N,), N of mu's last dimension");
  const ScalarType type = v.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::Double, "v: expected float32 or float64");
  ExpectationArgs a{};
  a.activation = activation_named(activation);
  a.features = v.size(0);
  a.rows = a.features ? mu.numel() / a.features : 0;
  a.v = v.const_data_ptr();
  a.v_is_double = type == ScalarType::Double;
  return a;
}

Tensor expectation(Tensor mu, Tensor v, std::string activation) {
  mu = torch::stable::contiguous(mu);
  v = torch::stable::contiguous(v);
  ExpectationArgs a = start_expectation(mu, v, activation);
  Tensor y = empty_like(mu, mu.scalar_type());
  a.mu = operand_of(mu);
  a.y = operand_of(y);
  check_done(expectation_cpu(a, parallel_for));
  return y;
}

VarianceArgs start_variance(const Tensor& weight, const Tensor& sigma, bool log_variance) {
  check_device(sigma, "sigma", weight);
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

Tensor affine_variance(Tensor weight, Tensor sigma, bool log_variance) {
  weight = torch::stable::contiguous(weight);
  sigma = torch::stable::contiguous(sigma);
  VarianceArgs a = start_variance(weight, sigma, log_variance);
  Tensor v = empty_vector(sigma, weight.size(0));
  a.v = v.mutable_data_ptr();
  check_done(variance_cpu(a, parallel_for));
  return v;
}

std::tuple<Tensor, Tensor> affine_variance_bwd(
    Tensor dv, Tensor weight, Tensor sigma, bool log_variance, std::optional<Tensor> given) {
  weight = torch::stable::contiguous(weight);
  sigma = torch::stable::contiguous(sigma);
  dv = torch::stable::contiguous(dv);
  VarianceArgs a = start_variance(weight, sigma, log_variance);
  check_device(dv, "dv", weight);
  STD_TORCH_CHECK(
      dv.dim() == 1 && dv.size(0) == weight.size(0) && dv.scalar_type() == sigma.scalar_type(),
      "dv: expected shape (N,) and sigma's dtype");
  Tensor dweight = empty_like(weight, weight.scalar_type()),
         dsigma = empty_vector(sigma, sigma.size(0));
  a.dv = dv.const_data_ptr();
  if (given) {
    check_alike(*given, "given", weight, "weight");
    given = torch::stable::contiguous(*given);
    a.given = operand_of(*given);
  }
  a.dweight = operand_of(dweight);
  a.dsigma = dsigma.mutable_data_ptr();
  if (!weight.size(0))  // a sum over no rows, whose dv says nothing to the kernel
    std::memset(a.dsigma, 0, static_cast<size_t>(dsigma.numel()) * dsigma.element_size());
  check_done(variance_cpu(a, parallel_for));
  return {dweight, dsigma};
}

std::tuple<Tensor, Tensor, Tensor> expectation_bwd(
    Tensor dy, Tensor mu, Tensor v, std::string activation) {
  dy = torch::stable::contiguous(dy);
  mu = torch::stable::contiguous(mu);
  v = torch::stable::contiguous(v);
  ExpectationArgs a = start_expectation(mu, v, activation);
  check_alike(dy, "dy", mu, "mu");
  Tensor dmu = empty_like(mu, mu.scalar_type()), dv = empty_vector(v, v.size(0)),
         sum = empty_vector(v, v.size(0));
  a.mu = operand_of(mu);
  a.dy = operand_of(dy);
  a.dmu = operand_of(dmu);
  a.dv = dv.mutable_data_ptr();
  a.sum = sum.mutable_data_ptr();
  check_done(expectation_cpu(a, parallel_for));
  return {dmu, dv, sum};
}

}  // namespace
}  // namespace dip

STABLE_TORCH_LIBRARY_IMPL(dipkernels, CPU, m) {
  m.impl("expectation", TORCH_BOX(&dip::expectation));
  m.impl("expectation_bwd", TORCH_BOX(&dip::expectation_bwd));
  m.impl("affine_variance", TORCH_BOX(&dip::affine_variance));
  m.impl("affine_variance_bwd", TORCH_BOX(&dip::affine_variance_bwd));
}
