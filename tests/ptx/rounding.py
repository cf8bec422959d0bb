"""Float arithmetic with one rounding, to nearest and ties to even, or down."""

import numpy as np

from .kinds import f32, f64, i64, u16, u32, u64

LEAST_NORMAL = f32(1.1754943508222875e-38)


def two_sum(a, b):
    """(a + b in float64, its error)"""
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back)


def to_odd(total, error):
    """total + error, rounded to odd: a further rounding to fewer bits then gives what one would
    have given."""
    total, error = np.asarray(total, f64), np.asarray(error, f64)
    inexact = (error != 0) & ((total.view(i64) & 1) == 0) & np.isfinite(total)
    return np.where(inexact, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)


def to_f32(high, low, down=False):
    """high + low, an unevaluated sum of float64, as float32"""
    high, low = np.asarray(high, f64), np.asarray(low, f64)
    result = high.astype(f32)
    if down:
        gap = high - result
        return np.where(
            (gap < 0) | ((gap == 0) & (low < 0)), np.nextafter(result, f32(-np.inf)), result
        )
    # Two roundings differ from one only where the first one's result lies halfway between two
    # float32.
    bits = high.view(u64) & u64(0x1FFFFFFF)
    doubtful = (bits == u64(0x10000000)) | ((np.abs(high) < 2.4e-38) & (high != 0))
    return np.where(doubtful, to_odd(high, low).astype(f32), result) if np.any(doubtful) else result


def fma32(a, b, c, down=False):
    product = np.multiply(a, b, dtype=f64)  # exact
    c = np.asarray(c, f64)
    total = product + c
    result = to_f32(*two_sum(product, c), down)
    # Of infinities the sum's error is no number; the sum is right.
    result = np.where(np.isfinite(total), result, total.astype(f32))
    if down:  # a sum of opposite numbers is -0
        opposite = (total == 0) & (np.signbit(product) != np.signbit(c))
        result = np.where(opposite, -np.abs(result), result)
    return result


def _split(a):
    scaled = a * 134217729.0
    high = scaled - (scaled - a)
    return high, a - high


def fma64(a, b, c):
    """Boldo and Melquiond's, by a sum rounded to odd; for numbers far from overflow and
    underflow"""
    a, b, c = (np.asarray(v, f64) for v in (a, b, c))
    product = a * b
    (ah, al), (bh, bl) = _split(a), _split(b)
    low = ((ah * bh - product) + ah * bl + al * bh) + al * bl
    th, tl = two_sum(c, low)
    vh, vl = two_sum(product, th)
    result = vh + to_odd(*two_sum(tl, vl))
    safe = np.isfinite(low) & np.isfinite(result)
    return np.where(safe, result, product + c)


# ---- 16 bits, flushing, least and greatest -------------------------------------------------------


def ftz(a):
    """Subnormal numbers to zeros of their sign"""
    return np.where(np.abs(a) < LEAST_NORMAL, np.copysign(f32(0), a), a)


def bf16_to_f32(bits):
    return (bits.astype(u32) << u32(16)).view(f32)


def f32_to_bf16(a):
    bits = np.asarray(a, f32).view(u32)
    bits = bits + u32(0x7FFF) + ((bits >> u32(16)) & u32(1))
    return np.where(np.isnan(a), u16(0x7FFF), (bits >> u32(16)).astype(u16))


def halves(word):
    """The low and the high 16 bits"""
    return (word & u32(0xFFFF)).astype(u16), (word >> u32(16)).astype(u16)


def packed(low, high):
    return low.astype(u32) | (high.astype(u32) << u32(16))


def float_min(a, b, nan, kind):
    """min, -0 below 0; nan: a NaN wins, else the number does"""
    small = np.minimum(a, b) if nan else np.fmin(a, b)
    return np.where(a == b, (a.view(kind) | b.view(kind)), small.view(kind))


def float_max(a, b, nan, kind):
    large = np.maximum(a, b) if nan else np.fmax(a, b)
    return np.where(a == b, (a.view(kind) & b.view(kind)), large.view(kind))


def saturated(a):
    """To [0, 1]; NaN is 0"""
    return np.where(np.isnan(a), 0, np.clip(a, 0, 1)).astype(np.asarray(a).dtype)
