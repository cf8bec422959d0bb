// Which instruction set runs: the best that the library carries and the machine offers, unless
// DIPKERNELS_CPU_CAPABILITY says.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#include "../launch.h"
#include "dispatch.h"

namespace dip {
namespace {

const char* const kNames[] = {"portable", "avx2", "avx512"};

bool offered(int capability) {
#ifdef DIP_HAS_X86
  if (capability == 2)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && offered(1);
  if (capability == 1)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
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

// What is wrong with the variable.
const char* refusal() {
  static const std::string text = [] {
    std::string offers;
    for (int c = 0; c < 3; ++c)
      if (offered(c)) offers += std::string(", ") + kNames[c];
    const char* set = std::getenv("DIPKERNELS_CPU_CAPABILITY");
    std::string wanted = set ? set : "";
    for (char& c : wanted)
      if (c < ' ' || c > '~') c = '?';  // Python takes a message for UTF-8
    return "DIPKERNELS_CPU_CAPABILITY: expected auto" + offers + ", which run here, got '" +
           wanted + "'; unset it for the best of them";
  }();
  return text.c_str();
}

std::atomic<int>& current() {
  static std::atomic<int> capability{initial()};
  return capability;
}

template <class Args>
using Kernel = const char* (*)(const Args&, ParallelFor);

template <class Args>
const char* run(const Kernel<Args>* kernels, const Args& args, ParallelFor parallel_for) {
  const int capability = cpu_capability();  // one that is offered, or -1
  return capability < 0 ? refusal() : kernels[capability](args, parallel_for);
}

}  // namespace

int cpu_capability() { return current().load(std::memory_order_relaxed); }

int set_cpu_capability(int capability) {
  if (capability < 0) capability = best();
  if (capability > 2 || !offered(capability)) return 1;
  current().store(capability, std::memory_order_relaxed);
  return 0;
}

// name_cpu of launch.h, and its kernels in the order of kNames.
#ifdef DIP_HAS_X86
#define DIP_NAMES(name) name##_portable, name##_avx2, name##_avx512
#else
#define DIP_NAMES(name) name##_portable
#endif
#define DIP_OPERATION(name, Args)                                      \
  const char* name##_portable(const Args&, ParallelFor);               \
  const char* name##_avx2(const Args&, ParallelFor);                   \
  const char* name##_avx512(const Args&, ParallelFor);                 \
  const char* name##_cpu(const Args& args, ParallelFor parallel_for) { \
    constexpr Kernel<Args> kernels[] = {DIP_NAMES(name)};              \
    return run(kernels, args, parallel_for);                           \
  }

DIP_OPERATION(perturb, PerturbArgs)
DIP_OPERATION(expectation, ExpectationArgs)
DIP_OPERATION(variance, VarianceArgs)
DIP_OPERATION(samples, SamplesArgs)
DIP_OPERATION(gate, GateArgs)
DIP_OPERATION(norm, NormArgs)

}  // namespace dip
