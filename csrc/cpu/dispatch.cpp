// Which instruction set runs: the best that the library carries and the machine offers, unless DIPKERNELS_CPU_CAPABILITY says.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "../launch.h"
#include "dispatch.h"

namespace dip {

const char* perturb_portable(const PerturbArgs&, ParallelFor);
const char* expectation_portable(const ExpectationArgs&, ParallelFor);
const char* variance_portable(const VarianceArgs&, ParallelFor);
const char* samples_portable(const SamplesArgs&, ParallelFor);
const char* gate_portable(const GateArgs&, ParallelFor);
const char* norm_portable(const NormArgs&, ParallelFor);
#ifdef DIP_HAS_X86
const char* perturb_avx2(const PerturbArgs&, ParallelFor);
const char* perturb_avx512(const PerturbArgs&, ParallelFor);
const char* expectation_avx2(const ExpectationArgs&, ParallelFor);
const char* variance_avx2(const VarianceArgs&, ParallelFor);
const char* samples_avx2(const SamplesArgs&, ParallelFor);
const char* gate_avx2(const GateArgs&, ParallelFor);
const char* norm_avx2(const NormArgs&, ParallelFor);
const char* expectation_avx512(const ExpectationArgs&, ParallelFor);
const char* variance_avx512(const VarianceArgs&, ParallelFor);
const char* samples_avx512(const SamplesArgs&, ParallelFor);
const char* gate_avx512(const GateArgs&, ParallelFor);
const char* norm_avx512(const NormArgs&, ParallelFor);
#endif

namespace {

const char* const kNames[] = {"portable", "avx2", "avx512"};
const char* const kUnknownCapability =
    "DIPKERNELS_CPU_CAPABILITY: expected auto, portable, avx2 or avx512, and one that this machine offers";

bool offered(int capability) {
#ifdef DIP_HAS_X86
  if (capability == 2)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && offered(1);
  if (capability == 1) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return capability == 0;
}

int best() {
  int capability = 2;
  while (!offered(capability)) --capability;
  return capability;
}

// -1: the environment named something unknown or not offered; reported at the first call.
int initial() {
  const char* wanted = std::getenv("DIPKERNELS_CPU_CAPABILITY");
  if (!wanted || !*wanted || !std::strcmp(wanted, "auto")) return best();
  for (int c = 0; c < 3; ++c)
    if (!std::strcmp(wanted, kNames[c])) return offered(c) ? c : -1;
  return -1;
}

std::atomic<int>& current() {
  static std::atomic<int> capability{initial()};
  return capability;
}

}  // namespace

int cpu_capability() { return current().load(std::memory_order_relaxed); }

int set_cpu_capability(int capability) {
  if (capability < 0) capability = best();
  if (capability > 2 || !offered(capability)) return 1;
  current().store(capability, std::memory_order_relaxed);
  return 0;
}

const char* perturb_cpu(const PerturbArgs& args, ParallelFor parallel_for) {
  switch (cpu_capability()) {
#ifdef DIP_HAS_X86
    case 2: return perturb_avx512(args, parallel_for);
    case 1: return perturb_avx2(args, parallel_for);
#endif
    case 0: return perturb_portable(args, parallel_for);
    default: return kUnknownCapability;
  }
}

const char* expectation_cpu(const ExpectationArgs& args, ParallelFor parallel_for) {
  switch (cpu_capability()) {
#ifdef DIP_HAS_X86
    case 2: return expectation_avx512(args, parallel_for);
    case 1: return expectation_avx2(args, parallel_for);
#endif
    case 0: return expectation_portable(args, parallel_for);
    default: return kUnknownCapability;
  }
}

const char* variance_cpu(const VarianceArgs& args, ParallelFor parallel_for) {
  switch (cpu_capability()) {
#ifdef DIP_HAS_X86
    case 2: return variance_avx512(args, parallel_for);
    case 1: return variance_avx2(args, parallel_for);
#endif
    case 0: return variance_portable(args, parallel_for);
    default: return kUnknownCapability;
  }
}

const char* samples_cpu(const SamplesArgs& args, ParallelFor parallel_for) {
  switch (cpu_capability()) {
#ifdef DIP_HAS_X86
    case 2: return samples_avx512(args, parallel_for);
    case 1: return samples_avx2(args, parallel_for);
#endif
    case 0: return samples_portable(args, parallel_for);
    default: return kUnknownCapability;
  }
}

const char* gate_cpu(const GateArgs& args, ParallelFor parallel_for) {
  switch (cpu_capability()) {
#ifdef DIP_HAS_X86
    case 2: return gate_avx512(args, parallel_for);
    case 1: return gate_avx2(args, parallel_for);
#endif
    case 0: return gate_portable(args, parallel_for);
    default: return kUnknownCapability;
  }
}

const char* norm_cpu(const NormArgs& args, ParallelFor parallel_for) {
  switch (cpu_capability()) {
#ifdef DIP_HAS_X86
    case 2: return norm_avx512(args, parallel_for);
    case 1: return norm_avx2(args, parallel_for);
#endif
    case 0: return norm_portable(args, parallel_for);
    default: return kUnknownCapability;
  }
}

}  // namespace dip
