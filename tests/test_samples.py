"""The passes of "mean" on a CPU, in the compiled library alone: draws of several samples, their
activations summed, and back.  docs/maths.md, section 4."""

import pytest
import torch
from capability_support import assert_same_everywhere

from dipkernels.ops.activations import ACTIVATIONS

OPS = torch.ops.dipkernels
SEED = torch.tensor([17, 2**33 + 5])
NAMES = list(ACTIVATIONS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = {torch.float32: 1e-7, torch.bfloat16: 2**-9, torch.float16: 2**-12}


def forward(h, activation, out=None, factor=1.0):
    total = torch.ones(h.shape[1:])
    OPS.act_add(total, h, activation, out, factor)
    return total


def back(h, dy, activation, out=None, factor=1.0):
    """(dh [samples, rows, columns], total [rows, columns])"""
    dh, total = h.clone(), torch.ones(dy.shape)
    OPS.act_add_bwd(total, dh, dy, activation, out, factor)
    return dh, total


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("x_dtype", [torch.float32, None])
def test_samples_are_the_draws_of_perturb(capability, dtype, x_dtype):
    for rows, columns, col0 in ((1, 1, 0), (13, 136, 8), (200, 520, 0), (9, 37, 3)):
        x, sigma = torch.randn(rows, columns).to(x_dtype or dtype), torch.rand(columns)
        u, z = torch.empty(2, 3, rows, columns, dtype=dtype)
        OPS.draw_samples(u, x, sigma, SEED, 2**32 - 4, col0, 6, 0.5)
        OPS.draw_samples(z, None, None, SEED, 2**32 - 4, col0, 6, 1.0)
        for s in range(3):
            where = (-1, 2**32 - 4, col0, 6 + s)
            assert torch.equal(u[s], OPS.perturb(x, sigma, SEED, *where, 0.5, False, dtype))
            assert torch.equal(z[s], OPS.noise(SEED, x.shape, *where).to(dtype))


@pytest.mark.parametrize("activation", [*NAMES, "identity"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_behind_an_activation_and_back(capability, dtype, activation):
    act = ACTIVATIONS | {"identity": lambda h: h}
    for samples, rows, columns in ((1, 1, 1), (3, 5, 700), (9, 300, 37), (2, 90, 1024)):
        h = (torch.randn(samples, rows, columns) * 4).to(dtype)
        dy = torch.randn(rows, columns).to(dtype)
        leaf = h.double().requires_grad_()
        values = act[activation](leaf)
        (want,) = torch.autograd.grad(values, leaf, dy.double().expand_as(leaf))
        wide = torch.empty(rows, columns + 3, dtype=dtype)
        total = forward(h, activation, out=wide[:, 3:], factor=0.25)
        torch.testing.assert_close(total.double(), 1 + values.sum(0), rtol=2e-6, atol=4e-6)
        assert torch.equal(wide[:, 3:], (0.25 * total).to(dtype))
        dh, total = back(h, dy.repeat(1, 2)[:, :columns], activation, out=wide[:, 3:], factor=0.5)
        torch.testing.assert_close(dh.double(), want, rtol=2 * EPS[dtype], atol=2e-6)
        torch.testing.assert_close(total.double(), 1 + want.sum(0), rtol=2e-6, atol=4e-6)
        assert torch.equal(wide[:, 3:], (0.5 * total).to(dtype))


def test_relu_of_a_sample_and_back(capability):
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan")])
    for dtype in DTYPES:
        h = torch.randn(2, 40, 700).to(dtype)
        h.view(-1)[::5] = special.to(dtype).repeat(h.numel() // 25)
        dy = torch.randn(40, 700).to(dtype)
        dy[0] = float("inf")
        total = forward(h, "relu")
        assert torch.equal(
            total.nan_to_num(7),
            (1 + torch.relu(h[0]).float() + torch.relu(h[1]).float()).nan_to_num(7),
        )
        dh, total = back(h, dy, "relu")
        assert torch.equal(dh, torch.where(h <= 0, 0, dy))
        assert torch.equal(total, 1 + dh[0].float() + dh[1].float())


@pytest.mark.parametrize("activation", NAMES)
def test_samples_ignore_instruction_set_and_threads(activation):
    h, dy = torch.randn(3, 90, 1000) * 6, torch.randn(90, 1000)
    assert_same_everywhere(lambda: [forward(h, activation), *back(h, dy, activation)])


@pytest.mark.parametrize("activation", NAMES)
def test_samples_far_out_and_not_numbers(activation):
    far, infinity, nan = (60.0, 300.0, 3e4, 1e38), float("inf"), float("nan")
    h = torch.tensor([1e-30, -1e-30, 3e-5, -3e-5, *far, *(-x for x in far), infinity, nan]).view(
        1, 1, -1
    )
    want = ACTIVATIONS[activation](h[0].double()).float()
    want[want.abs() < torch.finfo(torch.float32).smallest_normal] = 0  # of quick_gelu, at -60
    total = torch.zeros_like(h[0])
    OPS.act_add(total, h, activation, None, 1.0)
    torch.testing.assert_close(total, want, rtol=2e-6, atol=0, equal_nan=True)
    lowest = torch.full_like(h, float("-inf"))
    torch.testing.assert_close(
        forward(lowest, activation), 1 + ACTIVATIONS[activation](lowest[0]), equal_nan=True
    )


def test_passes_over_samples_stay_inside_their_buffers():
    h, dy, total = torch.randn(2, 4, 6), torch.randn(4, 6), torch.zeros(4, 6)
    for changed, match in [
        ({"total": torch.zeros(4, 5)}, "h: expected shape .samples, 4, 5."),
        (
            {"total": torch.zeros(4, 6).double()},
            "total: expected shape .outer, inner., contiguous, float32",
        ),
        ({"total": torch.zeros(6, 4).t()}, "total: expected shape .outer, inner., contiguous"),
        ({"h": h[0]}, "h: expected shape"),
        ({"h": h.repeat(1, 1, 2)[:, :, ::2]}, "h: expected shape .* elements side by side"),
        ({"h": h.double()}, "h: expected float32, float16 or bfloat16, got float64"),
        (
            {"activation": "elu"},
            f"activation: expected one of {', '.join(NAMES)}, got elu",
        ),
        ({"out": torch.zeros(4, 5)}, "out: expected shape .4, 6."),
        ({"out": torch.zeros(6, 4).t()}, "out: expected shape .4, 6. and elements side by side"),
        ({"dy": dy[:3]}, "dy: expected shape .4, 6."),
        ({"dy": dy.half()}, "dy: expected h's dtype"),
    ]:
        how = {"total": total, "h": h, "activation": "gelu", "out": None, "dy": dy, **changed}
        if "dy" not in changed:
            with pytest.raises(RuntimeError, match=match):
                OPS.act_add(*(how[name] for name in ("total", "h", "activation", "out")), 1.0)
        with pytest.raises(RuntimeError, match=match):
            OPS.act_add_bwd(*(how[name] for name in ("total", "h", "dy", "activation", "out")), 1.0)


def test_draws_of_samples_stay_inside_their_buffers():
    x, sigma, u = torch.randn(4, 6), torch.rand(6), torch.zeros(2, 4, 6)
    rows_of_u = "x: expected shape .rows, K. of u, contiguous"
    for to, rows, scale, match in [
        (u[:, :3], x, sigma, "u: expected shape .samples, rows, K., contiguous"),
        (u[0], x, sigma, "u: expected shape .samples, rows, K., contiguous"),
        (torch.zeros(3, 5, 6), x, sigma, rows_of_u),
        (torch.zeros(3, 6, 4), x.t(), torch.rand(4), rows_of_u),
        (u, x[0], sigma, rows_of_u),
        (u, None, sigma, "x, sigma: expected both or none of them"),
        (u, x, None, "x, sigma: expected both or none of them"),
    ]:
        with pytest.raises(RuntimeError, match=match):
            OPS.draw_samples(to, rows, scale, SEED, 0, 0, 0, 1.0)
    for changed, match in [
        ({"sigma": sigma[:5]}, "sigma: expected shape"),
        ({"seed": SEED.int()}, "seed: expected dtype int64"),
        ({"sample": 65535}, "sample: expected sample . num_samples <= 65536"),
    ]:
        how = {"sigma": sigma, "seed": SEED, "sample": 0, **changed}
        with pytest.raises(RuntimeError, match=match):
            OPS.draw_samples(u, x, how["sigma"], how["seed"], 0, 0, how["sample"], 1.0)
