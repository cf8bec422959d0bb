"""AugMix on tensors, after its paper (Hendrycks et al., arXiv 1912.02781) and its settings.

An image is mixed with the weighted sum of three chains of one to three operations each: weights
from Dirichlet(1, 1, 1), the image's own share from Beta(1, 1), severity 3 of 10. The loss is the
cross-entropy of the image as it is, plus 12 times the Jensen-Shannon divergence between the
predictions on it and on two such mixtures. The operations are the paper's nine, which leave out
what corruption benchmarks test (contrast, brightness, blur, noise).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH, DEPTH, SEVERITY, WEIGHT = 3, 3, 3.0, 12.0
Operation = Callable[[Tensor, Tensor, Tensor], Tensor]

# ---- operations: images [B, C, H, W] in 0 .. 1, level [B] of 0.1 .. SEVERITY, sign [B] of +-1


def autocontrast(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Each image's and channel's least value becomes 0 and its largest 1."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp(min=1e-6), x)


def equalize(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Each channel's histogram of 256 values made as flat as it can be, by Pillow's rule."""
    values = (255 * x).round().long().flatten(2)  # [B, C, H * W]
    counts = torch.zeros(*values.shape[:2], 256, dtype=torch.long)
    counts.scatter_add_(2, values, torch.ones_like(values))
    step = (values.shape[2] - counts.gather(2, values.amax(2, keepdim=True))) // 255
    below = counts.cumsum(2) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step[..., None] > 0, (table.gather(2, values) / 255.0).view_as(x), x)


def posterize(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Only the highest 4 bits of 8, or fewer, are kept."""
    unit = 2.0 ** (4 + (0.4 * level).floor())[:, None, None, None]
    return ((255 * x).round() / unit).floor() * unit / 255


def solarize(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """What is above a threshold is inverted."""
    return torch.where(x < 1 - level[:, None, None, None] / 10, x, 1 - x)


def _affine(x: Tensor, matrix: Tensor) -> Tensor:
    """x where the matrix [2, 3] of each image points, bilinear, zeros from outside."""
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def rotate(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """By up to 30 degrees at severity 10."""
    angle, zero = sign * level * math.pi / 60, torch.zeros_like(level)
    cos, sin = angle.cos(), angle.sin()
    return _affine(x, torch.stack([cos, -sin, zero, sin, cos, zero], 1).unflatten(1, (2, 3)))


def _entry(row: int, column: int, amount: Callable[[Tensor], Tensor]) -> Operation:
    """The operation whose matrix is the identity but for one number, amount(sign * level)."""

    def operation(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
        matrix = torch.eye(2, 3).repeat(len(x), 1, 1)
        matrix[:, row, column] = amount(sign * level)
        return _affine(x, matrix)

    return operation


# By up to 0.3 at severity 10; by up to a third of the side, which is 2 long in the grid's units.
shear_x, shear_y = (_entry(*place, lambda by: 0.03 * by) for place in ((0, 1), (1, 0)))
translate_x, translate_y = (_entry(row, 2, lambda by: by / 15) for row in (0, 1))
OPERATIONS: tuple[Operation, ...] = (
    autocontrast,
    equalize,
    posterize,
    rotate,
    solarize,
    shear_x,
    shear_y,
    translate_x,
    translate_y,
)

# ---- the mixture and its loss --------------------------------------------------------------------


def chain(x: Tensor, generator: torch.Generator, severity: float = SEVERITY) -> Tensor:
    """Each image through one to three random operations of its own, each of a random level."""
    count = len(x)
    depth = torch.randint(1, DEPTH + 1, (count,), generator=generator)
    x = x.clone()
    for place in range(DEPTH):
        chosen = torch.randint(len(OPERATIONS), (count,), generator=generator)
        level = 0.1 + (severity - 0.1) * torch.rand(count, generator=generator)
        sign = 2.0 * torch.randint(2, (count,), generator=generator) - 1
        for number, operation in enumerate(OPERATIONS):
            here = (chosen == number) & (place < depth)
            if here.any():
                x[here] = operation(x[here], level[here], sign[here])
    return x


def mixture(x: Tensor, generator: torch.Generator, severity: float = SEVERITY) -> Tensor:
    """x [B, C, H, W] in 0 .. 1, each image mixed with its three chains; the same shape, in 0 ..
    1."""
    # Exponentials over their sum are Dirichlet(1, 1, 1); Beta(1, 1) is uniform.
    weights = -(1 - torch.rand(WIDTH, len(x), 1, 1, 1, generator=generator)).log()
    weights = weights / weights.sum(0)
    mixed = sum((w * chain(x, generator, severity) for w in weights), torch.zeros_like(x))
    share = torch.rand(len(x), 1, 1, 1, generator=generator)
    return share * x + (1 - share) * mixed


def loss(logits: Tensor, mixed: tuple[Tensor, Tensor], y: Tensor, weight: float = WEIGHT) -> Tensor:
    """Cross-entropy of logits [B, C], plus weight times the Jensen-Shannon divergence to the two
    mixtures' logits."""
    logs = torch.stack([each.log_softmax(-1) for each in (logits, *mixed)])
    middle = (logs.logsumexp(0) - math.log(len(logs))).expand_as(logs)
    apart = F.kl_div(middle, logs, log_target=True, reduction="none").sum(-1).mean()
    return F.cross_entropy(logits, y) + weight * apart
