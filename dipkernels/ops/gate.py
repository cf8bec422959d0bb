"""u = act(x) + factor * sigma * z, and u = act(a) * b + factor * sigma * z, in one pass forward and
one back.  docs/maths.md, section 10.

Backward keeps what act, or the gated product, keeps: x, or a and b; never u nor z.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import worlds
from ..worlds import is_dtensor
from . import registry
from .activations import ACTIVATIONS
from .draw import Draw, check_out_dtype, check_projection
from .perturb import DRAW, OPTIONAL_DRAW, Grads, projection
from .pieces import fake_gradient, gradients, widened

# ---- the operations ------------------------------------------------------------------------------


def activate(
    x: Tensor, sigma: Tensor, seed: Tensor, draw: Draw, activation: str, dtype: torch.dtype | None
) -> Tensor:
    """u, of x's shape and of dtype, x's where that is None."""
    _check(x, sigma, seed, draw, activation, dtype)
    u: Tensor = registry.kernel("activate", x.device.type)(x, sigma, seed, *draw, activation, dtype)
    return u


def activate_bwd(
    du: Tensor, x: Tensor, sigma: Tensor | None, seed: Tensor, draw: Draw, activation: str
) -> tuple[Tensor, Tensor]:
    """(dx, dsigma), the latter empty without a sigma: then nothing is drawn."""
    run = registry.kernel("activate_bwd", x.device.type)
    grads: tuple[Tensor, Tensor] = run(du, x, sigma, seed, *draw, activation)
    return grads


def gate(
    a: Tensor,
    b: Tensor,
    sigma: Tensor,
    seed: Tensor,
    draw: Draw,
    activation: str,
    dtype: torch.dtype | None,
) -> Tensor:
    """u, of a's shape and of dtype, a's where that is None."""
    _check(a, sigma, seed, draw, activation, dtype)
    _check_gate(a, b)
    u: Tensor = registry.kernel("gate", a.device.type)(a, b, sigma, seed, *draw, activation, dtype)
    return u


def gate_bwd(
    du: Tensor,
    a: Tensor,
    b: Tensor,
    sigma: Tensor | None,
    seed: Tensor,
    draw: Draw,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(da, db, dsigma), the last empty without a sigma: then nothing is drawn."""
    run = registry.kernel("gate_bwd", a.device.type)
    grads: tuple[Tensor, Tensor, Tensor] = run(du, a, b, sigma, seed, *draw, activation)
    return grads


def _check(
    x: Tensor, sigma: Tensor, seed: Tensor, draw: Draw, kind: str, dtype: torch.dtype | None
) -> None:
    check_projection(x, sigma, seed, draw)
    check_out_dtype(dtype)
    check_kind(kind)


def check_kind(kind: str) -> None:
    """Raise ValueError for a name that is no activation's."""
    if kind not in ACTIVATIONS:
        raise ValueError(f"kind: expected one of {tuple(ACTIVATIONS)}, got {kind!r}")


def _check_gate(a: Tensor, b: Tensor) -> None:
    if b.shape != a.shape:
        raise ValueError(f"b: expected shape {tuple(a.shape)}, as a, got {tuple(b.shape)}")
    if b.dtype is not a.dtype:
        raise TypeError(f"b: expected dtype {a.dtype}, as a, got {b.dtype}")
    if b.device != a.device:
        raise ValueError(f"b: expected device {a.device}, as a, got {b.device}")


def _fake_activate(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x, dtype=rest[-1])


def _fake_activate_bwd(
    du: Tensor, x: Tensor, sigma: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), fake_gradient(sigma, x)


