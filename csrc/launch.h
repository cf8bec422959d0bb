// The seam between the files *_op.cpp, which know torch, and the kernels, which do not: plain
// argument structs and launcher declarations.
#pragma once
#include <cstdint>

namespace dip {

enum class DType : int { kFloat32, kFloat64, kFloat16, kBFloat16 };

constexpr int size_of(DType type) {
  return type == DType::kFloat64 ? 8 : type == DType::kFloat32 ? 4 : 2;
}

// A tensor as [outer, features, inner]; strides in elements.
struct Operand {
  void* data = nullptr;  // null: absent
  DType dtype = DType::kFloat32;
  int64_t outer_stride = 0;
  int64_t feature_stride = 0;
};

// One draw z of the noise contract and the scale factor * sigma of what is added:
// dipkernels/ops/draw.py, and its tensors.
struct Draw {
  const int64_t* seed;  // [2]: key, stream
  int64_t row0, col0;   // origin
  int32_t sample;
  const void* sigma;  // [features]; null: 1
  bool sigma_is_double;
  bool log_variance;  // sigma holds ln(sigma^2)
  double factor;      // multiplies sigma
};

// Two layouts, docs/maths.md, section 6:
//   rows      inner == 1, feature stride 1, any outer (row) stride
//   channels  inner > 1, inner stride 1, any other strides
struct PerturbArgs {
  int64_t outer, features, inner;  // the draw's rows are outer * inner, its columns features
  Draw draw;
  Operand x;     // null data: u is z, and sigma is null
  Operand u;     // written: x + factor * sigma * z
  Operand du;    // read where dsigma is written
  void* dsigma;  // [features], sigma's dtype, written
};

// Calls f(begin, end, context) over parts of [0, total), in parallel, none smaller than grain but
// the last.
using ParallelFor =
    void (*)(int64_t total, int64_t grain, void (*f)(int64_t, int64_t, void*), void* context);

// u where u.data is set, dsigma where dsigma is set. Returns null, or what went wrong.
const char* perturb_cpu(const PerturbArgs& args, ParallelFor parallel_for);

// How the CUDA kernels do it. No form changes a bit of u.
struct CudaForm {
  bool writes_from_end;  // a pass without a sum takes its rows from the last to the first
  bool sums_from_end;    // a pass with a sum does
  bool one_launch;       // the last block to arrive adds up the sum's partials, not a second launch
};

// The same on the current device of CUDA, asynchronously on `stream`; `partials` is scratch of
// perturb_cuda_scratch bytes.
const char* perturb_cuda(
    const PerturbArgs& args, const CudaForm& form, void* partials, void* stream);
int64_t perturb_cuda_scratch(const PerturbArgs& args, const CudaForm& form);

// u = act(a) * b + sigma * z; back: da = du * b * act'(a), db = du * act(a), dsigma = sum over rows
// of du * z.
struct GateArgs {
  int64_t outer, features, inner;  // layouts as PerturbArgs
  int activation;                  // Activation of activation.h
  Draw draw;
  Operand a;
  Operand b;           // null: 1
  Operand u;           // written; null: back
  Operand du, da, db;  // back: read, written, written where b is set
  void* dsigma;  // back: [features], sigma's dtype, written; null: not wanted, and nothing is drawn
};

const char* gate_cpu(const GateArgs& args, ParallelFor parallel_for);

// h = (x - mean) * rstd;  u = h * (offset + weight) + bias + sigma * z; back: dx, dweight = sum of
// du * h, dbias = sum of du, dsigma.
struct NormArgs {
  int64_t rows, features;
  bool centred;  // LayerNorm; RMSNorm's mean is 0
  double eps, offset;
  Draw draw;
  Operand x;             // rows of any stride, features side by side
  Operand weight, bias;  // [features], any type; null: 1 (without the offset) and 0
  // [rows], float32, or float64 for float64 x; written forward, read back; mean null: not centred
  void *mean, *rstd;
  Operand u;               // written; null: back
  Operand du, dx;          // back: read, written
  Operand dweight, dbias;  // back: [features], any type, written; null: not wanted
  void* dsigma;            // back: as GateArgs
};

const char* norm_cpu(const NormArgs& args, ParallelFor parallel_for);

// y = E[act(mu + sqrt(v) z)]. Every matrix is [rows, features], contiguous; v belongs to a column.
struct ExpectationArgs {
  int64_t rows, features;
  int activation;  // Activation of activation.h
  const void* v;   // [features]
  bool v_is_double;
  Operand mu;
  Operand y;        // written where dv is null
  Operand dy, dmu;  // read, written where dv is set
  void *dv, *sum;   // [features], v's dtype, written: sums over rows, the latter of dmu
};

const char* expectation_cpu(const ExpectationArgs& args, ParallelFor parallel_for);

// v_n = sum over k of s_k^2 W_nk^2, and back. The weight is [rows, features], contiguous.
struct VarianceArgs {
  int64_t rows, features;
  Operand weight;
  const void* sigma;  // [features]
  bool log_variance;  // sigma holds ln(sigma^2)
  bool is_double;     // sigma, v, dv and dsigma are float64, else float32
  void* v;            // [rows], written where dv is null
  const void* dv;     // [rows]
  Operand given;      // where dv is set: added to dweight; null: 0
  Operand dweight;    // written where dv is set
  void* dsigma;       // [features], written where dv is set
};

const char* variance_cpu(const VarianceArgs& args, ParallelFor parallel_for);

// total += sum over s of act(h_s); back: h_s = dy act'(h_s), total += their sum. Then out = factor
// total, where it is wanted. Every operand is [outer, inner], inner elements side by side.
struct SamplesArgs {
  int64_t outer, inner, samples;
  int activation;  // Activation of activation.h, or kIdentity
  bool back;
  Operand h;              // the first sample's, not float64; back: where dh is written
  int64_t sample_stride;  // from h of a sample to that of the next, in elements
  Operand dy;             // back
  float* total;           // [outer, inner], contiguous
  Operand out;            // null: not wanted
  float factor;
};

constexpr int kIdentity = -1;

const char* samples_cpu(const SamplesArgs& args, ParallelFor parallel_for);

}  // namespace dip
