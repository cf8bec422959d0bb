"""The noise contract's root is the correctly rounded one, whatever rsqrt.approx returns:
docs/maths.md, section 3."""

import numpy as np
import pytest
from ptx.approximations import BOUNDS
from ptx.rounding import fma32

f32, u32 = np.float32, np.uint32
# Of csrc/noise.h and triton_kernels/noise.py, from the highest on.
POLYNOMIAL = (
    0.20756372809410095,
    -0.3267586827278137,
    0.3442501127719879,
    -0.39768528938293457,
    0.49943113327026367,
    -0.6667121648788452,
    1.000006914138794,
    -1.9999998807907104,
)


def squared_radii(i):
    """-2 ln((i + 1/2) / 2^20) as every kernel computes it"""
    mantissa = (i.astype(u32) << u32(3)) | u32(0x3F800004)
    u = mantissa.view(f32) - f32(1)
    bits = u.view(u32)
    exponent = (bits - u32(0x3F3504F3)) & u32(0xFF800000)
    f = (bits - exponent).view(f32) - f32(1)
    p = fma32(f, f32(POLYNOMIAL[0]), f32(POLYNOMIAL[1]))
    for coefficient in POLYNOMIAL[2:]:
        p = fma32(p, f, f32(coefficient))
    return fma32(exponent.view(np.int32).astype(f32), f32(-1.3862943611198906 / 8388608.0), p * f)


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 16])
def test_corrected_root_is_the_ieee_root_for_whatever_rsqrt_returns(step):
    i = np.arange(0, 2**20, step)
    a = squared_radii(i)
    assert np.abs(a - -2 * np.log((i + 0.5) / 2**20)).max() < 4e-6
    want, exact = np.sqrt(a), 1 / np.sqrt(a.astype(float))
    bound = BOUNDS["rsqrt"]
    nearest, allowed = exact.astype(f32), 0
    for k in range(-4, 5):  # the floats next to it
        y = (nearest.view(np.int32) + np.int32(k)).view(f32)
        may_be = np.abs(y.astype(float) - exact) <= bound * exact
        g = a * y
        root = fma32(fma32(-g, g, a), f32(0.5) * y, g)
        assert (root == want)[may_be].all()
        allowed += int(may_be.sum())
        assert abs(k) < 4 or not may_be.any()  # no further ones are allowed
    assert allowed > 2 * len(a)
    # Without the correction it is not: the check can fail.
    assert (a * nearest != want).any()
