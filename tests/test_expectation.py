"""activation: y = E[act(mu + sqrt(v) z)] and its derivatives, against quadrature, Monte Carlo and
the limits.  docs/maths.md, section 7."""

import math
import re

import numpy as np
import pytest
import torch
from capability_support import assert_same_everywhere
from dipkernels.triton_kernels.mixtures import BOUNDS, MIXTURES
from scipy.special import expit, ndtr
from source_support import ROOT, module_at
from sums_support import telling_terms

from dipkernels import functional, reference
from dipkernels.ops.activations import ACTIVATIONS
from dipkernels.ops.expectation import (
    affine_variance,
    affine_variance_bwd,
    expectation,
    expectation_bwd,
    expected,
)

NAMES = list(ACTIVATIONS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TIER = {torch.bfloat16: 0, torch.float16: 0, torch.float32: 1, torch.float64: 2}
EPS = {torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-12, torch.float64: 2**-53}


def inputs(m=33, n=300, dtype=torch.float32, lead=()):
    generator = torch.Generator().manual_seed(m + n)
    mu, dy = (3 * torch.randn(2, *lead, m, n, generator=generator)).to(dtype)
    v = 6 * torch.rand(n, generator=generator, dtype=torch.float64) ** 4
    return mu, v.to(torch.float64 if dtype is torch.float64 else torch.float32), dy


def quadrature(activation, mu, v):
    """E act(mu + sqrt(v) z) by Simpson's rule, split at the kink of relu; nothing of the package in
    it."""
    functions = {
        "relu": lambda x: np.maximum(x, 0),
        "gelu": lambda x: x * ndtr(x),
        "gelu_tanh": lambda x: x * expit(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)),
        "silu": lambda x: x * expit(x),
        "quick_gelu": lambda x: x * expit(1.702 * x),
        "tanh": np.tanh,
    }
    s = math.sqrt(v)
    cut = min(max(-mu / s, -9.9), 9.9) if s > 0 else 0.0
    total = 0.0
    for low, high in ((-10.0, cut), (cut, 10.0)):
        z, step = np.linspace(low, high, 4001, retstep=True)
        weights = np.ones(4001)
        weights[1:-1:2], weights[2:-1:2] = 4, 2
        total += step / 3 * np.sum(weights * functions[activation](mu + s * z) * np.exp(-z * z / 2))
    return total / math.sqrt(2 * math.pi)


@pytest.mark.parametrize("activation", NAMES)
def test_activation_matches_quadrature_to_a_millionth(activation):
    mu = torch.tensor([-30.0, -6.0, -2.5, -1.0, -0.1, 0.0, 0.3, 1.7, 5.0, 40.0])
    v = torch.tensor([1e-8, 1e-3, 0.04, 0.5, 1.0, 4.0, 30.0, 200.0])
    rows = [[quadrature(activation, m, s) for s in v.tolist()] for m in mu.tolist()]
    table = torch.tensor(rows, dtype=torch.float64)
    grid = mu[:, None].expand(len(mu), len(v))
    wide = (grid.double(), v.double(), activation)
    assert (functional.expectation(*wide) - table).abs().max() <= 1e-6
    assert (reference.expectation(*wide) - table).abs().max() <= 1e-9
    rounding = 4 * EPS[torch.float32] * table.abs()
    narrow = functional.expectation(grid, v, activation).double()
    assert ((narrow - table).abs() <= 1e-6 + rounding).all()


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "m, n, lead",
    [(1, 1, ()), (65, 257, ()), (2100, 3, ()), (3, 40, (2, 5)), (0, 8, ()), (4, 0, ())],
)
def test_activation_and_its_gradients_match_reference(m, n, lead, dtype, activation):
    """The mixture's bound, a rounding of the result and, for sums over rows, what float32 adds up
    to."""
    mu, v, dy = inputs(m, n, dtype, lead)
    y, (dmu, dv, total) = expectation(mu, v, activation), expectation_bwd(dy, mu, v, activation)
    assert y.dtype == dmu.dtype == dtype and dv.dtype == total.dtype == v.dtype
    assert y.shape == dmu.shape == mu.shape
    wide = (mu.double(), v.double(), activation)
    want = reference.expectation(*wide)
    want_dmu, want_dv, _ = reference.expectation_bwd(dy.double(), *wide)
    if not mu.numel():
        assert not dv.any() and not total.any()
        return
    bound = BOUNDS.get(activation, (0, 0, 0))[TIER[dtype]]
    size, error = dy.double().abs(), lambda got, wanted: (got.double() - wanted).abs()
    # The kernels compute in float32 at least; the oracle's quadrature in float64 is good to 1e-13.
    rounding, inner = 4 * EPS[dtype], 1e-13 if dtype is torch.float64 else 8 * EPS[torch.float32]
    assert (error(y, want) <= bound + (rounding + inner) * (1 + mu.double().abs())).all()
    # A fit of least error oscillates: its slope is some ten times, its curvature some hundred times
    # further off.
    assert (error(dmu, want_dmu) <= (40 * bound + rounding + 2 * inner) * size).all()
    allowed = (600 * bound + 20 * inner) * (1 + size.sum() / n) + 1e-6 * want_dv.abs()
    assert (error(dv, want_dv) <= allowed).all()
    rows = dmu.double().reshape(-1, n)  # of what was not rounded yet
    allowed = (2 * EPS[dtype] + inner) * (rows.abs().sum(0) + 1e-6)
    assert (error(total, rows.sum(0)) <= allowed).all()


