"""Automatic mixed precision: one rounding, straight to the product's type; sigma and its gradient
stay float32."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dipkernels as dip
from dipkernels import functional
from dipkernels.nn.conv import DIPConv2d
from dipkernels.nn.input import DIPInput
from dipkernels.nn.linear import DIPLinear
from dipkernels.nn.numbering import number_layers
from dipkernels.ops import linear
from dipkernels.ops import perturb as projection

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=DTYPES, ids=["bf16", "fp16"])
def dtype(request):
    return request.param


def watch(monkeypatch):
    """What perturb is given and gives: (x.dtype, sigma.dtype, u.dtype)."""
    seen, run = [], projection.perturb

    def perturb(x, sigma, *rest):
        u = run(x, sigma, *rest)
        seen.append((x.dtype, sigma.dtype, u.dtype))
        return u

    monkeypatch.setattr(linear, "perturb", perturb)
    monkeypatch.setattr(projection, "perturb", perturb)
    return seen


@pytest.mark.parametrize("keep", ["u", "x"])
def test_autocast_rounds_once_straight_to_the_products_type(dtype, keep, monkeypatch):
    layer = DIPLinear(16, 8, keep=keep, init_variance=0.2)
    x = torch.randn(6, 16, requires_grad=True)
    seen = watch(monkeypatch)
    with dip.fixed_noise(3), torch.autocast("cpu", dtype):
        y = layer(x)
    assert seen == [(torch.float32, torch.float32, dtype)]
    u = functional.perturb(
        x, layer.log_variance, torch.tensor([3, layer.number]), log_variance=True, dtype=dtype
    )
    want = F.linear(u, layer.weight.to(dtype), layer.bias.to(dtype))
    torch.testing.assert_close(y, want, rtol=0, atol=0)
    y.float().square().sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {x.grad.dtype} == {torch.float32}


def test_autocast_of_convolutions_and_projections(dtype, monkeypatch):
    model = number_layers(
        nn.Sequential(DIPInput(4, dim=1), DIPConv2d(4, 4, 3), nn.Flatten(), DIPLinear(64, 3))
    )
    seen = watch(monkeypatch)
    with torch.autocast("cpu", dtype):
        y = model(torch.randn(2, 4, 6, 6))
    assert [(s, u) for _, s, u in seen] == [
        (torch.float32, torch.float32),
        (torch.float32, dtype),
        (torch.float32, dtype),
    ]
    y.sum().backward()
    assert all(p.dtype is p.grad.dtype is torch.float32 for p in model.parameters())


def test_dsigma_is_summed_in_float32_from_half_gradients(dtype):
    """4096 equal rows: a sum in half precision would stop growing."""
    layer = DIPLinear(8, 8, init_variance=1.0)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(8))
    with dip.fixed_noise(3), torch.autocast("cpu", dtype):
        layer(torch.zeros(4096, 8)).sum().backward()
    z = functional.noise((4096, 8), torch.tensor([3, layer.number]))
    torch.testing.assert_close(layer.log_variance.grad, z.sum(0) / 2, rtol=1e-4, atol=1e-2)


def test_a_scaled_step_is_the_unscaled_one_and_skips_infinities():
    torch.manual_seed(0)
    model = number_layers(nn.Sequential(DIPLinear(16, 32), nn.GELU(), DIPLinear(32, 4)))
    x, y = torch.randn(8, 16), torch.randn(8, 4)
    finals = []
    for scaled in (False, True):
        m = number_layers(nn.Sequential(DIPLinear(16, 32), nn.GELU(), DIPLinear(32, 4)))
        m.load_state_dict(model.state_dict())
        optimizer = torch.optim.SGD(dip.param_groups(m, lr=0.1, variance_lr=1.0))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for key in range(3):
            optimizer.zero_grad()
            with dip.fixed_noise(key), torch.autocast("cpu", torch.float16):
                loss = F.mse_loss(m(x).float(), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        finals.append({n: p.detach().clone() for n, p in m.named_parameters()})
    for name in finals[0]:
        assert finals[1][name].dtype is torch.float32
        torch.testing.assert_close(finals[1][name], finals[0][name], rtol=2e-3, atol=2e-3)
    # an infinite gradient, of a variance alone, skips the step
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = finals[1]["0.variance.log_variance"]
    scaler.scale(m(x).square().sum()).backward()
    m[0].log_variance.grad[0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(m[0].log_variance, before) and scaler.get_scale() == 2.0**9


def test_bfloat16_weights_keep_float32_variances_through_training():
    dtype = torch.bfloat16
    model = number_layers(nn.Sequential(DIPLinear(16, 16), nn.GELU(), DIPLinear(16, 4))).to(dtype)
    optimizer = torch.optim.AdamW(dip.param_groups(model, lr=1e-3, variance_lr=1e-4))
    before = model[0].log_variance.detach().clone()
    for key in range(3):
        with dip.fixed_noise(key):
            model(torch.randn(8, 16, dtype=dtype)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = (model[0].log_variance - before).abs()
    assert model[0].log_variance.dtype is torch.float32
    # three steps of at most 1e-4, where bfloat16 has steps of 3e-2 (at -4.6): all would have been
    # lost
    assert bool((moved > 0).all()) and 5e-5 < moved.max() < 4e-4


def test_a_double_input_stays_double_under_autocast(dtype):
    layer = DIPLinear(8, 8).double()
    with torch.autocast("cpu", dtype):
        y = functional.perturb(
            torch.randn(2, 8).double(), layer.log_variance, torch.tensor([1, 2]), log_variance=True
        )
        z = functional.dip_linear(
            torch.randn(2, 8).double(),
            layer.weight,
            layer.bias,
            layer.log_variance.exp(),
            y.new_zeros(2).long(),
        )
    assert y.dtype is z.dtype is torch.float64
