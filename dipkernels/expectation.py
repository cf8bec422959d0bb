"""The mean over infinitely many samples: y = E[act(mu + sqrt(v) z)], mu = x W^T + b, v_n = sum_k sigma_k^2 W_nk^2.  docs/maths.md, section 7.

One pass over mu after the product, and one in backward, which sums d/dv on its way.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import Function

from . import ops
from .row_blocks import ACTIVATIONS
from .triton_kernels.mixtures import MIXTURES


class _Variance(Function):
    """v [N] = sum over k of s_k^2 W_nk^2, in float32 at least, without keeping the squares of W."""

    @staticmethod
    def forward(ctx, weight, sigma, log_variance):
        ctx.save_for_backward(weight, sigma)
        ctx.log_variance = log_variance
        variance = torch.exp(sigma) if log_variance else sigma * sigma
        return torch.mv(weight.to(_wide(weight, sigma)).square(), variance)

    @staticmethod
    def backward(ctx, dv):
        weight, sigma = ctx.saved_tensors
        variance = torch.exp(sigma) if ctx.log_variance else sigma * sigma
        wide = weight.to(_wide(weight, sigma))
        dweight = dsigma = None
        scaled = wide * dv[:, None]
        if ctx.needs_input_grad[1]:
            dvariance = (scaled * wide).sum(0).to(sigma.dtype)
            dsigma = dvariance * (variance if ctx.log_variance else 2 * sigma)
        if ctx.needs_input_grad[0]:
            dweight = (scaled * (2 * variance)).to(weight.dtype)
        return dweight, dsigma, None


def _wide(weight: Tensor, sigma: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, sigma.dtype)


def variance(weight: Tensor, sigma: Tensor, log_variance: bool) -> Tensor:
    """v [N] of the pre-activation of an affine layer: it does not depend on the row."""
    if _wide(weight, sigma) is not sigma.dtype:
        sigma = sigma.to(weight.dtype)
    return _Variance.apply(weight, sigma, log_variance)


class _Activation(Function):
    @staticmethod
    def forward(ctx, mu, v, activation):
        ctx.save_for_backward(mu, v)
        ctx.activation = activation
        return ops.activation(mu, v, activation)

    @staticmethod
    def backward(ctx, dy):
        mu, v = ctx.saved_tensors
        if torch.is_grad_enabled():  # under create_graph: differentiable pieces
            wanted = [t for t, needs in zip((mu, v), ctx.needs_input_grad) if needs]
            grads = iter(torch.autograd.grad(_pieces(mu, v, ctx.activation), wanted, dy, create_graph=True))
            return *(next(grads) if needs else None for needs in ctx.needs_input_grad[:2]), None
        dmu, dv = ops.activation_bwd(dy, mu, v, ctx.activation)
        return dmu, dv, None


def _pieces(mu: Tensor, v: Tensor, activation: str) -> Tensor:
    """The same expectation in plain PyTorch, differentiable to any order; where v is 0, the activation itself."""
    positive = v > 0
    v = torch.where(positive, v, 1.0)
    if activation == "relu":
        terms = [(torch.rsqrt(v), 1.0)]
    else:
        terms = [(c * torch.rsqrt(1 + c * c * v), p) for c, p in zip(*MIXTURES[activation][2])]
    y = 0
    for alpha, p in terms:
        a = mu * alpha
        cdf = torch.special.ndtr(a)
        if activation == "tanh":
            y = y + p * (2 * cdf - 1)
        else:
            y = y + p * (mu * cdf + v * alpha * torch.exp(-a * a / 2) / math.sqrt(2 * math.pi))
    return torch.where(positive, y, ACTIVATIONS[activation](mu).to(y.dtype)).to(mu.dtype)


def activation(mu: Tensor, v: Tensor, activation: str) -> Tensor:
    if torch._C._are_functorch_transforms_active():
        return _pieces(mu, v, activation)
    return _Activation.apply(mu, v, activation)
