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


def remainder(a, b):
    zero = b == 0
    return np.where(zero, a, a - quotient(a, np.where(zero, b.dtype.type(1), b)) * b)


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


def bit_insert(a, b, position, length):
    """bfi.b32: the low bits of a into b"""
    position, length = position & u32(255), length & u32(255)
    mask = np.where(length >= 32, u32(0xFFFFFFFF), (u32(1) << np.minimum(length, u32(31))) - u32(1))
    mask = np.where(position > 31, u32(0), mask << np.minimum(position, u32(31)))
    return (b & ~mask) | ((a << np.minimum(position, u32(31))) & mask)


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


def logic3(a, b, c, table):
    """lop3.b32 by its truth table"""
    result = a & u32(0)
    for i in range(8):
        if table >> i & 1:
            result = result | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    return result


def funnel(a, b, shift, right, clamp):
    """shf: 32 bits of b:a"""
    shift = np.minimum(shift, u32(32)) if clamp else shift & u32(31)
    both = (b.astype(u64) << u64(32)) | a.astype(u64)
    if right:
        return (both >> shift.astype(u64)).astype(u32)
    return ((both << shift.astype(u64)) >> u64(32)).astype(u32)


def shift_left(a, n, bits):
    return np.where(n >= bits, a.dtype.type(0), a << np.minimum(n, u32(bits - 1)).astype(a.dtype))


def shift_right(a, n, bits):
    limit = np.minimum(n, u32(bits - 1)).astype(a.dtype)
    return a >> limit if a.dtype.kind == "i" else np.where(n >= bits, a.dtype.type(0), a >> limit)


def count_ones(a):
    return np.bitwise_count(a).astype(u32)


def leading_zeros(a):
    bits = 8 * a.dtype.itemsize
    for shift in (1, 2, 4, 8, 16, 32):
        if shift < bits:
            a = a | (a >> a.dtype.type(shift))
    return u32(bits) - count_ones(a)


def reversed_bits(a):
    size = a.dtype.itemsize
    masks = {1: 0x5555555555555555, 2: 0x3333333333333333, 4: 0x0F0F0F0F0F0F0F0F}
    for shift, mask in masks.items():
        n, m = a.dtype.type(shift), a.dtype.type(mask & (2 ** (8 * size) - 1))
        a = ((a >> n) & m) | ((a & m) << n)
    return a.byteswap()
