// The seam between ops.cpp, which knows torch, and the kernels, which do not: plain argument structs and launcher declarations.
#pragma once
#include <cstdint>

namespace dip {

enum class DType : int { kFloat32, kFloat64, kFloat16, kBFloat16 };

// A tensor as [outer, features, inner]; strides in elements.
struct Operand {
  void* data = nullptr;  // null: absent
  DType dtype = DType::kFloat32;
  int64_t outer_stride = 0;
  int64_t feature_stride = 0;
};

// Two layouts, docs/maths.md, section 6:
//   rows      inner == 1, feature stride 1, any outer (row) stride
//   channels  inner > 1, inner stride 1, any other strides
struct PerturbArgs {
  int64_t outer, features, inner;  // the draw's rows are outer * inner, its columns features
  const int64_t* seed;             // [2]: key, stream
  int64_t row0, col0;              // origin
  int32_t sample, num_samples;     // the mean over samples sample .. sample + num_samples - 1
  const void* sigma;               // [features]; null: 1
  bool sigma_is_double;
  bool log_variance;  // sigma holds ln(sigma^2)
  double factor;      // multiplies sigma
  Operand x;          // null data: zeros
  Operand u;          // written: x + factor * sigma * z
  Operand du;         // read where dsigma is written
  void* dsigma;       // [features], sigma's dtype, written
};

// Calls f(begin, end, context) over parts of [0, total), in parallel, none smaller than grain but the last.
using ParallelFor = void (*)(int64_t total, int64_t grain, void (*f)(int64_t, int64_t, void*), void* context);

// u where u.data is set, dsigma where dsigma is set. Returns null, or what went wrong.
const char* perturb_cpu(const PerturbArgs& args, ParallelFor parallel_for);

// The same on the current device of CUDA, asynchronously on `stream`; `partials` is scratch of perturb_cuda_scratch(args) bytes.
const char* perturb_cuda(const PerturbArgs& args, bool exact, void* partials, void* stream);
int64_t perturb_cuda_scratch(const PerturbArgs& args);
// Null where the kernels can run on the current device, else why not.
const char* cuda_problem();

// y = E[act(mu + sqrt(v) z)]. Every matrix is [rows, features], contiguous; v belongs to a column.
struct ActivationArgs {
  int64_t rows, features;
  int kind;       // Activation of activation.h
  const void* v;  // [features]
  bool v_is_double;
  Operand mu;
  Operand y;        // written where dv is null
  Operand dy, dmu;  // read, written where dv is set
  void* dv;         // [features], v's dtype, written: the sum over rows
};

const char* activation_cpu(const ActivationArgs& args, ParallelFor parallel_for);

// v_n = sum over k of s_k^2 W_nk^2, and back. The weight is [rows, features], contiguous.
struct VarianceArgs {
  int64_t rows, features;
  Operand weight;
  const void* sigma;  // [features]
  bool log_variance;  // sigma holds ln(sigma^2)
  bool is_double;     // sigma, v, dv and dsigma are float64, else float32
  void* v;            // [rows], written where dv is null
  const void* dv;     // [rows]
  Operand dweight;    // written where dv is set
  void* dsigma;       // [features], written where dv is set
};

const char* variance_cpu(const VarianceArgs& args, ParallelFor parallel_for);

// total += sum over s of act(h_s), [size] each; back: dh_s = dy act'(h_s), total += their sum. All contiguous.
struct SamplesArgs {
  int64_t size, samples;
  int kind;              // Activation of activation.h
  Operand h;             // [samples, size], not float64
  Operand dy;            // [size], read where dh is written
  Operand dh;            // [samples, size]; null: forward
  void* total;           // [size], float32, or float64 beside signs
  bool total_is_double;  // where h, dy and dh are
  // Not null: relu of one sample, of which forward sets `bit` where h is not <= 0, and leaves the others, and backward reads no
  // h.
  uint8_t* signs;  // [size]
  uint8_t bit;     // one of eight set
};

const char* samples_cpu(const SamplesArgs& args, ParallelFor parallel_for);

}  // namespace dip
