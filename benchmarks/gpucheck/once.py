"""Every kernel that torch reaches, once, for compute-sanitizer: python -m gpucheck.once DEVICE
[overrun]

Set PYTORCH_NO_CUDA_MEMORY_CACHING=1: each tensor then has memory of its own, and an access past its
end is seen.
"""

from __future__ import annotations

import sys

import torch

from dipkernels import backends
from dipkernels.ops import gate, norm, registry
from dipkernels.ops import perturb as projection
from dipkernels.ops.draw import Draw
from dipkernels.ops.expectation import expectation, expectation_bwd

DRAW = Draw(1)
# As tests/gpu has them: Triton compiles for a minute, and its cache then holds these. A shape, and
# LINEAR's type, activation and samples.
SHAPES = ((257, 72), (5, 9), (3, 24, 10, 6), (2, 13, 7, 7))
LINEAR = ((33, 1009, 53), torch.bfloat16, "gelu", 2)
LINEAR_DRAW = Draw(-1, 2**32 - 2, 3, 1, 0.5, True)


def perturb(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, overrun: bool = False
) -> None:
    seed = torch.tensor([1, 2], device=device)
    x, sigma = torch.randn(shape, device=device).to(dtype), torch.ones(shape[1], device=device)
    if overrun:
        sigma.untyped_storage().resize_(sigma.nbytes - 4)
    projection.perturb(x, sigma, seed, DRAW, None)
    projection.perturb_bwd(x, sigma, seed, DRAW)
    projection.perturb_replay(x, x, sigma, seed, DRAW, None)


def linear(device: torch.device) -> None:
    (m, k, n), dtype, activation, num_samples = LINEAR
    options = {"device": device, "dtype": dtype}
    x, weight, bias, dy = (torch.randn(*s, **options) for s in ((m, k), (n, k), (n,), (m, n)))
    seed, sigma = torch.tensor([1, 2], device=device), torch.ones(k, device=device)
    kernels, how = torch.ops.dipkernels_triton, (*LINEAR_DRAW[1:], num_samples, activation)
    kernels.linear(x, weight, bias, sigma, seed, *how, None)
    kernels.linear_bwd(dy, x, weight, bias, sigma, seed, *how)


def activation(device: torch.device) -> None:
    mu, v = torch.randn(33, 40, device=device), torch.ones(40, device=device)
    expectation(mu, v, "gelu")
    expectation_bwd(mu, mu, v, "gelu")


def producers(device: torch.device) -> None:
    seed, sigma = torch.tensor([1, 2], device=device), torch.ones(40, device=device)
    weight, x = torch.randn(40, device=device), torch.randn(33, 40, device=device)
    for kind in norm.KINDS:
        _, stats = norm.norm(x, weight, weight, sigma, seed, DRAW, kind, 1e-5, 0.0, None)
        run = registry.kernel("norm_bwd", device.type)
        run(x, x, stats, weight, weight, sigma, seed, *DRAW, kind, 0.0)
    for b, act in ((None, "gelu"), (x, "silu")):
        gate.gate(x, b, sigma, seed, DRAW, act, None)
        registry.kernel("gate_bwd", device.type)(x, x, b, sigma, seed, *DRAW, act)


def main(device: torch.device, overrun: bool) -> None:
    kinds = ["cuda"] if device.type == "cuda" else ["cpu"]
    triton = backends.has_triton() and device.type == "cuda"
    kinds += ["triton"] * triton
    for kind in kinds:
        with backends.backend(kind):
            for shape in SHAPES:
                for dtype in (torch.bfloat16, torch.float32):
                    perturb(device, shape, dtype, overrun)
    if triton and not overrun:
        with backends.backend("triton"):
            linear(device)
            activation(device)
            producers(device)
    elif not overrun:
        producers(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print("once: done with", *kinds)


if __name__ == "__main__":
    main(torch.device(sys.argv[1]), sys.argv[2:] == ["overrun"])
