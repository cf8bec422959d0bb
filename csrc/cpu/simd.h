// The lane types of noise.h for x86: 8 lanes of AVX2, 16 lanes of AVX-512. Compiled where the flags
// allow. Wide keeps 64-bit products of the even and the odd lanes apart, so that a Philox round
// shuffles nothing.
#pragma once
#include "../noise.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace dip {

struct BFloat16Bits {
  uint16_t bits;
};

#if defined(__AVX512F__)
struct Avx512 {
  static constexpr int kLanes = 16;
  using F = __m512;
  using U = __m512i;
  struct Wide {
    __m512i even, odd;
  };
  static DIP_HD Wide widen(U a) { return {a, _mm512_srli_epi64(a, 32)}; }
  static DIP_HD U narrow(Wide a) {
    return _mm512_mask_mov_epi32(a.even, 0xAAAA, _mm512_slli_epi64(a.odd, 32));
  }
  static DIP_HD Wide multiply(Wide a, uint32_t m) {
    const __m512i b = _mm512_set1_epi64(m);
    return {_mm512_mul_epu32(a.even, b), _mm512_mul_epu32(a.odd, b)};
  }
  static DIP_HD Wide high(Wide a) {
    return {_mm512_srli_epi64(a.even, 32), _mm512_srli_epi64(a.odd, 32)};
  }
  static DIP_HD Wide xor2(Wide a, uint64_t c) {
    const __m512i k = _mm512_set1_epi64(static_cast<int64_t>(c));
    return {_mm512_xor_si512(a.even, k), _mm512_xor_si512(a.odd, k)};
  }
  static DIP_HD Wide xor3(Wide a, Wide b, uint64_t c) {
    const __m512i k = _mm512_set1_epi64(static_cast<int64_t>(c));
    return {
        _mm512_ternarylogic_epi64(a.even, b.even, k, 0x96),
        _mm512_ternarylogic_epi64(a.odd, b.odd, k, 0x96)};
  }
  static DIP_HD U splat(uint32_t a) { return _mm512_set1_epi32(static_cast<int>(a)); }
  static DIP_HD F splat_f(float a) { return _mm512_set1_ps(a); }
  static DIP_HD U and_(U a, U b) { return _mm512_and_si512(a, b); }
  static DIP_HD U xor_and(U a, U b, U c) { return _mm512_ternarylogic_epi32(a, b, c, 0x78); }
  static DIP_HD U and_or(U a, U b, U c) { return _mm512_ternarylogic_epi32(a, b, c, 0xEA); }
  static DIP_HD U sub_u(U a, U b) { return _mm512_sub_epi32(a, b); }
  template <int kBits>
  static DIP_HD U shift_left(U a) {
    return _mm512_slli_epi32(a, kBits);
  }
  template <int kBits>
  static DIP_HD U shift_right(U a) {
    return _mm512_srli_epi32(a, kBits);
  }
  static DIP_HD F add(F a, F b) { return _mm512_add_ps(a, b); }
  static DIP_HD F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static DIP_HD F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static DIP_HD F as_float(U a) { return _mm512_castsi512_ps(a); }
  static DIP_HD U as_uint(F a) { return _mm512_castps_si512(a); }
  static DIP_HD F int_to_float(U a) { return _mm512_cvtepi32_ps(a); }
  static DIP_HD F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static DIP_HD F sqrt(F a) { return _mm512_sqrt_ps(a); }
  // y where x > 0 or x is a NaN, else 0.
  static DIP_HD F where_positive(F x, F y) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NLE_UQ), y);
  }

  // In the lanes that store_words needs.
  static DIP_HD U load_counters(const uint32_t* p) {
    const U order = _mm512_setr_epi32(0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 12, 14, 5, 7, 13, 15);
    return _mm512_permutexvar_epi32(order, _mm512_loadu_si512(p));
  }
  static DIP_HD U load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static DIP_HD void store(uint32_t* p, U a) { _mm512_storeu_si512(p, a); }
  static DIP_HD void store(float* p, F a) { _mm512_storeu_ps(p, a); }

  // w[t]: word t of 16 counters. Vector q of the 64 words at p has those of counters 4 * q on, in
  // the lanes that zip needs.
  static DIP_HD void store_words(uint32_t* p, const U w[4]) {
    const U low[2] = {_mm512_unpacklo_epi32(w[0], w[1]), _mm512_unpacklo_epi32(w[2], w[3])};
    const U high[2] = {_mm512_unpackhi_epi32(w[0], w[1]), _mm512_unpackhi_epi32(w[2], w[3])};
    const U first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
            second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    store(p, _mm512_permutex2var_epi64(low[0], first, low[1]));
    store(p + 16, _mm512_permutex2var_epi64(low[0], second, low[1]));
    store(p + 32, _mm512_permutex2var_epi64(high[0], first, high[1]));
    store(p + 48, _mm512_permutex2var_epi64(high[0], second, high[1]));
  }
  // The columns of such a vector, *a before *b.
  static DIP_HD void zip(F even, F odd, F* a, F* b) {
    *a = _mm512_unpacklo_ps(even, odd), *b = _mm512_unpackhi_ps(even, odd);
  }

  static DIP_HD F load(const float* p) { return _mm512_loadu_ps(p); }
  static DIP_HD F load(const BFloat16Bits* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static DIP_HD void store_pair(float* p, F a, F b) { store(p, a), store(p + 16, b); }
  static DIP_HD void store_pair(BFloat16Bits* p, F a, F b) {
    alignas(64) static constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                        23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                        45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    U x = round_number(a), y = round_number(b);
    if (__builtin_expect(_mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q), 0))
      x = keep_nan(a, x), y = keep_nan(b, y);
    _mm512_storeu_si512(p, _mm512_permutex2var_epi16(x, _mm512_load_si512(kUpper), y));
  }
  // Past the caches, to p aligned to a vector; other threads may read it after end_stream.
  static DIP_HD void stream_pair(float* p, F a, F b) {
    _mm512_stream_ps(p, a), _mm512_stream_ps(p + 16, b);
  }
  static DIP_HD void end_stream() { _mm_sfence(); }
  // In the upper half of each lane: to nearest, ties to even.
  static DIP_HD U round_number(F f) {
    const U bits = as_uint(f), up = _mm512_add_epi32(bits, splat(0x7FFF));
    return _mm512_mask_sub_epi32(
        up, _mm512_test_epi32_mask(bits, splat(0x10000)), up, _mm512_set1_epi32(-1));
  }
  static DIP_HD U keep_nan(F f, U rounded) {  // the canonical one
    return _mm512_mask_mov_epi32(
        rounded, _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q), splat(0x7FC00000));
  }
};
#endif

