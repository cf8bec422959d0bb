"""triton_kernels/norm.py: h = (x - mean) rstd, u = h (offset + weight) + bias + factor s z, and
back.  docs/maths.md, section 10.

Forward a program takes whole rows; blocks of columns where many lanes would have none, or where it
does not hold a row. Back it takes whole rows up to what MAX_WARPS hold; beyond, a kernel before it
sums along the rows.
"""

import torch
import triton
import triton.language as tl

from .noise import load_seed, normal_tile
from .perturb import column_sum, noise_scale
from .tiles import (
    EXACT,
    cdiv,
    columns_at,
    dense,
    flat_rows,
    load_matrix,
    next_power_of_2,
    num_multiprocessors,
    on_device,
    origin,
)

# Of a program of four warps, 16 numbers of each operand a thread; half of it for float64.
TILE_ELEMENTS = 2048
MAX_WARPS = 8  # with more of them a thread has too few registers
# Else the compiler would now and then rather spill than take what there are.
ALL_REGISTERS = {"maxnreg": 255}


@triton.jit
def _columns(ptr, col, mask, OTHER: tl.constexpr, dtype: tl.constexpr):
    """[BK] numbers that belong to columns; OTHER where there are none"""
    if ptr is not None:
        return tl.load(ptr + col, mask=mask, other=0.0).to(dtype)
    else:
        return tl.full(col.shape, OTHER, dtype)


@triton.jit
def _weight(ptr, col, mask, offset, dtype: tl.constexpr):
    """[BK]: offset + weight, 1 where there is none"""
    weight = _columns(ptr, col, mask, 1.0, dtype)
    if ptr is not None:
        weight += tl.cast(offset, dtype)
    return weight


