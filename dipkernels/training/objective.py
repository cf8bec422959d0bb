"""The loss: mean NLL over trajectories, KL to the prior, smoothness.  docs/maths.md, section 8."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import described, real
from ..nn.numbering import require_module
from ..nn.variance import Variance
from ..ops.dtensor import full, laid_out_as
from ..worlds import is_dtensor

KL = 0.4  # the default weight: studies/defaults.py


def _variances(model: nn.Module) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(log_variance, log_prior, pull / K), vectors laid out alike: of all variances in one go,
    which is a few operations instead of a few for each layer, but of each sharded one by itself.

    A variance that modules share counts once, an offloaded one not.
    """
    require_module(model)
    # Each tensor is kept beside its module: a parametrised one is another at each look, and ids of
    # the dead return.
    found = [(m.log_variance, m) for m in model.modules() if isinstance(m, Variance)]
    if not found:
        raise ValueError("model: expected DIP layers, found none; convert it first")
    unique = {id(tensor): variance for tensor, variance in found}
    # accelerate keeps what it offloads on the meta device, where it gets no gradient: its term
    # would be a constant. Without its hooks such a model is one to be filled, or functional_call's.
    offloads = any(hasattr(m, "_hf_hook") for m in model.modules())
    own = [
        v
        for v in unique.values()
        if v.num_features > 0 and not (offloads and v.log_variance.is_meta)
    ]
    rows = [(v.log_variance, full(v.log_prior), full(v.pull) / v.num_features) for v in own]
    for variance, row in zip(own, rows):
        variance.require_values(row[0])
    sharded: list[tuple[Tensor, Tensor, Tensor]] = [
        (values, laid_out_as(prior, values), laid_out_as(weight, values))
        for values, prior, weight in rows
        if is_dtensor(values)
    ]
    whole = [row for row in rows if not is_dtensor(row[0])]
    if not whole:
        return sharded
    device = whole[0][0].device
    values, priors, weights = (torch.cat([t.to(device) for t in part]) for part in zip(*whole))
    return [*sharded, (values, priors, weights)]


def _sum(terms: Iterable[Tensor]) -> Tensor:
    """Of scalars on any device; each over a DTensor is this rank's share until `full` adds them
    up."""
    return sum((full(term) for term in terms), torch.zeros((), dtype=torch.float32, device="cpu"))


def kl_penalty(model: nn.Module, kl: float = KL) -> Tensor:
    """kl * sum over layers of the mean over features of pull * KL(N(0, lambda) || N(0, gamma)).

    KL = (lambda / gamma - 1 - ln(lambda / gamma)) / 2: >= 0, and 0 where the variance lambda is the
    prior's, gamma = exp(log_prior). The pull is 1, or less for a deep model and for one whose
    examples have few independent values; `calibrate` sets both. For a model that computes its own
    loss: `model(**batch).loss + dip.kl_penalty(model)`; `objective` adds it by itself.

    Args:
        model: A model with DIP layers. A variance that layers share counts once. One that
            accelerate has offloaded does not learn, and does not count.
        kl: The weight, >= 0.

    Returns:
        A scalar, float32, differentiable. Of sharded parameters (FSDP2, DTensor) each rank gets the
        whole, so all must call it.

    Raises:
        ValueError: A model without DIP layers or without values (on the meta device), or a bad
            weight.

    Examples:
        >>> model = dip.convert(nn.Sequential(nn.Linear(4, 2)))
        >>> dip.kl_penalty(model).item()  # the variances are where they started
        0.0
    """
    kl = real("kl", kl, least=0)
    # r = ln(lambda / gamma) of each feature
    ratios = ((values - prior, weight) for values, prior, weight in _variances(model))
    return kl * _sum((weight * (r.expm1() - r) / 2).sum() for r, weight in ratios)


