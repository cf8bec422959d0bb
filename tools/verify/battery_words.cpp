// The noise contract's raw words on stdout, for a battery of tests, until nobody reads:
// battery_words STREAM.  docs/reliability.md. How many bytes went out is left in the file that the
// second argument names.
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../../csrc/noise.h"

namespace {

constexpr int kGroups = 128;  // of a row: a layer of 1024 features

// The words of one row of one draw.
void row_words(const int64_t seed[2], uint32_t sample, uint64_t row, uint32_t out[4 * kGroups]) {
  for (int g = 0; g < kGroups; ++g) {
    uint64_t ctr[4] = {
        static_cast<uint64_t>(g), row & 0xFFFFFFFFu, row >> 32, dip::stream_sample(seed, sample)};
    dip::philox4x32_10<dip::ScalarLane>(ctr, dip::philox_key(seed));
    for (int t = 0; t < 4; ++t) out[4 * g + t] = static_cast<uint32_t>(ctr[t]);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  std::signal(SIGPIPE, SIG_IGN);
  constexpr int kMost = 8;
  static uint32_t part[kMost][4 * kGroups], out[kMost * 4 * kGroups];
  const bool one = !std::strcmp(argv[1], "layer"), steps = !std::strcmp(argv[1], "steps");
  const bool layers = !std::strcmp(argv[1], "layers"), samples = !std::strcmp(argv[1], "samples"),
             rows = !std::strcmp(argv[1], "rows");
  if (!(one || layers || samples || steps || rows)) return 2;
  const int ways = one ? 1 : kMost;
  unsigned long long bytes = 0;
  for (uint64_t row = 0;; ++row) {
    for (int way = 0; way < ways; ++way) {
      // layer: one draw. layers, samples, steps (keys one apart), rows (2^32 apart): eight draws,
      // word by word.
      const int64_t seed[2] = {0x0123456789ABCDEF + (steps ? way : 0), layers ? way : 0};
      row_words(
          seed, samples ? static_cast<uint32_t>(way) : 0,
          row + (rows ? static_cast<uint64_t>(way) << 32 : 0), part[way]);
    }
    for (int i = 0; i < 4 * kGroups; ++i)
      for (int way = 0; way < ways; ++way) out[i * ways + way] = part[way][i];
    const size_t n = sizeof(uint32_t) * static_cast<size_t>(4 * kGroups * ways);
    if (std::fwrite(out, 1, n, stdout) != n) break;
    bytes += n;
  }
  if (std::FILE* f = std::fopen(argv[2], "w")) std::fprintf(f, "%llu\n", bytes), std::fclose(f);
  return 0;
}
