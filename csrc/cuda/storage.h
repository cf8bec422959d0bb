// Elements as they lie in memory, and their values in the compute type C (float or double).
#pragma once
#include <cuda_runtime.h>

#include "../launch.h"
#include "normal.h"
#ifdef DIP_EMULATOR
#include "../cpu/convert.h"
#endif

namespace dip {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// ---- values: two 16-bit elements share a word, the lower address in the low half ----------------------------------------

#ifdef __CUDA_ARCH__
DIP_DEVICE float low_value(BFloat16, uint32_t word) { return __uint_as_float(word << 16); }
DIP_DEVICE float high_value(BFloat16, uint32_t word) { return __uint_as_float(word & 0xFFFF0000u); }
DIP_DEVICE float low_value(Float16, uint32_t word) {
  float value;
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(value) : "r"(word));
  return value;
}
DIP_DEVICE float high_value(Float16, uint32_t word) {
  float value;
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(value) : "r"(word));
  return value;
}
DIP_DEVICE uint32_t pack(BFloat16, float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
DIP_DEVICE uint32_t pack(Float16, float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
#elif defined(DIP_EMULATOR)
DIP_DEVICE float low_value(BFloat16, uint32_t word) { return bfloat16_to_float(static_cast<uint16_t>(word)); }
DIP_DEVICE float high_value(BFloat16, uint32_t word) { return bfloat16_to_float(static_cast<uint16_t>(word >> 16)); }
DIP_DEVICE float low_value(Float16, uint32_t word) { return float16_to_float(static_cast<uint16_t>(word)); }
DIP_DEVICE float high_value(Float16, uint32_t word) { return float16_to_float(static_cast<uint16_t>(word >> 16)); }
DIP_DEVICE uint32_t pack(BFloat16, float low, float high) {
  return float_to_bfloat16(low) | static_cast<uint32_t>(float_to_bfloat16(high)) << 16;
}
DIP_DEVICE uint32_t pack(Float16, float low, float high) {
  return float_to_float16(low) | static_cast<uint32_t>(float_to_float16(high)) << 16;
}
#else  // nvcc reads device code once more for the host, and compiles none of it
template <class T>
DIP_DEVICE float low_value(T, uint32_t) { return 0; }
template <class T>
DIP_DEVICE float high_value(T, uint32_t) { return 0; }
template <class T>
DIP_DEVICE uint32_t pack(T, float, float) { return 0; }
#endif

DIP_DEVICE float element(float a) { return a; }
DIP_DEVICE double element(double a) { return a; }
template <class T>
DIP_DEVICE float element(T a) {
  return low_value(T{}, a.bits);
}
template <class C>
DIP_DEVICE void set_element(float* p, C a) {
  *p = static_cast<float>(a);
}
template <class C>
DIP_DEVICE void set_element(double* p, C a) {
  *p = a;
}
template <class T, class C>
DIP_DEVICE void set_element(T* p, C a) {
  p->bits = static_cast<uint16_t>(pack(T{}, static_cast<float>(a), 0.0f));
}

// ---- runs of N elements that lie side by side, aligned to their own size up to 16 bytes -----------------------------------

// Words of 4 bytes, read and written 16 or 8 bytes at a time.
template <int kWords>
DIP_DEVICE void load_words(const void* p, uint32_t* words) {
  if constexpr (kWords % 4 == 0) {
    DIP_UNROLL
    for (int i = 0; i < kWords; i += 4) {
      const uint4 v = __ldg(static_cast<const uint4*>(p) + i / 4);
      words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
    }
  } else {
    static_assert(kWords == 2);
    const uint2 v = __ldg(static_cast<const uint2*>(p));
    words[0] = v.x, words[1] = v.y;
  }
}

template <int kWords>
DIP_DEVICE void store_words(void* p, const uint32_t* words) {
  if constexpr (kWords % 4 == 0) {
    DIP_UNROLL
    for (int i = 0; i < kWords; i += 4)
      static_cast<uint4*>(p)[i / 4] = make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
  } else {
    static_assert(kWords == 2);
    *static_cast<uint2*>(p) = make_uint2(words[0], words[1]);
  }
}

// get(i): element i. set(i, a, b): elements i and i + 1, i even.
template <class T, int N>
struct Run {
  static constexpr int kElements = N;
  uint32_t words[N / 2];
  DIP_DEVICE void load(const Operand& a, int64_t at) { load_words<N / 2>(static_cast<const T*>(a.data) + at, words); }
  DIP_DEVICE void store(const Operand& a, int64_t at) const { store_words<N / 2>(static_cast<T*>(a.data) + at, words); }
  DIP_DEVICE float get(int i) const { return i % 2 ? high_value(T{}, words[i / 2]) : low_value(T{}, words[i / 2]); }
  DIP_DEVICE void set(int i, float a, float b) { words[i / 2] = pack(T{}, a, b); }
};

template <int N>
struct Run<float, N> {
  static constexpr int kElements = N;
  uint32_t words[N];
  DIP_DEVICE void load(const Operand& a, int64_t at) { load_words<N>(static_cast<const float*>(a.data) + at, words); }
  DIP_DEVICE void store(const Operand& a, int64_t at) const { store_words<N>(static_cast<float*>(a.data) + at, words); }
  DIP_DEVICE float get(int i) const { return ScalarLane::as_float(words[i]); }
  DIP_DEVICE void set(int i, float a, float b) {
    words[i] = ScalarLane::as_uint(a);
    words[i + 1] = ScalarLane::as_uint(b);
  }
};

// Any storage type, any alignment: elements [first, last) of N, one by one; the others are 0 and are not written.
template <class C, int N>
struct AnyRun {
  static constexpr int kElements = N;
  C values[N];

  template <class T>
  DIP_DEVICE void load_as(const Operand& a, int64_t at, int first, int last) {
    const T* p = static_cast<const T*>(a.data) + at;
    DIP_UNROLL
    for (int i = 0; i < N; ++i) values[i] = first <= i && i < last ? static_cast<C>(element(p[i])) : C(0);
  }
  template <class T>
  DIP_DEVICE void store_as(const Operand& a, int64_t at, int first, int last) const {
    T* p = static_cast<T*>(a.data) + at;
    DIP_UNROLL
    for (int i = 0; i < N; ++i)
      if (first <= i && i < last) set_element(p + i, values[i]);
  }
  DIP_DEVICE void load(const Operand& a, int64_t at, int first = 0, int last = N) {
    if (!a.data) last = first;  // absent: zeros
    switch (a.dtype) {
      case DType::kFloat32: return load_as<float>(a, at, first, last);
      case DType::kFloat64: return load_as<double>(a, at, first, last);
      case DType::kFloat16: return load_as<Float16>(a, at, first, last);
      case DType::kBFloat16: return load_as<BFloat16>(a, at, first, last);
    }
  }
  DIP_DEVICE void store(const Operand& a, int64_t at, int first = 0, int last = N) const {
    switch (a.dtype) {
      case DType::kFloat32: return store_as<float>(a, at, first, last);
      case DType::kFloat64: return store_as<double>(a, at, first, last);
      case DType::kFloat16: return store_as<Float16>(a, at, first, last);
      case DType::kBFloat16: return store_as<BFloat16>(a, at, first, last);
    }
  }
  DIP_DEVICE C get(int i) const { return values[i]; }
  DIP_DEVICE void set(int i, C a, C b) {
    values[i] = a;
    if (i + 1 < N) values[i + 1] = b;
  }
};

}  // namespace dip
