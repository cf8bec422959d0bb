"""triton_kernels/perturb.py: u = x + factor s z, dsigma = factor sum(du z) over rows.
docs/maths.md, sections 1, 5."""

import torch
import triton
import triton.language as tl

from .activations import act
from .noise import load_seed, noise, normal_tile
from .tiles import (
    EXACT,
    TILE_ELEMENTS,
    across,
    cdiv,
    columns_at,
    dense,
    load,
    on_device,
    origin,
    store,
    tile_at,
    tiling,
)

__all__ = ["noise", "perturb", "perturb_bwd", "perturb_replay"]

# Accumulators stay in registers across row tiles, so the tiles of the sums are half as large; a
# quarter for the combined form of 4-byte data, which holds two inputs.
SUM_ELEMENTS = 2048


@triton.jit
def noise_scale(
    sigma_ptr,  # [K]: sigma, or ln(sigma^2) if LOG_VARIANCE
    col,  # [BK]
    mask,  # [BK]
    factor,  # float64 scalar
    LOG_VARIANCE: tl.constexpr,
    dtype: tl.constexpr,
):
    """factor * s, [BK], with s = exp(sigma / 2) or sigma"""
    sigma = tl.load(sigma_ptr + col, mask=mask, other=0.0).to(dtype)
    if LOG_VARIANCE:
        sigma = tl.exp(0.5 * sigma)
    return tl.cast(factor, dtype) * sigma


