"""P, u = x + factor * sigma * z, and Q, dsigma = factor * sum over rows of du * z.  docs/maths.md,
section 1.

The operations, and `projection`, the differentiable function made of them: P and Q are each other's
derivative, so that every order of differentiation is made of the same two passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import worlds
from ..worlds import is_dtensor
from . import dtensor, registry
from .draw import Draw, check_projection, check_seed
from .pieces import Grads, fake_like, without_wrapper

# ---- the operations ------------------------------------------------------------------------------

_PLACE = "int dim, SymInt row0, SymInt col0, int sample"
# a sigma, its seed and the fields of Draw
DRAW = f"Tensor sigma, Tensor seed, {_PLACE}, float factor, bool log_variance"
# of a backward pass that may do without dsigma
OPTIONAL_DRAW = DRAW.replace("Tensor sigma", "Tensor? sigma", 1)


def noise(seed: Tensor, shape: Sequence[int], draw: Draw) -> Tensor:
    """z of this shape, float32, unscaled."""
    check_seed(seed, seed.device)
    draw.check(len(shape))
    return registry.kernel("noise", seed.device.type)(seed, shape, *draw[:4])


def perturb(
    x: Tensor, sigma: Tensor, seed: Tensor, draw: Draw, out_dtype: torch.dtype | None
) -> Tensor:
    """P: u, of x's shape and out_dtype, x's where that is None."""
    if is_dtensor(x):
        return dtensor.perturb(x, sigma, seed, draw, out_dtype)
    check_projection(x, sigma, seed, draw, out_dtype)
    return registry.kernel("perturb", x.device.type)(x, sigma, seed, *draw, out_dtype)


def perturb_bwd(du: Tensor, sigma: Tensor, seed: Tensor, draw: Draw) -> Tensor:
    """Q: dsigma [K], of sigma's dtype. Unchecked: backward repeats what forward was given."""
    if is_dtensor(du):
        return dtensor.perturb_bwd(du, sigma, seed, draw)
    return registry.kernel("perturb_bwd", du.device.type)(du, sigma, seed, *draw)


