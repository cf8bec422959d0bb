"""Approximate instructions: the exact value, or one as far off as the PTX manual allows."""

import numpy as np

from .kinds import f32, f64, u64
from .rounding import ftz

# The most, relative
BOUNDS = {
    "rsqrt": 2**-22.9,
    "sqrt": 2**-23,
    "rcp": 2**-23,
    "ex2": 2**-22,
    "div": 2**-22,
}


def approximate(name, exact, errors, flush):
    """float64 to float32.

    Args:
        name: Of the instruction.
        exact: The exact value, in float64.
        errors: 0: rounded to nearest. Else a seed: off by a part of the bound between -1 and 1,
            drawn by a hash of the value, for the same number has the same error, as on a GPU.
        flush: .ftz of the result.
    """
    exact = np.asarray(exact, f64)
    if errors:
        size = BOUNDS[name]
        salt = u64(errors * 0x9E3779B97F4A7C15 & (2**64 - 1))
        hashed = (exact.view(u64) ^ salt) * u64(0xD6E8FEB86659FD93)
        hashed = ((hashed >> u64(32)) * u64(0xD6E8FEB86659FD93)) >> u64(12)
        size = size * (hashed.astype(f64) / 2.0**51 - 1)
        special = ~np.isfinite(exact) | (exact == 0)
        if name == "ex2":  # of integers it is exact: libdevice builds on that
            special = special | (np.frexp(exact)[0] == 0.5)
        exact = np.where(special, exact, exact + size * np.abs(exact))
    result = exact.astype(f32)
    return ftz(result) if flush else result


def fast_quotient(a, b, full):
    """div.full and div.approx in float64: the latter gives 0 beyond 2^126, which it does not
    scale"""
    exact = a.astype(f64) / b.astype(f64)
    if full:
        return exact
    beyond = (np.abs(b) > f32(2.0**126)) & np.isfinite(b)
    return np.where(beyond, np.where(np.isinf(a), np.nan, np.copysign(0.0, exact)), exact)
