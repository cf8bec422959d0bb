"""Float arithmetic with one rounding, in each of PTX's modes: rn (nearest, ties to even), rz (to
0), rm (down), rp (up)."""

import numpy as np

from .kinds import f16, f32, f64, i64, u16, u32, u64

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


def step(nearest, error, how):
    """The result of mode `how` from one within a unit of the exact value, which lies `error` beside
    it."""
    if how == "rn":
        return nearest
    lowest, highest = nearest.dtype.type(-np.inf), nearest.dtype.type(np.inf)
    down, up = error < 0, error > 0
    if how == "rz":
        down, up = down & (nearest > 0), up & (nearest < 0)
    elif how == "rm":
        up = False
    else:
        down = False
    result = np.where(down, np.nextafter(nearest, lowest), nearest)
    return np.where(up, np.nextafter(nearest, highest), result)


def to_f32(high, low, how="rn"):
    """high + low, an unevaluated sum of float64, as float32"""
    high, low = np.asarray(high, f64), np.asarray(low, f64)
    if how != "rn":
        nearest = high.astype(f32)
        gap = high - nearest
        return step(nearest, np.where(gap != 0, gap, low), how)
    # Two roundings differ from one only where the first one's result lies halfway between two
    # float32.
    bits = high.view(u64) & u64(0x1FFFFFFF)
    doubtful = (bits == u64(0x10000000)) | ((np.abs(high) < 2.4e-38) & (high != 0))
    result = high.astype(f32)
    return np.where(doubtful, to_odd(high, low).astype(f32), result) if np.any(doubtful) else result


def _zero_down(result, a, b):
    """Rounding down, a sum of opposite numbers is -0; a, b: the terms, in float64."""
    return np.where((a + b == 0) & (np.signbit(a) != np.signbit(b)), -np.abs(result), result)


def add32(a, b, how="rn"):
    if how == "rn":
        return a + b
    a, b = np.asarray(a, f64), np.asarray(b, f64)
    result = to_f32(*two_sum(a, b), how)
    return _zero_down(result, a, b) if how == "rm" else result


def mul32(a, b, how="rn"):
    return a * b if how == "rn" else to_f32(np.multiply(a, b, dtype=f64), 0.0, how)


def fma32(a, b, c, how="rn"):
    product = np.multiply(a, b, dtype=f64)  # exact
    result = to_f32(*two_sum(product, np.asarray(c, f64)), how)
    # Of infinities the sum's error is no number; the sum is right.
    result = np.where(np.isfinite(product + c), result, (product + c).astype(f32))
    return _zero_down(result, product, c) if how == "rm" else result


def div32(a, b, how="rn"):
    quotient = np.asarray(a / b)
    if how == "rn":
        return quotient
    product = np.multiply(quotient, b, dtype=f64)
    left, more = two_sum(np.asarray(a, f64), -product)
    error = np.where(left != 0, left, more) * np.sign(b)
    error = np.where(np.isinf(quotient) & (b != 0) & np.isfinite(a), -quotient, error)
    return step(quotient, error, how)


def sqrt32(a, how="rn"):
    root = np.asarray(np.sqrt(a))
    if how == "rn":
        return root
    return step(root, np.asarray(a, f64) - np.multiply(root, root, dtype=f64), how)


# ---- float64 -------------------------------------------------------------------------------------


def _split(a):
    scaled = a * 134217729.0
    high = scaled - (scaled - a)
    return high, a - high


def fma64(a, b, c, how="rn"):
    """Boldo and Melquiond's, by a sum rounded to odd; for numbers far from overflow and
    underflow"""
    if how != "rn":
        raise NotImplementedError(how)
    a, b, c = (np.asarray(v, f64) for v in (a, b, c))
    product = a * b
    (ah, al), (bh, bl) = _split(a), _split(b)
    low = ((ah * bh - product) + ah * bl + al * bh) + al * bl
    th, tl = two_sum(c, low)
    vh, vl = two_sum(product, th)
    result = vh + to_odd(*two_sum(tl, vl))
    safe = np.isfinite(low) & np.isfinite(result)
    return np.where(safe, result, product + c)


