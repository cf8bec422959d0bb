"""For which sizes an affine layer on a GPU samples inside its own GEMM."""

from __future__ import annotations

import torch

# Where an affine layer on a GPU samples inside its own GEMM (Triton's `linear`) instead of writing
# u first. By the arithmetic of docs/measured_gpu_expectation.md: neither bound has been measured
# yet; `make gpu-check` times both forms around them. N: one tile of columns draws the noise once,
# and u's 2 M K elements of traffic go; two would draw it twice
FUSED_COLUMNS = 128
# M N K = 32 x 1024 x 1024: the product takes microseconds, as each of the two kernels saved does
FUSED_WORK = 2**25
# N of the mean over samples behind an activation: each tile of columns draws again, and beyond,
# that takes longer than a sample's way through memory.
FUSED_MEAN_COLUMNS = 512


def is_narrow(dtype: torch.dtype, m: int, n: int, k: int) -> bool:
    """Whether an affine layer of m rows, n out-features and k in-features is for that, where it
    may; of 16-bit types alone, because in float32 the vendor's product is far ahead."""
    return dtype in (torch.float16, torch.bfloat16) and (
        n <= FUSED_COLUMNS or m * n * k <= FUSED_WORK
    )


def is_wide(dtype: torch.dtype, m: int, n: int, k: int) -> bool:
    """Whether a mean behind an activation, weight [n, k] of this dtype, is for row blocks where
    CUDA kernels draw."""
    return m * n * k > FUSED_WORK and (dtype is torch.float32 or n > FUSED_MEAN_COLUMNS)
