"""The projection in the operation that makes a layer's input: u = f(x) + sigma * z.  docs/maths.md, section 10.

f is a norm over the last dimension, an activation, or a gated product. One pass forward and one in backward, which keeps
what the plain operation keeps, and never u or z.

    u = producers.norm(x, weight, bias, sigma, seed, kind="layer", eps=1e-5)
    u = producers.activate(x, sigma, seed, kind="gelu", dim=1)
    u = producers.gate(a, b, sigma, seed, kind="silu")

z is `functional.noise`'s for the same seed, row0, col0 and sample: u is `functional.perturb(f(x), ...)`, but that f(x) is not
rounded on the way. Without noise call the plain torch function.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import functional
from .row_blocks import ACTIVATIONS

KINDS = ("layer", "rms")


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _norm_pieces(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float, offset: float
) -> Tensor:  # fmt: skip
    """f(x) in float32 (float64 for float64), of operations that have their own derivatives."""
    wide = _wide(x)
    mean = wide.mean(-1, keepdim=True) if kind == "layer" else 0.0
    centred = wide - mean
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (weight.to(wide.dtype) + offset)
    return y if bias is None else y + bias.to(wide.dtype)


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
    """u = (x - mean) / sqrt(var + eps) * (offset + weight) + bias + sigma * z, mean and var over the last dimension.

    Args:
        x: [..., K], float32, float64, float16 or bfloat16.
        weight: [K] or None, of any of these types.
        bias: [K] or None.
        sigma: [K], float32 or float64: a standard deviation >= 0, or with log_variance ln(sigma^2).
        seed: int64 [2] = (key, stream), on x's device.
        kind: "layer", or "rms": no mean is subtracted.
        eps: added to the variance, as the plain module does.
        offset: added to the weight; 1.0 for Gemma's.
        row0: first row of the draw, as in `functional.noise`; rows are the other dimensions of x, in order.
        col0: its first column.
        sample: its sample.
        log_variance: what sigma holds.
        dtype: of u; autocast's where that is on, else x's.

    Returns:
        u, of x's shape. Computed in float32 (float64 for float64 x), statistics too, and rounded once.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
    y = _norm_pieces(x, weight, bias, kind, eps, offset)
    return _perturb(y, x, sigma, seed, -1, row0, col0, sample, log_variance, dtype)


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
        x: any shape; K = x.shape[dim].
        sigma: [K], as in `norm`.
        seed: int64 [2] = (key, stream), on x's device.
        kind: "relu", "gelu", "gelu_tanh", "silu" or "tanh".
        dim: the feature dimension.
        row0, col0, sample, log_variance, dtype: as in `norm`.

    Returns:
        u, of x's shape, and of its strides where x is dense.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    y = _act(kind)(_wide(x))
    return _perturb(y, x, sigma, seed, dim, row0, col0, sample, log_variance, dtype)


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
        a: any shape; K = a.shape[dim].
        b: of a's shape and dtype; with a the two halves of one tensor, or tensors of their own.
        sigma, seed, kind, dim, row0, col0, sample, log_variance, dtype: as in `activate`.

    Returns:
        u, of a's shape.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if b.shape != a.shape:
        raise ValueError(f"b: expected shape {tuple(a.shape)}, as a, got {tuple(b.shape)}")
    y = _act(kind)(_wide(a)) * _wide(b)
    return _perturb(y, a, sigma, seed, dim, row0, col0, sample, log_variance, dtype)


def _act(kind: str) -> Callable[[Tensor], Tensor]:
    if kind not in ACTIVATIONS:
        raise ValueError(f"kind: expected one of {tuple(ACTIVATIONS)}, got {kind!r}")
    return ACTIVATIONS[kind]


def _perturb(
    y: Tensor, x: Tensor, sigma: Tensor, seed: Tensor, dim: int, row0: int, col0: int, sample: int, log_variance: bool,
    dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    return functional.perturb(
        y, sigma, seed, dim=dim, row0=row0, col0=col0, sample=sample, log_variance=log_variance,
        dtype=dtype or functional.autocast_dtype(x) or x.dtype,
    )  # fmt: skip
