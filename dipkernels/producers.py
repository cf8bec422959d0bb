"""The projection in the operation that makes a layer's input: u = f(x) + sigma * z.  docs/maths.md,
section 10.

f is a norm over the last dimension, an activation, or a gated product. There is one pass forward
and one in backward. It keeps what the plain operation keeps, and never u or z.

    u = producers.norm(x, weight, bias, sigma, seed, kind="layer", eps=1e-5)
    u = producers.activate(x, sigma, seed, kind="gelu", dim=1)
    u = producers.gate(a, b, sigma, seed, kind="silu")

z is that of `functional.noise` for the same seed, row0, col0 and sample. u is
`functional.perturb(f(x), ...)`, except that f(x) is not rounded on the way. Without noise call the
plain torch function.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import worlds
from .arguments import real
from .functional import check_sigma, check_tensors
from .ops import gate as _gate
from .ops import norm as _norm
from .ops.draw import Draw, asked_for


def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sigma: Tensor,
    seed: Tensor,
    *,
    kind: str,
    eps: float,
    offset: float = 0.0,
    row0: int = 0,
    col0: int = 0,
    sample: int = 0,
    log_variance: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """u = (x - mean) / sqrt(var + eps) * (offset + weight) + bias + sigma * z, mean and var over
    the last dimension.

    Args:
        x: [..., K], float32, float64, float16 or bfloat16.
        weight: [K] or None, of any of these types.
        bias: [K] or None.
        sigma: [K], float32 or float64: a standard deviation >= 0, or with log_variance ln(sigma^2).
        seed: int64 [2] = (key, stream), on x's device.
        kind: "layer", or "rms": no mean is subtracted.
        eps: >= 0, added to the variance, as the plain module does.
        offset: Added to the weight; 1.0 for Gemma's.
        row0: First row of the draw, as in `functional.noise`; rows are the other dimensions of x,
            in order.
        col0: Its first column.
        sample: Its sample.
        log_variance: Whether sigma holds ln(sigma^2).
        dtype: The type of u; by default autocast's if that is on, otherwise x's.

    Returns:
        u, of x's shape. Computed in float32 (float64 for float64 x), statistics too, and rounded
        once.

    Raises:
        ValueError, TypeError: A bad argument, which the message names.

    Examples:
        >>> from dipkernels import producers
        >>> x, sigma, seed = torch.randn(8, 4), torch.full((4,), 0.1), torch.tensor([7, 0])
        >>> u = producers.norm(x, None, None, sigma, seed, kind="layer", eps=1e-5)
        >>> torch.allclose(u, dip.functional.perturb(F.layer_norm(x, (4,)), sigma, seed), atol=1e-5)
        True
    """
    affine = {"weight": weight, "bias": bias}
    given = {name: value for name, value in affine.items() if value is not None}
    check_tensors(x=x, sigma=sigma, seed=seed, **given)
    eps = real("eps", eps, least=0)
    draw = _draw(sigma, -1, row0, col0, sample, log_variance)
    return _norm.noised_norm(
        x, weight, bias, sigma, seed, draw, kind, eps, offset, dtype or worlds.autocast_dtype(x)
    )


def activate(
    x: Tensor,
    sigma: Tensor,
    seed: Tensor,
    *,
    kind: str,
    dim: int = -1,
    row0: int = 0,
    col0: int = 0,
    sample: int = 0,
    log_variance: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """u = act(x) + sigma * z.

    Args:
        x: Any shape; K = x.shape[dim].
        sigma: [K], as in `norm`.
        seed: int64 [2] = (key, stream), on x's device.
        kind: An activation, as in `functional.dip_linear`.
        dim: The feature dimension.
        row0, col0, sample, log_variance, dtype: As in `norm`.

    Returns:
        u, of x's shape, and of its strides if x is dense.

    Raises:
        ValueError, TypeError: A bad argument, which the message names.

    Examples:
        >>> from dipkernels import producers
        >>> x, sigma, seed = torch.randn(8, 4), torch.full((4,), 0.1), torch.tensor([7, 0])
        >>> u = producers.activate(x, sigma, seed, kind="gelu")
        >>> torch.allclose(u, dip.functional.perturb(F.gelu(x), sigma, seed), atol=1e-5)
        True
    """
    check_tensors(x=x, sigma=sigma, seed=seed)
    draw = _draw(sigma, dim, row0, col0, sample, log_variance)
    dtype = dtype or worlds.autocast_dtype(x)
    return _gate.noised_gate(x, None, sigma, seed, draw, kind, dtype)


def gate(
    a: Tensor,
    b: Tensor,
    sigma: Tensor,
    seed: Tensor,
    *,
    kind: str,
    dim: int = -1,
    row0: int = 0,
    col0: int = 0,
    sample: int = 0,
    log_variance: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """u = act(a) * b + sigma * z: SwiGLU with "silu", GEGLU with "gelu" or "gelu_tanh".

    Args:
        a: Any shape; K = a.shape[dim].
        b: Of a's shape and dtype; with a the two halves of one tensor, or tensors of their own.
        sigma, seed, kind, dim, row0, col0, sample, log_variance, dtype: As in `activate`.

    Returns:
        u, of a's shape.

    Raises:
        ValueError, TypeError: A bad argument, which the message names.

    Examples:
        >>> from dipkernels import producers
        >>> a, b, sigma = torch.randn(8, 4), torch.randn(8, 4), torch.full((4,), 0.1)
        >>> producers.gate(a, b, sigma, torch.tensor([7, 0]), kind="silu").shape
        torch.Size([8, 4])
    """
    check_tensors(a=a, b=b, sigma=sigma, seed=seed)
    draw = _draw(sigma, dim, row0, col0, sample, log_variance)
    return _gate.noised_gate(a, b, sigma, seed, draw, kind, dtype or worlds.autocast_dtype(a))


def _draw(sigma: Tensor, dim: int, row0: int, col0: int, sample: int, log_variance: bool) -> Draw:
    if not log_variance:
        check_sigma(sigma)
    return asked_for(dim, row0, col0, sample, 1.0, log_variance)


for _name in ("norm", "activate", "gate"):
    torch.fx.wrap(_name)  # one call in a graph that torch.fx traces
