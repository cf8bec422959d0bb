// The operations of dipkernels/ops/gate.py on a CPU: an activation, or a gated product, with noise,
// and back.
#include <tuple>

#include "activation_named.h"
#include "torch.h"

namespace dip {
namespace {

Tensor gate(
    Tensor a, std::optional<Tensor> b, Tensor sigma, Tensor seed, int64_t dim, int64_t row0,
    int64_t col0, int64_t sample, double factor, bool log_variance, std::string activation,
    std::optional<ScalarType> out_dtype) {
  GateArgs args{};
  args.draw = draw_of(a, &sigma, seed, &dim, row0, col0, sample, factor, log_variance);
  args.activation = activation_named(activation);
  if (b) check_alike(*b, "b", a, "a");
  const Tensor u = empty_like(a, out_dtype.value_or(a.scalar_type()));
  in_one_layout(args, dim, {{&a, &args.a}, {b ? &*b : nullptr, &args.b}, {&u, &args.u, true}}, [&] {
    check_done(gate_cpu(args, parallel_for));
  });
  return u;
}

std::tuple<Tensor, Tensor, Tensor> gate_bwd(
    Tensor du, Tensor a, std::optional<Tensor> b, std::optional<Tensor> sigma, Tensor seed,
    int64_t dim, int64_t row0, int64_t col0, int64_t sample, double factor, bool log_variance,
    std::string activation) {
  GateArgs args{};
  args.draw =
      draw_of(a, sigma ? &*sigma : nullptr, seed, &dim, row0, col0, sample, factor, log_variance);
  args.activation = activation_named(activation);
  check_alike(du, "du", a, "a");
  if (b) check_alike(*b, "b", a, "a");
  Tensor dsigma = sigma ? empty_vector(*sigma, a.size(dim)) : empty_gradient(a);
  if (sigma) args.dsigma = dsigma.mutable_data_ptr();
  const Tensor da = empty_like(a, a.scalar_type()),
               db = b ? empty_like(*b, b->scalar_type()) : empty_gradient(a);
  in_one_layout(
      args, dim,
      {{&a, &args.a},
       {b ? &*b : nullptr, &args.b},
       {&du, &args.du},
       {&da, &args.da, true},
       {b ? &db : nullptr, &args.db, true}},
      [&] { check_done(gate_cpu(args, parallel_for)); });
  return {da, db, dsigma};
}

}  // namespace
}  // namespace dip

STABLE_TORCH_LIBRARY_IMPL(dipkernels, CPU, m) {
  m.impl("gate", TORCH_BOX(&dip::gate));
  m.impl("gate_bwd", TORCH_BOX(&dip::gate_bwd));
}
