"""The mean over infinitely many samples: y = E[act(mu + sqrt(v) z)], mu = x W^T + b.  docs/maths.md, section 7.

One pass over mu after the product, and one in backward, which sums d/dv on its way.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import ops
from .row_blocks import ACTIVATIONS
from .triton_kernels.mixtures import MIXTURES


class _Variance(Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, sigma: Tensor, log_variance: bool) -> Tensor:
        ctx.save_for_backward(weight, sigma)
        ctx.log_variance = log_variance
        return ops.activation_variance(weight, sigma, log_variance)

    @staticmethod
    def backward(ctx: Any, dv: Tensor) -> tuple[Tensor | None, ...]:
        weight, sigma = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return *ops.activation_variance_bwd(dv, weight, sigma, ctx.log_variance), None
        needs = ctx.needs_input_grad[:2]  # under create_graph: differentiable pieces
        wanted = [t for t, need in zip((weight, sigma), needs) if need]
        v = _variance_pieces(weight, sigma, ctx.log_variance)
        grads = iter(torch.autograd.grad(v, wanted, dv, create_graph=True))
        return *(next(grads) if need else None for need in needs), None


def _variance_pieces(weight: Tensor, sigma: Tensor, log_variance: bool) -> Tensor:
    return torch.mv(weight.to(sigma.dtype).square(), torch.exp(sigma) if log_variance else sigma.square())


def variance(weight: Tensor, sigma: Tensor, log_variance: bool) -> Tensor:
    """v [N] = sum over k of sigma_k^2 W_nk^2: the variance of an affine layer's output, the same for every row."""
    if weight.dtype is torch.float64 and sigma.dtype is torch.float32:
        sigma = sigma.double()
    if torch._C._are_functorch_transforms_active():
        return _variance_pieces(weight, sigma, log_variance)
    v: Tensor = _Variance.apply(weight, sigma, log_variance)
    return v


class _Activation(Function):
    @staticmethod
    def forward(ctx: Any, mu: Tensor, v: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(mu, v)
        ctx.activation = activation
        return ops.activation(mu, v, activation)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
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
    y: Any = 0
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
    y: Tensor = _Activation.apply(mu, v, activation)
    return y
