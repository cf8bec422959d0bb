// Philox4x32-10: the bits of the noise contract.  docs/maths.md, section 3.
// Any edit here changes users' random numbers.
//
// One body for every backend, over a lane type V: `ScalarLane` of noise.h for a GPU thread or plain
// C++, the vector types of cpu/simd.h. V::Wide holds one 64-bit product per lane; only the low 32
// bits of a counter word are ever read.
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

template <class V, class Key>
DIP_HD void philox4x32_round(typename V::Wide ctr[4], const Key& key) {
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

// The keys of all rounds, in 64-bit words: a vector instruction takes one straight from memory.
struct PhiloxKeys {
  struct Round {
    uint64_t lo, hi;
  } round[10];

  DIP_HD explicit PhiloxKeys(PhiloxKey key) {
    for (Round& r : round) r = {key.lo, key.hi}, key = next_key(key);
  }
};

template <class V>
DIP_HD void philox4x32_10(typename V::Wide ctr[4], const PhiloxKeys& keys) {
  DIP_UNROLL
  for (int round = 0; round < 10; ++round) philox4x32_round<V>(ctr, keys.round[round]);
}

// The counters (group, row, stream_sample) of one row differ in `group` alone: of the first two
// rounds a half is common to all.
struct PhiloxRow {
  // what the numbered rounds xor into words 0 and 2, their keys included
  uint64_t first2, second0, second2, third2;

  DIP_HD PhiloxRow(uint64_t row, uint32_t stream_sample, const PhiloxKeys& keys) {
    const uint64_t p1 = (row >> 32) * 0xCD9E8D57u;
    const uint64_t p0 =
        static_cast<uint64_t>(static_cast<uint32_t>(p1 >> 32 ^ row ^ keys.round[0].lo)) *
        0xD2511F53u;
    first2 = stream_sample ^ keys.round[0].hi;
    second0 = static_cast<uint32_t>(p1) ^ keys.round[1].lo;
    second2 = p0 >> 32 ^ keys.round[1].hi;
    third2 = static_cast<uint32_t>(p0) ^ keys.round[2].hi;
  }
};

template <class V>
DIP_HD void philox4x32_10(
    typename V::U group, const PhiloxRow& row, const PhiloxKeys& keys, typename V::Wide ctr[4]) {
  typename V::Wide p0 = V::multiply(V::widen(group), 0xD2511F53u);
  typename V::Wide p1 = V::multiply(V::xor2(V::high(p0), row.first2), 0xCD9E8D57u);
  ctr[0] = V::xor2(V::high(p1), row.second0);
  ctr[1] = p1;
  ctr[2] = V::xor2(p0, row.second2);
  p0 = V::multiply(ctr[0], 0xD2511F53u);
  p1 = V::multiply(ctr[2], 0xCD9E8D57u);
  ctr[0] = V::xor3(V::high(p1), ctr[1], keys.round[2].lo);
  ctr[1] = p1;
  ctr[2] = V::xor2(V::high(p0), row.third2);
  ctr[3] = p0;
  DIP_UNROLL
  for (int round = 3; round < 10; ++round) philox4x32_round<V>(ctr, keys.round[round]);
}

}  // namespace dip
