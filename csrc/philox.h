// Philox4x32-10: the bits of the noise contract.  docs/maths.md, section 3.
// Any edit here changes users' random numbers.
//
// One body for every backend, over a lane type V: `ScalarLane` below for a GPU thread or plain C++, the vector types of
// cpu/simd.h. V::Wide holds one 64-bit product per lane; only the low 32 bits of a counter word are ever read.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define DIP_HD __host__ __device__ __forceinline__
#define DIP_UNROLL _Pragma("unroll")
#else
#define DIP_HD inline __attribute__((always_inline))
#define DIP_UNROLL _Pragma("GCC unroll 16")
#endif

namespace dip {

struct PhiloxKey {
  uint32_t lo, hi;
};

template <class V>
DIP_HD void philox4x32_round(typename V::Wide ctr[4], PhiloxKey key) {
  const typename V::Wide p0 = V::multiply(ctr[0], 0xD2511F53u);
  const typename V::Wide p1 = V::multiply(ctr[2], 0xCD9E8D57u);
  ctr[0] = V::xor3(V::high(p1), ctr[1], key.lo);
  ctr[1] = p1;
  ctr[2] = V::xor3(V::high(p0), ctr[3], key.hi);
  ctr[3] = p0;
}

DIP_HD PhiloxKey next_key(PhiloxKey key) { return {key.lo + 0x9E3779B9u, key.hi + 0xBB67AE85u}; }

// ctr[0..3] in, random words out.
template <class V>
DIP_HD void philox4x32_10(typename V::Wide ctr[4], PhiloxKey key) {
  DIP_UNROLL
  for (int round = 0; round < 10; ++round) {
    philox4x32_round<V>(ctr, key);
    key = next_key(key);
  }
}

}  // namespace dip
