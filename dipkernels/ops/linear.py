"""Layers: y = (x + sigma z) W^T + b, and the mean over samples of act(y).  docs/maths.md, sections
2 and 4."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, worlds
from ..worlds import is_dtensor
from . import registry, row_blocks, sizes
from .activations import act_of
from .draw import MAX_SAMPLES, Draw, check_projection
from .perturb import (
    DRAW,
    no_view,
    perturb,
    perturb_bwd,
    perturb_replay,
    projection,
)
from .pieces import fake_like, flat_rows, fused, linear_as

# ---- the operations: the mean over samples of act(affine), and its derivatives -------------------

# The draw of the first of num_samples samples, which follow one another; dim is the last.
_LAYER = f"Tensor weight, Tensor? bias, {DRAW}, int num_samples, str activation".replace(
    "int dim, ", ""
)
# The first sample's pre-activation, [..., N], made before: for `row_blocks` alone.
_FIRST = "Tensor? first=None"


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: Tensor,
    seed: Tensor,
    draw: Draw,
    num_samples: int,
    activation: str,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """y [..., N] of x [..., K], the mean over num_samples samples from the draw's on; activation
    "identity": none, of one. And what backward then need not make again, the pre-activation of the
    first of them, where products by blocks of rows run."""
    check_projection(x, sigma, seed, draw, out_dtype)
    if draw.sample + num_samples > MAX_SAMPLES:
        raise ValueError(
            f"sample: expected sample + num_samples <= {MAX_SAMPLES}, got {draw.sample} + "
            f"{num_samples}"
        )
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight: expected shape (N, K = {x.shape[-1]}), got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias: expected shape (N,) = ({weight.shape[0]},), got {tuple(bias.shape)}"
        )
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.device != x.device:
            raise ValueError(f"{name}: expected device {x.device}, as x, got {t.device}")
    run = registry.kernel("linear", device_of(x.device.type, x, weight))
    how = (*draw[1:], num_samples, activation, out_dtype)
    if activation == "identity" or run is not torch.ops.dipkernels.linear.default:
        return run(x, weight, bias, sigma, seed, *how), None
    first = no_view(F.linear(perturb(x, sigma, seed, draw, weight.dtype), weight, bias))
    return run(x, weight, bias, sigma, seed, *how, first), first


def device_of(device: str, x: Tensor, weight: Tensor) -> str:
    """x's device as `registry.kernel` wants it, from its type."""
    if device == "cuda" and weight.numel():
        m = x.numel() // weight.shape[1]
        return registry.WIDE if sizes.is_wide(weight.dtype, m, *weight.shape) else device
    return device


def _fake_linear_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    like = weight.new_empty(weight.shape[:1]) if bias is None else bias
    return tuple(fake_like(t, x) for t in (x, weight, like, sigma))


registry.define(
    "linear",
    f"(Tensor x, {_LAYER}, ScalarType? out_dtype, {_FIRST}) -> Tensor",
    # rest[10]: out_dtype
    lambda x, weight, *rest: x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=rest[10]),
    row_blocks.linear,
)
# (dx, dweight, dbias, dsigma); dbias [N] also without a bias.
registry.define(
    "linear_bwd",
    f"(Tensor dy, Tensor x, {_LAYER}, {_FIRST}) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_linear_bwd,
    row_blocks.linear_bwd,
)
# u_s = x + factor sigma z_s, or z_s without x and sigma, into u [samples, rows, K].
registry.define_pass(
    "draw_samples",
    "(Tensor(a!) u, Tensor? x, Tensor? sigma, Tensor seed, SymInt row0, SymInt col0, int sample, "
    "float factor) -> ()",
)
# total [A, B] += the sum over samples of act(h), h [samples, A, B]. Then out [A, B] = factor total,
# where it is wanted.
registry.define_pass(
    "act_add", "(Tensor(a!) total, Tensor h, str activation, Tensor(b!)? out, float factor) -> ()"
)
# Back: dh = dy act'(h) over h, total += its sum.
registry.define_pass(
    "act_add_bwd",
    "(Tensor(a!) total, Tensor(b!) h, Tensor dy, str activation, Tensor(c!)? out, float factor) -> "
    "()",
)

# ---- one draw ------------------------------------------------------------------------------------


def affine(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: Tensor,
    seed: Tensor,
    draw: Draw,
    keep: str,
    dtype: torch.dtype | None,
) -> Tensor:
    """(x + factor sigma z) W^T + b for arguments that were checked. dtype: of u and y, or None for
    x's."""
    if is_dtensor(x):
        if keep == "x":
            raise ValueError("keep: expected 'auto' or 'u' for a DTensor, got 'x'")
    elif worlds.tracing() and x.dim() > 2 and not worlds.wants_pieces():
        # as torch's own linear: Inductor makes four dimensions channels-last, for convolutions
        rows = affine(flat_rows(x), weight, bias, sigma, seed, draw, keep, dtype)
        return rows.view(*x.shape[:-1], weight.shape[0])
    elif keep != "u" and _fuses(x, weight, dtype):
        return mean(x, weight, bias, sigma, seed, draw, 1, "identity", dtype)
    elif keep != "u" and _replays(keep, x.dtype, weight.dtype, dtype):
        return _replay(x, weight, bias, sigma, seed, draw, dtype)
    return F.linear(projection(x, sigma, seed, draw, dtype), weight, bias)


