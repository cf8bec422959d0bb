"""u = act(a) * b + factor * sigma * z, and u = act(x) + factor * sigma * z, which is the same
without b, in one pass forward and one back.  docs/maths.md, section 10.

Backward keeps what act, or the gated product, keeps: x, or a and b; never u nor z.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import one_of
from . import registry
from .activations import ACTIVATIONS
from .draw import Draw, check_projection
from .perturb import DRAW, OPTIONAL_DRAW, projection
from .pieces import fake_like, fused, widened

# ---- the operations ------------------------------------------------------------------------------


def gate(
    a: Tensor,
    b: Tensor | None,
    sigma: Tensor,
    seed: Tensor,
    draw: Draw,
    activation: str,
    dtype: torch.dtype | None,
) -> Tensor:
    """u, of a's shape and of dtype, a's where that is None; act(a) and the noise without b."""
    check_projection(a, sigma, seed, draw, dtype)
    _check(a, b, activation)
    run = registry.kernel("gate", a.device.type)
    return run(a, b, sigma, seed, *draw, activation, dtype)


def _check(a: Tensor, b: Tensor | None, kind: str) -> None:
    one_of("kind", kind, ACTIVATIONS)
    if b is None:
        return
    if b.shape != a.shape:
        raise ValueError(f"b: expected shape {tuple(a.shape)}, as a, got {tuple(b.shape)}")
    if b.dtype is not a.dtype:
        raise TypeError(f"b: expected dtype {a.dtype}, as a, got {b.dtype}")
    if b.device != a.device:
        raise ValueError(f"b: expected device {a.device}, as a, got {b.device}")


registry.define(
    "gate",
    f"(Tensor a, Tensor? b, {DRAW}, str activation, ScalarType? out_dtype) -> Tensor",
    lambda a, *rest: torch.empty_like(a, dtype=rest[-1]),
)
# (da, db, dsigma), empty for what is None; without a sigma nothing is drawn.
registry.define(
    "gate_bwd",
    f"(Tensor du, Tensor a, Tensor? b, {OPTIONAL_DRAW}, str activation) -> "
    "(Tensor, Tensor, Tensor)",
    lambda du, a, b, sigma, *rest: (
        torch.empty_like(a),
        fake_like(None, a) if b is None else torch.empty_like(b),
        fake_like(sigma, a),
    ),
)

# ---- what the modules call -----------------------------------------------------------------------


def _pieces(a: Tensor, b: Tensor | None, sigma: Tensor, seed: Tensor, *how: Any) -> Tensor:
    draw, kind, dtype = how
    _check(a, b, kind)
    y = ACTIVATIONS[kind](widened(a))
    u_dtype = dtype or a.dtype
    return projection(y if b is None else y * widened(b), sigma, seed, draw, u_dtype)


def _run_bwd(du: Tensor, tensors: Any, kept: Any, how: Any, needs: Any) -> tuple[Any, ...]:
    (a, b, sigma, seed), (draw, kind, _) = tensors, how
    run = registry.kernel("gate_bwd", a.device.type)
    return *run(du, a, b, sigma if needs[2] else None, seed, *draw, kind), None


# noised_gate(a, b, sigma, seed, draw, kind, dtype): `gate`, differentiable in every world
noised_gate = fused("_Gate", gate, _run_bwd, _pieces, 4)
