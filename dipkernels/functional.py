"""What the layers call: noise, perturb and dip_linear as differentiable functions of tensors.  docs/maths.md.

`_Perturb` and `_NoiseSum` are each other's derivative, so that every order of differentiation is made of the same two passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from . import backends, expectation, ops, tensor_parallel, worlds
from .row_blocks import ACTIVATIONS as ACTIVATIONS
from .row_blocks import act_of, flat_rows, linear_as, slopes_form
from .worlds import is_dtensor

# ---- P and Q: one pass each, and each other's adjoint.  docs/maths.md, section 1 -------------------------------------

# (dim, row0, col0, sample, num_samples, factor, log_variance), as in ops
Where = tuple[int, int, int, int, int, float, bool]
Grads = tuple[Tensor | None, ...]


def _on(x: Tensor) -> Any:
    """Where the kernels of x are: ops, or for a DTensor the functions of the same name that call it on the shard."""
    return tensor_parallel if is_dtensor(x) else ops


def _perturb_backward(
    du: Tensor, x_dtype: torch.dtype, sigma: Tensor, seed: Tensor, where: Where, needs_dx: bool, needs_dsigma: bool,
    noise_sum: type[Function],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    dx = None
    if needs_dx:
        dx = du if du.dtype is x_dtype else du.to(x_dtype)
    if not needs_dsigma:
        return dx, None
    if not torch.is_grad_enabled():
        return dx, _on(du).perturb_bwd(du, sigma, seed, *where)
    # Under create_graph: the same value from differentiable pieces.
    *place, log_variance = where
    dsigma: Tensor = noise_sum.apply(du, sigma, seed, (*place, False))
    return dx, dsigma * torch.exp(sigma / 2) / 2 if log_variance else dsigma


class _Perturb(Function):
    """P: u = x + factor * sigma * z."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sigma: Tensor, seed: Tensor, where: Where, out_dtype: torch.dtype | None
    ) -> Tensor:
        ctx.save_for_backward(sigma, seed)
        ctx.where, ctx.x_dtype = where, x.dtype
        u: Tensor = _on(x).perturb(x, sigma, seed, *where, out_dtype)
        return u

    @staticmethod
    def backward(ctx: Any, du: Tensor) -> Grads:
        sigma, seed = ctx.saved_tensors
        needs_dx, needs_dsigma, *_ = ctx.needs_input_grad
        dx, dsigma = _perturb_backward(du, ctx.x_dtype, sigma, seed, ctx.where, needs_dx, needs_dsigma, _NoiseSum)
        return dx, dsigma, None, None, None


# What Function.apply comes to where no transform of torch.func is active: microseconds that a small layer feels.
_apply_perturb: Callable[..., Tensor] = super(Function, _Perturb).apply


class _NoiseSum(Function):
    """Q: factor * sum over rows of g * z, of sigma's dtype. `sigma` gives that dtype; it has no gradient."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, sigma: Tensor, seed: Tensor, where: Where) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.where, ctx.g_shape, ctx.g_dtype = where, g.shape, g.dtype
        ctx.g_mesh = (g.device_mesh,) if is_dtensor(g) else None
        dsigma: Tensor = _on(g).perturb_bwd(g, sigma, seed, *where)
        return dsigma

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> Grads:
        (seed,) = ctx.saved_tensors
        zeros = tensor_parallel.new_zeros(h, ctx.g_shape, ctx.g_dtype, ctx.g_mesh)
        return _Perturb.apply(zeros, h, seed, ctx.where, None), None, None, None


# ---- the same two for torch.func: a jvp or a vmap rule on the classes above would break torch.compile ---------------


def _slices(info: Any, in_dims: Sequence[int | None], tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The batch's slices of each tensor; an unbatched one is repeated, so that it keeps its seed and so its noise."""
    for i in range(info.batch_size):
        yield [t if d is None else t.select(d, i) for t, d in zip(tensors, in_dims, strict=True)]


