"""triton_kernels/perturb.py: u = x + factor s z, dsigma = factor sum(du z) over rows.
docs/maths.md, sections 1, 5."""

import torch
import triton
import triton.language as tl

from .noise import load_seed, noise, normal_tile
from .tickets import is_last_program, take_tickets
from .tiles import (
    EXACT,
    NARROW_COLUMNS,
    TILE_ELEMENTS,
    WIDE_COLUMNS,
    across,
    columns_at,
    on_device,
    row_count,
    rows_at,
    tile_mask,
    tile_offsets,
    tiling,
)

__all__ = ["noise", "perturb", "perturb_bwd", "perturb_replay"]

# Accumulators stay in registers across row tiles, so the tiles of the sums are half as large; a
# quarter for the combined form of 4-byte data, which holds two inputs.
SUM_ELEMENTS = 2048
# Whether P, and Q and the combined form, take their rows from the last to the first, which the
# kernel before left in L2. P's results are the same bits, Q's may differ in the last ones. Not
# measured yet; P then holds 72 registers instead of 64.
P_FROM_END, SUMS_FROM_END = False, False
# Whether the last program of each column of the grid adds the partial sums up (Q, the combined
# form, gate.py), instead of a second launch. Then tiles are narrow, so that little is left for that
# one program: 33 partials for each of 64 columns at K = 1024 on an H100, where 132 for each of 256
# would be. Not measured yet.
ONE_LAUNCH = False


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
def _add_partials(
    out_ptr,  # [K] of any type, written
    partial_ptr,  # [num_partials, K] float32 or float64
    sigma_ptr,  # [K]: ln(sigma^2), read if LOG_VARIANCE
    num_partials,
    K,
    col,  # [BLOCK_K]
    mask,  # [BLOCK_K]
    factor,  # float64 scalar
    LOG_VARIANCE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = factor * sum over partial, times s / 2 if LOG_VARIANCE: one fixed order, whatever ran
    first"""
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
    tl.store(out_ptr + col, (scale * tl.sum(total, axis=0)).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def finish_sum(
    out_ptr,  # [K] of any type, written by the last program
    partial_ptr,  # [row programs, K] float32 or float64: this program has written its row
    sigma_ptr,  # [K]: ln(sigma^2), read if LOG_VARIANCE
    ticket_ptr,  # [column blocks] int32
    K,
    col,  # [BLOCK_K]: the columns of program_id(0), those outside of 0 .. K - 1 too
    factor,  # float64 scalar
    LOG_VARIANCE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The end of a kernel whose programs (column block, row) leave partial sums: the last row to
    arrive adds them up."""
    BLOCK_P: tl.constexpr = 2048 // BLOCK_K if BLOCK_K < 2048 else 1
    num_partials = tl.num_programs(1)
    if is_last_program(ticket_ptr + tl.program_id(0), num_partials):
        mask = (col >= 0) & (col < K)
        _add_partials(
            out_ptr,
            partial_ptr,
            sigma_ptr,
            num_partials,
            K,
            col,
            mask,
            factor,
            LOG_VARIANCE,
            BLOCK_P,
            BLOCK_K,
        )


@triton.jit
def _perturb_fwd_kernel(
    u_ptr,  # [rows, K], written
    x_ptr,  # [rows, K]
    sigma_ptr,  # [K] float32 or float64
    seed_ptr,  # [2] int64: key, stream
    num_row_blocks,
    num_outer,
    num_inner,
    outer_step,
    inner_step,
    K,  # from num_row_blocks to shift: Tiling.arguments
    u_outer,  # from here to row0: strides in elements
    u_inner,
    u_col,
    x_outer,
    x_inner,
    x_col,
    row0,  # the first row
    group0,  # col0 // 8
    shift,  # col0 % 8
    sample,
    factor: tl.float64,
    LOG_VARIANCE: tl.constexpr,
    ROWS_LAST: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FROM_END: tl.constexpr,
):
    # where
    key, last_word = load_seed(seed_ptr, sample)
    group, col = columns_at(tl.program_id(0), group0, shift, BLOCK_K)
    col_mask = (col >= 0) & (col < K * VEC)
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    scale = noise_scale(sigma_ptr, col, col_mask, factor, LOG_VARIANCE, dtype)
    first, last, step = tl.program_id(1), num_row_blocks, tl.num_programs(1)
    if FROM_END:
        # Neighbours, for not all programs run at once: strided blocks would be a walk in four
        # places.
        each = tl.cdiv(num_row_blocks, step)
        first, last, step = first * each, tl.minimum(first * each + each, num_row_blocks), 1
    for i in range(first, last, step):
        row_block = num_row_blocks - 1 - i if FROM_END else i
        outer, inner, row = rows_at(
            row_block, num_outer, num_inner, outer_step, inner_step, BLOCK_R
        )
        mask = tile_mask(inner, num_inner, col, K * VEC, ROWS_LAST)
        # load
        x_off = tile_offsets(outer, inner, col, x_outer * VEC, x_inner * VEC, x_col, ROWS_LAST)
        x = tl.load(x_ptr + x_off, mask=mask, other=0.0).to(dtype)
        # compute
        z = normal_tile(key, last_word, row0 + row, group, ROWS_LAST).to(dtype)
        _, s = across(row, scale, ROWS_LAST)
        u = tl.fma(tl.broadcast_to(s, z.shape), z, x)
        # store
        u_off = tile_offsets(outer, inner, col, u_outer * VEC, u_inner * VEC, u_col, ROWS_LAST)
        tl.store(u_ptr + u_off, u.to(u_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _perturb_bwd_kernel(
    partial_ptr,  # [row programs, K] float32 (float64 for float64 data), written
    dsigma_ptr,  # [K] float32 or float64, written if FINISH
    ticket_ptr,  # [column blocks] int32, 0 before and after, used if FINISH
    u_ptr,  # [rows, K], written if REPLAY
    du_ptr,  # [rows, K]
    x_ptr,  # [rows, K], read if REPLAY
    sigma_ptr,  # [K] float32 or float64, read if REPLAY, or if FINISH and LOG_VARIANCE
    seed_ptr,  # [2] int64: key, stream
    num_row_blocks,
    num_outer,
    num_inner,
    outer_step,
    inner_step,
    K,
    u_outer,
    u_inner,
    u_col,
    du_outer,
    du_inner,
    du_col,
    x_outer,
    x_inner,
    x_col,
    row0,  # the first row
    group0,  # col0 // 8
    shift,  # col0 % 8
    sample,
    factor: tl.float64,
    REPLAY: tl.constexpr,
    LOG_VARIANCE: tl.constexpr,
    ROWS_LAST: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FROM_END: tl.constexpr,
    FINISH: tl.constexpr,
):
    # where
    row_program = tl.program_id(1)
    key, last_word = load_seed(seed_ptr, sample)
    group, col = columns_at(tl.program_id(0), group0, shift, BLOCK_K)
    col_mask = (col >= 0) & (col < K * VEC)
    dtype: tl.constexpr = tl.float64 if partial_ptr.dtype.element_ty == tl.float64 else tl.float32
    if REPLAY:
        scale = noise_scale(sigma_ptr, col, col_mask, factor, LOG_VARIANCE, dtype)
    total = tl.zeros([BLOCK_K, BLOCK_R] if ROWS_LAST else [BLOCK_R, BLOCK_K], dtype)
    for i in range(row_program, num_row_blocks, tl.num_programs(1)):
        row_block = num_row_blocks - 1 - i if FROM_END else i
        outer, inner, row = rows_at(
            row_block, num_outer, num_inner, outer_step, inner_step, BLOCK_R
        )
        mask = tile_mask(inner, num_inner, col, K * VEC, ROWS_LAST)
        # load
        du_off = tile_offsets(outer, inner, col, du_outer * VEC, du_inner * VEC, du_col, ROWS_LAST)
        du = tl.load(du_ptr + du_off, mask=mask, other=0.0).to(dtype)
        # compute
        z = normal_tile(key, last_word, row0 + row, group, ROWS_LAST).to(dtype)
        total = tl.fma(du, z, total)
        if REPLAY:
            x_off = tile_offsets(outer, inner, col, x_outer * VEC, x_inner * VEC, x_col, ROWS_LAST)
            x = tl.load(x_ptr + x_off, mask=mask, other=0.0).to(dtype)
            _, s = across(row, scale, ROWS_LAST)
            u = tl.fma(tl.broadcast_to(s, z.shape), z, x)
            u_off = tile_offsets(outer, inner, col, u_outer * VEC, u_inner * VEC, u_col, ROWS_LAST)
            tl.store(u_ptr + u_off, u.to(u_ptr.dtype.element_ty), mask=mask)
    # store
    tl.store(
        partial_ptr + tl.cast(row_program, tl.int64) * K * VEC + col,
        tl.sum(total, axis=1 if ROWS_LAST else 0),
        mask=col_mask,
    )
    if FINISH:
        finish_sum(
            dsigma_ptr,
            partial_ptr,
            sigma_ptr,
            ticket_ptr,
            K * VEC,
            col,
            factor,
            LOG_VARIANCE,
            BLOCK_K,
        )


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
    col = tl.cast(tl.program_id(0), tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    _add_partials(
        dsigma_ptr,
        partial_ptr,
        sigma_ptr,
        num_partials,
        K,
        col,
        col < K,
        factor,
        LOG_VARIANCE,
        BLOCK_P,
        BLOCK_K,
    )


def column_sum(out, partial, sigma=None, factor=1.0, log_variance=False):
    """out = factor * sum over partial [P, K], times s / 2 if log_variance: the second stage of
    every sum over rows"""
    block = {"BLOCK_P": 32, "BLOCK_K": 32}
    grid = (triton.cdiv(partial.shape[1], block["BLOCK_K"]),)
    arguments = (out, partial, sigma, *partial.shape, factor)
    with on_device(partial):
        _column_sum_kernel[grid](*arguments, LOG_VARIANCE=log_variance, **block, **EXACT)
    return out


def sum_columns():
    """Of a tile of a sum"""
    return NARROW_COLUMNS if ONE_LAUNCH else WIDE_COLUMNS


def tickets_of_sum(grid, device):
    """What `finish_sum` counts on in a launch of this grid; None where `column_sum` has to
    follow."""
    return take_tickets(device, grid[0]) if ONE_LAUNCH else None


def perturb(x, sigma, seed, dim, row0, col0, sample, factor, log_variance, out_dtype):
    """u [x.shape] = x + factor * s * z, in x's strides where x is dense; s = exp(sigma / 2) if
    log_variance."""
    u = torch.empty_like(x, dtype=out_dtype)
    if u.numel() == 0:
        return u
    tile = tiling(dim, col0, TILE_ELEMENTS, u, x)
    if tile is None:  # three or more row dimensions that do not merge
        draw = (dim, row0, col0, sample, factor, log_variance)
        return u.copy_(perturb(x.contiguous(), sigma, seed, *draw, out_dtype))
    with on_device(x):
        _perturb_fwd_kernel[tile.grid(x.device)](
            *(u, x, sigma.contiguous(), seed),
            *tile.arguments(row0),
            *(sample, factor),
            LOG_VARIANCE=log_variance,
            FROM_END=P_FROM_END,
            **tile.constants(),
        )
    return u


def _bwd(du, x, sigma, seed, dim, row0, col0, sample, factor, log_variance, out_dtype):
    replay = x is not None
    sigma = sigma.contiguous()
    u = torch.empty_like(x, dtype=out_dtype) if replay else None
    if row_count(du.shape, dim) == 0 or sigma.numel() == 0:
        return u, torch.zeros_like(sigma)
    wide = replay and max(du.element_size(), x.element_size()) >= 4
    elements = SUM_ELEMENTS // 2 if wide else SUM_ELEMENTS
    tile = tiling(dim, col0, elements, u, du, x, columns=sum_columns())
    if tile is None:
        du, x = du.contiguous(), x.contiguous() if replay else None
        draw = (dim, row0, col0, sample, factor, log_variance)
        dense, dsigma = _bwd(du, x, sigma, seed, *draw, out_dtype)
        return u.copy_(dense) if replay else None, dsigma
    grid = tile.sum_grid(du.device)
    dtype = torch.promote_types(du.dtype, torch.float32)
    dtype = torch.promote_types(dtype, x.dtype) if replay else dtype
    partial = torch.empty(grid[1], tile.k, dtype=dtype, device=du.device)
    dsigma, tickets = torch.empty_like(sigma), tickets_of_sum(grid, du.device)
    with on_device(du):
        _perturb_bwd_kernel[grid](
            *(partial, dsigma, tickets, u, du, x, sigma, seed),
            *tile.arguments(row0),
            *(sample, factor),
            REPLAY=replay,
            LOG_VARIANCE=log_variance,
            FROM_END=SUMS_FROM_END,
            FINISH=tickets is not None,
            **tile.constants(),
        )
    if tickets is None:
        column_sum(dsigma, partial, sigma, factor, log_variance)
    return u, dsigma


def perturb_bwd(du, sigma, seed, dim, row0, col0, sample, factor, log_variance):
    """dsigma [K] = factor * ds/dsigma * sum over rows of du * z, the adjoint of `perturb` in
    sigma."""
    return _bwd(du, None, sigma, seed, dim, row0, col0, sample, factor, log_variance, None)[1]


def perturb_replay(du, x, sigma, seed, dim, row0, col0, sample, factor, log_variance, out_dtype):
    """(u, dsigma) of `perturb` and `perturb_bwd` in one pass over (du, x)."""
    return _bwd(du, x, sigma, seed, dim, row0, col0, sample, factor, log_variance, out_dtype)
