"""u = h * (offset + weight) + bias + factor * sigma * z, h = (x - mean) * rstd: LayerNorm and
RMSNorm with noise.

One pass forward and one back. Backward keeps x and stats: [mean, rstd] of every row, or [rstd];
never u nor z. docs/maths.md, section 10.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..arguments import one_of
from . import registry
from .draw import DTYPES, Draw, check_projection
from .perturb import DRAW, OPTIONAL_DRAW, projection
from .pieces import fake_like, fused, widened

KINDS = ("layer", "rms")

# ---- the operations ------------------------------------------------------------------------------


def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sigma: Tensor,
    seed: Tensor,
    draw: Draw,
    kind: str,
    eps: float,
    offset: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """(u, stats)."""
    check_projection(x, sigma, seed, draw, dtype)
    check_norm(x, weight, bias, draw, kind)
    run = registry.kernel("norm", x.device.type)
    return run(x, weight, bias, sigma, seed, *draw, kind, eps, offset, dtype)


def check_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, draw: Draw, kind: str
) -> None:
    """Raise TypeError or ValueError for what no norm is made of."""
    one_of("kind", kind, KINDS)
    if draw.dim % x.dim() != x.dim() - 1:
        raise ValueError(f"dim: expected the last dimension, got {draw.dim}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        if t.shape != x.shape[-1:]:
            raise ValueError(
                f"{name}: expected shape (K,) = ({x.shape[-1]},), got {tuple(t.shape)}"
            )
        if t.dtype not in DTYPES:
            raise TypeError(f"{name}: expected one of {DTYPES}, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name}: expected device {x.device}, as x, got {t.device}")


def _fake_norm(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    kind, dtype = rest[-4], rest[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    stats = x.new_empty((2 if kind == "layer" else 1, math.prod(x.shape[:-1])), dtype=wide)
    # contiguous, as torch's own norms return
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format), stats


registry.define(
    "norm",
    f"(Tensor x, Tensor? weight, Tensor? bias, {DRAW}, str kind, float eps, float offset, "
    "ScalarType? out_dtype) -> (Tensor, Tensor)",
    _fake_norm,
)
# (dx, dweight, dbias, dsigma), empty for what is None; without a sigma nothing is drawn.
registry.define(
    "norm_bwd",
    f"(Tensor du, Tensor x, Tensor stats, Tensor? weight, Tensor? bias, {OPTIONAL_DRAW}, str kind, "
    "float offset) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda du, x, stats, weight, bias, sigma, *rest: (
        *(fake_like(t, x) for t in (x, weight, bias, sigma)),
    ),
)

# ---- what the modules call -----------------------------------------------------------------------


def _pieces(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, sigma: Tensor, seed: Tensor, *how: Any
) -> Tensor:
    draw, kind, eps, offset, dtype = how
    check_norm(x, weight, bias, draw, kind)
    wide = widened(x)
    centred = wide - wide.mean(-1, keepdim=True) if kind == "layer" else wide
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (weight.to(wide.dtype) + offset)
    if bias is not None:
        y = y + bias.to(wide.dtype)
    return projection(y, sigma, seed, draw, dtype or x.dtype)


def _run_bwd(du: Tensor, tensors: Any, kept: Any, how: Any, needs: Any) -> tuple[Any, ...]:
    (x, weight, bias, sigma, seed), (stats,), (draw, kind, _, offset, _) = tensors, kept, how
    sigma = sigma if needs[3] else None
    run = registry.kernel("norm_bwd", x.device.type)
    return *run(du, x, stats, weight, bias, sigma, seed, *draw, kind, offset), None


# noised_norm(x, weight, bias, sigma, seed, draw, kind, eps, offset, dtype): u of `norm`,
# differentiable in every world
noised_norm = fused("_Norm", norm, _run_bwd, _pieces, 5)
