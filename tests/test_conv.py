"""A convolution of the network's own input: the gradients of the projection and nn's convolution,
without an input gradient."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import dipkernels as dip
from dipkernels.ops import conv
from dipkernels.ops.draw import Draw

CASES = {
    "patches": (nn.Conv2d, (2, 3, 16, 16), dict(out_channels=8, kernel_size=4, stride=4)),
    "stem": (
        nn.Conv2d,
        (2, 3, 17, 13),
        dict(out_channels=6, kernel_size=(7, 3), stride=2, padding=(3, 1)),
    ),
    "groups": (
        nn.Conv2d,
        (2, 6, 9, 9),
        dict(out_channels=8, kernel_size=3, groups=2, dilation=2, bias=False),
    ),
    "sequence": (nn.Conv1d, (3, 5, 40), dict(out_channels=7, kernel_size=10, stride=5)),
    "volume": (nn.Conv3d, (2, 2, 6, 7, 8), dict(out_channels=4, kernel_size=(2, 3, 3), padding=1)),
    # windows side by side: of one dimension, not square, with an edge left over, of three
    "sequence patches": (nn.Conv1d, (3, 2, 24), dict(out_channels=5, kernel_size=5, stride=5)),
    "oblong": (nn.Conv2d, (3, 2, 12, 9), dict(out_channels=5, kernel_size=(4, 3), stride=(4, 3))),
    "edge": (nn.Conv2d, (3, 2, 13, 11), dict(out_channels=5, kernel_size=(4, 3), stride=(4, 3))),
    "cells": (
        nn.Conv3d,
        (3, 2, 7, 1, 9),
        dict(out_channels=5, kernel_size=(2, 1, 3), stride=(2, 1, 3)),
    ),
}
PATCHES = ("patches", "sequence patches", "oblong", "edge", "cells")


def layer_of(case, dtype=torch.float32, **options):
    kind, shape, arguments = CASES[case]
    torch.manual_seed(1)
    layer = kind(shape[1], dtype=dtype, **arguments)
    layer = dip.convert(nn.Sequential(layer), init_variance=0.3, num_samples=4)[
        0
    ]  # sigma times 1/2
    return layer, torch.randn(shape).to(dtype)


def gradients(layer, x, needs_input):
    layer.zero_grad()
    x = x.detach().requires_grad_(needs_input)
    with dip.fixed_noise(7):
        y = layer(x)
    y.square().sum().backward()
    return y.detach(), {name: p.grad.clone() for name, p in layer.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "case, channels_last",
    [
        (case, last)
        for case, (_, shape, _) in CASES.items()
        for last in (False, True)
        if len(shape) == 4 or not last
    ],
)
def test_own_input_gives_the_gradients_of_the_projection(case, channels_last, dtype, monkeypatch):
    layer, x = layer_of(case, dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    calls = []
    monkeypatch.setattr(
        conv, "own_input", lambda *a, run=conv.own_input: calls.append(1) or run(*a)
    )
    y, got = gradients(layer, x, False)
    want_y, want = gradients(layer, x, True)
    assert calls == [1]
    assert torch.equal(y, want_y)
    slack = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float64: 1e-5}[dtype]
    for name, grad in got.items():
        assert grad.dtype is want[name].dtype
        assert (grad - want[name]).abs().max() <= slack * want[name].abs().max(), name
    again = gradients(layer, x, False)[1]
    assert all(torch.equal(again[name], grad) for name, grad in got.items())


@pytest.mark.parametrize("case", ["stem", *PATCHES])
def test_own_input_asks_for_no_input_gradient(case):
    layer, x = layer_of(case)
    masks = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution_backward.default:
                masks.append(args[-1])
            return func(*args, **(kwargs or {}))

    y = layer(x)
    with Watch():
        y.sum().backward()
    # those of patches are one matrix product each
    assert len(masks) == (0 if case in PATCHES else 2) and not any(mask[0] for mask in masks)


def test_own_input_differentiates_twice():
    layer, x = layer_of("groups", torch.float64)
    window = conv.Window(layer.stride, layer.padding, layer.dilation, layer.groups)
    weight = layer.weight.detach()[:4, :, :2, :2].requires_grad_()
    sigma = (torch.rand(6).double() + 0.1).requires_grad_()
    x = x[:1, :, :4, :4]

    def run(weight, sigma):
        return conv.own_input(x, weight, None, sigma, torch.tensor([3, 4]), Draw(1), None, window)

    assert gradcheck(run, (weight, sigma))
    assert gradgradcheck(run, (weight, sigma))


@pytest.mark.parametrize("change", ["padding", "mode", "unbatched", "eval", "no_grad", "frozen"])
def test_other_convolutions_go_the_common_way(change, monkeypatch):
    monkeypatch.setattr(conv, "own_input", lambda *a: pytest.fail("not this one"))
    arguments = {
        "padding": dict(padding="same"),
        "mode": dict(padding=1, padding_mode="circular"),
    }.get(change, {})
    layer = dip.DIPConv2d(3, 4, 3, **arguments)
    x = torch.randn(3, 8, 8) if change == "unbatched" else torch.randn(2, 3, 8, 8)
    if change == "eval":
        layer.eval()
    layer.log_variance.requires_grad_(change != "frozen")
    with torch.set_grad_enabled(change != "no_grad"):
        assert layer(x).isfinite().all()


def test_own_input_under_autocast_and_channels_last():
    layer, x = layer_of("stem")
    x = x.to(memory_format=torch.channels_last)
    results = []
    for needs_input in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16), dip.fixed_noise(3):
            y = layer(x.clone().requires_grad_(needs_input))
        y.float().square().sum().backward()
        results.append((y, layer.log_variance.grad.clone(), layer.weight.grad.clone()))
    (y, *got), (want_y, *want) = results
    assert torch.equal(y, want_y)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 2e-2 * b.abs().max()


@pytest.mark.parametrize("case", ["patches", "stem"])
def test_a_backward_pass_inside_autocast_keeps_the_type_of_forward(case):
    """A stem that is kept in float32 inside a step under autocast."""
    layer, x = layer_of(case)
    results = []
    for inside in (False, True):
        layer.zero_grad()
        with dip.fixed_noise(3):
            y = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            y.backward(torch.ones_like(y) / 3)
        results.append([p.grad.clone() for p in layer.parameters()])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
