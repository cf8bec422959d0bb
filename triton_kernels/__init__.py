"""Triton kernels of the operations: noise, perturb and linear, one file each; tiles says how
tensors map to tiles."""
