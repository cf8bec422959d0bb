"""Where a draw of noise lies and how it is scaled: one value, made by the layer, handed on whole,
unpacked by the schema."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import worlds
from ..arguments import integer

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_SAMPLES = 2**16
MAX_ORIGIN = 2**62  # of row0 and col0: with the rows of any tensor added it is still an int64


class Draw(NamedTuple):
    """One draw z of the noise contract (docs/maths.md, section 3) and the scale factor * sigma of
    what is added.

    The seed is not in it: autograd and torch.compile want tensors as arguments of their own.
    """

    dim: int = -1  # the feature dimension: its index is z's column
    row0: int = 0  # of z, that of the tensor's first entry
    col0: int = 0
    sample: int = 0
    factor: float = 1.0  # multiplies sigma
    log_variance: bool = False  # whether sigma holds ln(sigma^2)

    def of_sigma(self) -> Draw:
        """The same where sigma itself is given, a standard deviation."""
        return self._replace(log_variance=False)

    def check(self, ndim: int) -> None:
        """Raise ValueError where it lies outside the contract, for a tensor of ndim dimensions."""
        if not -ndim <= self.dim < ndim:
            raise ValueError(f"dim: expected a dimension of a tensor of {ndim}, got {self.dim}")
        # torch.export refuses a bound on sizes that may change, of which row0 is made there
        inside = worlds.exporting() or (
            0 <= self.row0 <= MAX_ORIGIN and 0 <= self.col0 <= MAX_ORIGIN
        )
        if not (inside and 0 <= self.sample < MAX_SAMPLES):
            integer("row0", self.row0, 0, MAX_ORIGIN)
            integer("col0", self.col0, 0, MAX_ORIGIN)
            integer("sample", self.sample, 0, MAX_SAMPLES - 1)


def asked_for(
    dim: int, row0: int, col0: int, sample: int, factor: float, log_variance: bool
) -> Draw:
    """The Draw of what the caller of a function of tensors gave. Raises TypeError naming what is no
    integer; `Draw.check` looks at the ranges.

    Nothing has a default here: torch.compile takes a default of a class for a number that changes.
    """
    return Draw(
        integer("dim", dim),
        integer("row0", row0),
        integer("col0", col0),
        integer("sample", sample),
        factor,
        log_variance,
    )


def check_seed(seed: Tensor, device: torch.device) -> None:
    """Raise TypeError or ValueError for what is no seed on this device."""
    if seed.dtype is not torch.int64:
        raise TypeError(f"seed: expected dtype torch.int64, got {seed.dtype}")
    if seed.shape != (2,):
        raise ValueError(f"seed: expected shape (2,) = (key, stream), got {tuple(seed.shape)}")
    if not seed.is_contiguous():
        raise ValueError(
            f"seed: expected its two numbers side by side, got stride {seed.stride(0)}; pass "
            "seed.contiguous()"
        )
    if seed.device != device:
        raise ValueError(f"seed: expected device {device}, as the data, got {seed.device}")


def check_projection(
    x: Tensor, sigma: Tensor, seed: Tensor, draw: Draw, out_dtype: torch.dtype | None
) -> None:
    """Raise TypeError or ValueError for tensors that no projection of x can be made of, or a dtype
    that no kernel writes."""
    if x.dtype not in DTYPES:
        raise TypeError(f"x: expected one of {DTYPES}, got {x.dtype}")
    draw.check(x.dim())
    if sigma.shape != x.shape[draw.dim : draw.dim + 1 or None]:
        raise ValueError(
            f"sigma: expected shape (K,) = ({x.shape[draw.dim]},), got {tuple(sigma.shape)}"
        )
    if sigma.dtype is not torch.float32 and sigma.dtype is not torch.float64:
        raise TypeError(f"sigma: expected torch.float32 or torch.float64, got {sigma.dtype}")
    if sigma.device != x.device:
        raise ValueError(f"sigma: expected device {x.device}, as x, got {sigma.device}")
    check_seed(seed, x.device)
    if out_dtype is not None and out_dtype not in DTYPES:
        raise TypeError(f"dtype: expected one of {DTYPES}, got {out_dtype}")
