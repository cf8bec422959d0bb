// The operations as one unit: torch's headers are read, and their templates compiled, once.
#include "perturb_op.cpp"
#ifdef DIP_HAS_CPU  // the others have no CUDA kernels
#include "expectation_op.cpp"
#include "gate_op.cpp"
#include "norm_op.cpp"
#include "samples_op.cpp"
#endif