#if defined(__AVX2__)
struct Avx2 {
  static constexpr int kLanes = 8;
  using F = __m256;
  using U = __m256i;
  struct Wide {
    __m256i even, odd;
  };
  static DIP_HD Wide widen(U a) { return {a, _mm256_srli_epi64(a, 32)}; }
  static DIP_HD U narrow(Wide a) {
    return _mm256_blend_epi32(a.even, _mm256_slli_epi64(a.odd, 32), 0xAA);
  }
  static DIP_HD Wide multiply(Wide a, uint32_t m) {
    const __m256i b = _mm256_set1_epi64x(m);
    return {_mm256_mul_epu32(a.even, b), _mm256_mul_epu32(a.odd, b)};
  }
  static DIP_HD Wide high(Wide a) {
    return {_mm256_srli_epi64(a.even, 32), _mm256_srli_epi64(a.odd, 32)};
  }
  static DIP_HD Wide xor2(Wide a, uint64_t c) {
    const __m256i k = _mm256_set1_epi64x(static_cast<int64_t>(c));
    return {_mm256_xor_si256(a.even, k), _mm256_xor_si256(a.odd, k)};
  }
  static DIP_HD Wide xor3(Wide a, Wide b, uint64_t c) {
    const __m256i k = _mm256_set1_epi64x(static_cast<int64_t>(c));
    return {
        _mm256_xor_si256(_mm256_xor_si256(a.even, b.even), k),
        _mm256_xor_si256(_mm256_xor_si256(a.odd, b.odd), k)};
  }
  static DIP_HD U splat(uint32_t a) { return _mm256_set1_epi32(static_cast<int>(a)); }
  static DIP_HD F splat_f(float a) { return _mm256_set1_ps(a); }
  static DIP_HD U and_(U a, U b) { return _mm256_and_si256(a, b); }
  static DIP_HD U xor_and(U a, U b, U c) { return _mm256_xor_si256(a, _mm256_and_si256(b, c)); }
  static DIP_HD U and_or(U a, U b, U c) { return _mm256_or_si256(_mm256_and_si256(a, b), c); }
  static DIP_HD U sub_u(U a, U b) { return _mm256_sub_epi32(a, b); }
  template <int kBits>
  static DIP_HD U shift_left(U a) {
    return _mm256_slli_epi32(a, kBits);
  }
  template <int kBits>
  static DIP_HD U shift_right(U a) {
    return _mm256_srli_epi32(a, kBits);
  }
  static DIP_HD F add(F a, F b) { return _mm256_add_ps(a, b); }
  static DIP_HD F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static DIP_HD F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static DIP_HD F as_float(U a) { return _mm256_castsi256_ps(a); }
  static DIP_HD U as_uint(F a) { return _mm256_castps_si256(a); }
  static DIP_HD F int_to_float(U a) { return _mm256_cvtepi32_ps(a); }
  static DIP_HD F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static DIP_HD F sqrt(F a) { return _mm256_sqrt_ps(a); }
  static DIP_HD F where_positive(F x, F y) {
    return _mm256_and_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NLE_UQ), y);
  }

  static DIP_HD U load(const uint32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static DIP_HD U load_counters(const uint32_t* p) { return load(p); }
  static DIP_HD void store(uint32_t* p, U a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a);
  }
  static DIP_HD void store(float* p, F a) { _mm256_storeu_ps(p, a); }

  // w[t]: word t of 8 counters. Vector q of the 32 words at p has those of counters 2 * q on, in
  // the lanes that zip needs.
  static DIP_HD void store_words(uint32_t* p, const U w[4]) {
    const U low[2] = {_mm256_unpacklo_epi32(w[0], w[1]), _mm256_unpacklo_epi32(w[2], w[3])};
    const U high[2] = {_mm256_unpackhi_epi32(w[0], w[1]), _mm256_unpackhi_epi32(w[2], w[3])};
    store(p, _mm256_permute2x128_si256(low[0], low[1], 0x20));
    store(p + 8, _mm256_permute2x128_si256(high[0], high[1], 0x20));
    store(p + 16, _mm256_permute2x128_si256(low[0], low[1], 0x31));
    store(p + 24, _mm256_permute2x128_si256(high[0], high[1], 0x31));
  }
  // The columns of such a vector, *a before *b.
  static DIP_HD void zip(F even, F odd, F* a, F* b) {
    *a = _mm256_unpacklo_ps(even, odd), *b = _mm256_unpackhi_ps(even, odd);
  }

  static DIP_HD F load(const float* p) { return _mm256_loadu_ps(p); }
  static DIP_HD F load(const BFloat16Bits* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static DIP_HD void store_pair(float* p, F a, F b) { store(p, a), store(p + 8, b); }
  static DIP_HD void store_pair(BFloat16Bits* p, F a, F b) {
    const U packed = _mm256_packus_epi32(
        shift_right<16>(round_to_bfloat16(a)), shift_right<16>(round_to_bfloat16(b)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xD8));
  }
  static DIP_HD void stream_pair(float* p, F a, F b) {
    _mm256_stream_ps(p, a), _mm256_stream_ps(p + 8, b);
  }
  static DIP_HD void end_stream() { _mm_sfence(); }
  // In the upper half of each lane, to nearest, ties to even; a NaN becomes the canonical one.
  static DIP_HD U round_to_bfloat16(F f) {
    const U bits = as_uint(f), last = and_(shift_right<16>(bits), splat(1));
    const U rounded = _mm256_add_epi32(_mm256_add_epi32(bits, splat(0x7FFF)), last);
    return _mm256_blendv_epi8(
        rounded, splat(0x7FC00000), as_uint(_mm256_cmp_ps(f, f, _CMP_UNORD_Q)));
  }
};
#endif

