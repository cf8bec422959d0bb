"""A convolution of the network's own input: dsigma without an input gradient.  docs/maths.md,
section 11.

Where x needs no gradient, plain training computes none for the convolution's input, and dsigma need
not ask for it: dsigma_c = sum over du_c z_c = sum over n and the window of W_nc G_nc, where G is
the weight's gradient with z in the input's place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from .. import worlds
from ..worlds import is_dtensor
from .draw import Draw
from .perturb import Grads, noise, perturb, projection
from .pieces import gradients


class Window(NamedTuple):
    """How a convolution moves: one entry per spatial dimension, padded with zeros."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def convolve(self, u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution of u [N, C, ...], in its dtype."""
        weight, bias = weight.to(u.dtype), None if bias is None else bias.to(u.dtype)
        nothing = [0] * len(self.stride)
        y: Tensor = torch.ops.aten.convolution(
            u, weight, bias, self.stride, self.padding, self.dilation, False, nothing, self.groups
        )
        return y

    def weight_gradient(self, dy: Tensor, u: Tensor, weight: Tensor) -> Tensor:
        """sum over positions of dy and the window of u there, of weight's shape, in u's dtype."""
        nothing = [0] * len(self.stride)
        _, dweight, _ = torch.ops.aten.convolution_backward(
            dy,
            u,
            weight.to(u.dtype),
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            nothing,
            self.groups,
            [False, True, False],
        )
        gradient: Tensor = dweight
        return gradient


def fits(x: Tensor, sigma: Tensor) -> bool:
    """Whether x is an input whose gradient nobody wants while sigma's is wanted, in eager mode."""
    if x.requires_grad or not (torch.is_grad_enabled() and sigma.requires_grad):
        return False
    return worlds.eager() and not (is_dtensor(x) or is_dtensor(sigma))


def own_input(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: Tensor,
    seed: Tensor,
    draw: Draw,
    dtype: torch.dtype | None,
    window: Window,
) -> Tensor:
    """conv(x + factor sigma z) + b for an x [N, C, ...] that needs no gradient. dtype: of u and y,
    or None for x's."""
    y: Tensor = _OwnInput.apply(x, weight, bias, sigma, seed, draw, dtype, window)
    return y


class _OwnInput(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sigma: Tensor,
        seed: Tensor,
        draw: Draw,
        dtype: torch.dtype | None,
        window: Window,
    ) -> Tensor:
        u = perturb(x, sigma, seed, draw, dtype)
        ctx.save_for_backward(x, weight, bias, sigma, seed, u)
        ctx.draw, ctx.dtype, ctx.window = draw, dtype, window
        return window.convolve(u, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Grads:
        x, weight, bias, sigma, seed, u = ctx.saved_tensors
        draw, window = ctx.draw, ctx.window
        _, needs_dweight, needs_dbias, needs_dsigma = needs = ctx.needs_input_grad[:4]
        rest = (None,) * 4
        if torch.is_grad_enabled():  # under create_graph: differentiable pieces
            y = window.convolve(projection(x, sigma, seed, draw, ctx.dtype), weight, bias)
            return *gradients(y, (x, weight, bias, sigma), dy, needs), *rest
        dweight = window.weight_gradient(dy, u, weight).to(weight.dtype) if needs_dweight else None
        dbias = (
            dy.sum([d for d in range(dy.dim()) if d != 1]).to(bias.dtype) if needs_dbias else None
        )
        dsigma = _dsigma(window, dy, u, weight, sigma, seed, draw) if needs_dsigma else None
        return None, dweight, dbias, dsigma, *rest


def _dsigma(
    window: Window, dy: Tensor, u: Tensor, weight: Tensor, sigma: Tensor, seed: Tensor, draw: Draw
) -> Tensor:
    z = noise(seed, u.shape, draw).to(u.dtype)
    if u.is_contiguous(memory_format=torch.channels_last) and u.dim() == 4:
        z = z.contiguous(memory_format=torch.channels_last)
    wide = torch.promote_types(sigma.dtype, torch.promote_types(u.dtype, torch.float32))
    # [N, C / groups, ...]
    products = window.weight_gradient(dy, z, weight).to(wide) * weight.to(wide)
    rest = products.shape[1:]
    products = products.reshape(window.groups, weight.shape[0] // window.groups, *rest)
    sums = products.sum((1, *range(3, products.dim()))).reshape(-1)  # [C]
    dsigma = draw.factor * sums
    if draw.log_variance:
        dsigma = dsigma * torch.exp(sigma.to(wide) / 2) / 2
    result: Tensor = dsigma.to(sigma.dtype)
    return result
