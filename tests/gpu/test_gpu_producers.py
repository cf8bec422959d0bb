"""Norms, activations and gated products with noise on a device against the float64 reference, by
the kernels that are chosen there."""

import itertools

import pytest
import torch

from dipkernels import backends, producers, reference
from dipkernels.ops.activations import ACTIVATIONS
from dipkernels.ops.draw import Draw

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
ROWS, LONG, ODD, IMAGES = (257, 72), (33, 6000), (70, 1009), (3, 24, 10, 6)
PLACE = (2**32 - 3, 5, 1)  # rows cross 2^32, columns start inside a group
# Each kernel is compiled anew for a type, so not every pair: the types take turns.
CASES = [
    (kind, shape, dtype)
    for i, (kind, shape) in enumerate(itertools.product(("layer", "rms"), (ROWS, LONG, ODD)))
    for dtype in ((BF16, F32), (F16, F64))[i % 2]
] + [
    (kind, shape, (BF16, F64, F32, BF16, F16)[i % 5])
    for i, (kind, shape) in enumerate(itertools.product(ACTIVATIONS, (ROWS, IMAGES)))
]


def inputs(kind, shape, dtype):
    generator = torch.Generator("cuda").manual_seed(sum(shape))

    def randn(*size):
        return torch.randn(size, generator=generator, device="cuda").to(dtype).requires_grad_()

    k = shape[1] if len(shape) == 4 else shape[-1]
    sigma = torch.rand(k, generator=generator, device="cuda", dtype=F64 if dtype is F64 else F32)
    columns = {"layer": 2, "rms": 1}.get(kind, 0)
    return [randn(*shape)], [randn(k) for _ in range(columns)], (sigma - 2).requires_grad_(), randn


def run(kind, tensors, columns, sigma, dim):
    row0, col0, sample = PLACE
    place = {"row0": row0, "col0": col0, "sample": sample, "log_variance": True}
    seed = torch.tensor([0x0123456789ABCDEF, 7], device="cuda")
    if kind in ("layer", "rms"):
        bias = columns[1] if kind == "layer" else None
        return producers.norm(
            *tensors, columns[0], bias, sigma, seed, kind=kind, eps=1e-5, offset=0.5, **place
        )
    if len(tensors) == 2:
        return producers.gate(*tensors, sigma, seed, kind=kind, dim=dim, **place)
    return producers.activate(*tensors, sigma, seed, kind=kind, dim=dim, **place)


@pytest.mark.parametrize("kind, shape, dtype", CASES)
def test_producers_and_their_gradients_match_reference(kind, shape, dtype):
    """The same computation by the reference in float64 on the same numbers; z may be 4e-6 off."""
    dim = 1 if shape is IMAGES else -1
    tensors, columns, sigma, randn = inputs(kind, shape, dtype)
    forms = [tensors] if columns else [tensors, [*tensors, randn(*shape)]]
    for given in forms:
        leaves = [*given, *columns, sigma]
        u = run(kind, given, columns, sigma, dim)
        du = torch.randn_like(u)
        got = u, *torch.autograd.grad(u, leaves, du)
        wide = [t.detach().double().requires_grad_() for t in leaves]
        tensors_of, columns_of = wide[: len(given)], wide[len(given) : -1]
        with backends.backend("reference"):
            want = run(kind, tensors_of, columns_of, wide[-1], dim)
            want = want, *torch.autograd.grad(want, wide, du.double())
        eps = torch.finfo(dtype).eps
        for a, b in zip(got, want, strict=True):
            assert a.dtype in (dtype, sigma.dtype) and a.shape == b.shape
            near = 8 * eps + 2e-5 if a.dtype is not F64 else 1e-5
            assert (a.double() - b).norm() <= near * b.norm() + 1e-6


def test_producers_draw_what_perturb_draws_to_the_bit():
    """Behind relu, which rounds nothing, by whatever kernels each of the two is made of."""
    x = torch.randn(257, 72, device="cuda")
    sigma, seed = torch.rand(72, device="cuda"), torch.tensor([3, 1], device="cuda")
    from dipkernels.functional import perturb

    u = producers.activate(x, sigma, seed, kind="relu")
    assert torch.equal(u, perturb(x.relu(), sigma, seed))
    assert reference.perturb(x.relu(), sigma, seed, *Draw(), F64).sub(u).abs().max() < 1e-5