// Two vectors in lockstep: one chain of dependent operations fills the waiting of the other.
template <class V>
struct Twice {
  using One = V;
  static constexpr int kLanes = 2 * V::kLanes;
  struct F {
    typename V::F a, b;
  };
  struct U {
    typename V::U a, b;
  };
  struct Wide {
    typename V::Wide a, b;
  };
  static DIP_HD Wide widen(U x) { return {V::widen(x.a), V::widen(x.b)}; }
  static DIP_HD U narrow(Wide x) { return {V::narrow(x.a), V::narrow(x.b)}; }
  static DIP_HD Wide multiply(Wide x, uint32_t m) {
    return {V::multiply(x.a, m), V::multiply(x.b, m)};
  }
  static DIP_HD Wide high(Wide x) { return {V::high(x.a), V::high(x.b)}; }
  static DIP_HD Wide xor2(Wide x, uint64_t c) { return {V::xor2(x.a, c), V::xor2(x.b, c)}; }
  static DIP_HD Wide xor3(Wide x, Wide y, uint64_t c) {
    return {V::xor3(x.a, y.a, c), V::xor3(x.b, y.b, c)};
  }
  static DIP_HD U splat(uint32_t x) { return {V::splat(x), V::splat(x)}; }
  static DIP_HD F splat_f(float x) { return {V::splat_f(x), V::splat_f(x)}; }
  static DIP_HD U and_(U x, U y) { return {V::and_(x.a, y.a), V::and_(x.b, y.b)}; }
  static DIP_HD U xor_and(U x, U y, U z) {
    return {V::xor_and(x.a, y.a, z.a), V::xor_and(x.b, y.b, z.b)};
  }
  static DIP_HD U and_or(U x, U y, U z) {
    return {V::and_or(x.a, y.a, z.a), V::and_or(x.b, y.b, z.b)};
  }
  static DIP_HD U sub_u(U x, U y) { return {V::sub_u(x.a, y.a), V::sub_u(x.b, y.b)}; }
  template <int kBits>
  static DIP_HD U shift_left(U x) {
    return {V::template shift_left<kBits>(x.a), V::template shift_left<kBits>(x.b)};
  }
  template <int kBits>
  static DIP_HD U shift_right(U x) {
    return {V::template shift_right<kBits>(x.a), V::template shift_right<kBits>(x.b)};
  }
  static DIP_HD F add(F x, F y) { return {V::add(x.a, y.a), V::add(x.b, y.b)}; }
  static DIP_HD F sub(F x, F y) { return {V::sub(x.a, y.a), V::sub(x.b, y.b)}; }
  static DIP_HD F mul(F x, F y) { return {V::mul(x.a, y.a), V::mul(x.b, y.b)}; }
  static DIP_HD F as_float(U x) { return {V::as_float(x.a), V::as_float(x.b)}; }
  static DIP_HD U as_uint(F x) { return {V::as_uint(x.a), V::as_uint(x.b)}; }
  static DIP_HD F int_to_float(U x) { return {V::int_to_float(x.a), V::int_to_float(x.b)}; }
  static DIP_HD F fma(F x, F y, F z) { return {V::fma(x.a, y.a, z.a), V::fma(x.b, y.b, z.b)}; }
  static DIP_HD F sqrt(F x) { return {V::sqrt(x.a), V::sqrt(x.b)}; }

