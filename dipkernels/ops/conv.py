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

from .. import worlds
from ..worlds import is_dtensor
from .draw import Draw
from .perturb import noise, perturb, projection
from .pieces import flat_rows, fused


class Window(NamedTuple):
    """How a convolution moves: one entry per spatial dimension, padded with zeros."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def convolve(self, u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution of u [N, C, ...], in its dtype."""
        bias = None if bias is None else bias.to(u.dtype)
        return torch.ops.aten.convolution(u, weight.to(u.dtype), bias, *self._in_aten())

    def weight_gradient(self, dy: Tensor, u: Tensor, weight: Tensor) -> Tensor:
        """sum over positions of dy and the window of u there, of weight's shape, in u's dtype."""
        kernel = weight.shape[2:]
        if u.device.type == "cpu" and self._cuts_patches(kernel):
            # one matrix product: oneDNN's convolution takes longer in bfloat16, measured_intel.md
            rows, patches = flat_rows(dy.movedim(1, -1)), _patches(u, kernel)
            with torch.autocast("cpu", enabled=False):  # which leaves convolution_backward alone
                return (rows.t() @ patches).view_as(weight)
        tensors, wanted = (dy, u, weight.to(u.dtype), None), [False, True, False]
        return torch.ops.aten.convolution_backward(*tensors, *self._in_aten(), wanted)[1]

    def _cuts_patches(self, kernel: torch.Size) -> bool:
        """Whether windows of this size lie side by side, as in the first layer of a ViT."""
        apart = tuple(self.stride) == tuple(kernel) and max(kernel) > 1
        return apart and self.groups == 1 and {*self.padding} == {0} and {*self.dilation} == {1}

    def _in_aten(self) -> tuple[Any, ...]:
        """Its arguments: not transposed, so no padding of the output."""
        output_padding = [0] * len(self.stride)
        return self.stride, self.padding, self.dilation, False, output_padding, self.groups


def _patches(u: Tensor, kernel: torch.Size) -> Tensor:
    """The windows of u [N, C, ...] that lie side by side, a row each: [positions, C x window]."""
    for d, size in enumerate(kernel):
        count = u.shape[2 + 2 * d] // size
        u = u.narrow(2 + 2 * d, 0, count * size).unflatten(2 + 2 * d, (count, size))
    places, within = range(2, u.dim(), 2), range(3, u.dim(), 2)
    rows = u.permute(0, *places, 1, *within)
    return rows.flatten(1 + len(kernel)).flatten(0, len(kernel))


def fits(x: Tensor, sigma: Tensor) -> bool:
    """Whether nobody wants x's gradient, and sigma's is wanted, in eager mode or compiled."""
    if x.requires_grad or not (torch.is_grad_enabled() and sigma.requires_grad):
        return False
    return not (worlds.wants_pieces() or is_dtensor(x) or is_dtensor(sigma))


def _run(
    x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, seed: Tensor, *how: Any
) -> tuple[Tensor, Tensor]:
    draw, dtype, window = how
    u = perturb(x, sigma, seed, draw, dtype)
    return window.convolve(u, weight, bias), u


def _run_bwd(dy: Tensor, tensors: Any, kept: Any, how: Any, needs: Any) -> tuple[Any, ...]:
    (_, weight, _, sigma, seed), (u,), (draw, _, window) = tensors, kept, how
    dweight = window.weight_gradient(dy, u, weight) if needs[1] else None
    dbias = dy.sum([d for d in range(dy.dim()) if d != 1]) if needs[2] else None
    dsigma = _dsigma(window, dy, u, weight, sigma, seed, draw) if needs[3] else None
    return None, dweight, dbias, dsigma, None


# own_input(x, weight, bias, sigma, seed, draw, dtype, window) = conv(x + factor sigma z) + b for an
# x [N, C, ...] that needs no gradient. dtype: of u and y, or None for x's.
own_input = fused(
    "_OwnInput",
    _run,
    _run_bwd,
    lambda x, weight, bias, sigma, seed, draw, dtype, window: window.convolve(
        projection(x, sigma, seed, draw, dtype), weight, bias
    ),
    5,
)


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
    dsigma: Tensor = draw.factor * sums
    return dsigma * torch.exp(sigma.to(wide) / 2) / 2 if draw.log_variance else dsigma