def _step64(result, error, how, *operands):
    """Beyond the largest number a mode that does not go outward stops at it."""
    finite = np.all([np.isfinite(v) for v in np.broadcast_arrays(*operands)], axis=0)
    return step(result, np.where(np.isinf(result) & finite, -result, error), how)


def add64(a, b, how="rn"):
    total, error = two_sum(np.asarray(a, f64), np.asarray(b, f64))
    if how == "rn":
        return total
    result = _step64(total, error, how, a, b)
    return _zero_down(result, a, b) if how == "rm" else result


def mul64(a, b, how="rn"):
    product = np.asarray(a * b)
    return product if how == "rn" else _step64(product, fma64(a, b, -product), how, a, b)


def div64(a, b, how="rn"):
    quotient = np.asarray(a / b)
    if how == "rn":
        return quotient
    return _step64(quotient, fma64(-quotient, b, a) * np.sign(b), how, a, 1 / b)


def sqrt64(a, how="rn"):
    root = np.asarray(np.sqrt(a))
    return root if how == "rn" else step(root, fma64(-root, root, a), how)


# ---- 16 bits, flushing, least and greatest -------------------------------------------------------


def ftz(a):
    """Subnormal numbers to zeros of their sign"""
    return np.where(np.abs(a) < LEAST_NORMAL, np.copysign(f32(0), a), a)


def bf16_to_f32(bits):
    return (bits.astype(u32) << u32(16)).view(f32)


def f32_to_bf16(a, how="rn"):
    a = np.asarray(a, f32)
    bits = a.view(u32)
    if how == "rn":
        bits = bits + u32(0x7FFF) + ((bits >> u32(16)) & u32(1))
    return np.where(np.isnan(a), u16(0x7FFF), (bits >> u32(16)).astype(u16))


def sum16(kind, a, b, c, how="rn"):
    """a b + c of 16-bit floats, as their bits: the exact value is at most two float64, rounded
    once"""
    wide = [
        bf16_to_f32(v).astype(f64) if kind == "bf16" else v.view(f16).astype(f64) for v in (a, b, c)
    ]
    product = wide[0] * wide[1]
    total = product + wide[2]
    exact = np.where(np.isfinite(total), to_odd(*two_sum(product, wide[2])), total)
    if kind == "f16":
        return exact.astype(f16).view(u16)
    # Through float32, to odd too: its 24 bits are more than twice 8.
    near = exact.astype(f32)
    gap = exact - near
    even = ((near.view(u32) & u32(1)) == 0) & np.isfinite(near) & (gap != 0)
    odd = np.where(even, np.nextafter(near, np.where(gap > 0, f32(np.inf), f32(-np.inf))), near)
    return f32_to_bf16(odd)


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


# ---- conversions ---------------------------------------------------------------------------------


def to_integer(a, kind, how):
    """A float rounded to an integer, saturated; NaN is 0"""
    rounded = integral(a.astype(f64), how)
    info = np.iinfo(kind)
    inside = np.clip(np.where(np.isnan(rounded), 0.0, rounded), float(info.min), float(info.max))
    big = inside >= float(info.max)
    return np.where(big, kind(info.max), np.where(big, 0, inside).astype(kind))


def integral(a, how):
    return {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[how](a)


def to_f16(a, how="rn"):
    """A float as float16"""
    nearest = np.asarray(a).astype(f16)
    return step(nearest, np.asarray(a, f64) - nearest.astype(f64), how)


def to_tf32(a):
    """cvt.rna: 10 bits of mantissa, ties away from 0"""
    bits = np.asarray(a, f32).view(u32)
    return np.where(np.isfinite(a), (bits + u32(0x1000)) & u32(0xFFFFE000), bits)


def saturated(a):
    """To [0, 1]; NaN is 0"""
    return np.where(np.isnan(a), 0, np.clip(a, 0, 1)).astype(np.asarray(a).dtype)


def _extreme16(of, kind, a, b, nan):
    wide = [bf16_to_f32(v) if kind == "bf16" else v.view(f16).astype(f32) for v in (a, b)]
    result = of(*wide, nan, u32).view(f32)
    return f32_to_bf16(result) if kind == "bf16" else result.astype(f16).view(u16)


def float_min16(kind, a, b, nan):
    return _extreme16(float_min, kind, a, b, nan)


def float_max16(kind, a, b, nan):
    return _extreme16(float_max, kind, a, b, nan)
