// The CPU kernels' instruction set: 0 portable, 1 avx2, 2 avx512.
#pragma once

namespace dip {

int cpu_capability();  // -1: DIPKERNELS_CPU_CAPABILITY is not one of them, or not offered here
// negative: the best; returns nonzero where it is not offered
int set_cpu_capability(int capability);

}  // namespace dip
