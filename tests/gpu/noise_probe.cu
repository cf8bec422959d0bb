// What the noise headers give on a device, argument by argument; tests/gpu/test_gpu_noise.py
// compares it with the host's.
#include "../../csrc/cuda/normal.h"

namespace {

__global__ void radii(float* out) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;  // all 2^20
  out[i] = dip::radius<dip::ScalarLane>(i << 12);
}

__global__ void angles(float* out) {  // [4096, 2]: cosine, sine
  const uint32_t j = blockIdx.x * blockDim.x + threadIdx.x;
  dip::cos_sin<dip::ScalarLane>(j, 1.0f, &out[2 * j], &out[2 * j + 1]);
}

// [n, 4], [n, 2], [n, 4]
__global__ void words(const int64_t* counters, const int64_t* keys, int64_t* out, int n) {
  const int i = threadIdx.x;
  if (i >= n) return;
  uint64_t ctr[4];
  for (int t = 0; t < 4; ++t) ctr[t] = static_cast<uint64_t>(counters[4 * i + t]);
  dip::philox4x32_10<dip::ScalarLane>(
      ctr, {static_cast<uint32_t>(keys[2 * i]), static_cast<uint32_t>(keys[2 * i + 1])});
  for (int t = 0; t < 4; ++t) out[4 * i + t] = static_cast<uint32_t>(ctr[t]);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int probe_radii(float* out) {
  radii<<<4096, 256>>>(out);
  return cudaDeviceSynchronize();
}
EXPORT int probe_angles(float* out) {
  angles<<<16, 256>>>(out);
  return cudaDeviceSynchronize();
}
EXPORT int probe_words(const int64_t* counters, const int64_t* keys, int64_t* out, int n) {
  words<<<1, 256>>>(counters, keys, out, n);
  return cudaDeviceSynchronize();
}
EXPORT void host_radii(float* out) {
  for (uint32_t i = 0; i < 1u << 20; ++i) out[i] = dip::radius<dip::ScalarLane>(i << 12);
}
EXPORT void host_angles(float* out) {
  for (uint32_t j = 0; j < 4096; ++j)
    dip::cos_sin<dip::ScalarLane>(j, 1.0f, &out[2 * j], &out[2 * j + 1]);
}