def penalty(model: nn.Module, alpha: float, beta: float) -> Tensor:
    """alpha * sum_j lambda_j - beta * sum_j ln lambda_j, over every feature j of every DIP layer,
    lambda = sigma^2.

    This is the paper's form of `kl_penalty`: alpha = w / (2 gamma) and beta = w / 2 are a KL of
    weight w, summed over features. With no pull from the data the optimum is lambda = beta / alpha.

    Args:
        model: A model with DIP layers. A variance that layers share counts once.
        alpha: >= 0.
        beta: >= 0, and only beside an alpha > 0, which bounds the variances.

    Returns:
        A scalar, float32, differentiable. Of sharded parameters (FSDP2, DTensor) each rank gets the
        whole, so all must call it.

    Raises:
        ValueError: There are no DIP layers, or alpha or beta is bad.

    Examples:
        >>> model = dip.convert(nn.Sequential(nn.Linear(4, 2)), init_variance=0.25)
        >>> dip.penalty(model, alpha=1.0, beta=0.0).item()
        1.0

    Source: arXiv 2506.04690, the ELBO with prior N(0, gamma I).
    """
    alpha, beta = _checked_pair(alpha, beta)
    rows = _variances(model)
    return _sum(alpha * values.exp().sum() - beta * values.sum() for values, _, _ in rows)


def _checked_pair(alpha: float, beta: float) -> tuple[float, float]:
    alpha, beta = real("alpha", alpha, least=0), real("beta", beta, least=0)
    if beta > 0 and alpha == 0:
        raise ValueError(
            f"alpha: expected > 0 beside beta = {beta}, got 0, with which every variance grows "
            "without bound; use kl=, or alpha = beta / variance"
        )
    return alpha, beta


def objective(
    out: Tensor,
    target: Any,
    loss_fn: Callable[[Tensor, Any], Tensor],
    model: nn.Module | None = None,
    *,
    kl: float | None = None,
    alpha: float = 0.0,
    beta: float = 0.0,
    lambda_s: float = 0.0,
) -> Tensor:
    """mean_s loss_fn(out[s], target) + kl * KL(variances || prior) + lambda_s * Var_s[out].

    The KL term is that of `kl_penalty`; alpha and beta weigh the paper's form of it, `penalty`.
    Var_s is the unbiased variance over the m trajectories. It is summed over the last dimension if
    out has three or more, and averaged over the others (the project's choice).

    Args:
        out: [m, B, ...], from `trajectories`. For a model with several outputs add your own loss
            and `kl_penalty`; or call this for each output, and give the model in one call only.
        target: The second argument of loss_fn.
        loss_fn: Returns a scalar, such as F.cross_entropy.
        model: The model, whose variances the KL term pulls to their prior. Without it there is no
            such term, and the noise fades.
        kl: >= 0. By default 0.4 with a model, 0 without one or beside alpha; 0 lets the loss alone
            move the variances. 0.4 is for a loss of about 1 where nothing is learned, such as a
            cross-entropy; of a regression multiply it by the target's variance.
        alpha: >= 0.
        beta: >= 0, and only beside an alpha > 0.
        lambda_s: >= 0; above 0 it needs m >= 2.

    Returns:
        A scalar.

    Raises:
        ValueError: A weight or shape outside these; also kl beside alpha.

    Examples:
        >>> model = dip.convert(nn.Sequential(nn.Linear(4, 3)))
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> out = dip.trajectories(model, x, m=2)
        >>> dip.objective(out, y, F.cross_entropy, model).backward()

    Source: arXiv 2506.04690, Algorithm 1; the KL term is its ELBO.
    """
    if not isinstance(out, Tensor):
        raise TypeError(
            f"out: expected a tensor [m, B, ...], got {type(out).__name__}; pass the logits of the "
            "model's output; of several outputs, take your own loss + dip.kl_penalty(model)"
        )
    if out.ndim < 2 or out.shape[0] == 0:
        raise ValueError(
            f"out: expected a tensor [m, B, ...] with m >= 1, got shape {tuple(out.shape)}"
        )
    one_number_each = out.ndim == 2 and isinstance(target, Tensor) and target.ndim > 0
    if one_number_each and len(target) != out.shape[1]:
        raise ValueError(
            f"out: expected [m, B] beside a target of B = {len(target)}, got shape "
            f"{tuple(out.shape)}; pass dip.trajectories(model, x, m=...), or model(x)[None] for "
            "one pass"
        )
    if isinstance(loss_fn, type) or not callable(loss_fn):
        came = f"the class {loss_fn.__name__}" if isinstance(loss_fn, type) else repr(loss_fn)
        raise TypeError(
            "loss_fn: expected a function such as F.cross_entropy, or a loss module such as "
            f"nn.CrossEntropyLoss(), got {came}"
        )
    alpha, beta = _checked_pair(alpha, beta)
    lambda_s = real("lambda_s", lambda_s, least=0)
    if kl is not None:
        kl = real("kl", kl, least=0)
        if kl > 0 and alpha > 0:
            raise ValueError(
                f"kl: expected none beside alpha, another form of this term, got {kl} and "
                f"alpha={alpha}"
            )
    else:
        kl = KL if model is not None and alpha == 0 else 0.0
    if model is None and (kl > 0 or alpha > 0):
        raise ValueError(
            "model: expected the model, whose variances kl, alpha and beta weigh, got None"
        )
    if lambda_s > 0 and out.shape[0] < 2:
        raise ValueError(
            "lambda_s: expected 0 with one trajectory, which has no variance (take m >= 2), got "
            f"{lambda_s}"
        )
    losses = [loss_fn(trajectory, target) for trajectory in out]
    if not isinstance(losses[0], Tensor) or losses[0].ndim != 0:
        raise ValueError(
            f"loss_fn: expected a scalar tensor, got {described(losses[0])}; return the mean over "
            "the examples"
        )
    total = torch.stack(losses).mean()
    if model is not None and kl > 0:
        total = total + kl_penalty(model, kl).to(total.device)
    if model is not None and alpha > 0:
        total = total + penalty(model, alpha, beta).to(total.device)
    if lambda_s > 0:
        total = total + lambda_s * smoothness(out)
    return total