def perturb_replay(
    du: Tensor, x: Tensor, sigma: Tensor, seed: Tensor, draw: Draw, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """(u, dsigma) of one draw, made once. Unchecked, as `perturb_bwd`."""
    return registry.kernel("perturb_replay", x.device.type)(du, x, sigma, seed, *draw, out_dtype)


registry.define(
    "noise",
    f"(Tensor seed, SymInt[] shape, {_PLACE}) -> Tensor",
    lambda seed, shape, *place: seed.new_empty(shape, dtype=torch.float32),
)
registry.define(
    "perturb",
    f"(Tensor x, {DRAW}, ScalarType? out_dtype) -> Tensor",
    lambda x, *rest: torch.empty_like(x, dtype=rest[-1]),
)
registry.define(
    "perturb_bwd",
    f"(Tensor du, {DRAW}) -> Tensor",
    lambda du, sigma, *rest: fake_like(sigma, du),
)
registry.define(
    "perturb_replay",
    f"(Tensor du, Tensor x, {DRAW}, ScalarType? out_dtype) -> (Tensor, Tensor)",
    lambda du, x, sigma, *rest: (torch.empty_like(x, dtype=rest[-1]), fake_like(sigma, du)),
)

# ---- their derivatives ---------------------------------------------------------------------------


class _Perturb(Function):
    """P: u = x + factor * sigma * z."""

    @staticmethod
    def forward(
        x: Tensor, sigma: Tensor, seed: Tensor, draw: Draw, dtype: torch.dtype | None
    ) -> Tensor:
        return perturb(x, sigma, seed, draw, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, sigma, seed, ctx.draw, _ = inputs
        ctx.save_for_backward(sigma, seed)

    @staticmethod
    def backward(ctx: Any, du: Tensor) -> Grads:
        sigma, seed = ctx.saved_tensors
        dsigma = None
        if ctx.needs_input_grad[1] and not torch.is_grad_enabled():
            dsigma = perturb_bwd(du, sigma, seed, ctx.draw)
        elif ctx.needs_input_grad[1]:  # create_graph: the same value from differentiable pieces
            dsigma = _noise_sum(du, sigma, seed, ctx.draw.of_sigma())
            if ctx.draw.log_variance:
                dsigma = dsigma * torch.exp(sigma / 2) / 2
        return du, dsigma, None, None, None  # autograd casts to x's type


_apply_perturb = without_wrapper(_Perturb)


class _NoiseSum(Function):
    """Q: factor * sum over rows of g * z, of sigma's dtype. `sigma` gives that dtype; it has no
    gradient."""

    @staticmethod
    def forward(g: Tensor, sigma: Tensor, seed: Tensor, draw: Draw) -> Tensor:
        return perturb_bwd(g, sigma, seed, draw)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        g, sigma, seed, ctx.draw = inputs
        ctx.save_for_backward(sigma, seed)
        ctx.g_shape, ctx.g_dtype = g.shape, g.dtype
        ctx.g_mesh = (g.device_mesh,) if is_dtensor(g) else None

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> Grads:
        _, seed = ctx.saved_tensors
        zeros = dtensor.new_zeros(h, ctx.g_shape, ctx.g_dtype, ctx.g_mesh)
        if torch.is_grad_enabled() and worlds.batched(h):
            return _in_pieces(zeros, h, seed, ctx.draw, None), None, None, None
        perturbed = _PerturbFunc if worlds.transforming() else _Perturb
        return perturbed.apply(zeros, h, seed, ctx.draw, None), None, None, None


def _noise_sum(g: Tensor, sigma: Tensor, seed: Tensor, draw: Draw) -> Tensor:
    """Q, differentiable in g in every world."""
    if worlds.batched(g):
        rows = [d for d in range(g.dim()) if d != draw.dim % g.dim()]
        wide = g.to(torch.promote_types(g.dtype, torch.float32))
        terms = draw.factor * wide * noise(seed, g.shape, draw)
        # a sum over no dimension is one over all of them
        return (terms.sum(rows) if rows else terms).to(sigma.dtype)
    noise_sum = _NoiseSumFunc if worlds.transforming() else _NoiseSum
    return noise_sum.apply(g, sigma, seed, draw)


# ---- the same two for torch.func -----------------------------------------------------------------
# A jvp or a vmap rule on the classes above would break torch.compile.


def _sliced(
    kind: type[Function], info: Any, in_dims: Sequence[int | None], args: Sequence[Any]
) -> tuple[Tensor, int]:
    """kind on each slice of the batch; what is unbatched is repeated, so that it keeps its seed and
    so its noise."""
    calls = [
        [arg.select(d, i) if isinstance(d, int) else arg for arg, d in zip(args, in_dims)]
        for i in range(info.batch_size)
    ]
    return torch.stack([kind.apply(*each) for each in calls]), 0


class _PerturbFunc(_Perturb):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _Perturb.setup_context(ctx, inputs, output)
        x, sigma, seed, _, ctx.dtype = inputs
        ctx.save_for_forward(sigma, seed)
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dsigma: Tensor | None, *_: Any) -> Any:
        sigma, seed = ctx.saved_tensors
        if dsigma is None:
            assert dx is not None  # one of the two is
            return dx.to(ctx.dtype or ctx.x_dtype)
        if ctx.draw.log_variance:
            dsigma = dsigma * torch.exp(sigma / 2) / 2
        if dx is None:
            dx = dsigma.new_zeros(ctx.x_shape, dtype=ctx.x_dtype)
        return _PerturbFunc.apply(dx, dsigma, seed, ctx.draw.of_sigma(), ctx.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return _sliced(_PerturbFunc, info, in_dims, args)


class _NoiseSumFunc(_NoiseSum):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _NoiseSum.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[1:3])

    @staticmethod
    def jvp(ctx: Any, dg: Tensor, *_: Any) -> Any:
        sigma, seed = ctx.saved_tensors
        return _NoiseSumFunc.apply(dg, sigma, seed, ctx.draw)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return _sliced(_NoiseSumFunc, info, in_dims, args)


# ---- what the layers call ------------------------------------------------------------------------


def projection(
    x: Tensor, sigma: Tensor, seed: Tensor, draw: Draw, dtype: torch.dtype | None
) -> Tensor:
    """u = x + factor * sigma * z, of `dtype`, x's where that is None, differentiable in x and sigma
    in every world."""
    if is_dtensor(x) or is_dtensor(sigma):
        x, seed = dtensor.prepare(x, sigma, seed, draw)
    elif (worlds.tracing() or worlds.exporting()) and worlds.wants_pieces():
        return _in_pieces(x, sigma, seed, draw, dtype)
    if worlds.transforming():
        return _PerturbFunc.apply(x, sigma, seed, draw, dtype)
    if worlds.tracing():
        return _Perturb.apply(x, sigma, seed, draw, dtype)
    return _apply_perturb(x, sigma, seed, draw, dtype)


def _in_pieces(
    x: Tensor, sigma: Tensor, seed: Tensor, draw: Draw, dtype: torch.dtype | None
) -> Tensor:
    # torch.export loses the derivative of an autograd.Function, in silence, and torch.compile of a
    # transform takes none with a jvp: P of operations that have their own.
    wide = torch.promote_types(x.dtype, torch.float32)
    s = (torch.exp(sigma.to(wide) / 2) if draw.log_variance else sigma.to(wide)) * draw.factor
    s = s.view([-1 if d == draw.dim % x.ndim else 1 for d in range(x.ndim)])
    return (x.to(wide) + s * noise(seed, x.shape, draw).to(wide)).to(dtype or x.dtype)


def without_noise(x: Tensor, sigma: Tensor) -> Tensor:
    """x itself, with a gradient of zeros for sigma, whose absence DDP takes for a fault at the next
    step."""
    if not (torch.is_grad_enabled() and sigma.requires_grad) or worlds.wants_pieces():
        return x
    return _Unused.apply(x, sigma)


class _Unused(Function):
    """x itself; sigma gets a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sigma: Tensor) -> Tensor:
        ctx.save_for_backward(sigma)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, du: Tensor) -> Grads:
        return du, torch.zeros_like(ctx.saved_tensors[0])


def no_view(y: Tensor) -> Tensor:
    """y, which a Function made, as no view: what follows may then work in place
    (nn.ReLU(inplace=True))."""
    if not (worlds.tracing() or y._is_view()):
        return y
    return torch.ops.aten._unsafe_view.default(y, y.shape)
