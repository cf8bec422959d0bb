"""The mean over infinitely many samples: y = E[act(mu + sqrt(v) z)], mu = x W^T + b.
docs/maths.md, section 7.

One pass over mu after the product, and one in backward, which sums d/dv and the bias's gradient on
its way.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import worlds
from ..arguments import one_of
from ..triton_kernels.mixtures import MIXTURES
from ..worlds import is_dtensor
from . import registry
from .activations import ACTIVATIONS
from .draw import DTYPES
from .pieces import fake_like, flat_rows, fused, linear_as

# ---- the operations ------------------------------------------------------------------------------


def expectation(mu: Tensor, v: Tensor, activation: str) -> Tensor:
    """y = E[act(mu + sqrt(v) z)] with v [N], in mu's shape and dtype."""
    one_of("activation", activation, ACTIVATIONS)
    if mu.dtype not in DTYPES:
        raise TypeError(f"mu: expected one of {DTYPES}, got {mu.dtype}")
    if mu.dim() == 0 or v.shape != mu.shape[-1:]:
        raise ValueError(f"v: expected shape (N,) = {tuple(mu.shape[-1:])}, got {tuple(v.shape)}")
    if v.dtype is not torch.float32 and v.dtype is not torch.float64:
        raise TypeError(f"v: expected torch.float32 or torch.float64, got {v.dtype}")
    if v.device != mu.device:
        raise ValueError(f"v: expected device {mu.device}, as mu, got {v.device}")
    return registry.kernel("expectation", mu.device.type)(mu, v, activation)


def expectation_bwd(
    dy: Tensor, mu: Tensor, v: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """dmu = dy d/dmu, and of v's dtype the sums over rows of dy d/dv and of dmu."""
    return registry.kernel("expectation_bwd", mu.device.type)(dy, mu, v, activation)


def affine_variance(weight: Tensor, sigma: Tensor, log_variance: bool) -> Tensor:
    """v [N] = sum over k of sigma_k^2 W_nk^2, of sigma's dtype."""
    return registry.kernel("affine_variance", weight.device.type)(weight, sigma, log_variance)


def affine_variance_bwd(
    dv: Tensor, weight: Tensor, sigma: Tensor, log_variance: bool, given: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(given + dweight, dsigma)."""
    run = registry.kernel("affine_variance_bwd", weight.device.type)
    return run(dv, weight, sigma, log_variance, given)


registry.define(
    "expectation",
    "(Tensor mu, Tensor v, str activation) -> Tensor",
    lambda mu, v, activation: fake_like(mu, mu),
)
registry.define(
    "expectation_bwd",
    "(Tensor dy, Tensor mu, Tensor v, str activation) -> (Tensor, Tensor, Tensor)",
    lambda dy, mu, v, activation: tuple(fake_like(t, mu) for t in (mu, v, v)),
)
registry.define(
    "affine_variance",
    "(Tensor weight, Tensor sigma, bool log_variance) -> Tensor",
    lambda weight, sigma, log_variance: sigma.new_empty(weight.shape[:1]),
)
registry.define(
    "affine_variance_bwd",
    "(Tensor dv, Tensor weight, Tensor sigma, bool log_variance, Tensor? given) -> (Tensor, "
    "Tensor)",
    lambda dv, weight, sigma, *rest: tuple(fake_like(t, weight) for t in (weight, sigma)),
)

# ---- what the layers call ------------------------------------------------------------------------


def _variance_pieces(weight: Tensor, sigma: Tensor, log_variance: bool) -> Tensor:
    return torch.mv(
        weight.to(sigma.dtype).square(), torch.exp(sigma) if log_variance else sigma.square()
    )


def _as_wide_as(weight: Tensor, sigma: Tensor) -> Tensor:
    return (
        sigma.double() if weight.dtype is torch.float64 and sigma.dtype is torch.float32 else sigma
    )


def variance(weight: Tensor, sigma: Tensor, log_variance: bool) -> Tensor:
    """v [N] = sum over k of sigma_k^2 W_nk^2: the variance of an affine layer's output, the same
    for every row. Raises TypeError for a weight in shards."""
    if is_dtensor(weight):
        raise TypeError(
            "weight: expected it whole on this rank for an exact mean, got a DTensor of placements "
            f"{tuple(weight.placements)}; take method='sample' in dip.predict"
        )
    sigma = _as_wide_as(weight, sigma)
    if torch.is_grad_enabled() or worlds.transforming():
        return _variance_pieces(weight, sigma, log_variance)
    return affine_variance(weight, sigma, log_variance)


def _pieces(mu: Tensor, v: Tensor, activation: str) -> Tensor:
    """The same expectation in plain PyTorch, differentiable to any order; where v is 0, the
    activation itself."""
    none = v == 0
    v = torch.where(none, 1.0, v)
    if activation == "relu":
        terms = [(torch.rsqrt(v), 1.0)]
    else:
        terms = [(c * torch.rsqrt(1 + c * c * v), p) for c, p in zip(*MIXTURES[activation][2][:2])]
    y: Any = 0
    for alpha, p in terms:
        a = mu * alpha
        cdf = torch.special.ndtr(a)
        if activation == "tanh":
            y = y + p * (2 * cdf - 1)
        else:
            y = y + p * (mu * cdf + v * alpha * torch.exp(-a * a / 2) / math.sqrt(2 * math.pi))
    return torch.where(none, ACTIVATIONS[activation](mu).to(y.dtype), y).to(mu.dtype)


# expected(mu, v, activation): `expectation`, differentiable in every world
expected = fused(
    "_Expectation",
    expectation,
    lambda dy, tensors, kept, how, needs: expectation_bwd(dy, *tensors, *how),
    _pieces,
    2,
)


# The layer as a whole, so that no pass is left to autograd: the bias's gradient is summed with
# d/dv, and the variance's part of the weight's is added to the product's where it is computed.
def _run(
    x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, *how: Any
) -> tuple[Tensor, Tensor, Tensor]:
    log_variance, activation = how
    mu, v = linear_as(x, weight, bias), affine_variance(weight, sigma, log_variance)
    return expectation(mu, v, activation), mu, v


def _run_bwd(dy: Tensor, tensors: Any, kept: Any, how: Any, needs: Any) -> tuple[Any, ...]:
    (x, weight, _, sigma), (log_variance, activation) = tensors, how
    mu, v = kept
    dmu, dv, dbias = expectation_bwd(dy, mu, v, activation)
    dx = dmu @ weight.to(dmu.dtype) if needs[0] else None
    dweight = flat_rows(dmu).t() @ flat_rows(x) if needs[1] else None
    dsigma = None
    if needs[1] or needs[3]:
        dweight, dsigma = affine_variance_bwd(dv, weight, sigma, log_variance, dweight)
    return dx, dweight, dbias, dsigma


def _linear_pieces(
    x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, *how: Any
) -> Tensor:
    log_variance, activation = how
    v = _variance_pieces(weight, sigma, log_variance)
    return _pieces(linear_as(x, weight, bias), v, activation)


_fused_linear = fused("_Linear", _run, _run_bwd, _linear_pieces, 4)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: Tensor,
    log_variance: bool,
    activation: str,
) -> Tensor:
    """The layer and its activation, in x's dtype."""
    return _fused_linear(x, weight, bias, _as_wide_as(weight, sigma), log_variance, activation)
