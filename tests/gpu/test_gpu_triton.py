"""Triton's fused linear and expectations on a device against the reference; without one, in the
interpreter: test_triton_interpreter.py."""

import pytest
import torch
import torch.nn.functional as F
from dipkernels.triton_kernels import mixtures

from dipkernels import backends, reference
from dipkernels.ops.activations import ACTIVATIONS
from dipkernels.ops.expectation import (
    affine_variance,
    affine_variance_bwd,
    expectation,
    expectation_bwd,
)

pytest.importorskip("triton")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# The interpreter is slow, and NumPy has no bfloat16.
DTYPES = (
    [torch.float32, torch.float16, torch.bfloat16] if ON_GPU else [torch.float32, torch.float16]
)
SHAPES = (
    [(257, 72, 40), (33, 1009, 53), (512, 1024, 640), (4096, 64, 64)]
    if ON_GPU
    else [(19, 24, 20), (7, 21, 33)]
)
SUMS = [("identity", 1), *((name, 1 + i % 3) for i, name in enumerate(ACTIVATIONS))]
# Each kernel is compiled anew for a type and an alignment, so not every pair: in turn, until each
# shape has met each type.
CASES = [
    (SHAPES[i % len(SHAPES)], DTYPES[(i + i // len(SHAPES)) % len(DTYPES)], *SUMS[i % len(SUMS)])
    for i in range(12 if ON_GPU else 7)
]


@pytest.fixture(autouse=True)
def triton():
    with backends.backend("triton"):
        yield


def make(m, k, n, dtype):
    generator = torch.Generator().manual_seed(m + k + n)
    x, weight, bias, dy = (
        torch.randn(*s, generator=generator) for s in ((m, k), (n, k), (n,), (m, n))
    )
    tensors = [t.to(DEVICE, dtype) for t in (x, weight / k**0.5, bias)]
    sigma = torch.rand(k, generator=generator).to(DEVICE) - 2  # ln(sigma^2)
    return (
        tensors,
        sigma,
        dy.to(DEVICE, dtype),
        torch.tensor([0x0123456789ABCDEF, 7], device=DEVICE),
    )


def in_pytorch(tensors, sigma, dy, seed, where, activation, dtype):
    """y and its gradients by autograd at `dtype`, with the reference's noise."""
    row0, col0, sample, factor, _, num_samples = where
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors] + [
        sigma.detach().double().requires_grad_()
    ]
    x, weight, bias, log_variance = leaves
    s = factor * torch.exp(log_variance / 2)
    act = ACTIVATIONS.get(activation, lambda h: h)
    draws = [
        reference.noise(seed, x.shape, -1, row0, col0, sample + i).double()
        for i in range(num_samples)
    ]
    y = sum(act(F.linear(x + (s * z).to(dtype), weight, bias)) for z in draws) / len(draws)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]


@pytest.mark.parametrize("shape, dtype, activation, num_samples", CASES)
# fused, and by row blocks
@pytest.mark.parametrize("namespace", ["dipkernels_triton", "dipkernels"])
def test_fused_linear_and_its_gradients_match_reference(
    namespace, shape, dtype, activation, num_samples
):
    """At most twice the error of the same expression in PyTorch at that dtype; z may add its
    4e-6."""
    kernels = getattr(torch.ops, namespace)
    tensors, sigma, dy, seed = make(*shape, dtype)
    where = (2**32 - 2, 3 if shape[1] % 8 else 0, 1, 0.5, True, num_samples)
    got = [kernels.linear(*tensors, sigma, seed, *where, activation, None)]
    got += kernels.linear_bwd(dy, *tensors, sigma, seed, *where, activation)
    want, eager = (
        in_pytorch(tensors, sigma, dy, seed, where, activation, d) for d in (torch.float64, dtype)
    )
    for name, ours, exact, theirs in zip(
        ("y", "dx", "dweight", "dbias", "dsigma"), got, want, eager, strict=True
    ):
        assert ours.dtype is (sigma.dtype if name == "dsigma" else dtype)
        assert ours.shape == exact.shape
        error, allowed = (
            (t.double() - exact).abs().max().item() for t in (ours, theirs.to(ours.dtype))
        )
        scale = max(1.0, exact.abs().max().item())
        rounding = torch.finfo(ours.dtype).eps * scale
        assert error <= 2 * allowed + rounding + 1e-5 * scale, (
            f"{name}: error {error:.2e}, PyTorch's {allowed:.2e}"
        )
    repeated = kernels.linear_bwd(dy, *tensors, sigma, seed, *where, activation)
    assert all(torch.equal(a, b) for a, b in zip(got[1:], repeated, strict=True))  # no atomics


TIERS = {torch.float16: 0, torch.bfloat16: 0, torch.float32: 1, torch.float64: 2}


@pytest.mark.parametrize("turn", range(2))
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_expectations_and_their_gradients_match_reference(name, turn):
    dtypes = [*DTYPES, torch.float64]
    dtype = dtypes[(2 * sorted(ACTIVATIONS).index(name) + turn) % len(dtypes)]
    shape = [(257, 1000), (4096, 130)][turn] if ON_GPU else (5, 40)
    generator = torch.Generator().manual_seed(sum(shape))
    mu, dy = (3 * torch.randn(2, *shape, generator=generator)).to(DEVICE, dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    v = (4 * torch.rand(shape[1], generator=generator, dtype=torch.float64) ** 3).to(DEVICE, wide)
    v[shape[1] // 2] = 0
    y, (dmu, dv, total) = expectation(mu, v, name), expectation_bwd(dy, mu, v, name)
    want = reference.expectation(mu.double(), v.double(), name)
    want_dmu, want_dv, want_total = reference.expectation_bwd(
        dy.double(), mu.double(), v.double(), name
    )
    assert y.dtype is dmu.dtype is dtype and dv.dtype is total.dtype is wide
    bound = mixtures.BOUNDS.get(name, (0, 0, 0))[TIERS[dtype]]
    rounding = 4 * torch.finfo(dtype).eps + 1e-6 * (dtype is not torch.float64)
    assert (y - want).abs().max() <= bound + rounding * (1 + mu.double().abs().max())
    assert (dmu - want_dmu).abs().max() <= (60 * bound + 4 * rounding) * (
        1 + dy.double().abs().max()
    )
    allowed = (1500 * bound + 4e-6) * shape[
        0
    ] ** 0.5 * dy.double().abs().max() + 1e-6 * want_dv.abs().max()
    assert (dv - want_dv).abs().max() <= allowed
    allowed = (
        shape[0] * (60 * bound + 1e-6) * dy.double().abs().max() + 1e-6 * want_total.abs().max()
    )
    assert (total - want_total).abs().max() <= allowed


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_expectations_of_infinities_and_nans(name):
    infinity = float("inf")
    for dtype in (*DTYPES, torch.float64):
        mu = torch.tensor([-infinity, infinity, float("nan")]).to(DEVICE, dtype)
        v = torch.ones(
            3, dtype=torch.float64 if dtype is torch.float64 else torch.float32, device=DEVICE
        )
        y = expectation(mu, v, name)
        dmu, dv, total = expectation_bwd(torch.ones_like(mu), mu, v, name)
        low, high = (-1, 1) if name == "tanh" else (0, infinity)
        assert abs(y[0] - low) <= 1e-30 and y[1] == high
        assert all(t[:2].isfinite().all() and t[2].isnan() for t in (dmu, dv, total))
        assert y[2].isnan()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("log_variance", [False, True])
def test_variances_and_their_gradients_match_reference(dtype, log_variance):
    n, k = (4096, 1009) if ON_GPU else (9, 40)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    weight = torch.randn(n, k).to(DEVICE, dtype)
    sigma = torch.rand(k).to(DEVICE, wide)
    dv = torch.randn(n).to(DEVICE, wide)
    got = [affine_variance(weight, sigma, log_variance)]
    want = [reference.affine_variance(weight, sigma, log_variance)]
    for given in (None, torch.randn(n, k).to(DEVICE, dtype)):
        got += affine_variance_bwd(dv, weight, sigma, log_variance, given)
        want += reference.affine_variance_bwd(dv, weight, sigma, log_variance, given)
    for ours, exact in zip(got, want, strict=True):
        assert ours.dtype is exact.dtype
        allowed = (
            8 * torch.finfo(ours.dtype).eps + 1e-6 * (dtype is not torch.float64)
        ) * exact.abs().max()
        assert (ours - exact).abs().max() <= allowed
