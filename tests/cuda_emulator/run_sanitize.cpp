// tools/verify/sanitize_cuda.cu with the kernels it launches, on the emulator instead of a GPU.
#include "../../csrc/cuda/perturb.cu"
// The kernels' own files come first, so that this one sees the emulator's runtime.
#include "../../tools/verify/sanitize_cuda.cu"
