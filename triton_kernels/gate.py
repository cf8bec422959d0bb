"""triton_kernels/gate.py: u = act(a) b + factor s z, and back.  docs/maths.md, section 10."""

import torch
import triton
import triton.language as tl

from .activations import act, act_bwd
from .noise import load_seed, normal_tile
from .perturb import SUM_ELEMENTS, column_sum, perturb_fwd_kernel
from .tiles import (
    TILE_ELEMENTS,
    columns_at,
    on_device,
    rows_at,
    tile_mask,
    tile_offsets,
    tiling,
)


def _resources(tile, dtype):
    """Warps, twice as many for channels, of which a thread would hold too many, and for float64;
    and all registers, which the compiler would now and then rather spill than take."""
    wide = tile.rows_last or dtype is torch.float64
    return {"num_warps": 8 if wide else 4, "maxnreg": 255}


@triton.jit
def _gate_bwd_kernel(
    partial_ptr,  # [row programs, K] float32 (float64 for float64 data), written, or None: no draw
    da_ptr,  # [rows, K], written
    db_ptr,  # [rows, K], written where there is b
    du_ptr,  # [rows, K]
    a_ptr,  # [rows, K]
    b_ptr,  # [rows, K], or None
    seed_ptr,  # [2] int64: key, stream
    num_row_blocks,
    num_outer,
    num_inner,
    outer_step,
    inner_step,
    K,
    da_outer,
    da_inner,
    da_col,
    db_outer,
    db_inner,
    db_col,
    du_outer,
    du_inner,
    du_col,
    a_outer,
    a_inner,
    a_col,
    b_outer,
    b_inner,
    b_col,
    row0,  # the first row
    group0,  # col0 // 8
    shift,  # col0 % 8
    sample,
    ACTIVATION: tl.constexpr,
    ROWS_LAST: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # where
    row_program = tl.program_id(1)
    key, last_word = load_seed(seed_ptr, sample)
    group, col = columns_at(tl.program_id(0), group0, shift, BLOCK_K)
    col_mask = (col >= 0) & (col < K * VEC)
    dtype: tl.constexpr = tl.float64 if a_ptr.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([BLOCK_K, BLOCK_R] if ROWS_LAST else [BLOCK_R, BLOCK_K], dtype)
    for row_block in range(row_program, num_row_blocks, tl.num_programs(1)):
        outer, inner, row = rows_at(
            row_block, num_outer, num_inner, outer_step, inner_step, BLOCK_R
        )
        mask = tile_mask(inner, num_inner, col, K * VEC, ROWS_LAST)
        # load
        du_off = tile_offsets(outer, inner, col, du_outer * VEC, du_inner * VEC, du_col, ROWS_LAST)
        du = tl.load(du_ptr + du_off, mask=mask, other=0.0).to(dtype)
        a_off = tile_offsets(outer, inner, col, a_outer * VEC, a_inner * VEC, a_col, ROWS_LAST)
        a = tl.load(a_ptr + a_off, mask=mask, other=0.0).to(dtype)
        # compute
        dy = du
        if b_ptr is not None:
            b_off = tile_offsets(outer, inner, col, b_outer * VEC, b_inner * VEC, b_col, ROWS_LAST)
            dy = du * tl.load(b_ptr + b_off, mask=mask, other=0.0).to(dtype)
            db_off = tile_offsets(
                outer, inner, col, db_outer * VEC, db_inner * VEC, db_col, ROWS_LAST
            )
            tl.store(
                db_ptr + db_off, (du * act(a, ACTIVATION)).to(db_ptr.dtype.element_ty), mask=mask
            )
        da = act_bwd(dy, a, ACTIVATION)
        # store
        da_off = tile_offsets(outer, inner, col, da_outer * VEC, da_inner * VEC, da_col, ROWS_LAST)
        tl.store(da_ptr + da_off, da.to(da_ptr.dtype.element_ty), mask=mask)
        if partial_ptr is not None:
            z = normal_tile(key, last_word, row0 + row, group, ROWS_LAST).to(dtype)
            total = tl.fma(du, z, total)
    if partial_ptr is not None:
        out = tl.cast(row_program, tl.int64) * K * VEC + col
        tl.store(partial_ptr + out, tl.sum(total, axis=1 if ROWS_LAST else 0), mask=col_mask)


def gate(a, b, sigma, seed, dim, row0, col0, sample, factor, log_variance, activation, out_dtype):
    """u [a.shape] = act(a) * b + factor * s * z, in a's strides where a is dense; s = exp(sigma /
    2) if log_variance. b None: 1."""
    u = torch.empty_like(a, dtype=out_dtype)
    if u.numel() == 0:
        return u
    # Wide data and a gate have more to hold.
    elements = 2 * TILE_ELEMENTS // max(2, a.element_size()) // (1 if b is None else 2)
    tile = tiling(dim, col0, elements, u, a, b)
    if tile is None:  # three or more row dimensions that do not merge
        b = None if b is None else b.contiguous()
        rest = (sigma, seed, dim, row0, col0, sample, factor, log_variance, activation, out_dtype)
        return u.copy_(gate(a.contiguous(), b, *rest))
    with on_device(a):
        perturb_fwd_kernel[tile.grid(a.device)](
            *(u, a, b, sigma.contiguous(), seed),
            *tile.arguments(row0),
            *(sample, factor),
            ACTIVATION=activation,
            LOG_VARIANCE=log_variance,
            **tile.constants(),
            **_resources(tile, a.dtype),
        )
    return u


def gate_bwd(du, a, b, sigma, seed, dim, row0, col0, sample, factor, log_variance, activation):
    """(da, db, dsigma) of `gate`, empty for what is None; without a sigma nothing is drawn."""
    da, written = torch.empty_like(a), None if b is None else torch.empty_like(b)
    db = du.new_empty(0, dtype=torch.float32) if b is None else written
    dsigma = du.new_empty(0, dtype=torch.float32) if sigma is None else sigma.new_empty(sigma.shape)
    if a.numel() == 0:
        return da, db, dsigma.zero_()
    # As perturb's sums: an accumulator stays in registers; wide data and a gate hold more beside
    # it.
    elements = SUM_ELEMENTS if a.element_size() == 2 and b is None else SUM_ELEMENTS // 2
    elements = SUM_ELEMENTS // 8 if a.element_size() == 8 else elements
    tile = tiling(dim, col0, elements, da, written, du, a, b)
    if tile is None:
        b = None if b is None else b.contiguous()
        rest = (sigma, seed, dim, row0, col0, sample, factor, log_variance, activation)
        dense_da, dense_db, dsigma = gate_bwd(du.contiguous(), a.contiguous(), b, *rest)
        return da.copy_(dense_da), db.copy_(dense_db), dsigma
    grid = tile.sum_grid(du.device)
    partial = None
    if sigma is not None:
        dtype = torch.float64 if a.dtype is torch.float64 else torch.float32
        partial = torch.empty(grid[1], tile.k, dtype=dtype, device=du.device)
    with on_device(du):
        _gate_bwd_kernel[grid](
            *(partial, da, written, du, a, b, seed),
            *tile.arguments(row0),
            sample,
            ACTIVATION=activation,
            **tile.constants(),
            **_resources(tile, a.dtype),
        )
    if sigma is not None:
        column_sum(dsigma, partial, sigma.contiguous(), factor, log_variance)
    return da, db, dsigma
