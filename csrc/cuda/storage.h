// Elements as they lie in memory, and their values in the compute type C (float or double).
#pragma once
#include <cuda_runtime.h>

#include "../launch.h"
#include "normal.h"

namespace dip {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// ---- values: two 16-bit elements share a word, the lower address in the low half ----------------

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

// ---- runs of N elements that lie side by side, aligned to their own size up to 16 bytes ---------

// nvcc splits a plain store of a uint4 into four.
DIP_DEVICE void store_vector(uint4* p, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}
DIP_DEVICE void store_vector(uint2* p, uint2 v) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(v.x), "r"(v.y) : "memory");
}

// Words of 4 bytes, read and written up to 16 bytes at a time.
template <int kWords>
DIP_DEVICE void load_words(const char* p, uint32_t* words) {
  if constexpr (kWords % 4 == 0) {
    DIP_UNROLL
    for (int i = 0; i < kWords; i += 4) {
      const uint4 v = __ldg(reinterpret_cast<const uint4*>(p) + i / 4);
      words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
    }
  } else if constexpr (kWords == 2) {
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(p));
    words[0] = v.x, words[1] = v.y;
  } else {
    static_assert(kWords == 1);
    words[0] = __ldg(reinterpret_cast<const uint32_t*>(p));
  }
}

template <int kWords>
DIP_DEVICE void store_words(char* p, const uint32_t* words) {
  if constexpr (kWords % 4 == 0) {
    DIP_UNROLL
    for (int i = 0; i < kWords; i += 4)
      store_vector(
          reinterpret_cast<uint4*>(p) + i / 4,
          make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]));
  } else if constexpr (kWords == 2) {
    store_vector(reinterpret_cast<uint2*>(p), make_uint2(words[0], words[1]));
  } else {
    static_assert(kWords == 1);
    *reinterpret_cast<uint32_t*>(p) = words[0];
  }
}

// load, store: the run at p. get(i): element i. set(i, a, b): elements i and i + 1, i even.
// bytes(n): of n elements.
template <class T, int N>
struct Run {
  static constexpr int kElements = N;
  static constexpr bool kMayBeAbsent = false;
  uint32_t words[N / 2];
  static DIP_DEVICE int64_t bytes(DType, int64_t n) { return n * int64_t{sizeof(T)}; }
  DIP_DEVICE void load(const char* p, DType, int, int) { load_words<N / 2>(p, words); }
  DIP_DEVICE void store(char* p, DType, int, int) const { store_words<N / 2>(p, words); }
  DIP_DEVICE float get(int i) const {
    return i % 2 ? high_value(T{}, words[i / 2]) : low_value(T{}, words[i / 2]);
  }
  DIP_DEVICE void set(int i, float a, float b) { words[i / 2] = pack(T{}, a, b); }
};

template <int N>
struct Run<float, N> {
  static constexpr int kElements = N;
  static constexpr bool kMayBeAbsent = false;
  uint32_t words[N];
  static DIP_DEVICE int64_t bytes(DType, int64_t n) { return n * int64_t{sizeof(float)}; }
  DIP_DEVICE void load(const char* p, DType, int, int) { load_words<N>(p, words); }
  DIP_DEVICE void store(char* p, DType, int, int) const { store_words<N>(p, words); }
  DIP_DEVICE float get(int i) const { return ScalarLane::as_float(words[i]); }
  DIP_DEVICE void set(int i, float a, float b) {
    words[i] = ScalarLane::as_uint(a);
    words[i + 1] = ScalarLane::as_uint(b);
  }
};

// Any storage type, any alignment: elements [first, last) of N, one by one; the others are 0 and
// are not written.
template <class C, int N>
struct AnyRun {
  static constexpr int kElements = N;
  static constexpr bool kMayBeAbsent = true;
  C values[N];

  static DIP_HD int64_t bytes(DType type, int64_t n) { return n * size_of(type); }
  template <class T>
  DIP_DEVICE void load_as(const char* p, int first, int last) {
    DIP_UNROLL
    for (int i = 0; i < N; ++i)
      values[i] =
          first <= i && i < last ? static_cast<C>(element(reinterpret_cast<const T*>(p)[i])) : C(0);
  }
  template <class T>
  DIP_DEVICE void store_as(char* p, int first, int last) const {
    DIP_UNROLL
    for (int i = 0; i < N; ++i)
      if (first <= i && i < last) set_element(reinterpret_cast<T*>(p) + i, values[i]);
  }
  DIP_DEVICE void load(const char* p, DType type, int first, int last) {
    switch (type) {
      case DType::kFloat32: return load_as<float>(p, first, last);
      case DType::kFloat64: return load_as<double>(p, first, last);
      case DType::kFloat16: return load_as<Float16>(p, first, last);
      case DType::kBFloat16: return load_as<BFloat16>(p, first, last);
    }
  }
  DIP_DEVICE void store(char* p, DType type, int first, int last) const {
    switch (type) {
      case DType::kFloat32: return store_as<float>(p, first, last);
      case DType::kFloat64: return store_as<double>(p, first, last);
      case DType::kFloat16: return store_as<Float16>(p, first, last);
      case DType::kBFloat16: return store_as<BFloat16>(p, first, last);
    }
  }
  DIP_DEVICE C get(int i) const { return values[i]; }
  DIP_DEVICE void set(int i, C a, C b) {
    values[i] = a;
    if (i + 1 < N) values[i + 1] = b;
  }
};

}  // namespace dip
