// Runs of n <= kRun elements of any storage type to and from the compute type C (float or double).
#pragma once
#include <cstring>

#include "../launch.h"
#include "simd.h"

namespace dip {
namespace {

constexpr int kRun = 1024;

DIP_HD float bfloat16_to_float(uint16_t h) {
  return ScalarLane::as_float(static_cast<uint32_t>(h) << 16);
}

DIP_HD uint16_t float_to_bfloat16(float f) {
  const uint32_t bits = ScalarLane::as_uint(f);
  // to nearest, ties to even
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return f != f ? 0x7FC0 : static_cast<uint16_t>(rounded);
}

#if !defined(__F16C__)
inline float float16_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, magnitude = h & 0x7FFFu;
  if (magnitude >= 0x7C00u)
    return ScalarLane::as_float(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
  // Exact, and no subnormal float on the way, which a processor may be set to take for 0.
  const float value = magnitude < 0x400u
                          ? static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f
                          : ScalarLane::as_float((magnitude << 13) + 0x38000000u);
  return ScalarLane::as_float(sign | ScalarLane::as_uint(value));
}

inline uint16_t float_to_float16(float f) {
  const uint32_t bits = ScalarLane::as_uint(f), sign = bits >> 16 & 0x8000u,
                 magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
  if (magnitude >= 0x477FF000u)
    return static_cast<uint16_t>(sign | 0x7C00u);  // from 65520 on: infinity
  if (magnitude < 0x38800000u) {  // subnormal: the addition rounds to a multiple of 2^-24
    const float rounded = ScalarLane::as_float(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (ScalarLane::as_uint(rounded) - 0x3F000000u));
  }
  return static_cast<uint16_t>(
      sign | ((magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u)) >> 13));
}
#endif

inline void store_bfloat16(uint16_t* p, int n, const float* in) {
  int i = 0;
#if defined(__AVX512BW__)
  for (; i + 32 <= n; i += 32)
    Avx512::store_pair(
        reinterpret_cast<BFloat16Bits*>(p + i), Avx512::load(in + i), Avx512::load(in + i + 16));
  if (i < n) {  // by way of a whole vector: one by one these would take as long as 100 others
    alignas(64) uint16_t last[32];
    const uint32_t here = (1u << (n - i)) - 1;
    Avx512::store_pair(
        reinterpret_cast<BFloat16Bits*>(last),
        _mm512_maskz_loadu_ps(static_cast<__mmask16>(here), in + i),
        _mm512_maskz_loadu_ps(static_cast<__mmask16>(here >> 16), in + i + 16));
    _mm512_mask_storeu_epi16(p + i, here, _mm512_load_si512(last));
    return;
  }
#endif
  for (; i < n; ++i) p[i] = float_to_bfloat16(in[i]);
}

inline void load_float16(const uint16_t* p, int n, float* out) {
#if defined(__F16C__)
  int i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(
        out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i))));
  for (; i < n; ++i) out[i] = _cvtsh_ss(p[i]);
#else
  for (int i = 0; i < n; ++i) out[i] = float16_to_float(p[i]);
#endif
}

inline void store_float16(uint16_t* p, int n, const float* in) {
#if defined(__F16C__)
  int i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(p + i),
        _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < n; ++i) p[i] = _cvtss_sh(in[i], _MM_FROUND_TO_NEAREST_INT);
#else
  for (int i = 0; i < n; ++i) p[i] = float_to_float16(in[i]);
#endif
}

// Asks for the lines of a run before other work that takes longer than their way here; kWrite: to
// be written.
template <int kWrite>
DIP_HD void prefetch_run(const Operand& a, int64_t offset, int n) {
  if (!a.data) return;
  const int size = size_of(a.dtype);
  const char* p = static_cast<const char*>(a.data) + offset * size;
  for (int i = 0; i < n * size; i += 64) __builtin_prefetch(p + i, kWrite);
}

// The n elements at `offset`, in `buffer` or where they lie.
template <class C>
DIP_HD const C* load_run(const Operand& a, int64_t offset, int n, C* buffer) {
  switch (a.dtype) {
    case DType::kFloat32: {
      const float* p = static_cast<const float*>(a.data) + offset;
      if constexpr (sizeof(C) == 4) return p;
      for (int i = 0; i < n; ++i) buffer[i] = p[i];
      return buffer;
    }
    case DType::kFloat64: {
      const double* p = static_cast<const double*>(a.data) + offset;
      if constexpr (sizeof(C) == 8) return p;
      for (int i = 0; i < n; ++i) buffer[i] = static_cast<C>(p[i]);
      return buffer;
    }
    case DType::kBFloat16: {
      const uint16_t* p = static_cast<const uint16_t*>(a.data) + offset;
      for (int i = 0; i < n; ++i) buffer[i] = bfloat16_to_float(p[i]);
      return buffer;
    }
    case DType::kFloat16: {
      const uint16_t* p = static_cast<const uint16_t*>(a.data) + offset;
      if constexpr (sizeof(C) == 4) {
        load_float16(p, n, buffer);
      } else {
        float narrow[kRun];
        load_float16(p, n, narrow);
        for (int i = 0; i < n; ++i) buffer[i] = narrow[i];
      }
      return buffer;
    }
  }
  return buffer;
}

// Where a run is computed: in place where u has the compute type, else in `buffer`.
template <class C>
DIP_HD C* run_target(const Operand& a, int64_t offset, C* buffer) {
  if (a.dtype == (sizeof(C) == 4 ? DType::kFloat32 : DType::kFloat64))
    return static_cast<C*>(a.data) + offset;
  return buffer;
}

template <class C>
DIP_HD void store_run(const Operand& a, int64_t offset, int n, const C* run) {
  switch (a.dtype) {
    case DType::kFloat32: {
      float* p = static_cast<float*>(a.data) + offset;
      if constexpr (sizeof(C) == 8)
        for (int i = 0; i < n; ++i) p[i] = static_cast<float>(run[i]);
      return;
    }
    case DType::kFloat64: {
      double* p = static_cast<double*>(a.data) + offset;
      if constexpr (sizeof(C) == 4)
        for (int i = 0; i < n; ++i) p[i] = run[i];
      return;
    }
    case DType::kBFloat16: {
      uint16_t* p = static_cast<uint16_t*>(a.data) + offset;
      if constexpr (sizeof(C) == 4) store_bfloat16(p, n, run);
      else
        for (int i = 0; i < n; ++i) p[i] = float_to_bfloat16(static_cast<float>(run[i]));
      return;
    }
    case DType::kFloat16: {
      uint16_t* p = static_cast<uint16_t*>(a.data) + offset;
      if constexpr (sizeof(C) == 4) {
        store_float16(p, n, run);
      } else {
        float narrow[kRun];
        for (int i = 0; i < n; ++i) narrow[i] = static_cast<float>(run[i]);
        store_float16(p, n, narrow);
      }
      return;
    }
  }
}

}  // namespace
}  // namespace dip
