"""What several operations' autograd is made of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def flat_rows(x: Tensor) -> Tensor:
    """[..., K] as [M, K], whatever is empty."""
    # torch's batched gradients (is_grads_batched) know reshape, and not flatten
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def linear_as(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b in x's dtype"""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def gradients(
    y: Tensor, tensors: Sequence[Tensor | None], dy: Tensor, needs: Sequence[bool]
) -> Iterator[Tensor | None]:
    """Those of differentiable pieces y of these tensors, under create_graph; None where one is not
    needed."""
    wanted = [t for t, need in zip(tensors, needs) if t is not None and need]
    grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return (next(grads) if need else None for _, need in zip(tensors, needs))


def widened(x: Tensor) -> Tensor:
    """x in the type that kernels compute in: float32, or float64 for float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def fake_gradient(t: Tensor | None, like: Tensor) -> Tensor:
    """The fake gradient of a vector of the features, empty where there is none."""
    if t is None:
        return like.new_empty(0, dtype=torch.float32)
    return torch.empty_like(t, memory_format=torch.contiguous_format)