@pytest.mark.parametrize("activation", NAMES)
def test_activation_without_variance_is_the_activation(activation):
    for dtype in DTYPES:
        mu, v, dy = inputs(9, 20, dtype)
        v[::2] = 0
        leaf = mu.double().requires_grad_()  # PyTorch's own in 16 bits is further from the truth
        plain = ACTIVATIONS[activation](leaf)
        (dplain,) = torch.autograd.grad(plain, leaf, dy.double())
        y, (dmu, dv, total) = expectation(mu, v, activation), expectation_bwd(dy, mu, v, activation)
        for ours, theirs in ((y, plain), (dmu, dplain)):
            ours, theirs = ours[:, ::2].double(), theirs.detach()[:, ::2]
            tiny = max(1e-13, 1e-3 * EPS[dtype])
            torch.testing.assert_close(ours, theirs, rtol=4 * EPS[dtype], atol=tiny)
        _, want_dv, _ = reference.expectation_bwd(dy.double(), mu.double(), v.double(), activation)
        assert (dv.double() - want_dv)[::2].abs().max() <= 1e-5 * dy.double().abs().sum(0).max()
        got, tiny = total[::2].double(), max(1e-13, 20 * EPS[v.dtype])
        torch.testing.assert_close(got, dplain.sum(0)[::2], rtol=1e-5, atol=tiny)