@triton.jit
def _root(x):
    """sqrt(x); tl.sqrt of float32 takes a subnormal x, which only an eps near 0 leaves, for 0."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def _norm_fwd_kernel(
    u_ptr,  # [M, K], written
    stats_ptr,  # [2, M] if CENTRED, else [1, M]: mean, rstd; float32 or float64, written
    x_ptr,  # [M, K]
    weight_ptr,  # [K], or None
    bias_ptr,  # [K], or None
    sigma_ptr,  # [K] float32 or float64
    seed_ptr,  # [2] int64: key, stream
    M,
    K,
    u_row,  # strides in elements
    x_row,
    origin,
    factor: tl.float64,
    eps: tl.float64,
    offset: tl.float64,
    CENTRED: tl.constexpr,
    LOG_VARIANCE: tl.constexpr,
    COL_BLOCKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # where
    dtype: tl.constexpr = stats_ptr.dtype.element_ty
    key, last_word = load_seed(seed_ptr, origin.sample)
    for row_block in range(tl.program_id(0), tl.cdiv(M, BLOCK_R), tl.num_programs(0)):
        row = tl.cast(row_block, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        # load, and the sums along a row
        sums = tl.zeros([BLOCK_R, BLOCK_K], dtype)
        x = tl.zeros([BLOCK_R, BLOCK_K], dtype)
        if CENTRED:
            for c in range(COL_BLOCKS):
                _, col = columns_at(c, origin, BLOCK_K)
                mask = (row < M)[:, None] & ((col >= 0) & (col < K))[None, :]
                x = load_matrix(x_ptr, row, col, mask, x_row, dtype)
                sums += x
        mean = tl.sum(sums, axis=1) / K
        squares = tl.zeros([BLOCK_R, BLOCK_K], dtype)
        for c in range(COL_BLOCKS):
            _, col = columns_at(c, origin, BLOCK_K)
            inside = (col >= 0) & (col < K)
            mask = (row < M)[:, None] & inside[None, :]
            if not CENTRED or COL_BLOCKS > 1:
                x = load_matrix(x_ptr, row, col, mask, x_row, dtype)
            centred = tl.where(inside[None, :], x - mean[:, None], 0.0)
            squares = tl.fma(centred, centred, squares)
        rstd = 1.0 / _root(tl.sum(squares, axis=1) / K + tl.cast(eps, dtype))
        if CENTRED:
            tl.store(stats_ptr + row, mean, mask=row < M)
            tl.store(stats_ptr + M + row, rstd, mask=row < M)
        else:
            tl.store(stats_ptr + row, rstd, mask=row < M)
        for c in range(COL_BLOCKS):
            group, col = columns_at(c, origin, BLOCK_K)
            inside = (col >= 0) & (col < K)
            mask = (row < M)[:, None] & inside[None, :]
            if COL_BLOCKS > 1:
                x = load_matrix(x_ptr, row, col, mask, x_row, dtype)
            # compute
            weight = _weight(weight_ptr, col, inside, offset, dtype)
            bias = _columns(bias_ptr, col, inside, 0.0, dtype)
            scale = noise_scale(sigma_ptr, col, inside, factor, LOG_VARIANCE, dtype)
            z = normal_tile(key, last_word, origin.row0 + row, group, False).to(dtype)
            h = (x - mean[:, None]) * rstd[:, None]
            y = tl.fma(
                h,
                tl.broadcast_to(weight[None, :], h.shape),
                tl.broadcast_to(bias[None, :], h.shape),
            )
            u = tl.fma(tl.broadcast_to(scale[None, :], z.shape), z, y)
            # store
            u_off = (row * u_row)[:, None] + col[None, :]
            tl.store(u_ptr + u_off, u.to(u_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_sums_kernel(
    means_ptr,  # [2, M] float32 or float64, written: of g and of g h along a row
    du_ptr,  # [M, K]
    x_ptr,  # [M, K]
    stats_ptr,  # as _norm_fwd_kernel writes it
    weight_ptr,  # [K], or None
    M,
    K,
    du_row,
    x_row,
    offset: tl.float64,
    CENTRED: tl.constexpr,
    COL_BLOCKS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    dtype: tl.constexpr = stats_ptr.dtype.element_ty
    row = tl.cast(tl.program_id(0), tl.int64) + tl.arange(0, 1)
    rstd = tl.load(stats_ptr + row + (M if CENTRED else 0))
    mean = tl.load(stats_ptr + row) if CENTRED else rstd * 0.0
    sums = tl.zeros([1], dtype)
    products = tl.zeros([1], dtype)
    for c in range(COL_BLOCKS):
        col = tl.cast(c, tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = col < K
        mask = inside[None, :]
        weight = _weight(weight_ptr, col, inside, offset, dtype)
        g = load_matrix(du_ptr, row, col, mask, du_row, dtype) * weight[None, :]
        h = (load_matrix(x_ptr, row, col, mask, x_row, dtype) - mean[:, None]) * rstd[:, None]
        sums += tl.sum(g, axis=1)
        products += tl.sum(g * h, axis=1)
    tl.store(means_ptr + row, sums / K)
    tl.store(means_ptr + M + row, products / K)


@triton.jit
def _norm_bwd_kernel(
    partial_ptr,  # [3, row programs, K] float32 or float64, written: sums of du h, du, du z
    dx_ptr,  # [M, K], written
    du_ptr,  # [M, K]
    x_ptr,  # [M, K]
    stats_ptr,  # as _norm_fwd_kernel writes it
    means_ptr,  # as _norm_sums_kernel writes it; read unless WHOLE
    weight_ptr,  # [K], or None
    seed_ptr,  # [2] int64: key, stream
    M,
    K,
    dx_row,
    du_row,
    x_row,
    origin,
    offset: tl.float64,
    CENTRED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DRAWS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # where
    dtype: tl.constexpr = stats_ptr.dtype.element_ty
    key, last_word = load_seed(seed_ptr, origin.sample)
    group, col = columns_at(tl.program_id(0), origin, BLOCK_K)
    inside = (col >= 0) & (col < K)
    weight = _weight(weight_ptr, col, inside, offset, dtype)
    dweight = tl.zeros([BLOCK_R, BLOCK_K], dtype)
    dbias = tl.zeros([BLOCK_R, BLOCK_K], dtype)
    dsigma = tl.zeros([BLOCK_R, BLOCK_K], dtype)
    for row_block in range(tl.program_id(1), tl.cdiv(M, BLOCK_R), tl.num_programs(1)):
        row = tl.cast(row_block, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = (row < M)[:, None] & inside[None, :]
        # load
        rstd = tl.load(stats_ptr + row + (M if CENTRED else 0), mask=row < M, other=0.0)
        mean = tl.load(stats_ptr + row, mask=row < M, other=0.0) if CENTRED else rstd * 0.0
        du = load_matrix(du_ptr, row, col, mask, du_row, dtype)
        h = (load_matrix(x_ptr, row, col, mask, x_row, dtype) - mean[:, None]) * rstd[:, None]
        # compute
        g = du * weight[None, :]
        if WHOLE:
            slope = tl.sum(g * h, axis=1) / K
            shift_of = tl.sum(g, axis=1) / K if CENTRED else slope * 0.0
        else:
            slope = tl.load(means_ptr + M + row, mask=row < M, other=0.0)
            shift_of = tl.load(means_ptr + row, mask=row < M, other=0.0) if CENTRED else slope * 0.0
        dx = rstd[:, None] * (g - shift_of[:, None] - h * slope[:, None])
        # store
        dx_off = (row * dx_row)[:, None] + col[None, :]
        tl.store(dx_ptr + dx_off, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if weight_ptr is not None:
            dweight = tl.fma(du, h, dweight)
        if HAS_BIAS:
            dbias += du
        if DRAWS:
            z = normal_tile(key, last_word, origin.row0 + row, group, False).to(dtype)
            dsigma = tl.fma(du, z, dsigma)
    out = tl.cast(tl.program_id(1), tl.int64) * K + col
    each = tl.cast(tl.num_programs(1), tl.int64) * K
    if weight_ptr is not None:
        tl.store(partial_ptr + out, tl.sum(dweight, axis=0), mask=inside)
    if HAS_BIAS:
        tl.store(partial_ptr + each + out, tl.sum(dbias, axis=0), mask=inside)
    if DRAWS:
        tl.store(partial_ptr + 2 * each + out, tl.sum(dsigma, axis=0), mask=inside)


def _whole_columns(dtype):
    """Of a row that a program holds"""
    return TILE_ELEMENTS * MAX_WARPS // (8 if dtype is torch.float64 else 4)


def _forward_columns(k, shift, dtype):
    """Of a forward tile: a whole row, whose lanes are a power of two; a block, where an eighth or
    more of those would idle or no program holds a row. Rows are read again then, and two or more
    share weight and sigma: in L1, which rows of more than 32 KiB would overrun, and by wide loads,
    as single ones would spill."""
    whole, lanes = _whole_columns(dtype), next_power_of_2(k)
    is_wide = shift == 0 and k % 16 == 0 and k * dtype.itemsize <= 32 * 1024
    if not is_wide or (lanes <= whole and 8 * (lanes - k) < lanes):
        return whole
    return next((block for block in (1024, 512, 256) if 8 * (-k % block) <= k), whole)


def _tile(m, k, dtype, limit):
    """BLOCK_R, BLOCK_K and num_warps, by name"""
    elements = TILE_ELEMENTS // 2 if dtype is torch.float64 else TILE_ELEMENTS
    block_k = max(8, min(next_power_of_2(k), limit))
    block_r = max(1, min(next_power_of_2(max(m, 1)), elements // block_k))
    num_warps = max(4, min(MAX_WARPS, 4 * block_r * block_k // elements))
    return {"BLOCK_R": block_r, "BLOCK_K": block_k, "num_warps": num_warps}


def norm(x, weight, bias, sigma, seed, *draw_and_norm):
    """(u, stats): u [x.shape] = h (offset + weight) + bias + factor * s * z, h the normalised x;
    stats [mean, rstd] or [rstd]."""
    _, row0, col0, sample, factor, log_variance, kind, eps, offset, out_dtype = draw_and_norm
    m, k, shift, centred = x.shape[:-1].numel(), x.shape[-1], col0 % 8, kind == "layer"
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    u = torch.empty_like(x, dtype=out_dtype, memory_format=torch.contiguous_format)
    stats = torch.empty(1 + centred, m, dtype=wide, device=x.device)
    if u.numel() == 0:
        return u, stats.zero_()  # of nothing
    rows, flat_u = flat_rows(x), flat_rows(u)
    weight, bias, sigma = dense(weight, bias, sigma)
    tile = _tile(m, k + shift, x.dtype, _forward_columns(k, shift, x.dtype))
    grid = (min(cdiv(m, tile["BLOCK_R"]), 32 * num_multiprocessors(x.device)),)
    tensors = (flat_u, stats, rows, weight, bias, sigma, seed)
    sizes = (m, k, flat_u.stride(0), rows.stride(0))
    with on_device(x):
        _norm_fwd_kernel[grid](
            *tensors,
            *sizes,
            *(origin(row0, col0, sample), factor, eps, offset),
            CENTRED=centred,
            LOG_VARIANCE=log_variance,
            COL_BLOCKS=cdiv(k + shift, tile["BLOCK_K"]),
            **tile,
            **EXACT,
            **ALL_REGISTERS,
        )
    return u, stats


def norm_bwd(du, x, stats, weight, bias, sigma, seed, *draw_and_norm):
    """(dx, dweight, dbias, dsigma) of `norm`, empty for what is None; without a sigma nothing is
    drawn."""
    _, row0, col0, sample, factor, log_variance, kind, offset = draw_and_norm
    m, k, shift = x.shape[:-1].numel(), x.shape[-1], col0 % 8
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    weight, bias, sigma = columns = dense(weight, bias, sigma)
    grads = [
        du.new_empty(0, dtype=torch.float32) if t is None else torch.empty_like(t) for t in columns
    ]
    if x.numel() == 0:
        return dx, *(grad.zero_() for grad in grads)
    rows, flat_du, flat_dx, wide = flat_rows(x), flat_rows(du), flat_rows(dx), stats.dtype
    whole = k + shift <= _whole_columns(x.dtype)
    tile = _tile(m, k + shift, x.dtype, _whole_columns(x.dtype) if whole else 256)
    col_blocks = cdiv(k + shift, tile["BLOCK_K"])
    fill = cdiv(4 * num_multiprocessors(x.device), col_blocks)
    programs = max(1, min(cdiv(m, tile["BLOCK_R"]), fill))
    partial = torch.empty(3, programs, k, dtype=wide, device=x.device)
    strides = (flat_du.stride(0), rows.stride(0))
    means = None
    with on_device(x):
        if not whole:
            means = torch.empty(2, m, dtype=wide, device=x.device)
            _norm_sums_kernel[(m,)](
                *(means, flat_du, rows, stats, weight),
                *(m, k, *strides, offset),
                COL_BLOCKS=cdiv(k, TILE_ELEMENTS),
                BLOCK_K=TILE_ELEMENTS,
                CENTRED=kind == "layer",
                **EXACT,
                **ALL_REGISTERS,
            )
        _norm_bwd_kernel[(col_blocks, programs)](
            *(partial, flat_dx, flat_du, rows, stats, means, weight, seed),
            *(m, k, flat_dx.stride(0), *strides),
            *(origin(row0, col0, sample), offset),
            HAS_BIAS=bias is not None,
            DRAWS=sigma is not None,
            WHOLE=whole,
            CENTRED=kind == "layer",
            **tile,
            **EXACT,
            **ALL_REGISTERS,
        )
    if weight is not None:
        column_sum(grads[0], partial[0])
    if bias is not None:
        column_sum(grads[1], partial[1])
    if sigma is not None:
        column_sum(grads[2], partial[2], sigma, factor, log_variance)
    return dx, *grads
