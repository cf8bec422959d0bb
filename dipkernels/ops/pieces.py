"""What several operations' autograd is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .. import worlds
from ..worlds import is_dtensor

Grads = tuple[Tensor | None, ...]


def fused(
    name: str,
    run: Callable[..., Tensor | tuple[Any, ...]],
    run_bwd: Callable[..., Sequence[Tensor | None]],
    pieces: Callable[..., Tensor],
    num_tensors: int,
) -> Callable[..., Tensor]:
    """The differentiable form of an operation that takes one pass each way.

    Args:
        name: What a profiler calls it.
        run: run(*tensors, *how) gives the result, or a tuple of it and of what backward keeps
            beside the tensors.
        run_bwd: run_bwd(dy, tensors, kept, how, needs) gives a gradient for each tensor; those that
            are not needed are dropped.
        pieces: pieces(*tensors, *how), the same result of operations that have derivatives. It runs
            where `worlds.wants_pieces` says so and on DTensors; elsewhere backward makes its
            gradients of it under create_graph.
        num_tensors: How many of the arguments are tensors or None; the others are `how`.
    """

    class Fused(Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Tensor:
            out = run(*args)
            y, *kept = out if isinstance(out, tuple) else (out,)
            ctx.save_for_backward(*args[:num_tensors], *kept)
            ctx.how = args[num_tensors:]
            return y

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Grads:
            saved = ctx.saved_tensors  # once: a checkpoint gives each but once
            tensors, kept = saved[:num_tensors], saved[num_tensors:]
            needs, how = ctx.needs_input_grad[:num_tensors], ctx.how
            rest = (None,) * len(how)
            if torch.is_grad_enabled():  # create_graph
                # views: a gradient by W alone, where x is made of W too (a layer called again)
                views = [t.view_as(t) if need else t for t, need in zip(tensors, needs)]
                wanted = [t for t, need in zip(views, needs) if need]
                y = pieces(*views, *how)
                found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
                return *(next(found) if need else None for need in needs), *rest
            grads = zip(run_bwd(dy, tensors, kept, how, needs), needs)  # autograd casts to types
            return *(grad if need else None for grad, need in grads), *rest

    named: Any = type(name, (Fused,), {})
    in_eager = without_wrapper(named)

    def apply(*args: Any) -> Tensor:
        if worlds.wants_pieces() or any([is_dtensor(t) for t in args[:num_tensors]]):
            return pieces(*args)
        return (named.apply if worlds.tracing() else in_eager)(*args)  # no transform is on here

    return apply


def without_wrapper(kind: type[Function]) -> Callable[..., Tensor]:
    """kind.apply without its part in Python, which a small layer feels; for calls that no transform
    of torch.func and no compiler sees."""
    return super(Function, kind).apply  # type: ignore[misc]


def flat_rows(x: Tensor) -> Tensor:
    """[..., K] as [M, K], whatever is empty."""
    # torch's batched gradients (is_grads_batched) know reshape, and not flatten
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def linear_as(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b in x's dtype"""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def widened(x: Tensor) -> Tensor:
    """x in the type that kernels compute in: float32, or float64 for float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def fake_like(t: Tensor | None, like: Tensor) -> Tensor:
    """A fake result of t's shape and dtype, contiguous; empty where there is no t."""
    if t is None:
        return like.new_empty(0, dtype=torch.float32)
    return torch.empty_like(t, memory_format=torch.contiguous_format)