  static DIP_HD U load(const uint32_t* p) { return {V::load(p), V::load(p + V::kLanes)}; }
  static DIP_HD F load(const float* p) { return {V::load(p), V::load(p + V::kLanes)}; }
  static DIP_HD U load_counters(const uint32_t* p) {
    return {V::load_counters(p), V::load_counters(p + V::kLanes)};
  }
  static DIP_HD void store(uint32_t* p, U x) { V::store(p, x.a), V::store(p + V::kLanes, x.b); }
  static DIP_HD void store(float* p, F x) { V::store(p, x.a), V::store(p + V::kLanes, x.b); }
  static DIP_HD void store_words(uint32_t* p, const U w[4]) {
    const typename V::U first[4] = {w[0].a, w[1].a, w[2].a, w[3].a},
                        second[4] = {w[0].b, w[1].b, w[2].b, w[3].b};
    V::store_words(p, first);
    V::store_words(p + 4 * V::kLanes, second);
  }
  // Calls f(i, x, y) for the vectors of columns i on and i + V::kLanes on, of those that belong to
  // these words.
  template <class G>
  static DIP_HD void zip(F even, F odd, G&& f) {
    typename V::F x, y;
    V::zip(even.a, odd.a, &x, &y);
    f(0, x, y);
    V::zip(even.b, odd.b, &x, &y);
    f(2 * V::kLanes, x, y);
  }
};

struct Portable : ScalarLane {
  using One = Portable;
  static DIP_HD U load(const uint32_t* p) { return *p; }
  static DIP_HD F load(const float* p) { return *p; }
  static DIP_HD U load_counters(const uint32_t* p) { return *p; }
  static DIP_HD void store(uint32_t* p, U a) { *p = a; }
  static DIP_HD void store(float* p, F a) { *p = a; }
  static DIP_HD F where_positive(F x, F y) { return x <= 0 ? 0 : y; }
  static DIP_HD void store_words(uint32_t* p, const U w[4]) {
    for (int t = 0; t < 4; ++t) p[t] = w[t];
  }
  template <class G>
  static DIP_HD void zip(F even, F odd, G&& f) {
    f(0, even, odd);
  }
  static DIP_HD void store_pair(float* p, F a, F b) { p[0] = a, p[1] = b; }
  static DIP_HD void stream_pair(float* p, F a, F b) { store_pair(p, a, b); }
  static DIP_HD void end_stream() {}
};

}  // namespace dip
