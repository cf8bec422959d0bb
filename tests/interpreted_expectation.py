"""The expectation of an activation in Triton's interpreter against the float64 reference; started
by test_triton_interpreter.py."""

import pytest
import torch
from triton_support import load_kernels, load_reference, patch_interpreter

patch_interpreter()
expectation, mixtures = load_kernels("expectation", "mixtures")
reference = load_reference()

NAMES = ["relu", "gelu", "gelu_tanh", "silu", "tanh"]
TIER = {torch.float16: 0, torch.float32: 1, torch.float64: 2}
EPS = {torch.float16: 2**-12, torch.float32: 2**-24, torch.float64: 1e-14}


def make(m, n, dtype):
    generator = torch.Generator().manual_seed(m + n)
    mu, dy = (3 * torch.randn(2, m, n, generator=generator)).to(dtype)
    v = 4 * torch.rand(n, generator=generator, dtype=torch.float64) ** 3
    v[n // 2] = 0
    return mu, dy, v.to(torch.float64 if dtype is torch.float64 else torch.float32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", TIER)
@pytest.mark.parametrize("m, n", [(9, 130)])  # past one tile each way
def test_activation_and_its_gradients_match_reference(name, dtype, m, n):
    mu, dy, v = make(m, n, dtype)
    y, (dmu, dv, total) = (
        expectation.expectation(mu, v, name),
        expectation.expectation_bwd(dy, mu, v, name),
    )
    want = reference.expectation(mu.double(), v.double(), name)
    want_dmu, want_dv, want_total = reference.expectation_bwd(
        dy.double(), mu.double(), v.double(), name
    )
    assert y.dtype == dmu.dtype == dtype and dv.dtype == total.dtype == v.dtype
    bound = mixtures.BOUNDS.get(name, (0, 0, 0))[TIER[dtype]]
    rounding = 4 * EPS[dtype] + 1e-6 * (dtype is not torch.float64)
    assert (y - want).abs().max() <= bound + rounding * (1 + mu.double().abs().max())
    assert (dmu - want_dmu).abs().max() <= (60 * bound + 4 * rounding) * (
        1 + dy.double().abs().max()
    )
    assert (dv - want_dv).abs().max() <= (
        1500 * bound + 4e-6
    ) * m**0.5 * dy.double().abs().max() + 1e-6 * want_dv.abs().max()
    assert (total - want_total).abs().max() <= m * (60 * bound + 1e-6) * dy.double().abs().max()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", TIER)
def test_activation_far_out_and_not_numbers(name, dtype):
    infinity = float("inf")
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    v = torch.tensor([1e-38, 1e-8, 1.0], dtype=wide)  # a column each
    mu = (
        torch.tensor([-infinity, -6e4, -1e-7, 0.0, 1e-7, 6e4, infinity])
        .to(dtype)[:, None]
        .repeat(1, len(v))
    )
    if dtype is not torch.float16:
        mu[1], mu[5] = -1e30, 1e30
    ones, nan = torch.ones_like(mu), torch.full_like(mu, float("nan"))
    y, (dmu, dv, total) = (
        expectation.expectation(mu, v, name),
        expectation.expectation_bwd(ones, mu, v, name),
    )
    limits = (-1, 1) if name == "tanh" else (0, infinity)
    assert (
        (y[:2] - limits[0]).abs().max() <= 1e-30
        and (y[-1] == limits[1]).all()
        and y[2:-1].isfinite().all()
    )
    assert dmu.isfinite().all() and dv.isfinite().all() and total.isfinite().all()
    assert dmu[0].abs().max() <= 1e-30 and (dmu[-1] - float(name != "tanh")).abs().max() <= 1e-30
    results = (
        expectation.expectation(nan, v, name),
        *expectation.expectation_bwd(ones, nan, v, name),
    )
    assert all(result.isnan().all() for result in results)


def test_activation_without_rows_or_columns():
    for m, n in ((0, 4), (4, 0)):
        mu, v = torch.zeros(m, n), torch.ones(n)
        dmu, *sums = expectation.expectation_bwd(mu, mu, v, "relu")
        assert expectation.expectation(mu, v, "relu").shape == dmu.shape == mu.shape
        assert all(torch.equal(total, torch.zeros(n)) for total in sums)


def test_activation_sums_the_same_whatever_the_number_of_programs(monkeypatch):
    mu, dy, v = make(40, 20, torch.float32)
    results = []
    for count in (4, 4, 1):
        monkeypatch.setattr(expectation, "num_multiprocessors", lambda device, count=count: count)
        results.append(torch.cat(expectation.expectation_bwd(dy, mu, v, "gelu")[1:]))
    assert torch.equal(results[0], results[1]) and torch.allclose(
        results[0], results[2], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("log_variance", [False, True])
@pytest.mark.parametrize(
    "weight_dtype, sigma_dtype",
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_activation_variance_matches_reference(weight_dtype, sigma_dtype, log_variance):
    for n, k in ((5, 7), (70, 530), (1, 1)):  # past one tile each way
        weight, sigma = torch.randn(n, k).to(weight_dtype), torch.rand(k, dtype=sigma_dtype)
        dv = torch.randn(n, dtype=sigma_dtype)
        for w, given in (
            (weight, None),
            (weight.t().contiguous().t(), torch.randn(k, n).half().t()),
        ):
            got = (
                expectation.affine_variance(w, sigma, log_variance),
                *expectation.affine_variance_bwd(dv, w, sigma, log_variance, given),
            )
            want = (
                reference.affine_variance(weight, sigma, log_variance),
                *reference.affine_variance_bwd(dv, weight, sigma, log_variance, given),
            )
            tolerance = (
                2e-3
                if weight_dtype is torch.float16
                else 1e-4
                if sigma_dtype is torch.float32
                else 1e-10
            )
            for a, b in zip(got, want, strict=True):
                assert a.dtype == b.dtype and torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def test_activation_variance_without_rows_or_columns():
    for n, k in ((0, 4), (4, 0)):
        weight, sigma = torch.zeros(n, k), torch.ones(k)
        assert torch.equal(expectation.affine_variance(weight, sigma, False), torch.zeros(n))
        dweight, dsigma = expectation.affine_variance_bwd(torch.ones(n), weight, sigma, False, None)
        assert dweight.shape == weight.shape and torch.equal(dsigma, torch.zeros(k))


def test_activation_variance_sums_the_same_whatever_the_number_of_programs(monkeypatch):
    weight, sigma, dv = torch.randn(300, 20), torch.rand(20), torch.randn(300)
    results = []
    for count in (4, 4, 1):
        monkeypatch.setattr(expectation, "num_multiprocessors", lambda device, count=count: count)
        results.append(expectation.affine_variance_bwd(dv, weight, sigma, False, None)[1])
    assert torch.equal(results[0], results[1]) and torch.allclose(
        results[0], results[2], rtol=1e-5, atol=1e-5
    )