class _PerturbFunc(Function):
    @staticmethod
    def forward(x: Tensor, sigma: Tensor, seed: Tensor, where: Where, out_dtype: torch.dtype | None) -> Tensor:
        return ops.perturb(x, sigma, seed, *where, out_dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, sigma, seed, ctx.where, ctx.out_dtype = inputs
        ctx.save_for_backward(sigma, seed)
        ctx.save_for_forward(sigma, seed)
        ctx.x_dtype, ctx.x_shape = x.dtype, x.shape

    @staticmethod
    def backward(ctx: Any, du: Tensor) -> Grads:
        sigma, seed = ctx.saved_tensors
        needs_dx, needs_dsigma, *_ = ctx.needs_input_grad
        grads = _perturb_backward(du, ctx.x_dtype, sigma, seed, ctx.where, needs_dx, needs_dsigma, _NoiseSumFunc)
        return *grads, None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dsigma: Tensor | None, *_: Any) -> Any:
        sigma, seed = ctx.saved_tensors
        *place, log_variance = ctx.where
        if dsigma is None:
            assert dx is not None  # one of the two is
            return dx.to(ctx.out_dtype or ctx.x_dtype)
        if log_variance:
            dsigma = dsigma * torch.exp(sigma / 2) / 2
        if dx is None:
            dx = dsigma.new_zeros(ctx.x_shape, dtype=ctx.x_dtype)
        return _PerturbFunc.apply(dx, dsigma, seed, (*place, False), ctx.out_dtype)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, sigma: Tensor, seed: Tensor, where: Where,
        out_dtype: torch.dtype | None,
    ) -> tuple[Tensor, int]:  # fmt: skip
        calls = _slices(info, in_dims[:3], (x, sigma, seed))
        return torch.stack([_PerturbFunc.apply(*tensors, where, out_dtype) for tensors in calls]), 0


class _NoiseSumFunc(Function):
    @staticmethod
    def forward(g: Tensor, sigma: Tensor, seed: Tensor, where: Where) -> Tensor:
        return ops.perturb_bwd(g, sigma, seed, *where)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        g, sigma, seed, ctx.where = inputs
        ctx.save_for_backward(sigma, seed)
        ctx.save_for_forward(sigma, seed)
        ctx.g_shape, ctx.g_dtype = g.shape, g.dtype

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> Grads:
        _, seed = ctx.saved_tensors
        zeros = h.new_zeros(ctx.g_shape, dtype=ctx.g_dtype)
        return _PerturbFunc.apply(zeros, h, seed, ctx.where, None), None, None, None

    @staticmethod
    def jvp(ctx: Any, dg: Tensor, *_: Any) -> Any:
        sigma, seed = ctx.saved_tensors
        return _NoiseSumFunc.apply(dg, sigma, seed, ctx.where)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], g: Tensor, sigma: Tensor, seed: Tensor, where: Where
    ) -> tuple[Tensor, int]:
        calls = _slices(info, in_dims[:3], (g, sigma, seed))
        return torch.stack([_NoiseSumFunc.apply(*tensors, where) for tensors in calls]), 0


def _no_view(y: Tensor) -> Tensor:
    """y, which a Function made, as no view: what follows may then work in place (nn.ReLU(inplace=True))."""
    if not (worlds.tracing() or y._is_view()):
        return y
    same: Tensor = torch.ops.aten._unsafe_view.default(y, y.shape)
    return same


# ---- keep="x": backward makes u again instead of keeping it.  docs/maths.md, section 2 -------------------------------


def _replays(keep: str) -> bool:
    """Whether backward makes u again in this world."""
    if worlds.exporting() or worlds.transforming():  # a transform keeps what it likes
        return False
    if keep == "auto" and worlds.tracing():
        return backends._compiled_keep == "x"
    return keep == "x"