@pytest.mark.parametrize("activation", NAMES)
def test_activation_is_stable_as_the_variance_vanishes_and_for_large_means(activation):
    mu = torch.tensor([-1e30, -1e4, -20.0, -1e-20, 0.0, 1e-20, 20.0, 1e4, 1e30])
    for variance in (1e-38, 1e-20, 1e-8, 1.0, 1e8):
        v = torch.full((len(mu),), variance)
        y = expectation(mu, v, activation)
        dmu, dv, _ = expectation_bwd(torch.ones_like(mu), mu, v, activation)
        assert y.isfinite().all() and dmu.isfinite().all() and dv.isfinite().all()
        if variance <= 1e-8:
            torch.testing.assert_close(y, ACTIVATIONS[activation](mu), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("activation", NAMES)
def test_activation_of_a_variance_that_is_no_number_is_none(activation):
    """And the other columns are as they were, also where it is made of plain operations."""
    mu, v = torch.randn(3, 2), torch.tensor([float("nan"), 100.0])
    for forward, backward in (
        (expectation, expectation_bwd),
        (reference.expectation, reference.expectation_bwd),
    ):
        y, (dmu, dv, total) = forward(mu, v, activation), backward(mu, mu, v, activation)
        for t in (y[:, 0], dmu[:, 0], dv[0], total[0]):
            assert t.isnan().all()
        assert torch.equal(y[:, 1:], forward(mu[:, 1:], v[1:], activation))
        alone = backward(*(mu[:, 1:],) * 2, v[1:], activation)
        assert all(torch.equal(t[..., 1:], a) for t, a in zip((dmu, dv, total), alone))
    y = torch.func.vmap(lambda mu: expected(mu, v, activation))(mu)
    assert y[:, 0].isnan().all() and y[:, 1].isfinite().all()


@pytest.mark.parametrize("activation", NAMES)
def test_reference_takes_any_variance(activation):
    v = torch.tensor([1e4, 1e12, 1e30], dtype=torch.float64)
    mu = torch.tensor([[0.5], [-0.5]]) * v.sqrt()
    y = reference.expectation(mu, v, activation)
    dmu, dv, _ = reference.expectation_bwd(torch.ones_like(mu), mu, v, activation)
    a, s = mu / v.sqrt(), v.sqrt()
    pdf, cdf = torch.exp(-a * a / 2) / math.sqrt(2 * math.pi), torch.special.ndtr(a)
    limits = (mu * cdf + s * pdf, cdf, (pdf / s).sum(0) / 2)  # of relu, and of a step
    if activation == "tanh":
        limits = (2 * cdf - 1, 2 * pdf / s, -(a * pdf).sum(0) / v)
    torch.testing.assert_close((y, dmu, dv), limits, rtol=1e-3, atol=1e-9)
    reference.expectation(mu, v.fill_(math.inf), activation)


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activation_of_infinities_and_nans(activation, dtype):
    mu = torch.tensor([-math.inf, math.inf]).to(dtype)[:, None]
    nan, ones = torch.full_like(mu, math.nan), torch.ones_like(mu)
    for variance in (0.0, 1e-8, 1.0):
        v = torch.tensor([variance], dtype=torch.float64 if TIER[dtype] == 2 else torch.float32)
        # torch's own gelu and silu make NaNs of some infinities
        if variance or activation in ("relu", "tanh"):
            y, sums = expectation(mu, v, activation), expectation_bwd(ones, mu, v, activation)
            limits = (-1, 1) if activation == "tanh" else (0, math.inf)
            assert abs(y[0] - limits[0]) <= 1e-12 and y[1] == limits[1]
            assert all(t.isfinite().all() for t in sums) and abs(sums[0][0]) <= 1e-12
        y, (dmu, *_) = expectation(nan, v, activation), expectation_bwd(ones, nan, v, activation)
        assert y.isnan().all() and (activation == "relu" or dmu.isnan().all())


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variance", [1e-4, 1e-2, 1.0])
def test_activation_makes_no_subnormal_numbers(variance, dtype, activation, capability):
    """Each costs a CPU a hundred cycles: of gradients as small as a mean loss has, behind relu and
    sigma = 0.01, the weight's would take a hundred times as long."""
    mu = torch.linspace(-30, 30, 4001, dtype=dtype)[:, None]
    v = torch.tensor([variance], dtype=dtype)
    y = expectation(mu, v, activation)
    dmu, *_ = expectation_bwd(torch.full_like(mu, 1e-12), mu, v, activation)
    for found in (y, dmu):
        assert not ((found != 0) & (found.abs() < torch.finfo(dtype).tiny)).any()


@pytest.mark.parametrize("activation", NAMES)
def test_activation_gradcheck_and_gradgradcheck(activation):
    mu, v, _ = inputs(3, 5, torch.float64)
    arguments = (mu.requires_grad_(), (v + 0.1).requires_grad_())
    run = lambda mu, v: functional.expectation(mu, v, activation)  # noqa: E731
    assert torch.autograd.gradcheck(run, arguments) and torch.autograd.gradgradcheck(run, arguments)


@pytest.mark.parametrize("activation", NAMES)
def test_activation_sums_in_one_order_on_every_instruction_set(activation):
    mu, v, dy = inputs(700, 130)
    assert_same_everywhere(
        lambda: [expectation(mu, v, activation), *expectation_bwd(dy, mu, v, activation)]
    )


@pytest.mark.parametrize("rows", [1000, 2049, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activation_sums_over_the_stated_blocks_of_rows(capability, rows, dtype):
    terms, ones = telling_terms(rows, 300, dtype), torch.ones(rows, 300, dtype=dtype)
    *_, total = expectation_bwd(terms, ones, torch.zeros(300, dtype=dtype), "relu")
    assert torch.equal(total, torch.ones(300, dtype=dtype))
    half = torch.full((300,), 0.5, dtype=dtype)  # the slope of sigma^2 is 1
    _, dsigma = affine_variance_bwd(terms[:, 0].contiguous(), ones, half, False, None)
    assert torch.equal(dsigma, torch.ones(300, dtype=dtype))


def test_activation_takes_strided_and_expanded_tensors():
    mu, v, _ = inputs(8, 20)
    dy = torch.ones(1).expand(8, 20)
    want = expectation_bwd(dy.contiguous(), mu, v, "gelu")
    got = expectation_bwd(dy, mu.t().contiguous().t(), torch.stack([v, v], 1)[:, 0], "gelu")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("log_variance", [False, True])
def test_activation_variance_and_its_gradients_match_reference(dtype, log_variance):
    generator = torch.Generator().manual_seed(1)
    for n, k in ((1, 1), (70, 300), (5, 33)):
        weight = torch.randn(n, k, generator=generator).to(dtype)
        sigma, dv = torch.rand(k, generator=generator) + 0.1, torch.randn(n, generator=generator)
        if dtype is torch.float64:
            sigma, dv = sigma.double(), dv.double()
        wide = (weight.double(), sigma.double(), log_variance)
        plain = torch.randn(n, k, generator=generator)
        turned = torch.randn(k, n, generator=generator).bfloat16().t()
        for given in (None, plain, turned):
            v = affine_variance(weight, sigma, log_variance)
            got = (v, *affine_variance_bwd(dv, weight, sigma, log_variance, given))
            added = None if given is None else given.double()
            want = reference.affine_variance_bwd(dv.double(), *wide, added)
            want = (reference.affine_variance(*wide), *want)
            for ours, theirs, like in zip(got, want, (sigma, weight, sigma), strict=True):
                assert ours.dtype == like.dtype
                allowed = 8 * EPS[ours.dtype] * theirs.abs().max() * math.sqrt(n + k)
                assert (ours.double() - theirs).abs().max() <= allowed


# ---- the mixtures --------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", MIXTURES)
def test_mixtures_keep_their_bounds(activation):
    """An expectation of f - g is at most sup |f - g|: the bound at variance 0 holds for every mean
    and variance."""
    x = torch.linspace(-40, 40, 160001, dtype=torch.float64)
    want = reference._ACTIVATIONS[activation](x)[0]
    for (c, p, d), bound in zip(MIXTURES[activation], BOUNDS[activation], strict=True):
        assert sum(p) == pytest.approx(1, abs=1e-14) and len(c) == len(p) == len(d)
        odd, value = activation == "tanh", torch.zeros_like(x)
        for b, q, powers in zip(c, p, d, strict=True):
            a = b * x
            value += q * (2 * torch.special.ndtr(a) - 1 if odd else x * torch.special.ndtr(a))
            density = torch.exp(-a * a / 2) / math.sqrt(2 * math.pi)
            value += density * sum(
                (e * a ** (2 * n + odd) for n, e in enumerate(powers)), torch.zeros_like(a)
            )
        worst = (value - want).abs().max().item()
        assert worst <= bound + 1e-13 and worst == pytest.approx(bound, rel=0.06, abs=1e-13)


@pytest.mark.parametrize(
    "activation, tier",
    [
        ("silu", 0),
        ("tanh", 0),
        ("gelu_tanh", 0),
        ("gelu_tanh", 1),
        *(pytest.param(name, 1, marks=pytest.mark.slow) for name in ("silu", "tanh")),
    ],
)
def test_mixtures_are_what_their_command_fits(activation, tier):
    fit_mixtures = module_at("studies/fit_mixtures.py")
    c, _, d = MIXTURES[activation][tier]
    error, found, _, _ = fit_mixtures.fit(activation, len(c), len(d[0]))
    assert error == pytest.approx(BOUNDS[activation][tier], rel=0.05)
    assert sorted(found) == pytest.approx(sorted(c), rel=1e-3)


def test_mixtures_are_the_same_numbers_in_cpp():
    text = (ROOT / "csrc" / "activation.h").read_text()
    for name, tiers in MIXTURES.items():
        if name == "quick_gelu":  # computed from silu's, here and there
            continue
        constant = "k" + "".join(part.capitalize() for part in name.split("_"))
        body = re.search(rf"Mixture {constant}\[3\] = (.*?);", text, re.DOTALL)[1]
        numbers = [float(number) for number in re.findall(r"-?\d[\d.e-]*", body)]
        assert numbers == [
            n
            for c, p, d in tiers
            for n in (len(c), *c, *p, len(d[0]), *(e for powers in d for e in powers))
        ]
        assert all(len(powers) == len(d[0]) for _, _, d in tiers for powers in d)


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"activation": "selu"}, ValueError, "activation: expected one of .* got 'selu'"),
        ({"v": torch.ones(3)}, ValueError, r"v: expected shape \(N,\) = \(8,\), got \(3,\)"),
        (
            {"v": torch.ones(8, dtype=torch.float16)},
            TypeError,
            "v: expected torch.float32 or torch.float64",
        ),
        ({"v": -torch.ones(8)}, ValueError, "v: expected values >= 0, got a negative or NaN one"),
        ({"mu": torch.ones(2, 8, dtype=torch.int64)}, TypeError, "mu: expected one of"),
    ],
)
def test_activation_names_what_is_wrong(change, error, match):
    arguments = {"mu": torch.ones(2, 8), "v": torch.ones(8), "activation": "relu", **change}
    with pytest.raises(error, match=match):
        functional.expectation(**arguments)


