// The operations of dipkernels/ops/gate.py on a CPU: an activation, or a gated product, with noise,
// and back.
#include <tuple>

#include "activation_named.h"
#include "torch.h"

namespace dip {
namespace {

// b null: the activation alone.
Tensor run_forward(
    const Tensor& a, const Tensor* b, const Draw& draw, int64_t dim, const std::string& activation,
    std::optional<ScalarType> out_dtype) {
  GateArgs args{};
  args.draw = draw;
  args.kind = activation_named(activation);
  if (b) check_same(*b, "b", a), check_same_shape(*b, "b", a, "a");
  const ScalarType type = out_dtype.value_or(a.scalar_type());
  const auto run = [&](const Tensor& a, const Tensor* b, const Tensor& u) {
    std::vector<View> views{{&a, &args.a}, {&u, &args.u}};
    if (b) views.push_back({b, &args.b});
    if (!lay_out(args, dim, views)) return false;
    check_done(gate_cpu(args, parallel_for));
    return true;
  };
  Tensor u = empty_like(a, type);
  if (run(a, b, u)) return u;
  const Tensor dense = torch::stable::contiguous(a),
               dense_b = b ? torch::stable::contiguous(*b) : dense;
  const Tensor dense_u = empty_like(dense, type);
  run(dense, b ? &dense_b : nullptr, dense_u);
  return torch::stable::copy_(u, dense_u);
}

struct Gradients {
  Tensor da, db, dsigma;
};

Gradients run_backward(
    const Tensor& du, const Tensor& a, const Tensor* b, const std::optional<Tensor>& sigma,
    const Draw& draw, int64_t dim, const std::string& activation) {
  GateArgs args{};
  check_same(du, "du", a), check_same_shape(du, "du", a, "a");
  if (b) check_same(*b, "b", a), check_same_shape(*b, "b", a, "a");
  args.draw = draw;
  args.kind = activation_named(activation);
  Tensor dsigma = sigma ? empty_vector(*sigma, a.size(dim)) : empty_gradient(a);
  if (sigma) args.dsigma = dsigma.mutable_data_ptr();
  const auto run = [&](const Tensor& du, const Tensor& a, const Tensor* b, const Tensor& da,
                       const Tensor& db) {
    std::vector<View> views{{&a, &args.a}, {&du, &args.du}, {&da, &args.da}};
    if (b) views.push_back({b, &args.b}), views.push_back({&db, &args.db});
    if (!lay_out(args, dim, views)) return false;
    check_done(gate_cpu(args, parallel_for));
    return true;
  };
  Tensor da = empty_like(a, a.scalar_type()), db = b ? empty_like(*b, b->scalar_type()) : da;
  if (run(du, a, b, da, db)) return {da, db, dsigma};
  const Tensor dense = torch::stable::contiguous(a),
               dense_b = b ? torch::stable::contiguous(*b) : dense;
  const Tensor dense_da = empty_like(dense, a.scalar_type()),
               dense_db = b ? empty_like(dense_b, b->scalar_type()) : dense_da;
  run(torch::stable::contiguous(du), dense, b ? &dense_b : nullptr, dense_da, dense_db);
  torch::stable::copy_(da, dense_da);
  if (b) torch::stable::copy_(db, dense_db);
  return {da, db, dsigma};
}

Tensor activate(
    Tensor x, Tensor sigma, Tensor seed, int64_t dim, int64_t row0, int64_t col0, int64_t sample,
    double factor, bool log_variance, std::string activation, std::optional<ScalarType> out_dtype) {
  const Draw draw = draw_of(x, &sigma, seed, &dim, row0, col0, sample, factor, log_variance);
  return run_forward(x, nullptr, draw, dim, activation, out_dtype);
}

std::tuple<Tensor, Tensor> activate_bwd(
    Tensor du, Tensor x, std::optional<Tensor> sigma, Tensor seed, int64_t dim, int64_t row0,
    int64_t col0, int64_t sample, double factor, bool log_variance, std::string activation) {
  const Draw draw =
      draw_of(x, sigma ? &*sigma : nullptr, seed, &dim, row0, col0, sample, factor, log_variance);
  const Gradients g = run_backward(du, x, nullptr, sigma, draw, dim, activation);
  return {g.da, g.dsigma};
}

Tensor gate(
    Tensor a, Tensor b, Tensor sigma, Tensor seed, int64_t dim, int64_t row0, int64_t col0,
    int64_t sample, double factor, bool log_variance, std::string activation,
    std::optional<ScalarType> out_dtype) {
  const Draw draw = draw_of(a, &sigma, seed, &dim, row0, col0, sample, factor, log_variance);
  return run_forward(a, &b, draw, dim, activation, out_dtype);
}

std::tuple<Tensor, Tensor, Tensor> gate_bwd(
    Tensor du, Tensor a, Tensor b, std::optional<Tensor> sigma, Tensor seed, int64_t dim,
    int64_t row0, int64_t col0, int64_t sample, double factor, bool log_variance,
    std::string activation) {
  const Draw draw =
      draw_of(a, sigma ? &*sigma : nullptr, seed, &dim, row0, col0, sample, factor, log_variance);
  const Gradients g = run_backward(du, a, &b, sigma, draw, dim, activation);
  return {g.da, g.db, g.dsigma};
}

}  // namespace
}  // namespace dip

STABLE_TORCH_LIBRARY_IMPL(dipkernels, CPU, m) {
  m.impl("activate", TORCH_BOX(&dip::activate));
  m.impl("activate_bwd", TORCH_BOX(&dip::activate_bwd));
  m.impl("gate", TORCH_BOX(&dip::gate));
  m.impl("gate_bwd", TORCH_BOX(&dip::gate_bwd));
}