class _LinearReplay(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, seed: Tensor, where: Where,
        out_dtype: torch.dtype | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, sigma, seed)
        ctx.where, ctx.out_dtype = where, out_dtype or x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        u = ops.perturb(x, sigma, seed, *where, out_dtype)
        return _no_view(linear_as(u, weight, bias))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Grads:
        x, weight, sigma, seed = ctx.saved_tensors
        where: Where = ctx.where
        needs_dx, needs_dweight, needs_dbias, needs_dsigma = ctx.needs_input_grad[:4]
        dx: Any
        dsigma: Any
        u: Any
        du: Any = dy @ weight.to(dy.dtype) if needs_dx or needs_dsigma else None
        if torch.is_grad_enabled():  # under create_graph: differentiable pieces
            dx, dsigma = (
                (None, None)
                if du is None
                else _perturb_backward(du, x.dtype, sigma, seed, where, needs_dx, needs_dsigma, _NoiseSum)
            )
            u = _Perturb.apply(x, sigma, seed, where, ctx.out_dtype) if needs_dweight else None
        else:
            dx = du.to(x.dtype) if needs_dx else None
            u = dsigma = None
            if needs_dweight and needs_dsigma:
                u, dsigma = ops.perturb_replay(du, x, sigma, seed, *where, ctx.out_dtype)
            elif needs_dweight:
                u = ops.perturb(x, sigma, seed, *where, ctx.out_dtype)
            elif needs_dsigma:
                dsigma = ops.perturb_bwd(du, sigma, seed, *where)
        rows = flat_rows(dy)
        dweight = (rows.t() @ flat_rows(u)).to(weight.dtype) if needs_dweight else None
        dbias = rows.sum(0).to(ctx.bias_dtype) if needs_dbias else None
        return dx, dweight, dbias, dsigma, None, None, None


# ---- the mean over samples behind an activation: docs/maths.md, section 4 ----------------------------------------------

# (row0, col0, sample, num_samples, factor, log_variance), as in ops.linear
Place = tuple[int, int, int, int, float, bool]


