// z on a GPU: the words of noise.h's normals, drawn for several rows in lockstep.  docs/maths.md,
// section 3.
#pragma once
#include "../noise.h"

#define DIP_DEVICE __device__ __forceinline__

namespace dip {

// The key schedule, made once a block: reading two rounds' keys from shared memory takes one issue
// slot, adding them four.
struct alignas(16) RoundKeys {
  uint32_t words[20];  // key of round i: words 2i, 2i + 1
};

DIP_DEVICE void make_round_keys(RoundKeys* keys, PhiloxKey key) {
  DIP_UNROLL
  for (int round = 0; round < 10; ++round) {
    keys->words[2 * round] = key.lo;
    keys->words[2 * round + 1] = key.hi;
    key = next_key(key);
  }
}

// Rounds 2i and 2i + 1. Volatile: hoisted out of a loop, the keys would hold twenty registers.
DIP_DEVICE void load_round_keys(const RoundKeys& keys, int i, PhiloxKey pair[2]) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(pair[0].lo), "=r"(pair[0].hi), "=r"(pair[1].lo), "=r"(pair[1].hi)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(keys.words + 4 * i))));
}

// z[i][t]: column 8 * group + t of row `row + i * step`, for N rows in lockstep. last_word: stream
// and sample.
template <int N>
DIP_DEVICE void draw_groups(
    const RoundKeys& keys, uint32_t last_word, uint32_t group, uint64_t row, uint64_t step,
    float z[N][8]) {
  uint64_t ctr[N][4];
  DIP_UNROLL
  for (int i = 0; i < N; ++i) {
    const uint64_t at = row + i * step;
    ctr[i][0] = group, ctr[i][1] = static_cast<uint32_t>(at), ctr[i][2] = at >> 32,
    ctr[i][3] = last_word;
  }
  DIP_UNROLL
  for (int round = 0; round < 10; round += 2) {
    PhiloxKey key[2];
    load_round_keys(keys, round / 2, key);
    DIP_UNROLL
    for (int i = 0; i < 2 * N; ++i) philox4x32_round<ScalarLane>(ctr[i % N], key[i / N]);
  }
  DIP_UNROLL
  for (int i = 0; i < N; ++i) {
    DIP_UNROLL
    for (int t = 0; t < 4; ++t)
      standard_normal_pair<ScalarLane>(
          static_cast<uint32_t>(ctr[i][t]), &z[i][2 * t], &z[i][2 * t + 1]);
  }
}

}  // namespace dip