def _fuses(x: Tensor, weight: Tensor, dtype: torch.dtype | None) -> bool:
    # the common case at once: no GPU, nothing to fuse
    if x.device.type == "cpu" and backends.forced is None:
        return False
    m = x.numel() // x.shape[-1] if x.dim() and x.shape[-1] else 0
    return weight.dim() == 2 and registry.fuses(x.device.type, dtype or x.dtype, m, *weight.shape)


def _replays(
    keep: str, x_dtype: torch.dtype, weight_dtype: torch.dtype, dtype: torch.dtype | None
) -> bool:
    """Whether backward makes u again out of x; dtype: u's, None for x's."""
    if dtype is None and weight_dtype is not x_dtype:  # as the plain layer, which refuses it
        return False
    if keep == "auto" and worlds.tracing():
        kept = backends.kept_when_compiled
        if kept == "bytes":
            return dtype is None or dtype.itemsize >= x_dtype.itemsize
        return kept == "x"
    return keep == "x"


def _run_replay_bwd(dy: Tensor, tensors: Any, kept: Any, how: Any, needs: Any) -> tuple[Any, ...]:
    (x, weight, _, sigma, seed), (draw, dtype) = tensors, how
    needs_dx, needs_dweight, needs_dbias, needs_dsigma, _ = needs
    du: Any = dy @ weight.to(dy.dtype) if needs_dx or needs_dsigma else None
    u = dsigma = None
    if needs_dweight and needs_dsigma:
        u, dsigma = perturb_replay(du, x, sigma, seed, draw, dtype)
    elif needs_dweight:
        u = perturb(x, sigma, seed, draw, dtype)
    elif needs_dsigma:
        dsigma = perturb_bwd(du, sigma, seed, draw)
    rows = flat_rows(dy)
    dweight = None if u is None else rows.t() @ flat_rows(u)
    return du, dweight, rows.sum(0) if needs_dbias else None, dsigma, None


# keep="x": backward makes u again, in the pass that sums dsigma. noise: sigma, seed, draw, dtype.
_replay = fused(
    "_LinearReplay",
    lambda x, weight, bias, *noise: no_view(linear_as(perturb(x, *noise), weight, bias)),
    _run_replay_bwd,
    lambda x, weight, bias, *noise: linear_as(projection(x, *noise), weight, bias),
    5,
)


# ---- the mean over samples behind an activation --------------------------------------------------


def mean(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: Tensor,
    seed: Tensor,
    draw: Draw,
    num_samples: int,
    activation: str,
    dtype: torch.dtype | None,
) -> Tensor:
    """The mean over num_samples samples from the draw's on of act(affine), in the memory of one,
    differentiable in every world."""
    check_weight(x, weight, dtype)
    # no Triton kernel multiplies in float64
    fused = x.device.type == "cpu" or x.dtype is not torch.float64
    fused = fused and not (worlds.exporting() or worlds.counting())
    arguments = (x, weight, bias, sigma, seed, draw, num_samples, activation, dtype or x.dtype)
    return (_fused if fused else _mean_pieces)(*arguments)


def check_weight(x: Tensor, weight: Tensor, dtype: torch.dtype | None) -> None:
    """Raise TypeError for a weight of another dtype than x's, outside autocast."""
    if dtype is None and weight.dtype is not x.dtype:
        raise TypeError(f"weight: expected dtype {x.dtype}, as x, got {weight.dtype}")


def _run(
    x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, seed: Tensor, *how: Any
) -> tuple[Tensor, Tensor | None]:
    y, first = linear(x, *_cast(how[-1], weight, bias), sigma, seed, *how)
    return no_view(y), first


def _run_bwd(dy: Tensor, tensors: Any, kept: Any, how: Any, needs: Any) -> tuple[Any, ...]:
    (x, weight, bias, sigma, seed), (draw, num_samples, activation, dtype) = tensors, how
    weight, bias = _cast(dtype, weight, bias)
    run: Any = registry.kernel("linear_bwd", device_of(x.device.type, x, weight))
    how = (*draw[1:], num_samples, activation)
    if run is not torch.ops.dipkernels.linear_bwd.default:
        kept = ()
    elif kept[0] is not None and worlds.frees_what_was_saved(dy, x, weight):
        run = partial(row_blocks.linear_bwd, over_first=True)
    return *run(dy, x, weight, bias, sigma, seed, *how, *kept), None


def _cast(dtype: torch.dtype, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def _mean_pieces(
    x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, seed: Tensor, *how: Any
) -> Tensor:
    """Its memory grows with the samples."""
    draw, num_samples, activation, dtype = how
    weight, bias = _cast(dtype, weight, bias)
    total: Any = 0
    for s in range(draw.sample, draw.sample + num_samples):
        u = projection(x, sigma, seed, draw._replace(sample=s), dtype)
        total = total + act_of(activation)(F.linear(u, weight, bias))
    return total / num_samples


_fused = fused("_Mean", _run, _run_bwd, _mean_pieces, 5)
