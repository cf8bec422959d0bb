"""triton_kernels/noise.py: z = r cos a, r sin a with (r, a) from Philox4x32-10 words.
docs/maths.md, section 3."""

import torch
import triton
import triton.language as tl

from .tiles import TILE_ELEMENTS, columns_at, on_device, origin, store, tile_at, tiling


@triton.jit
def _mul_wide(word, multiplier: tl.constexpr):
    """High and low word of the 64-bit product: one wide multiplication, where umulhi and mul would
    be two."""
    product = word.to(tl.uint64) * multiplier
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox4x32(key, c0, c1, c2, c3):
    """Ten rounds; key int64 scalar, counter words uint32."""
    k0 = key.to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        hi0, lo0 = _mul_wide(c0, 0xD2511F53)
        hi1, lo1 = _mul_wide(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _flip_sign(value, bit31):
    # An exclusive or, which the compiler turns into a free negation where bit31 is constant; -value
    # is 0 - value.
    return (value.to(tl.uint32, bitcast=True) ^ (bit31 & 0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def _radius(w):
    """sqrt(-2 ln u), u = ((w >> 12) + 1/2) / 2^20"""
    # 1 + u in the mantissa, so that no integer is converted: the subtraction is exact.
    u = (((w >> 12) << 3) | 0x3F800004).to(tl.float32, bitcast=True) - 1.0
    bits = u.to(tl.int32, bitcast=True)
    # u = 2^e (1 + f), 1 + f in [sqrt(1/2), sqrt(2)); exponent holds e * 2^23.
    exponent = (bits - 0x3F3504F3) & -0x800000
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    p = tl.fma(f, 0.20756372809410095, -0.3267586827278137)
    p = tl.fma(p, f, 0.3442501127719879)
    p = tl.fma(p, f, -0.39768528938293457)
    p = tl.fma(p, f, 0.49943113327026367)
    p = tl.fma(p, f, -0.6667121648788452)
    p = tl.fma(p, f, 1.000006914138794)
    p = tl.fma(p, f, -1.9999998807907104)
    square = tl.fma(exponent.to(tl.float32), -1.3862943611198906 / 8388608.0, p * f)  # -2 ln u
    # One correction step takes the approximate reciprocal square root to the IEEE square root.
    y = tl.rsqrt(square)
    g = square * y
    return tl.fma(tl.fma(_flip_sign(g, 0x80000000), g, square), 0.5 * y, g)


@triton.jit
def normal_pair(w):
    """(r cos a, r sin a) of one Philox word: the draws of an even column and of the odd one after
    it"""
    r = _radius(w)
    # Angle inside its quadrant, from the middle: x = (j mod 1024 + 1/2) / 1024 - 1/2.
    x = ((w << 13) & 0x7FE000 | 0x3F801000).to(tl.float32, bitcast=True) - 1.5
    x2 = x * x
    c = tl.fma(x2, -0.014430979266762733, 0.17932136356830597)
    c = tl.fma(c, x2, -0.8723555207252502)
    c = tl.fma(c, x2, 0.7071067690849304)
    s = tl.fma(x2, 0.05491918325424194, -0.4565873444080353)
    s = tl.fma(s, x2, 1.1107151508331299)
    # The quadrant is bits 10 and 11 of w: an odd one swaps the two sums, which is a sign flip of s.
    odd = w << 21
    half = w << 20
    s = _flip_sign(s * x, odd)
    return _flip_sign(r, half ^ odd) * (c - s), _flip_sign(r, half) * (c + s)


@triton.jit
def noise_words(
    key,  # int64 scalar
    last_word,  # uint32 scalar: (stream mod 2^16) * 2^16 + sample
    row,  # [R] int64
    group,  # [G] int: column // 8
    ROWS_LAST: tl.constexpr,  # orientation of the result: [R, G], or [G, R]
):
    """The four Philox words of every (row, group)."""
    if ROWS_LAST:
        row = row[None, :]
        group = group[:, None]
    else:
        row = row[:, None]
        group = group[None, :]
    zero = ((row + group) * 0).to(tl.uint32)
    return philox4x32(
        key,
        zero + group.to(tl.uint32),
        zero + (row & 0xFFFFFFFF).to(tl.uint32),
        zero + ((row >> 32) & 0xFFFFFFFF).to(tl.uint32),
        zero + last_word,
    )


@triton.jit
def normal_tile(key, last_word, row, group, ROWS_LAST: tl.constexpr):
    """One draw: [R, 8 G] float32, columns 8 group .. 8 group + 7; transposed if ROWS_LAST."""
    w0, w1, w2, w3 = noise_words(key, last_word, row, group, ROWS_LAST)
    z0, z1 = normal_pair(w0)
    z2, z3 = normal_pair(w1)
    z4, z5 = normal_pair(w2)
    z6, z7 = normal_pair(w3)
    # Each join appends an axis of two, so the last join is the lowest bit of the column: no data
    # leaves its thread.
    even = tl.join(tl.join(z0, z4), tl.join(z2, z6))
    odd = tl.join(tl.join(z1, z5), tl.join(z3, z7))
    z = tl.join(even, odd)
    if ROWS_LAST:
        z = tl.permute(tl.reshape(z, [group.shape[0], row.shape[0], 8]), (0, 2, 1))
        return tl.reshape(z, [group.shape[0] * 8, row.shape[0]])
    else:
        return tl.reshape(z, [row.shape[0], group.shape[0] * 8])


@triton.jit
def load_seed(seed_ptr, sample):
    """(key, last_word) of a draw: the seed's key, and its stream with the sample, the last word of
    every counter"""
    stream = tl.load(seed_ptr + 1)
    return tl.load(seed_ptr), (((stream & 0xFFFF) << 16) + sample).to(tl.uint32)


@triton.jit
def _noise_kernel(
    z,  # written
    seed_ptr,  # [2] int64: key, stream
    rows,
    origin,
    ROWS_LAST: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    key, last_word = load_seed(seed_ptr, origin.sample)
    group, col = columns_at(tl.program_id(0), origin, BLOCK_K)
    for row_block in range(tl.program_id(1), rows.blocks, tl.num_programs(1)):
        row, place = tile_at(rows, row_block, col, ROWS_LAST, VEC, BLOCK_R)
        drawn = normal_tile(key, last_word, origin.row0 + row, group, ROWS_LAST)
        store(z, place, drawn, ROWS_LAST, VEC)


def noise(seed, shape, dim, row0, col0, sample):
    """z [shape] float32, contiguous, on the seed's device: the draws of rows row0 .., columns col0
    .. along `dim`."""
    z = torch.empty(shape, dtype=torch.float32, device=seed.device)
    if z.numel() == 0:
        return z
    tile = tiling(dim, col0, TILE_ELEMENTS, z)
    with on_device(z):
        _noise_kernel[tile.grid(z.device)](
            *tile.operands(z), seed, tile.rows(), origin(row0, col0, sample), **tile.constants()
        )
    return z
