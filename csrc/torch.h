// What the operations share of torch's stable ABI: checks, layouts, allocation. Files *_op.cpp
// alone include it.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "launch.h"

namespace dip {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- checks -------------------------------------------------------------------------------------
// What keeps a kernel inside its buffers; dipkernels/ops says the same with Python's exceptions.

inline DType dtype_of(ScalarType type, const char* name) {
  switch (type) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: STD_TORCH_CHECK(false, name, ": expected float32, float64, float16 or bfloat16");
  }
}

// What a kernel returned: null, or what went wrong.
inline void check_done(const char* error) {
  STD_TORCH_CHECK(error == nullptr, "dipkernels: ", error);
}

inline void check_sigma(const Tensor& sigma, int64_t k) {
  STD_TORCH_CHECK(
      sigma.dim() == 1 && sigma.size(0) == k, "sigma: expected shape (K,) = (", k, ",)");
  const ScalarType type = sigma.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::Double,
      "sigma: expected float32 or float64");
}

inline void check_device(const Tensor& a, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(
      a.is_cuda() == x.is_cuda() && a.get_device() == x.get_device(), name,
      ": expected the device of the data");
}

// ---- layouts ------------------------------------------------------------------------------------

// Dimensions [first, last) as one of a single stride, or nothing. A dimension of size 1 has no say.
inline std::optional<int64_t> collapse(const Tensor& t, int64_t first, int64_t last, int64_t skip) {
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

inline std::optional<Operand> as_rows(const Tensor& t, int64_t dim) {
  Operand rows{nullptr, dtype_of(t.scalar_type(), "data"), 0, 1};
  if (t.numel() == 0) return rows;  // its strides say nothing
  if (t.size(dim) != 1 && t.stride(dim) != 1) return std::nullopt;
  const auto stride = collapse(t, 0, t.dim(), dim);
  if (!stride) return std::nullopt;
  rows.outer_stride = *stride;
  return rows;
}

// The dimensions before `split` are the outer ones, those from there on the inner.
inline std::optional<Operand> as_channels(const Tensor& t, int64_t dim, int64_t split) {
  const auto outer = collapse(t, 0, split, dim), inner = collapse(t, split, t.dim(), dim);
  if (!outer || inner != 1) return std::nullopt;  // an expanded one has stride 0
  return Operand{nullptr, dtype_of(t.scalar_type(), "data"), *outer, t.stride(dim)};
}

inline int32_t code_of(DType type) {
  switch (type) {
    case DType::kFloat32: return aoti_torch_dtype_float32();
    case DType::kFloat64: return aoti_torch_dtype_float64();
    case DType::kFloat16: return aoti_torch_dtype_float16();
    default: return aoti_torch_dtype_bfloat16();
  }
}

// The shim keeps torch's own words for stderr.
inline void check_allocated(int32_t error, IntHeaderOnlyArrayRef sizes) {
  if (error == AOTI_TORCH_SUCCESS) return;
  std::string shape;
  for (const int64_t size : sizes) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
  STD_TORCH_CHECK(
      false, "dipkernels: out of memory: no result of shape (", shape, ") could be allocated");
}

// Straight from the allocator's shim: the dispatcher would cost a small layer microseconds.
inline Tensor empty_strided(
    const Tensor& like, IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides, DType type) {
  AtenTensorHandle handle;
  const int32_t device =
      like.is_cuda() ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
  const auto rank = static_cast<int64_t>(sizes.size());
  check_allocated(
      aoti_torch_empty_strided(
          rank, sizes.data(), strides.data(), code_of(type), device, like.get_device_index(),
          &handle),
      sizes);
  return Tensor(handle);
}

inline Tensor empty_vector(const Tensor& like, int64_t size) {
  const int64_t stride = 1;
  return empty_strided(like, {&size, 1}, {&stride, 1}, dtype_of(like.scalar_type(), "sigma"));
}

// torch.empty_like: x's strides where x is dense.
inline Tensor empty_like(const Tensor& t, ScalarType type) {
  if (t.is_contiguous()) return empty_strided(t, t.sizes(), t.strides(), dtype_of(type, "dtype"));
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{
      from(t),
      from(std::optional<ScalarType>(type)),
      from(std::nullopt),
      from(std::nullopt),
      from(std::nullopt),
      from(std::nullopt)};
  check_allocated(
      torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION), t.sizes());
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Of t's shape, contiguous.
inline Tensor empty_dense(const Tensor& t, ScalarType type) {
  std::vector<int64_t> strides(static_cast<size_t>(t.dim()), 1);
  for (size_t d = strides.size(); d-- > 1;) {
    const int64_t size = t.size(static_cast<int64_t>(d));
    strides[d - 1] = strides[d] * (size ? size : 1);
  }
  return empty_strided(t, t.sizes(), {strides.data(), strides.size()}, dtype_of(type, "dtype"));
}

// torch::stable::new_empty, float32, that says what failed.
inline Tensor new_empty(const Tensor& like, const std::vector<int64_t>& shape) {
  try {
    return torch::stable::new_empty(like, shape, std::optional<ScalarType>(ScalarType::Float));
  } catch (const std::exception&) {
    check_allocated(!AOTI_TORCH_SUCCESS, shape);
    throw;
  }
}

struct View {
  const Tensor* tensor;  // null: absent
  Operand* operand;
  bool written = false;
};

// Gives every operand its strides in one layout that all tensors have; false where there is none.
template <class Args>
bool lay_out(Args& a, int64_t dim, const std::vector<View>& views) {
  const Tensor& first = *views[0].tensor;
  const auto fit = [&](auto&& layout) {
    for (const View& v : views) {
      if (!v.tensor) continue;
      const auto operand = layout(*v.tensor, dim);
      if (!operand) return false;
      *v.operand = *operand;
      v.operand->data = const_cast<void*>(v.tensor->const_data_ptr());
    }
    return true;
  };
  const auto sizes = first.sizes();
  a.features = sizes[dim];
  a.outer = a.features ? first.numel() / a.features : 0;
  a.inner = 1;
  if (fit(as_rows)) return true;
  std::swap(a.outer, a.inner);
  for (int64_t split = 0; split < first.dim(); ++split) {  // the longest inner runs first
    if (split == dim) continue;
    const auto channels = [&](const Tensor& t, int64_t d) { return as_channels(t, d, split); };
    if (a.inner > 1 && fit(channels)) return true;
    a.outer *= sizes[split];
    a.inner /= sizes[split];
  }
  return false;
}

// run(), every operand in one layout that all tensors have, or over contiguous copies.
template <class Args, class Run>
void in_one_layout(Args& a, int64_t dim, const std::vector<View>& views, const Run& run) {
  if (lay_out(a, dim, views)) return run();
  std::vector<View> dense = views;
  std::vector<Tensor> copies;
  copies.reserve(views.size());  // dense points into it
  for (View& v : dense) {
    if (!v.tensor) continue;
    const Tensor& t = *v.tensor;
    copies.push_back(v.written ? empty_dense(t, t.scalar_type()) : torch::stable::contiguous(t));
    v.tensor = &copies.back();
  }
  lay_out(a, dim, dense);
  run();
  for (size_t i = 0; i < views.size(); ++i) {
    if (!views[i].written || !views[i].tensor) continue;
    Tensor result = *views[i].tensor;
    torch::stable::copy_(result, *dense[i].tensor);
  }
}

inline Operand operand_of(const Tensor& t) {
  return {const_cast<void*>(t.const_data_ptr()), dtype_of(t.scalar_type(), "data"), 0, 1};
}

inline void parallel_for(
    int64_t total, int64_t grain, void (*f)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(
      0, total, grain, [&](int64_t begin, int64_t end) { f(begin, end, context); });
}

// ---- one draw -----------------------------------------------------------------------------------

// That of the features of x along *dim, which is then counted from the front. The draw points into
// seed and *sigma, which is made dense for it and may be null: so no sigma, as where the noise
// itself is asked for.
inline Draw draw_of(
    const Tensor& x, Tensor* sigma, const Tensor& seed, int64_t* dim, int64_t row0, int64_t col0,
    int64_t sample, double factor, bool log_variance) {
  const int64_t ndim = x.dim();
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long, "seed: expected dtype int64");
  STD_TORCH_CHECK(
      seed.dim() == 1 && seed.size(0) == 2, "seed: expected shape (2,) = (key, stream)");
  STD_TORCH_CHECK(seed.stride(0) == 1, "seed: expected stride 1, got ", seed.stride(0));
  check_device(seed, "seed", x);
  STD_TORCH_CHECK(
      -ndim <= *dim && *dim < ndim, "dim: expected a dimension of a tensor of ", ndim, ", got ",
      *dim);
  if (*dim < 0) *dim += ndim;
  // draw.py stops at 2^62, from where row_blocks.py counts on.
  const auto fits = [](int64_t origin) { return origin >= 0 && origin <= 3 * (int64_t{1} << 61); };
  STD_TORCH_CHECK(
      fits(row0) && fits(col0), "row0, col0: expected 0 to 2^62, got ", row0, ", ", col0);
  STD_TORCH_CHECK(sample >= 0 && sample < 65536, "sample: expected 0 to 65535, got ", sample);
  Draw draw{};
  draw.seed = static_cast<const int64_t*>(seed.const_data_ptr());
  draw.row0 = row0;
  draw.col0 = col0;
  draw.sample = static_cast<int32_t>(sample);
  draw.factor = factor;
  draw.log_variance = log_variance;
  if (!sigma) return draw;
  check_device(*sigma, "sigma", x);
  check_sigma(*sigma, x.size(*dim));
  if (sigma->stride(0) != 1 && sigma->size(0) != 1) *sigma = torch::stable::contiguous(*sigma);
  draw.sigma = sigma->const_data_ptr();
  draw.sigma_is_double = sigma->scalar_type() == ScalarType::Double;
  return draw;
}

// Of the device and the shape of x.
inline void check_alike(const Tensor& a, const char* name, const Tensor& x, const char* like) {
  check_device(a, name, x);
  bool same = a.dim() == x.dim();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = a.size(d) == x.size(d);
  STD_TORCH_CHECK(same, name, ": expected the shape of ", like);
}

// What stands for a gradient that is not wanted.
inline Tensor empty_gradient(const Tensor& like) {
  const int64_t size = 0, stride = 1;
  return empty_strided(like, {&size, 1}, {&stride, 1}, DType::kFloat32);
}

}  // namespace dip
