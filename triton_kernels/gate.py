"""triton_kernels/gate.py: u = act(a) b + factor s z, and back.  docs/maths.md, section 10."""

import torch
import triton
import triton.language as tl

from .activations import act, act_bwd
from .noise import load_seed, normal_tile
from .perturb import SUM_ELEMENTS, column_sum, perturb_fwd_kernel, store_partial
from .tiles import (
    TILE_ELEMENTS,
    columns_at,
    dense,
    load,
    on_device,
    origin,
    store,
    tile_at,
    tiling,
)


def _resources(tile, dtype):
    """Warps, twice as many for channels, of which a thread would hold too many, and for float64;
    and all registers, which the compiler would now and then rather spill than take."""
    wide = tile.rows_last or dtype is torch.float64
    return {"num_warps": 8 if wide else 4, "maxnreg": 255}


@triton.jit
def _gate_bwd_kernel(
    da,  # written
    db,  # written where there is b
    du,
    a,
    b,  # its ptr may be None
    partial_ptr,  # [row programs, K] float32 (float64 for float64 data), written, or None: no draw
    seed_ptr,  # [2] int64: key, stream
    rows,
    origin,
    ACTIVATION: tl.constexpr,
    ROWS_LAST: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # where
    key, last_word = load_seed(seed_ptr, origin.sample)
    group, col = columns_at(tl.program_id(0), origin, BLOCK_K)
    col_mask = (col >= 0) & (col < rows.K * VEC)
    dtype: tl.constexpr = tl.float64 if a.ptr.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([BLOCK_K, BLOCK_R] if ROWS_LAST else [BLOCK_R, BLOCK_K], dtype)
    for row_block in range(tl.program_id(1), rows.blocks, tl.num_programs(1)):
        row, place = tile_at(rows, row_block, col, ROWS_LAST, VEC, BLOCK_R)
        # load
        g = load(du, place, dtype, ROWS_LAST, VEC)
        h = load(a, place, dtype, ROWS_LAST, VEC)
        # compute, store
        dy = g
        if b.ptr is not None:
            dy = g * load(b, place, dtype, ROWS_LAST, VEC)
            store(db, place, g * act(h, ACTIVATION), ROWS_LAST, VEC)
        store(da, place, act_bwd(dy, h, ACTIVATION), ROWS_LAST, VEC)
        if partial_ptr is not None:
            z = normal_tile(key, last_word, origin.row0 + row, group, ROWS_LAST).to(dtype)
            total = tl.fma(g, z, total)
    if partial_ptr is not None:
        store_partial(partial_ptr, total, rows.K * VEC, col, col_mask, ROWS_LAST)


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
        rest = (sigma, seed, dim, row0, col0, sample, factor, log_variance, activation, out_dtype)
        return u.copy_(gate(*dense(a, b), *rest))
    with on_device(a):
        perturb_fwd_kernel[tile.grid(a.device)](
            *(tile.rows(), *tile.operands(u, a, b)),
            *(sigma.contiguous(), seed, origin(row0, col0, sample), factor),
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
        rest = (sigma, seed, dim, row0, col0, sample, factor, log_variance, activation)
        dense_da, dense_db, dsigma = gate_bwd(*dense(du, a, b), *rest)
        return da.copy_(dense_da), db.copy_(dense_db), dsigma
    grid = tile.sum_grid(du.device)
    partial = None
    if sigma is not None:
        dtype = torch.float64 if a.dtype is torch.float64 else torch.float32
        partial = torch.empty(grid[1], tile.k, dtype=dtype, device=du.device)
    with on_device(du):
        _gate_bwd_kernel[grid](
            *tile.operands(da, written, du, a, b),
            *(partial, seed, tile.rows(), origin(row0, col0, sample)),
            ACTIVATION=activation,
            **tile.constants(),
            **_resources(tile, a.dtype),
        )
    if sigma is not None:
        column_sum(dsigma, partial, sigma.contiguous(), factor, log_variance)
    return da, db, dsigma
