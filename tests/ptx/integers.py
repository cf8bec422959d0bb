"""Integer and bit instructions that NumPy has no word for."""

import numpy as np

from .kinds import u32, u64


def quotient(a, b):
    """C's integer division; anything by zero is all ones, as on a GPU"""
    zero = b == 0
    safe = np.where(zero, b.dtype.type(1), b)
    q = a // safe
    if a.dtype.kind == "i":
        q = q + ((q * safe != a) & ((a < 0) != (safe < 0))).astype(q.dtype)
    return np.where(zero, ~np.zeros_like(q), q)


def high64(a, b):
    """The upper half of a 128-bit product, unsigned"""
    low = u64(0xFFFFFFFF)
    a0, a1, b0, b1 = a & low, a >> u64(32), b & low, b >> u64(32)
    middle = a1 * b0 + ((a0 * b0) >> u64(32))
    other = a0 * b1 + (middle & low)
    return a1 * b1 + (middle >> u64(32)) + (other >> u64(32))


def signed_high64(a, b):
    """The same of int64"""
    x, y = a.view(u64), b.view(u64)
    high = high64(x, y) - np.where(a < 0, y, u64(0)) - np.where(b < 0, x, u64(0))
    return high.view(np.int64)


def bit_field(a, position, length, signed):
    """bfe.u32, bfe.s32"""
    position, length = position & u32(255), length & u32(255)
    inside = np.minimum(length, u32(32) - np.minimum(position, u32(32)))  # bits that the word has
    mask = np.where(inside >= 32, u32(0xFFFFFFFF), (u32(1) << np.minimum(inside, u32(31))) - u32(1))
    value = np.where(position >= 32, u32(0), (a >> np.minimum(position, u32(31))) & mask)
    if not signed:
        return value
    top = np.minimum(position + length - u32(1), u32(31))
    negative = (length > 0) & (((a >> top) & u32(1)) == 1)
    return np.where(negative, value | ~mask, value)


def permute_bytes(a, b, selector):
    """prmt.b32"""
    both = (b.astype(u64) << u64(32)) | a.astype(u64)
    result = u32(0)
    for i in range(4):
        nibble = (selector >> u32(4 * i)) & u32(15)
        byte = ((both >> (u64(8) * (nibble & u32(7)).astype(u64))) & u64(255)).astype(u32)
        sign = np.where((byte & u32(128)) != 0, u32(255), u32(0))
        result = result | (np.where((nibble & u32(8)) != 0, sign, byte) << u32(8 * i))
    return result


def shift_left(a, n, bits):
    return np.where(n >= bits, a.dtype.type(0), a << np.minimum(n, u32(bits - 1)).astype(a.dtype))


def shift_right(a, n, bits):
    limit = np.minimum(n, u32(bits - 1)).astype(a.dtype)
    return a >> limit if a.dtype.kind == "i" else np.where(n >= bits, a.dtype.type(0), a >> limit)
