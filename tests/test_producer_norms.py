"""convert(place="producer"): norms of other packages."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from plain_support import assert_plain
from plan_support import X, having, left, moved
from torch import nn

import dipkernels as dip


class UnscaledNorm(nn.Module):
    """RMSNorm without a weight, as nanochat writes it."""

    eps = 1e-6

    def forward(self, x):
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x)


class UnscaledNormOfSums(UnscaledNorm):
    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + self.eps)


class NormAround(nn.Module):
    """x_transformers': torch's norm, and a weight of its own from 0 or 1."""

    def __init__(self, offset=1.0):
        super().__init__()
        self.ln, self.start = nn.LayerNorm(8, 3e-2, elementwise_affine=False), offset
        self.gamma = nn.Parameter(torch.rand(8))

    def forward(self, x):
        return self.ln(x) * (self.gamma + self.start)


class NormByLength(nn.Module):
    """x_transformers' RMSNorm, whose eps is F.normalize's."""

    def __init__(self, offset=0.0, eps=0.0):
        super().__init__()
        self.g, self.start, self.least = nn.Parameter(torch.rand(8)), offset, eps

    def forward(self, x):
        if self.least:
            return F.rms_norm(x, (8,), self.g + self.start, self.least)
        return F.normalize(x, dim=-1) * 8**0.5 * (self.g + self.start)


class NormByGroups(nn.Module):
    """Weights for a group of features that is normalised alone; or one weight for all (ScaleNorm)."""

    def __init__(self, weights):
        super().__init__()
        self.g, self.eps = nn.Parameter(torch.rand(weights)), 1e-3

    def forward(self, x):
        x = x.unflatten(-1, (-1, len(self.g) if len(self.g) > 1 else x.shape[-1]))
        return (F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.g).flatten(-2)


def hooked_inside():
    norm = NormAround()
    norm.ln.register_forward_hook(lambda module, args, out: None)
    return norm


@pytest.mark.parametrize(
    "make",
    [
        UnscaledNormOfSums,
        hooked_inside,
        # whose eps cannot be seen
        *(functools.partial(NormByLength, eps=eps) for eps in (1e-18, 1e-12, 1e-5)),
        # without one weight for each feature
        *(functools.partial(NormByGroups, weights) for weights in (1, 4)),
    ],
)
def test_what_is_like_a_norm_stays(make):
    plain = having(norm=make())()
    dip.convert(plain, place="producer", batches=[X])(X)
    said = f"{type(plain.norm).__name__} is not a LayerNorm"
    assert said in left(dip.summary(plain).plan)["a"]


def test_a_norm_by_the_length_has_the_slopes_of_the_plain_one_at_zero():
    plain = nn.Sequential(NormByLength(), nn.Linear(8, 4))
    x = torch.randn(4, 8) * torch.tensor([1.0, 0.0, 1e-10, 1e10])[:, None]
    model = dip.convert(copy.deepcopy(plain), 1e-14, place="producer", batches=[X])
    assert moved(dip.summary(model).plan) == {"0": ("1",)}
    slopes = []
    for module in (plain, model):
        leaf = x.clone().requires_grad_()
        module(leaf).sum().backward()
        slopes.append(leaf.grad)
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(model[0].g.grad, plain[0].g.grad)


@pytest.mark.parametrize(
    "make, weight",
    [
        *((functools.partial(NormAround, start), "gamma") for start in (0.0, 1.0)),
        *((functools.partial(NormByLength, start), "g") for start in (0.0, 1.0)),
        (UnscaledNorm, None),
    ],
)
def test_another_packages_norm_moves_with_a_weight_of_any_name_or_none(make, weight):
    torch._dynamo.reset()
    plain = having(norm=make())()
    model = dip.convert(copy.deepcopy(plain), 1e-12, place="producer", batches=[X])
    assert moved(dip.summary(model).plan) == {"norm": ("a", "b"), "act": ("head",)}
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    y, want = model(X), plain(X)
    for out in (y, compiled(X)):
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
    for out in (y, want):
        out.square().sum().backward()
    if weight is not None:
        got, grad = (getattr(m.norm, weight).grad for m in (model, plain))
        torch.testing.assert_close(got, grad)
    assert torch.equal(model.eval()(X), plain(X))
    assert_plain(dip.to_plain(model), plain)


@pytest.mark.parametrize("made_in", [False, True])
@pytest.mark.parametrize("planned_in", [False, True])
def test_inference_mode_hides_no_move(made_in, planned_in):
    with torch.inference_mode(made_in):
        model = having(norm=UnscaledNorm())()
    model.stem.bias.requires_grad_(False)
    with torch.inference_mode(planned_in):
        plan = dip.producer_plan(model, [X])
    assert moved(plan) == {"norm": ("a", "b"), "act": ("head",)}
    fixed = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert fixed == ["stem.bias"]