class _Mean(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, seed: Tensor, where: Place, activation: str,
        dtype: torch.dtype, num_kept: int,
    ) -> Tensor:  # fmt: skip
        ctx.where, ctx.activation, ctx.dtype = where, activation, dtype
        last = (num_kept, dtype) if num_kept else (dtype,)
        arguments: Any = (x, *_cast(dtype, weight, bias), sigma, seed, *where, activation, *last)
        y, kept = ops.linear_keep(*arguments) if num_kept else (ops.linear(*arguments), None)
        ctx.save_for_backward(x, weight, bias, sigma, seed, kept)
        return _no_view(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Grads:
        *tensors, kept = ctx.saved_tensors
        x, weight, bias, sigma, seed = tensors
        needs = ctx.needs_input_grad[:4]
        nothing = (None,) * 5
        if torch.is_grad_enabled():  # under create_graph: differentiable pieces, whose memory grows with the samples
            y = _mean_pieces(x, weight, bias, sigma, seed, ctx.where, ctx.activation, ctx.dtype)
            return *expectation.gradients(y, tensors, dy, needs), *nothing
        arguments: Any = (dy, x, *_cast(ctx.dtype, weight, bias), sigma, seed, *ctx.where, ctx.activation)
        if kept is not None:
            arguments = (*arguments, kept)
        grads: Any = ops.linear_bwd(*arguments) if kept is None else ops.linear_keep_bwd(*arguments)
        grads = (grad.to(t.dtype) if need else None for grad, t, need in zip(grads, tensors, needs))
        return *grads, *nothing


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> Iterator[Any]:
    return (None if t is None else t.to(dtype) for t in tensors)


def _mean_pieces(
    x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, seed: Tensor, where: Place, activation: str, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    row0, col0, sample, num_samples, factor, log_variance = where
    weight, bias = _cast(dtype, weight, bias)
    y: Any = 0
    for s in range(sample, sample + num_samples):
        u = _perturb(x, sigma, seed, (-1, row0, col0, s, 1, factor, log_variance), dtype)
        y = y + act_of(activation)(F.linear(u, weight, bias))
    mean: Tensor = y / num_samples
    return mean


def _mean(
    x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, seed: Tensor, where: Place, activation: str,
    dtype: torch.dtype | None, keep: str,
) -> Tensor:  # fmt: skip
    _check_weight(x, weight, dtype)
    fused = x.device.type == "cpu" or x.dtype is not torch.float64  # no Triton kernel multiplies in float64
    arguments: Any = (x, weight, bias, sigma, seed, where, activation, dtype or x.dtype)
    if not fused or is_dtensor(x) or worlds.exporting() or worlds.transforming():
        return _mean_pieces(*arguments)
    differentiates = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments[:4])
    can_keep = ops.can_keep(x.device.type)
    if keep == "u" and not can_keep:
        raise ValueError(f"keep: expected 'auto' or 'x' with estimator='mean' on {x.device.type}, got 'u'")
    num_kept = _num_kept(keep, activation, where[3], dtype or x.dtype) if differentiates and can_keep else 0
    y: Tensor = _Mean.apply(*arguments, num_kept)
    return y


def _num_kept(keep: str, activation: str, num_samples: int, dtype: torch.dtype) -> int:
    """Samples of which backward finds act' at hand; "auto": those that fit into one output, as one draw would keep."""
    if keep == "auto":
        if activation == "relu":  # a bit of each sample, of all or none
            return num_samples if num_samples <= 8 * dtype.itemsize else 0
        _, kept = slopes_form(activation, dtype, num_samples, 1)
        return min(num_samples, dtype.itemsize // kept.itemsize)
    return num_samples if keep == "u" else 0


class _Unused(Function):
    """x itself; sigma gets a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sigma: Tensor) -> Tensor:
        ctx.save_for_backward(sigma)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, du: Tensor) -> Grads:
        return du, torch.zeros_like(ctx.saved_tensors[0])


ESTIMATORS = ("sample", "mean", "analytic")

# ---- public --------------------------------------------------------------------------------------------------------


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The type that a matrix product on x would be given by autocast, or None where autocast leaves x alone."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(device)
    return None


def without_noise(x: Tensor, sigma: Tensor) -> Tensor:
    """x itself, with a gradient of zeros for sigma, whose absence DDP takes for a fault at the next step."""
    if not (torch.is_grad_enabled() and sigma.requires_grad) or worlds.wants_pieces():
        return x
    same: Tensor = _Unused.apply(x, sigma)
    return same


def _check_sigma(sigma: Tensor) -> None:
    # Reading values would stop a GPU and a tracer; there a negative or NaN sigma is the caller's own.
    # Of a DTensor a rank alone cannot say it for all.
    if sigma.device.type != "cpu" or not worlds.has_values(sigma):
        return
    if not bool((sigma >= 0).all()):
        raise ValueError(f"sigma: expected values >= 0, got a negative or NaN one: {sigma.detach()}")


def _where(
    sigma: Tensor, dim: int, row0: int, col0: int, sample: int, num_samples: int, collapsed: bool, log_variance: bool
) -> Where:
    if not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"num_samples: expected an integer >= 1, got {num_samples!r}")
    if not log_variance:
        _check_sigma(sigma)
    if collapsed:
        return dim, row0, col0, sample, 1, num_samples**-0.5, log_variance
    return dim, row0, col0, sample, num_samples, 1.0, log_variance


def _perturb_exported(x: Tensor, sigma: Tensor, seed: Tensor, where: Where, dtype: torch.dtype | None) -> Tensor:
    # torch.export loses the derivative of an autograd.Function, in silence: P of operations that have their own.
    *place, factor, log_variance = where
    wide = torch.promote_types(x.dtype, torch.float32)
    s = (torch.exp(sigma.to(wide) / 2) if log_variance else sigma.to(wide)) * factor
    z = ops.noise(seed, x.shape, *place).to(wide)
    return (x.to(wide) + s.view([-1 if d == place[0] % x.ndim else 1 for d in range(x.ndim)]) * z).to(dtype or x.dtype)


def _perturb(x: Tensor, sigma: Tensor, seed: Tensor, where: Where, dtype: torch.dtype | None) -> Tensor:
    u: Tensor
    if is_dtensor(x) or is_dtensor(sigma):
        x, seed = tensor_parallel.prepare(x, sigma, seed, where[0])
    elif worlds.exporting() and torch.is_grad_enabled():
        return _perturb_exported(x, sigma, seed, where, dtype)
    if worlds.transforming():
        u = _PerturbFunc.apply(x, sigma, seed, where, dtype)
        return u
    if worlds.tracing():
        u = _Perturb.apply(x, sigma, seed, where, dtype)
        return u
    return _apply_perturb(x, sigma, seed, where, dtype)


def noise(
    shape: tuple[int, ...],
    seed: Tensor,
    *,
    dim: int = -1,
    row0: int = 0,
    col0: int = 0,
    sample: int = 0,
    num_samples: int = 1,
) -> Tensor:
    """The standard normal draw z of the noise contract (docs/maths.md, section 3); its mean over samples where num_samples > 1.

    shape: of the result, any number of dimensions >= 1. seed: int64 [2] = (key, stream). dim: the feature dimension.
    row0, col0: origin, at most 2^62, so that noise(window) is the window of the noise: row = row0 + the flattened index over the other
    dimensions, column = col0 + the index along dim. sample: first sample, sample + num_samples <= 65536.
    Returns float32 on seed's device. Raises ValueError or TypeError for arguments outside these.
    """
    return ops.noise(seed, tuple(shape), dim, row0, col0, sample, num_samples)


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
    collapsed: bool = True,
    log_variance: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """u = x + sigma * z, differentiable in x and sigma to any order.

    x: any shape, float32, float64, float16 or bfloat16; K = x.shape[dim] features; a DTensor gets the noise of the whole
    tensor, each rank that of its shard (seed must be one on all ranks; cut along an inner dimension: a call per entry).
    sigma: [K], float32 or float64, a standard deviation >= 0 (checked on a CPU in eager mode), or with log_variance=True
    ln(sigma^2), any value. seed: int64 [2] = (key,
    stream), on x's device. row0, col0, sample: as in `noise`. num_samples = S averages S draws: collapsed, one draw with
    sigma / sqrt(S), which has the same law; otherwise the mean of samples sample .. sample + S - 1. dtype: of u, x's by default.
    Computed in float32 (float64 for float64 x), rounded once. Returns u, of x's shape, and of its strides where x is dense.
    Raises ValueError or TypeError naming the argument. Source: DIPNet, arXiv 2506.04690, the projection u ~ N(v, diag(sigma^2)).
    """
    return _perturb(x, sigma, seed, _where(sigma, dim, row0, col0, sample, num_samples, collapsed, log_variance), dtype)


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
    collapsed: bool = True,
    log_variance: bool = False,
    keep: str = "auto",
    activation: str | None = None,
    estimator: str = "sample",
) -> Tensor:
    """y = act((x + sigma * z) W^T + b) or its mean over z, differentiable in x, weight, bias and sigma to any order.

    x: [..., K]. weight: [N, K]. bias: [N] or None. sigma, seed, row0, col0, sample, num_samples, collapsed, log_variance: as in
    `perturb`. keep: what backward keeps of the input: "u" (as nn.Linear keeps its input), "x" (u is made again in backward, in
    the pass that sums dsigma: for layers that share an input), or "auto": "u", and under torch.compile what
    `backends.compiled_keep` says, "x" by default. Under autocast u is rounded once, straight to the autocast type.
    activation: None, "relu", "gelu", "gelu_tanh", "silu" or "tanh". estimator: where the mean over z is taken.
      "sample"    act of one draw; num_samples draws are averaged before the activation.
      "mean"      mean over s of act(h_s), samples sample .. sample + num_samples - 1 drawn one after another: the time of S layers
                  in the memory of one. Backward draws again; keep says whether it multiplies again as well: "x" yes; "u" no, on
                  a CPU, for act'(h_s) kept beside x: S numbers per output, in bfloat16 S bytes, for relu S bits; "auto": on a
                  CPU not for the samples whose act' (relu: of all or none) takes no more than one output. Without an
                  activation as "sample".
      "analytic"  E[act(h)], S = infinity, in closed form: h is normal with mean x W^T + b and variance sum_k sigma_k^2 W_nk^2.
                  Nothing is drawn, seed and its origin are not used; num_samples must be 1. Error: docs/maths.md, section 7.
    Returns y [..., N]. Raises ValueError or TypeError naming the argument. Source: arXiv 2506.04690.
    """
    if keep not in ("auto", "u", "x"):
        raise ValueError(f"keep: expected 'auto', 'u' or 'x', got {keep!r}")
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected None or one of {tuple(ACTIVATIONS)}, got {activation!r}")
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: expected one of {ESTIMATORS}, got {estimator!r}")
    dtype = autocast_dtype(x)
    where = _where(sigma, -1, row0, col0, sample, num_samples, collapsed, log_variance)
    if estimator != "sample":
        if keep == "u" and estimator == "analytic":
            raise ValueError(f"keep: expected 'auto' or 'x' with estimator={estimator!r}, got 'u'")
        if is_dtensor(x) or is_dtensor(weight):
            raise ValueError(f"estimator: expected 'sample' for a DTensor, got {estimator!r}")
    if estimator == "analytic":
        if num_samples != 1:
            raise ValueError(f"num_samples: expected 1 with estimator='analytic', got {num_samples}")
        return _analytic(x, weight, bias, sigma, log_variance, activation, dtype)
    if estimator == "mean" and activation is not None and num_samples > 1:
        real = (row0, col0, sample, num_samples, 1.0, log_variance)
        return _mean(x, weight, bias, sigma, seed, real, activation, dtype, keep)
    y = affine(x, weight, bias, sigma, seed, where, keep, dtype)
    return y if activation is None else ACTIVATIONS[activation](y)


def _check_weight(x: Tensor, weight: Tensor, dtype: torch.dtype | None) -> None:
    if dtype is None and weight.dtype is not x.dtype:
        raise TypeError(f"weight: expected dtype {x.dtype}, as x, got {weight.dtype}")


def _fuses(x: Tensor, weight: Tensor, dtype: torch.dtype | None) -> bool:
    if x.device.type == "cpu" and backends._forced is None:  # the common case at once: no GPU, nothing to fuse
        return False
    m = x.numel() // x.shape[-1] if x.dim() and x.shape[-1] else 0
    return weight.dim() == 2 and ops.fuses(x.device.type, dtype or x.dtype, m, *weight.shape)


def affine(
    x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, seed: Tensor, where: Where, keep: str,
    dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """dip_linear before its activation, for arguments that were checked. dtype: of u and y, or None for x's."""
    if is_dtensor(x):
        if keep == "x":
            raise ValueError("keep: expected 'auto' or 'u' for a DTensor, got 'x'")
    elif keep != "u" and _fuses(x, weight, dtype):
        _, row0, col0, sample, num_samples, factor, log_variance = where
        place = (row0, col0, sample, num_samples, factor, log_variance)
        return _mean(x, weight, bias, sigma, seed, place, "identity", dtype, "x")
    elif keep != "u" and _replays(keep):
        y: Tensor = _LinearReplay.apply(x, weight, bias, sigma, seed, where, dtype)
        return y
    return F.linear(_perturb(x, sigma, seed, where, dtype), weight, bias)


def _analytic(
    x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, log_variance: bool, activation: str | None,
    dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    if sigma.shape != x.shape[-1:]:
        raise ValueError(f"sigma: expected shape (K,) = {tuple(x.shape[-1:])}, got {tuple(sigma.shape)}")
    if activation is None:
        return F.linear(without_noise(x, sigma), weight, bias)
    _check_weight(x, weight, dtype)
    return expectation.linear(x.to(dtype or x.dtype), weight, bias, sigma, log_variance, activation)


def activation(mu: Tensor, v: Tensor, activation: str) -> Tensor:
    """y = E[act(mu + sqrt(v) z)], z ~ N(0, 1): an activation behind normal noise, differentiable in mu and v to any order.

    mu: [..., N], float32, float64, float16 or bfloat16. v: [N], float32 or float64, a variance >= 0; where it is 0, y is act(mu).
    activation: "relu", "gelu", "gelu_tanh", "silu" or "tanh". relu and gelu are exact; the others are within the bounds of
    docs/maths.md, section 7, whatever mu and v. Returns y in mu's shape and dtype. Raises ValueError or TypeError naming the argument.
    """
    return expectation.activation(mu, v, activation)


for _name in ("noise", "perturb", "dip_linear", "activation"):
    torch.fx.wrap(_name)  # one call in a graph that torch.fx traces