def smoothness(out: Tensor) -> Tensor:
    """Var_s[out] of out [m, B, ...], m >= 2: the term that `objective` weighs by lambda_s; a
    scalar, at least float32."""
    wide = out.to(torch.promote_types(out.dtype, torch.float32))
    # not var, which takes several times as long over the first dimension
    variance = (wide - wide.mean(0)).square().sum(0) / (len(wide) - 1)  # [B, ...]
    return variance.sum(-1).mean() if out.ndim >= 3 else variance.mean()


def energy_score(out: Tensor, target: Tensor) -> Tensor:
    """mean_s |out_s - target| - 1/2 mean_{s != t} |out_s - out_t|, averaged over the batch.

    A loss for regression, in place of the mean squared one of `objective`. It is least if the
    trajectories are draws from the distribution of the target. Then
    `predict(model, x, k=..., average=None)` draws from it. For one number for each example it is
    the CRPS. Add `kl_penalty(model)` for the pull to the prior, and start at the whole spread,
    `calibrate(model, batches, ratio=1)`.

    Args:
        out: [m, B, ...], m >= 2, from `trajectories`.
        target: [B, ...], of the shape of a trajectory. Of classes: one-hot, beside probabilities.

    Returns:
        A scalar, at least float32. The distance |.| is Euclidean over an example's numbers.

    Raises:
        ValueError: m is 1, or the shapes do not fit.

    Examples:
        >>> model = dip.convert(nn.Sequential(nn.Linear(4, 1)))
        >>> x, y = torch.randn(8, 4), torch.randn(8, 1)
        >>> loss = dip.energy_score(dip.trajectories(model, x, m=4), y) + dip.kl_penalty(model)
        >>> loss.backward()

    Source: Gneiting and Raftery, JASA 2007; as a loss of networks with noise: engression, Shen and
    Meinshausen, JRSS B 2024.
    """
    for name, value in (("out", out), ("target", target)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name}: expected a floating tensor, got {described(value)}")
    if out.ndim < 2 or len(out) < 2:
        raise ValueError(
            f"out: expected [m, B, ...] with m >= 2 trajectories, got shape {tuple(out.shape)}"
        )
    if target.shape != out.shape[1:]:
        raise ValueError(
            f"target: expected shape {tuple(out.shape[1:])}, that of a trajectory, got "
            f"{tuple(target.shape)}"
        )
    wide = torch.promote_types(out.dtype, torch.float32)
    draws = out.to(wide).unsqueeze(-1).flatten(2)
    first, second = torch.triu_indices(len(out), len(out), 1, device=out.device)
    apart = (draws[first] - draws[second]).norm(dim=-1).mean()
    away = (draws - target.to(wide).unsqueeze(-1).flatten(1)).norm(dim=-1).mean()
    return away - apart / 2
