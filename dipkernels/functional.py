"""The package's functions of tensors: noise, perturb, dip_linear and expectation, differentiable to
any order.  docs/maths.md."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import worlds
from .arguments import described, integer, one_of
from .ops import expectation as _expectation
from .ops import linear as _linear
from .ops import perturb as _perturb
from .ops.activations import ACTIVATIONS as ACTIVATIONS
from .ops.draw import asked_for
from .worlds import is_dtensor

ESTIMATORS = ("sample", "mean", "analytic")
KEEPS = ("auto", "u", "x")  # what backward keeps of a layer's input


def noise(
    shape: tuple[int, ...],
    seed: Tensor,
    *,
    dim: int = -1,
    row0: int = 0,
    col0: int = 0,
    sample: int = 0,
) -> Tensor:
    """The standard normal draw z of the noise contract (docs/maths.md, section 3).

    Args:
        shape: Of the result, any number of dimensions >= 1.
        seed: int64 [2] = (key, stream).
        dim: The feature dimension.
        row0: First row, 0 to 2^62, so that noise(window) is the window of the noise: row = row0 +
            the flattened index over the other dimensions.
        col0: First column: column = col0 + the index along dim.
        sample: 0 to 65535.

    Returns:
        float32, on seed's device.

    Raises:
        ValueError, TypeError: Arguments outside these.

    Examples:
        >>> seed = torch.tensor([7, 0])
        >>> z = dip.functional.noise((4, 3), seed)
        >>> torch.equal(dip.functional.noise((2, 3), seed, row0=2), z[2:])
        True
    """
    check_tensors(seed=seed)
    sizes = tuple(integer("shape", size, 0) for size in shape)
    return _perturb.noise(seed, sizes, asked_for(dim, row0, col0, sample, 1.0, False))


def perturb(
    x: Tensor,
    sigma: Tensor,
    seed: Tensor,
    *,
    dim: int = -1,
    row0: int = 0,
    col0: int = 0,
    sample: int = 0,
    num_samples: int = 1,
    log_variance: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """u = x + sigma * z, differentiable in x and sigma to any order.

    Computed in float32 (float64 for float64 x), rounded once.

    Args:
        x: Any shape, float32, float64, float16 or bfloat16; K = x.shape[dim] features. Each rank of
            a DTensor gets the part of the whole tensor's noise that belongs to its shard; the seed
            must be the same on all ranks.
        sigma: [K], float32 or float64, a standard deviation >= 0 (checked on a CPU in eager mode),
            or with log_variance=True ln(sigma^2), any value.
        seed: int64 [2] = (key, stream), on x's device.
        dim: The feature dimension.
        row0, col0, sample: As for `noise`.
        num_samples: S. The mean of S draws is made as one draw with sigma / sqrt(S), which has the
            same law.
        log_variance: Whether sigma holds ln(sigma^2).
        dtype: The type of u; by default x's.

    Returns:
        u, of x's shape, and of its strides if x is dense.

    Raises:
        ValueError, TypeError: A bad argument, which the message names.

    Examples:
        >>> x, sigma, seed = torch.zeros(4, 3), torch.full((3,), 0.5), torch.tensor([7, 0])
        >>> u = dip.functional.perturb(x, sigma, seed)
        >>> torch.allclose(u, 0.5 * dip.functional.noise((4, 3), seed))
        True

    Source: DIPNet, arXiv 2506.04690, the projection u ~ N(v, diag(sigma^2)).
    """
    check_tensors(x=x, sigma=sigma, seed=seed)
    factor = integer("num_samples", num_samples, 1) ** -0.5
    if not log_variance:
        check_sigma(sigma)
    draw = asked_for(dim, row0, col0, sample, factor, log_variance)
    return _perturb.projection(x, sigma, seed, draw, dtype)


def dip_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: Tensor,
    seed: Tensor,
    *,
    row0: int = 0,
    col0: int = 0,
    sample: int = 0,
    num_samples: int = 1,
    log_variance: bool = False,
    keep: str = "auto",
    activation: str | None = None,
    estimator: str = "sample",
) -> Tensor:
    """y = act((x + sigma * z) W^T + b) or its mean over z, differentiable in x, weight, bias and
    sigma to any order.

    Under autocast u is rounded once, straight to the autocast type.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N] or None.
        sigma, seed: As for `perturb`.
        row0, col0, sample: As for `noise`.
        num_samples: As for `perturb`, before the activation; with estimator="mean", behind it.
        log_variance: Whether sigma holds ln(sigma^2).
        keep: What backward keeps of the input: "u" (as nn.Linear keeps its input), "x" (u is made
            again in backward, in the pass that sums dsigma: for layers that share an input), or
            "auto": "u", and under torch.compile what `backends.compiled_keep` says, "x" by
            default.
        activation: None, "relu", "gelu", "gelu_tanh", "silu", "quick_gelu" (CLIP's x sigmoid(1.702
            x)) or "tanh".
        estimator: Where the mean over z is taken.
            "sample": act of one draw; num_samples draws are averaged before the activation.
            "mean": mean over s of act(h_s). The samples sample .. sample + num_samples - 1 are
            drawn one after another: the time of S layers in the memory of one. Backward draws them
            again, and multiplies all but the first again. Without an activation the same as
            "sample".
            "analytic": E[act(h)], S = infinity, in closed form: h is normal with mean x W^T + b and
            variance sum_k sigma_k^2 W_nk^2. Nothing is drawn, and seed and origin are not used.
            num_samples must be 1. docs/maths.md, section 7, has the error.

    Returns:
        y [..., N].

    Raises:
        ValueError, TypeError: A bad argument, which the message names.
        RuntimeError: A weight or bias of another shape or type, in torch's words.

    Examples:
        >>> x, weight, bias = torch.randn(8, 4), torch.randn(2, 4), torch.zeros(2)
        >>> sigma, seed = torch.full((4,), 0.1), torch.tensor([7, 0])
        >>> dip.functional.dip_linear(x, weight, bias, sigma, seed, activation="gelu").shape
        torch.Size([8, 2])

    Source: arXiv 2506.04690.
    """
    num_samples = integer("num_samples", num_samples, 1)
    check_estimator(estimator, activation, num_samples, keep)
    check_tensors(x=x, weight=weight, sigma=sigma, seed=seed)
    if not log_variance:
        check_sigma(sigma)
    dtype = worlds.autocast_dtype(x)
    if estimator != "sample" and (is_dtensor(x) or is_dtensor(weight)):
        raise ValueError(f"estimator: expected 'sample' for a DTensor, got {estimator!r}")
    if estimator == "analytic":
        if sigma.shape != x.shape[-1:]:
            raise ValueError(
                f"sigma: expected shape (K,) = {tuple(x.shape[-1:])}, got {tuple(sigma.shape)}"
            )
        if activation is None:
            return F.linear(_perturb.without_noise(x, sigma), weight, bias)
        _linear.check_weight(x, weight, dtype)
        x = x.to(dtype or x.dtype)
        return _expectation.linear(x, weight, bias, sigma, log_variance, activation)
    draw = asked_for(-1, row0, col0, sample, 1.0, log_variance)
    if estimator == "mean" and activation is not None and num_samples > 1:
        return _linear.mean(x, weight, bias, sigma, seed, draw, num_samples, activation, dtype)
    draw = draw._replace(factor=num_samples**-0.5)
    y = _linear.affine(x, weight, bias, sigma, seed, draw, keep, dtype)
    return y if activation is None else ACTIVATIONS[activation](y)


def expectation(mu: Tensor, v: Tensor, activation: str) -> Tensor:
    """y = E[act(mu + sqrt(v) z)], z ~ N(0, 1): an activation behind normal noise, differentiable in
    mu and v to any order.

    Args:
        mu: [..., N], float32, float64, float16 or bfloat16.
        v: [N], float32 or float64, a variance >= 0 (checked on a CPU in eager mode); where it is 0,
            y is act(mu).
        activation: One of `dip_linear`'s. relu and gelu are exact; the others are within the bounds
            of docs/maths.md, section 7, whatever mu and v.

    Returns:
        y, in mu's shape and dtype.

    Raises:
        ValueError, TypeError: A bad argument, which the message names.

    Examples:
        >>> dip.functional.expectation(torch.zeros(1, 1), torch.ones(1), "relu")  # 1 / sqrt(2 pi)
        tensor([[0.3989]])
    """
    check_tensors(mu=mu, v=v)
    check_sigma(v, "v")
    return _expectation.expected(mu, v, activation)


def check_estimator(estimator: str, activation: str | None, num_samples: int, keep: str) -> None:
    """Raise ValueError for what `dip_linear` does not take, alone or together."""
    one_of("keep", keep, KEEPS)
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(
            f"activation: expected None or one of {tuple(ACTIVATIONS)}, got {activation!r}"
        )
    one_of("estimator", estimator, ESTIMATORS)
    if estimator == "analytic" and num_samples != 1:
        raise ValueError(f"num_samples: expected 1 with estimator='analytic', got {num_samples}")
    if estimator != "sample" and keep == "u":
        raise ValueError(f"keep: expected 'auto' or 'x' with estimator={estimator!r}, got 'u'")


def check_tensors(**values: object) -> None:
    """Raise TypeError naming what is no tensor."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {described(value)}")


def check_sigma(sigma: Tensor, name: str = "sigma") -> None:
    """Raise ValueError for a standard deviation or variance that is none, where its values may be
    read."""
    # Reading values would stop a GPU and a tracer; there a negative or NaN one is the caller's
    # own. Of a DTensor a rank alone cannot say it for all.
    if sigma.device.type != "cpu" or not worlds.has_values(sigma):
        return
    if not bool((sigma >= 0).all()):
        raise ValueError(
            f"{name}: expected values >= 0, got a negative or NaN one: {sigma.detach()}"
        )


for _name in ("noise", "perturb", "dip_linear", "expectation"):
    torch.fx.wrap(_name)  # one call in a graph that torch.fx traces
