"""The loss: mean NLL over trajectories, penalty on variances, smoothness.  docs/maths.md, section 8."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .layers import Variance
from .tensor_parallel import full, is_dtensor


def _check_weight(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")


def penalty(model: nn.Module, alpha: float, beta: float) -> Tensor:
    """alpha * sum_j lambda_j - beta * sum_j ln lambda_j, over every feature j of every DIP layer, lambda = sigma^2.

    model: a module with DIP layers; a variance that layers share counts once. alpha, beta: >= 0. With no pull from the
    data the optimum is lambda = beta / alpha.
    Sharded parameters (FSDP2, DTensor) are summed over the ranks: each gets the whole penalty, so all must call it.
    Returns a scalar, float32, differentiable. Raises ValueError without DIP layers or for a negative alpha or beta.
    Source: arXiv 2506.04690, the ELBO with prior N(0, gamma I).
    """
    _check_weight("alpha", alpha)
    _check_weight("beta", beta)
    # Read once: a parametrised module computes another tensor each time.
    parts = [module.log_variance for module in model.modules() if isinstance(module, Variance)]
    unique = {id(part): part for part in parts}
    if not unique:
        raise ValueError("model: expected DIP layers, found none; convert it first")
    sharded = [part for part in unique.values() if is_dtensor(part)]
    parts = [part for part in unique.values() if not is_dtensor(part)]
    # Each sum over a DTensor is this rank's share of it until full_tensor adds the shares up.
    total: Any = sum(full(alpha * part.exp().sum() - beta * part.sum()) for part in sharded)
    if not parts:
        return total  # type: ignore[no-any-return]
    log_variance = torch.cat([part.to(parts[0].device) for part in parts])
    return alpha * log_variance.exp().sum() - beta * log_variance.sum() + total  # type: ignore[no-any-return]


def objective(
    out: Tensor,
    target: Any,
    loss_fn: Callable[[Tensor, Any], Tensor],
    model: nn.Module | None = None,
    *,
    alpha: float = 0.0,
    beta: float = 0.0,
    lambda_s: float = 0.0,
) -> Tensor:
    """mean_s loss_fn(out[s], target) + alpha * sum lambda - beta * sum ln lambda + lambda_s * Var_s[out].

    out: [m, B, ...], from `trajectories`. target: what loss_fn takes beside [B, ...]. loss_fn: returns a scalar, such
    as F.cross_entropy. model: for the penalty, needed where alpha or beta > 0. alpha, beta, lambda_s: >= 0.
    Var_s is the unbiased variance over the m trajectories, so m >= 2 where lambda_s > 0; summed over the last
    dimension where out has three or more, then averaged over the others (the paper does not state it; this is the
    project's choice).
    Returns a scalar. Raises ValueError or TypeError naming the argument. Source: arXiv 2506.04690, Algorithm 1.
    """
    if not isinstance(out, Tensor):
        raise TypeError(
            f"out: expected a tensor [m, B, ...], got {type(out).__name__}; pass the logits of the model's output"
        )
    if out.ndim < 2 or out.shape[0] == 0:
        raise ValueError(f"out: expected a tensor [m, B, ...] with m >= 1, got shape {tuple(out.shape)}")
    for name, value in (("alpha", alpha), ("beta", beta), ("lambda_s", lambda_s)):
        _check_weight(name, value)
    if model is None and (alpha > 0 or beta > 0):
        raise ValueError("model: expected the model, whose variances alpha and beta weigh, got None")
    if lambda_s > 0 and out.shape[0] < 2:
        raise ValueError(
            f"lambda_s: expected 0 with one trajectory, whose variance is undefined (m >= 2), got {lambda_s}"
        )
    losses = [loss_fn(trajectory, target) for trajectory in out]
    if not isinstance(losses[0], Tensor) or losses[0].ndim != 0:
        got = tuple(losses[0].shape) if isinstance(losses[0], Tensor) else type(losses[0]).__name__
        raise ValueError(f"loss_fn: expected a scalar tensor, got {got}")
    total = torch.stack(losses).mean()
    if model is not None and (alpha > 0 or beta > 0):
        total = total + penalty(model, alpha, beta)
    if lambda_s > 0:
        total = total + lambda_s * _smoothness(out)
    return total


def _smoothness(out: Tensor) -> Tensor:
    variance = out.to(torch.promote_types(out.dtype, torch.float32)).var(0)  # [B, ...]
    return variance.sum(-1).mean() if out.ndim >= 3 else variance.mean()
