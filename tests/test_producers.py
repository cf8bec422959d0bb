"""u = f(x) + sigma z with f a norm, an activation, a gated product, against the float64 reference.  docs/maths.md, section 10."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from dipkernels import functional, producers, reference

SEED = torch.tensor([0x0123456789ABCDEF, 3])
ACTIVATIONS = ["relu", "gelu", "gelu_tanh", "silu", "tanh"]
PLAIN = {
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
}


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed), dtype=torch.float64).to(dtype)


def scale(k, log_variance=False, dtype=torch.float32):
    sigma = torch.rand(k, generator=torch.Generator().manual_seed(k), dtype=torch.float64) + 0.1
    return (sigma.square().log() if log_variance else sigma).to(dtype)


# ---- the reference: its gradients are the derivatives of its own forward ------------------------------------------------


def derivative(f, t, dt, step=1e-6):
    return (f(t + step * dt) - f(t - step * dt)) / (2 * step)


def assert_adjoint(f, t, gradient, du):
    """<du, f'(t) dt> = <gradient, dt>"""
    dt = randn(*t.shape, seed=5)
    assert abs((du * derivative(f, t, dt)).sum() - (gradient * dt).sum()) <= 1e-6 * (1 + du.abs().sum())


@pytest.mark.parametrize("log_variance", [False, True])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_reference_gradients_of_activations_are_its_derivatives(kind, log_variance):
    x, b, du, sigma = (
        randn(3, 10, 4),
        randn(3, 10, 4, seed=1),
        randn(3, 10, 4, seed=2),
        scale(10, log_variance).double(),
    )
    where = SEED, 1, 2**33 + 1, 3, 2, log_variance, kind
    dx, dsigma = reference.activate_bwd(du, x, sigma, *where)
    assert_adjoint(lambda x: reference.activate(x, sigma, *where, None), x, dx, du)
    assert_adjoint(lambda s: reference.activate(x, s, *where, None), sigma, dsigma, du)
    da, db, dsigma = reference.gate_bwd(du, x, b, sigma, *where)
    assert_adjoint(lambda x: reference.gate(x, b, sigma, *where, None), x, da, du)
    assert_adjoint(lambda b: reference.gate(x, b, sigma, *where, None), b, db, du)
    assert_adjoint(lambda s: reference.gate(x, b, s, *where, None), sigma, dsigma, du)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_reference_gradients_of_norms_are_its_derivatives(kind, offset):
    x, weight, bias, du, sigma = (
        randn(3, 4, 10),
        randn(10),
        randn(10, seed=1),
        randn(3, 4, 10, seed=2),
        scale(10).double(),
    )
    where = SEED, 2**33 + 1, 3, 2, False, kind

    def u(x, weight, bias, sigma):
        return reference.norm(x, weight, bias, sigma, *where, 1e-3, offset, None)[0]

    stats = reference.norm(x, weight, bias, sigma, *where, 1e-3, offset, None)[1]
    dx, dweight, dbias, dsigma = reference.norm_bwd(du, x, stats, weight, bias, sigma, *where, offset)
    assert_adjoint(lambda t: u(t, weight, bias, sigma), x, dx, du)
    assert_adjoint(lambda t: u(x, t, bias, sigma), weight, dweight, du)
    assert_adjoint(lambda t: u(x, weight, t, sigma), bias, dbias, du)
    assert_adjoint(lambda t: u(x, weight, bias, t), sigma, dsigma, du)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_reference_norms_are_torchs(kind):
    x, weight, sigma = randn(3, 4, 10), randn(10), torch.zeros(10)
    bias = randn(10, seed=1) if kind == "layer" else None
    u, _ = reference.norm(x, weight, bias, sigma, SEED, 0, 0, 0, False, kind, 1e-3, 0.0, None)
    functions = torch.nn.functional
    want = (
        functions.layer_norm(x, (10,), weight, bias, 1e-3)
        if bias is not None
        else functions.rms_norm(x, (10,), weight, 1e-3)
    )
    torch.testing.assert_close(u, want, rtol=1e-12, atol=1e-12)


# ---- the functions --------------------------------------------------------------------------------------------------------


def calls(kind, log_variance=False, dtype=torch.float64):
    """A producer of this kind as a function of its differentiable tensors, the plain f of those but sigma, and the tensors."""
    where = dict(row0=5, col0=2, sample=1, log_variance=log_variance)
    sigma = scale(10, log_variance, torch.float64 if dtype is torch.float64 else torch.float32)
    if kind in ("layer", "rms"):
        tensors = randn(2, 3, 10, dtype=dtype), randn(10, dtype=dtype), randn(10, seed=1, dtype=dtype), sigma

        def run(x, weight, bias, sigma):
            return producers.norm(x, weight, bias, sigma, SEED, kind=kind, eps=1e-3, offset=1.0, **where)

        def plain(x, weight, bias):
            if kind == "layer":
                return torch.nn.functional.layer_norm(x, (10,), weight + 1, bias, 1e-3)
            return torch.nn.functional.rms_norm(x, (10,), weight + 1, 1e-3) + bias

    elif kind.startswith("gated "):
        tensors = randn(2, 10, 3, dtype=dtype), randn(2, 10, 3, seed=1, dtype=dtype), sigma

        def run(a, b, sigma):
            return producers.gate(a, b, sigma, SEED, kind=kind[6:], dim=1, **where)

        def plain(a, b):
            return PLAIN[kind[6:]](a) * b

    else:
        tensors = randn(2, 10, 3, dtype=dtype), sigma

        def run(x, sigma):
            return producers.activate(x, sigma, SEED, kind=kind, dim=1, **where)

        plain = PLAIN[kind]
    return run, plain, tensors


KINDS = ["layer", "rms", *ACTIVATIONS, "gated silu", "gated gelu", "gated gelu_tanh"]


@pytest.mark.parametrize("log_variance", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_producer_is_perturb_behind_the_plain_function(kind, log_variance):
    run, plain, tensors = calls(kind, log_variance)
    dim = -1 if kind in ("layer", "rms") else 1
    want = functional.perturb(
        plain(*tensors[:-1]), tensors[-1], SEED, dim=dim, row0=5, col0=2, sample=1, log_variance=log_variance
    )
    torch.testing.assert_close(run(*tensors), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("log_variance", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_producer_gradcheck_and_gradgradcheck(kind, log_variance):
    run, _, tensors = calls(kind, log_variance)
    tensors = [t.requires_grad_() for t in tensors]
    assert gradcheck(run, tensors) and gradgradcheck(run, tensors)


@pytest.mark.parametrize(
    "change, error, match",
    [
        (dict(kind="batch"), ValueError, "kind: expected one of"),
        (dict(sigma=torch.ones(7)), ValueError, r"sigma: expected shape \(K,\) = \(8,\), got \(7,\)"),
    ],
)
@pytest.mark.parametrize("name", ["norm", "activate", "gate"])
def test_producer_names_what_is_wrong(name, change, error, match):
    arguments = dict(kind="layer" if name == "norm" else "silu", sigma=torch.ones(8), seed=SEED) | change
    x = torch.ones(2, 8)
    with pytest.raises(error, match=match):
        if name == "norm":
            producers.norm(x, None, None, **arguments, eps=1e-5)
        elif name == "activate":
            producers.activate(x, **arguments)
        else:
            producers.gate(x, x, **arguments)
