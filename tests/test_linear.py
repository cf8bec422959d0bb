"""dip_linear: y = (x + sigma z) W^T + b and its four gradients, for each way to keep the input.
docs/maths.md, section 2."""

import math

import pytest
import torch
import torch.nn.functional as F
from timing import saved_bytes

from dipkernels import functional, reference

SEED = torch.tensor([77, 5])
EPS = {torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-12}


def inputs(m=20, k=24, n=12, dtype=torch.float32, lead=()):
    generator = torch.Generator().manual_seed(m + k + n)
    shapes = {"x": (*lead, m, k), "weight": (n, k), "bias": (n,), "dy": (*lead, m, n)}
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()
    }
    tensors["weight"] /= math.sqrt(k)
    return *tensors.values(), torch.rand(k, generator=generator) + 0.1


def run(x, weight, bias, dy, sigma, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias, sigma)]
    y = functional.dip_linear(*leaves, SEED, **options)
    return y, torch.autograd.grad(y, leaves, dy)


@pytest.mark.parametrize("keep", ["u", "x"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "m, k, n, lead",
    [(20, 24, 12, ()), (1, 1, 1, ()), (33, 129, 65, ()), (5, 40, 16, (2, 3)), (0, 8, 4, ())],
)
def test_linear_matches_reference(m, k, n, lead, dtype, keep):
    """Output and gradients: at most twice the error of the same expression in plain PyTorch, +
    1e-6."""
    x, weight, bias, dy, sigma = inputs(m, k, n, dtype, lead)
    y, gradients = run(x, weight, bias, dy, sigma, keep=keep)
    z = reference.standard_normal(SEED, max(1, x.numel() // k), k)[: x.numel() // k].view(*x.shape)

    def expression(dtype, z):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias, sigma)]
        out = F.linear(leaves[0] + leaves[3] * z.to(dtype), leaves[1], leaves[2])
        return [out, *torch.autograd.grad(out, leaves, dy.to(dtype))]

    exact, plain = expression(torch.float64, z), expression(dtype, z)
    for name, ours, theirs, true in zip(
        ("y", "dx", "dweight", "dbias", "dsigma"), (y, *gradients), plain, exact, strict=True
    ):
        if not true.numel():
            continue
        largest = true.abs().max()
        error, allowed = (ours.double() - true).abs().max(), (theirs.double() - true).abs().max()
        # The few elements of a small case can be lucky for the plain expression: a rounding of the
        # result is always allowed.
        assert error <= 2 * allowed + 1e-6 + 4 * EPS[dtype] * largest + 4e-6 * math.sqrt(m + k), (
            name
        )


@pytest.mark.parametrize("keep", ["u", "x"])
def test_linear_by_the_identity_returns_u(keep):
    x, *_, sigma = inputs(17, 40, 40)
    y = functional.dip_linear(x, torch.eye(40), None, sigma, SEED, keep=keep)
    assert torch.equal(y, functional.perturb(x, sigma, SEED))


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(log_variance=True),
        dict(num_samples=3),
        dict(row0=9, col0=4, sample=2),
    ],
)
def test_linear_gives_the_same_whatever_it_keeps(options):
    x, weight, bias, dy, sigma = inputs(65, 40, 24)
    y, gradients = run(x, weight, bias, dy, sigma, keep="u", **options)
    again, others = run(x, weight, bias, dy, sigma, keep="x", **options)
    assert torch.equal(y, again)
    torch.testing.assert_close(gradients, others, rtol=1e-6, atol=1e-6)


def test_linear_keeps_for_backward_what_a_linear_keeps():
    x, weight, bias, _, sigma = inputs(256, 64, 32)
    leaves = [t.requires_grad_() for t in (x, weight, bias, sigma)]
    plain = saved_bytes(lambda: F.linear(x * 1, weight, bias), leaves)
    ours = saved_bytes(lambda: functional.dip_linear(x * 1, weight, bias, sigma, SEED), leaves)
    eager = saved_bytes(lambda: F.linear(x * 1 + sigma * torch.randn_like(x), weight, bias), leaves)
    assert plain == 256 * 64 * 4
    assert plain <= ours <= plain + 16 + 4 * 64
    assert eager >= 2 * plain


def test_linear_layers_of_one_input_keep_it_once():
    x, weight, bias, _, sigma = inputs(256, 64, 32)
    leaves = [t.requires_grad_() for t in (x, weight, bias, sigma)]

    def three(keep):
        shared = x * 1
        return [
            functional.dip_linear(shared, weight, bias, sigma, torch.tensor([i, 0]), keep=keep)
            for i in range(3)
        ]

    one = 256 * 64 * 4
    assert saved_bytes(lambda: three("x"), leaves) <= one + 3 * 16
    assert 3 * one <= saved_bytes(lambda: three("u"), leaves) <= 3 * one + 3 * 16


@pytest.mark.parametrize(
    "bad, error",
    [
        (dict(keep="y"), "keep: expected"),
        (dict(sigma=torch.ones(3)), "sigma: expected shape"),
        (dict(x=torch.ones(2, 9)), "sigma: expected shape"),
        # as where a kernel fuses the layer: Triton's leaves the shapes to this check
        (
            dict(weight=torch.ones(4, 9), num_samples=2, estimator="mean", activation="relu"),
            r"weight: expected shape \(N, K = 24\), got \(4, 9\)",
        ),
        (dict(sigma=-torch.ones(8)), "sigma: expected values >= 0"),
    ],
)
def test_linear_rejects(bad, error):
    x, weight, bias, _, sigma = inputs()
    good = dict(x=x, weight=weight, bias=bias, sigma=sigma, seed=SEED)
    with pytest.raises((ValueError, TypeError), match=error):
        functional.dip_linear(**{**good, **bad})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape, n", [((3, 0), 4), ((3, 5), 0), ((0, 5), 4), ((0, 0), 0), ((2, 0, 5), 3), ((0,), 4)]
)
def test_linear_takes_empty_tensors(shape, n, dtype):
    x, weight, bias = (
        torch.randn(s).to(dtype).requires_grad_() for s in (shape, (n, shape[-1]), (n,))
    )
    leaves = [x, weight, bias, torch.ones(shape[-1], requires_grad=True)]
    means = [
        dict(estimator="mean", num_samples=3, activation=a, keep=k)
        for a in ("relu", "gelu")
        for k in ("auto", "x")
    ]
    for options in (dict(), dict(keep="x"), *means, dict(estimator="analytic", activation="gelu")):
        y = functional.dip_linear(*leaves, SEED, **options)
        assert y.shape == (*shape[:-1], n) and not y.isnan().any()
        grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
        assert all(
            g.shape == t.shape and not g.isnan().any() for g, t in zip(grads, leaves, strict=True)
        )