@triton.jit
def perturb_fwd_kernel(
    rows,  # first: behind the operands the compiler takes more registers for channels
    u,  # written
    a,
    b,  # its ptr may be None
    sigma_ptr,  # [K] float32 or float64
    seed_ptr,  # [2] int64: key, stream
    origin,
    factor: tl.float64,
    ACTIVATION: tl.constexpr,
    LOG_VARIANCE: tl.constexpr,
    ROWS_LAST: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """u = act(a) b + factor s z; perturb's own act is "identity", and gate.py has the others"""
    # where
    key, last_word = load_seed(seed_ptr, origin.sample)
    group, col = columns_at(tl.program_id(0), origin, BLOCK_K)
    col_mask = (col >= 0) & (col < rows.K * VEC)
    dtype: tl.constexpr = tl.float64 if a.ptr.dtype.element_ty == tl.float64 else tl.float32
    scale = noise_scale(sigma_ptr, col, col_mask, factor, LOG_VARIANCE, dtype)
    for row_block in range(tl.program_id(1), rows.blocks, tl.num_programs(1)):
        row, place = tile_at(rows, row_block, col, ROWS_LAST, VEC, BLOCK_R)
        # load
        y = act(load(a, place, dtype, ROWS_LAST, VEC), ACTIVATION)
        if b.ptr is not None:
            y *= load(b, place, dtype, ROWS_LAST, VEC)
        # compute
        z = normal_tile(key, last_word, origin.row0 + row, group, ROWS_LAST).to(dtype)
        _, s = across(row, scale, ROWS_LAST)
        # store
        store(u, place, tl.fma(tl.broadcast_to(s, z.shape), z, y), ROWS_LAST, VEC)


@triton.jit
def store_partial(partial_ptr, total, K, col, col_mask, ROWS_LAST: tl.constexpr):
    """A program's sums over its rows, into partial [row programs, K]"""
    out = tl.cast(tl.program_id(1), tl.int64) * K + col
    tl.store(partial_ptr + out, tl.sum(total, axis=1 if ROWS_LAST else 0), mask=col_mask)


@triton.jit
def _perturb_bwd_kernel(
    u,  # written where there is x
    du,
    x,  # its ptr may be None
    partial_ptr,  # [row programs, K] float32 (float64 for float64 data), written
    sigma_ptr,  # [K] float32 or float64, read where there is x
    seed_ptr,  # [2] int64: key, stream
    rows,
    origin,
    factor: tl.float64,
    LOG_VARIANCE: tl.constexpr,
    ROWS_LAST: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # where
    key, last_word = load_seed(seed_ptr, origin.sample)
    group, col = columns_at(tl.program_id(0), origin, BLOCK_K)
    col_mask = (col >= 0) & (col < rows.K * VEC)
    dtype: tl.constexpr = tl.float64 if partial_ptr.dtype.element_ty == tl.float64 else tl.float32
    if x.ptr is not None:
        scale = noise_scale(sigma_ptr, col, col_mask, factor, LOG_VARIANCE, dtype)
    total = tl.zeros([BLOCK_K, BLOCK_R] if ROWS_LAST else [BLOCK_R, BLOCK_K], dtype)
    for row_block in range(tl.program_id(1), rows.blocks, tl.num_programs(1)):
        row, place = tile_at(rows, row_block, col, ROWS_LAST, VEC, BLOCK_R)
        g = load(du, place, dtype, ROWS_LAST, VEC)
        z = normal_tile(key, last_word, origin.row0 + row, group, ROWS_LAST).to(dtype)
        total = tl.fma(g, z, total)
        if x.ptr is not None:
            y = load(x, place, dtype, ROWS_LAST, VEC)
            _, s = across(row, scale, ROWS_LAST)
            store(u, place, tl.fma(tl.broadcast_to(s, z.shape), z, y), ROWS_LAST, VEC)
    store_partial(partial_ptr, total, rows.K * VEC, col, col_mask, ROWS_LAST)


@triton.jit
def _column_sum_kernel(
    dsigma_ptr,  # [K] float32 or float64, written
    partial_ptr,  # [P, K] float32 or float64
    sigma_ptr,  # [K]: ln(sigma^2), read if LOG_VARIANCE
    num_partials,
    K,
    factor: tl.float64,
    LOG_VARIANCE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dsigma = factor * sum over partial, times s / 2 if LOG_VARIANCE"""
    col = tl.cast(tl.program_id(0), tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = col < K
    dtype: tl.constexpr = partial_ptr.dtype.element_ty
    total = tl.zeros([BLOCK_P, BLOCK_K], dtype)
    for first in range(0, num_partials, BLOCK_P):
        p = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_P)[:, None]
        total += tl.load(
            partial_ptr + p * K + col[None, :], mask=(p < num_partials) & mask[None, :], other=0.0
        )
    scale = tl.cast(factor, dtype)
    if LOG_VARIANCE:
        # ds / d ln(sigma^2) = s / 2
        scale = 0.5 * noise_scale(sigma_ptr, col, mask, factor, LOG_VARIANCE, dtype)
    dsigma = (scale * tl.sum(total, axis=0)).to(dsigma_ptr.dtype.element_ty)
    tl.store(dsigma_ptr + col, dsigma, mask=mask)


def column_sum(out, partial, sigma=None, factor=1.0, log_variance=False):
    """out = factor * sum over partial [P, K], times s / 2 if log_variance: the second stage of
    every sum over rows"""
    block = {"BLOCK_P": 32, "BLOCK_K": 32}
    grid = (cdiv(partial.shape[1], block["BLOCK_K"]),)
    arguments = (out, partial, sigma, *partial.shape, factor)
    with on_device(partial):
        _column_sum_kernel[grid](*arguments, LOG_VARIANCE=log_variance, **block, **EXACT)
    return out


def perturb(x, sigma, seed, dim, row0, col0, sample, factor, log_variance, out_dtype):
    """u [x.shape] = x + factor * s * z, in x's strides where x is dense; s = exp(sigma / 2) if
    log_variance."""
    u = torch.empty_like(x, dtype=out_dtype)
    if u.numel() == 0:
        return u
    tile = tiling(dim, col0, TILE_ELEMENTS, u, x, None)
    if tile is None:  # three or more row dimensions that do not merge
        draw = (dim, row0, col0, sample, factor, log_variance)
        return u.copy_(perturb(x.contiguous(), sigma, seed, *draw, out_dtype))
    with on_device(x):
        perturb_fwd_kernel[tile.grid(x.device)](
            *(tile.rows(), *tile.operands(u, x, None)),
            *(sigma.contiguous(), seed, origin(row0, col0, sample), factor),
            ACTIVATION="identity",
            LOG_VARIANCE=log_variance,
            **tile.constants(),
        )
    return u


def _bwd(du, x, sigma, seed, dim, row0, col0, sample, factor, log_variance, out_dtype):
    replay = x is not None
    sigma = sigma.contiguous()
    u = torch.empty_like(x, dtype=out_dtype) if replay else None
    if du.numel() == 0:
        return u, torch.zeros_like(sigma)
    wide = replay and max(du.element_size(), x.element_size()) >= 4
    elements = SUM_ELEMENTS // 2 if wide else SUM_ELEMENTS
    tile = tiling(dim, col0, elements, u, du, x)
    if tile is None:
        draw = (dim, row0, col0, sample, factor, log_variance)
        dense_u, dsigma = _bwd(*dense(du, x), sigma, seed, *draw, out_dtype)
        return u.copy_(dense_u) if replay else None, dsigma
    grid = tile.sum_grid(du.device)
    dtype = torch.promote_types(du.dtype, torch.float32)
    dtype = torch.promote_types(dtype, x.dtype) if replay else dtype
    partial = torch.empty(grid[1], tile.k, dtype=dtype, device=du.device)
    with on_device(du):
        _perturb_bwd_kernel[grid](
            *tile.operands(u, du, x),
            *(partial, sigma, seed, tile.rows(), origin(row0, col0, sample), factor),
            LOG_VARIANCE=log_variance,
            **tile.constants(),
        )
    return u, column_sum(torch.empty_like(sigma), partial, sigma, factor, log_variance)


def perturb_bwd(du, sigma, seed, dim, row0, col0, sample, factor, log_variance):
    """dsigma [K] = factor * ds/dsigma * sum over rows of du * z, the adjoint of `perturb` in
    sigma."""
    return _bwd(du, None, sigma, seed, dim, row0, col0, sample, factor, log_variance, None)[1]


def perturb_replay(du, x, sigma, seed, dim, row0, col0, sample, factor, log_variance, out_dtype):
    """(u, dsigma) of `perturb` and `perturb_bwd` in one pass over (du, x)."""
    return _bwd(du, x, sigma, seed, dim, row0, col0, sample, factor, log_variance, out_dtype)