def test_compiled_gradients_stay_inside_their_buffers():
    """Called without the checks of ops."""
    mu, v, weight, sigma = torch.ones(2, 8), torch.ones(8), torch.ones(8, 5), torch.ones(5)
    for op, arguments, match in [
        ("expectation_bwd", (mu[:1], mu, v, "relu"), "dy: expected the shape of mu"),
        ("expectation_bwd", (mu, mu, v[:3], "relu"), "v: expected shape"),
        ("affine_variance_bwd", (v[:3], weight, sigma, False, None), "dv: expected shape"),
        ("affine_variance_bwd", (v, weight, sigma[:3], False, None), "sigma: expected shape"),
        (
            "affine_variance_bwd",
            (v, weight, sigma, False, weight[:3]),
            "given: expected the shape of weight",
        ),
    ]:
        with pytest.raises(RuntimeError, match=match):
            getattr(torch.ops.dipkernels, op)(*arguments)


@pytest.mark.parametrize("activation", NAMES)
def test_expectation_is_the_same_with_a_graph_and_under_torch_func(activation):
    """Both are made of plain operations; eager autograd has the kernels."""
    mu, v, dy = inputs(5, 7, torch.float64)
    v[3] = 0
    mu, v = mu.requires_grad_(), v.requires_grad_()
    y = expected(mu, v, activation)
    want = torch.autograd.grad(y, (mu, v), dy, retain_graph=True)
    graph = torch.autograd.grad(y, (mu, v), dy, create_graph=True)
    got, pull = torch.func.vjp(lambda mu, v: expected(mu, v, activation), mu, v)
    close = 20 * BOUNDS[activation][2] + 1e-12 if activation in BOUNDS else 1e-12
    torch.testing.assert_close(got, y, rtol=close, atol=close)
    away = v > 0  # the slope in v there is a limit
    for dmu, dv in (graph, pull(dy)):
        torch.testing.assert_close(dmu, want[0], rtol=close, atol=close)
        torch.testing.assert_close(dv[away], want[1][away], rtol=1e3 * close, atol=1e3 * close)