def _fake_gate_bwd(
    du: Tensor, a: Tensor, b: Tensor, sigma: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    return torch.empty_like(a), torch.empty_like(b), fake_gradient(sigma, a)


registry.define(
    "activate",
    f"(Tensor x, {DRAW}, str activation, ScalarType? out_dtype) -> Tensor",
    _fake_activate,
    "gate",
)
registry.define(
    "activate_bwd",
    f"(Tensor du, Tensor x, {OPTIONAL_DRAW}, str activation) -> (Tensor, Tensor)",
    _fake_activate_bwd,
    "gate",
)
registry.define(
    "gate",
    f"(Tensor a, Tensor b, {DRAW}, str activation, ScalarType? out_dtype) -> Tensor",
    _fake_activate,
    "gate",
)
registry.define(
    "gate_bwd",
    f"(Tensor du, Tensor a, Tensor b, {OPTIONAL_DRAW}, str activation) -> (Tensor, Tensor, Tensor)",
    _fake_gate_bwd,
    "gate",
)

# ---- what the modules call -----------------------------------------------------------------------


def _pieces(
    a: Tensor,
    b: Tensor | None,
    sigma: Tensor,
    seed: Tensor,
    draw: Draw,
    kind: str,
    dtype: torch.dtype,
) -> Tensor:
    """The same of operations that have their own derivatives."""
    y = ACTIVATIONS[kind](widened(a))
    return projection(y if b is None else y * widened(b), sigma, seed, draw, dtype)


class _Activate(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sigma: Tensor, seed: Tensor, draw: Draw, kind: str, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(x, sigma, seed)
        ctx.how = draw, kind, dtype
        return activate(x, sigma, seed, draw, kind, dtype)

    @staticmethod
    def backward(ctx: Any, du: Tensor) -> Grads:
        x, sigma, seed = ctx.saved_tensors
        draw, kind, dtype = ctx.how
        needs = ctx.needs_input_grad[:2]
        nothing = (None,) * 4
        if torch.is_grad_enabled():  # under create_graph: differentiable pieces
            y = _pieces(x, None, sigma, seed, draw, kind, dtype)
            return *gradients(y, (x, sigma), du, needs), *nothing
        dx, dsigma = activate_bwd(du, x, sigma if needs[1] else None, seed, draw, kind)
        return dx if needs[0] else None, dsigma if needs[1] else None, *nothing


class _Gate(Function):
    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        sigma: Tensor,
        seed: Tensor,
        draw: Draw,
        kind: str,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(a, b, sigma, seed)
        ctx.how = draw, kind, dtype
        return gate(a, b, sigma, seed, draw, kind, dtype)

    @staticmethod
    def backward(ctx: Any, du: Tensor) -> Grads:
        a, b, sigma, seed = ctx.saved_tensors
        draw, kind, dtype = ctx.how
        needs = ctx.needs_input_grad[:3]
        nothing = (None,) * 4
        if torch.is_grad_enabled():
            y = _pieces(a, b, sigma, seed, draw, kind, dtype)
            return *gradients(y, (a, b, sigma), du, needs), *nothing
        grads = gate_bwd(du, a, b, sigma if needs[2] else None, seed, draw, kind)
        return *(grad if need else None for grad, need in zip(grads, needs)), *nothing


def noised_activation(
    x: Tensor, sigma: Tensor, seed: Tensor, draw: Draw, kind: str, dtype: torch.dtype | None
) -> Tensor:
    """u = act(x) + factor * sigma * z, differentiable in every world."""
    out = dtype or x.dtype
    if is_dtensor(x) or is_dtensor(sigma) or worlds.wants_pieces():
        check_kind(kind)
        return _pieces(x, None, sigma, seed, draw, kind, out)
    u: Tensor = _Activate.apply(x, sigma, seed, draw, kind, out)
    return u


def noised_gate(
    a: Tensor,
    b: Tensor,
    sigma: Tensor,
    seed: Tensor,
    draw: Draw,
    kind: str,
    dtype: torch.dtype | None,
) -> Tensor:
    """u = act(a) * b + factor * sigma * z, differentiable in every world."""
    out = dtype or a.dtype
    if is_dtensor(a) or is_dtensor(b) or is_dtensor(sigma) or worlds.wants_pieces():
        check_kind(kind)
        _check_gate(a, b)
        return _pieces(a, b, sigma, seed, draw, kind, out)
    u: Tensor = _Gate.apply(a, b, sigma, seed, draw, kind, out)
    return u
