"""triton_kernels/linear.py: y = mean_i act((x + factor s z_i) W^T + b), u unstored.  docs/maths.md,
sections 2, 4."""

import functools
import os

import torch
import triton
import triton.language as tl

from .activations import act, act_bwd
from .blocks import Blocks, blocks, candidates, splits
from .mixtures import MIXTURES
from .noise import load_seed, normal_tile
from .perturb import column_sum, noise_scale
from .tiles import (
    EXACT,
    cdiv,
    columns_at,
    flat_rows,
    load_matrix,
    num_multiprocessors,
    on_device,
    origin,
)

OPERANDS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
ACTIVATIONS = (None, "relu", *MIXTURES)


@triton.jit
def _noised_tile(
    x_ptr,
    sigma_ptr,
    key,
    last_word,
    row,  # [R] int64: into x
    col,  # [BK] int: into x, of whole groups
    group,  # [BK / 8] int
    M,
    K,
    x_stride_m,
    row0,  # the first row
    factor,
    dtype: tl.constexpr,  # of u, the weight's
    LOG_VARIANCE: tl.constexpr,
):
    """u = x + factor s z, rounded to the weight's type; zero outside of x"""
    col_mask = (col >= 0) & (col < K)
    mask = (row < M)[:, None] & col_mask[None, :]
    x = load_matrix(x_ptr, row, col, mask, x_stride_m, tl.float32)
    # A masked column has sigma 0, and a masked row meets a zero or is not stored.
    s = noise_scale(sigma_ptr, col, col_mask, factor, LOG_VARIANCE, tl.float32)
    if LOG_VARIANCE:
        s = tl.where(col_mask, s, 0.0)
    z = normal_tile(key, last_word, row0 + row, group, False)
    return tl.fma(tl.broadcast_to(s[None, :], z.shape), z, x).to(dtype)


@triton.jit
def _tile_of(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """(m, n) block of a program: GROUP_M blocks of rows share the weight's tiles in cache."""
    width = GROUP_M * num_n
    first_m = pid // width * GROUP_M
    height = min(num_m - first_m, GROUP_M)
    return first_m + pid % width % height, pid % width // height


@triton.jit
def _linear_fwd_kernel(
    y_ptr,  # [M, N] contiguous, written: y, or d loss / dh where there is dy
    x_ptr,  # [M, K], column stride 1
    weight_ptr,  # [N, K], column stride 1
    bias_ptr,  # [N], or None
    sigma_ptr,  # [K] float32
    # [M, N] contiguous, or None; of one sample of the backward pass: dy * act'(h) * inv_num_samples
    dy_ptr,
    seed_ptr,  # [2] int64: key, stream
    M,
    N,
    K,
    x_stride_m,
    weight_stride_n,
    origin,
    num_samples,
    inv_num_samples,
    factor: tl.float64,
    LOG_VARIANCE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PASSES: tl.constexpr,  # num_samples > 1: one after another, their results averaged
    PRECISION: tl.constexpr,
    VEC: tl.constexpr,  # sizes and strides come divided by it: see _divided
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # where
    N, K, x_stride_m, weight_stride_n = N * VEC, K * VEC, x_stride_m * VEC, weight_stride_n * VEC
    key, last_word = load_seed(seed_ptr, origin.sample)
    pid_m, pid_n = _tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    row = tl.cast(pid_m, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    out = tl.cast(pid_n, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (row < M)[:, None] & (out < N)[None, :]
    bias = tl.zeros([1, BLOCK_N], tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + out, mask=out < N, other=0.0).to(tl.float32)[None, :]
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    passes = num_samples if PASSES else 1
    # compute
    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(passes):
        h = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in range(0, K + origin.shift, BLOCK_K):
            col = first + tl.arange(0, BLOCK_K) - origin.shift
            # [BM, BK]
            u = _noised_tile(
                x_ptr,
                sigma_ptr,
                key,
                (last_word + i).to(tl.uint32),
                row,
                col,
                origin.group0 + first // 8 + tl.arange(0, BLOCK_K // 8),
                M,
                K,
                x_stride_m,
                origin.row0,
                factor,
                dtype,
                LOG_VARIANCE,
            )
            # [BK, BN]
            w = tl.load(
                weight_ptr + (out * weight_stride_n)[None, :] + col[:, None],
                mask=(out < N)[None, :] & ((col >= 0) & (col < K))[:, None],
                other=0.0,
            )
            h = tl.dot(u, w, h, input_precision=PRECISION)
        h += bias
        if dy_ptr is not None:
            dy = load_matrix(dy_ptr, row, out, mask, N, tl.float32)
            y = act_bwd(dy, h, ACTIVATION) * tl.cast(inv_num_samples, tl.float32)
        elif PASSES:
            y += act(h, ACTIVATION)
        else:
            y = act(h, ACTIVATION)
    if PASSES:
        y *= tl.cast(inv_num_samples, tl.float32)
    # store
    tl.store(y_ptr + (row * N)[:, None] + out[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _linear_bwd_x_kernel(
    dx_ptr,  # [M, K] contiguous, written
    partial_ptr,  # [row blocks, K] float32, written: sums of dx * z over the rows of a block
    dy_ptr,  # [M, N], column stride 1
    weight_ptr,  # [N, K], column stride 1
    seed_ptr,  # [2] int64: key, stream
    M,
    N,
    K,
    dy_stride_m,
    weight_stride_n,
    origin,
    PRECISION: tl.constexpr,
    VEC: tl.constexpr,  # sizes and strides come divided by it: see _divided
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # where
    N, K, dy_stride_m, weight_stride_n = N * VEC, K * VEC, dy_stride_m * VEC, weight_stride_n * VEC
    key, last_word = load_seed(seed_ptr, origin.sample)
    pid_m, pid_k = _tile_of(
        tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K + origin.shift, BLOCK_K), GROUP_M
    )
    row = tl.cast(pid_m, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    group, col = columns_at(pid_k, origin, BLOCK_K)
    col_mask = (col >= 0) & (col < K)
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    # compute
    dx = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(0, N, BLOCK_N):
        out = start + tl.arange(0, BLOCK_N)
        # [BM, BN]
        mask = (row < M)[:, None] & (out < N)[None, :]
        dy = load_matrix(dy_ptr, row, out, mask, dy_stride_m, dtype)
        # [BN, BK]
        mask, out = (out < N)[:, None] & col_mask[None, :], tl.cast(out, tl.int64)
        w = load_matrix(weight_ptr, out, col, mask, weight_stride_n, dtype)
        dx = tl.dot(dy, w, dx, input_precision=PRECISION)
    # store
    mask = (row < M)[:, None] & col_mask[None, :]
    tl.store(dx_ptr + (row * K)[:, None] + col[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
    # Rows past the end are zero in dx, so they add nothing.
    z = normal_tile(key, last_word, origin.row0 + row, group, False)
    tl.store(
        partial_ptr + tl.cast(pid_m, tl.int64) * K + col, tl.sum(dx * z, axis=0), mask=col_mask
    )


@triton.jit
def _linear_bwd_weight_kernel(
    dweight_ptr,  # [splits, N, K] contiguous, written: a sum over each split's rows
    dy_ptr,  # [M, N], column stride 1
    x_ptr,  # [M, K], column stride 1
    sigma_ptr,  # [K] float32
    seed_ptr,  # [2] int64: key, stream
    M,
    N,
    K,
    split_rows,  # rows of a split
    dy_stride_m,
    x_stride_m,
    origin,
    factor: tl.float64,
    DTYPE: tl.constexpr,  # of the product's operands: the weight's
    LOG_VARIANCE: tl.constexpr,
    PRECISION: tl.constexpr,
    VEC: tl.constexpr,  # sizes and strides come divided by it: see _divided
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # where
    N, K, dy_stride_m, x_stride_m = N * VEC, K * VEC, dy_stride_m * VEC, x_stride_m * VEC
    key, last_word = load_seed(seed_ptr, origin.sample)
    pid_n, pid_k = _tile_of(
        tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(K + origin.shift, BLOCK_K), GROUP_M
    )
    split = tl.cast(tl.program_id(1), tl.int64)
    out = tl.cast(pid_n, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    group, col = columns_at(pid_k, origin, BLOCK_K)
    end = tl.minimum(M, (split + 1) * split_rows)
    # compute
    dweight = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(split * split_rows, end, BLOCK_M):
        row = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_M)
        # [BM, BN]
        mask = (row < end)[:, None] & (out < N)[None, :]
        dy = load_matrix(dy_ptr, row, out, mask, dy_stride_m, DTYPE)
        # [BM, BK]
        u = _noised_tile(
            x_ptr,
            sigma_ptr,
            key,
            last_word,
            row,
            col,
            group,
            M,
            K,
            x_stride_m,
            origin.row0,
            factor,
            DTYPE,
            LOG_VARIANCE,
        )
        dweight = tl.dot(tl.trans(dy), u, dweight, input_precision=PRECISION)
    # store
    tl.store(
        dweight_ptr + split * N * K + (out * K)[:, None] + col[None, :],
        dweight.to(dweight_ptr.dtype.element_ty),
        mask=(out < N)[:, None] & ((col >= 0) & (col < K))[None, :],
    )


def _architecture(device: torch.device) -> int:
    """10 * major + minor of compute capability; 90 where there is no GPU (the interpreter)."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _tuned(kernel, op: str, chosen: Blocks):
    """The kernel with its candidates; a tile's choice holds for every number of rows."""
    configs = []
    for c in candidates(chosen, op):
        block = {name: value for name, value in vars(c).items() if name.isupper()}
        configs.append(triton.Config(block, c.num_warps, c.num_stages))
    return triton.autotune(configs, key=["N", "K"])(kernel)


def _autotunes() -> bool:
    value = os.environ.get("DIPKERNELS_AUTOTUNE") or "0"
    if value not in ("0", "1"):
        raise ValueError(f"DIPKERNELS_AUTOTUNE: expected one of ('0', '1'), got {value!r}")
    return value == "1"


def _launch(kernel, op: str, grid, chosen: Blocks, *args, **constants) -> None:
    if _autotunes() and not triton.knobs.runtime.interpret:
        kernel = _tuned(kernel, op, chosen)
    else:
        constants |= vars(chosen)
    kernel[grid](*args, **constants, **EXACT)


def _precision() -> str:
    """As torch.matmul multiplies float32 on a GPU; 16-bit operands do not ask.

    torch.get_float32_matmul_precision raises once a user has chosen by torch.backends.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _divided(shift: int, *sizes: int) -> tuple[int, list[int]]:
    """(8, the sizes and strides divided by it) where each is a multiple of 8, which tells the
    compiler of aligned rows; otherwise (1, themselves)."""
    vec = 8 if shift == 0 and all(size % 8 == 0 and size < 2**31 for size in sizes) else 1
    return vec, [size // vec for size in sizes]


def _check(x, weight, num_samples, activation) -> None:
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.dtype not in OPERANDS:
            raise TypeError(f"{name}: expected one of {tuple(OPERANDS)}, got {tensor.dtype}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
    if activation is None and num_samples != 1:
        raise ValueError(f"num_samples: expected 1 with activation 'identity', got {num_samples}")
    if num_samples < 1:
        raise ValueError(f"num_samples: expected 1 or more, got {num_samples}")


def _forward(x, weight, bias, sigma, seed, draw, num_samples, activation, out_dtype, dy=None):
    """y [M, N] of a flat x; with dy the gradient at the pre-activation of the first sample, over
    num_samples. draw: row0, col0, sample, factor, log_variance"""
    (m, k), n = x.shape, weight.shape[0]
    row0, col0, sample, factor, log_variance = draw
    y = torch.empty(m, n, dtype=out_dtype, device=x.device)
    if y.numel() == 0:
        return y
    bias = None if bias is None else bias.contiguous()
    vec, sizes = _divided(col0 % 8, n, k, x.stride(0), weight.stride(0))
    regular = vec == 8 and x.element_size() <= weight.element_size()
    # The smaller tile also where a slope's registers come on top of those of unaligned loads.
    passes = num_samples > 1 and dy is None
    op = "fwd_mean" if passes or (dy is not None and not regular) else "fwd"
    chosen = blocks(op, _architecture(x.device), m, n, k, weight.element_size(), regular)
    with on_device(x):
        _launch(
            _linear_fwd_kernel,
            op,
            lambda meta: (cdiv(m, meta["BLOCK_M"]) * cdiv(n, meta["BLOCK_N"]),),
            chosen,
            *(y, x, weight, bias, sigma, dy, seed),
            *(m, *sizes),
            origin(row0, col0, sample),
            *(num_samples if passes else 1, 1.0 / num_samples, factor),
            LOG_VARIANCE=log_variance,
            ACTIVATION=activation,
            PASSES=passes,
            PRECISION=_precision(),
            VEC=vec,
        )
    return y


def linear(
    x,
    weight,
    bias,
    sigma,
    seed,
    row0,
    col0,
    sample,
    factor,
    log_variance,
    num_samples=1,
    activation="identity",
    out_dtype=None,
):
    """y [..., N] = mean over samples of act((x + factor s z_s) W^T + b); x [..., K], weight [N, K],
    sigma [K].

    u is rounded to the weight's type, as the layer's two-step form rounds it. Without an activation
    num_samples is 1. out_dtype: default x's. Raises ValueError or TypeError for what it cannot
    take; shapes are checked before.
    """
    activation = None if activation == "identity" else activation
    _check(x, weight, num_samples, activation)
    flat = flat_rows(x)
    draw, scale = (row0, col0, sample, factor, log_variance), sigma.contiguous()
    how = (draw, num_samples, activation, out_dtype or x.dtype)
    y = _forward(flat, flat_rows(weight), bias, scale, seed, *how)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def linear_bwd_x(dy, weight, sigma, seed, row0, col0, sample, factor, log_variance, out_dtype=None):
    """(dx [..., K], dsigma [K]) of an affine layer: dx = dy W, dsigma = factor ds/dsigma sum over
    rows of dx z."""
    flat, weight, sigma = flat_rows(dy), flat_rows(weight), sigma.contiguous()
    (m, n), k = flat.shape, weight.shape[1]
    dx = torch.empty(m, k, dtype=out_dtype or dy.dtype, device=dy.device)
    if m == 0 or k == 0:
        return dx.reshape(*dy.shape[:-1], k), torch.zeros_like(sigma)
    vec, sizes = _divided(col0 % 8, n, k, flat.stride(0), weight.stride(0))
    op = "bwd_x_unaligned" if vec == 1 else "bwd_x"
    chosen = blocks(op, _architecture(dy.device), m, n, k, weight.element_size())
    row_blocks = cdiv(m, chosen.BLOCK_M)
    partial = torch.empty(row_blocks, k, dtype=torch.float32, device=dy.device)
    with on_device(dy):
        _launch(
            _linear_bwd_x_kernel,
            op,
            lambda meta: (row_blocks * cdiv(k + col0 % 8, meta["BLOCK_K"]),),
            chosen,
            *(dx, partial, flat, weight, seed),
            *(m, *sizes),
            origin(row0, col0, sample),
            PRECISION=_precision(),
            VEC=vec,
        )
    dsigma = column_sum(torch.empty_like(sigma), partial, sigma, factor, log_variance)
    return dx.reshape(*dy.shape[:-1], k), dsigma


def linear_bwd_weight(
    dy, x, sigma, seed, row0, col0, sample, factor, log_variance, weight_dtype=None, out_dtype=None
):
    """(dweight [N, K], dbias [N]) of an affine layer: dweight = dy^T u with u regenerated from x,
    dbias = sum over dy.

    weight_dtype: of the product's operands, by default dy's; out_dtype: of the results, by default
    weight_dtype.
    """
    dy, x, sigma = flat_rows(dy), flat_rows(x), sigma.contiguous()
    (m, n), k, operand = dy.shape, x.shape[1], weight_dtype or dy.dtype
    dtype = out_dtype or operand
    dbias = dy.sum(0, dtype=torch.float32).to(dtype)
    if m == 0 or n == 0 or k == 0:
        return torch.zeros(n, k, dtype=dtype, device=dy.device), dbias
    vec, sizes = _divided(col0 % 8, n, k, dy.stride(0), x.stride(0))
    regular = vec == 8 and max(x.element_size(), dy.element_size()) <= operand.itemsize
    chosen = blocks("bwd_weight", _architecture(dy.device), m, n, k, operand.itemsize, regular)
    tiles = cdiv(n, chosen.BLOCK_N) * cdiv(k + col0 % 8, chosen.BLOCK_K)
    count = splits(tiles, m, num_multiprocessors(dy.device))
    split_rows = cdiv(cdiv(m, count), chosen.BLOCK_M) * chosen.BLOCK_M
    count = cdiv(m, split_rows)
    wide = torch.float32 if count > 1 else dtype
    dweight = torch.empty(count, n, k, dtype=wide, device=dy.device)
    with on_device(dy):
        _launch(
            _linear_bwd_weight_kernel,
            "bwd_weight",
            lambda meta: (
                cdiv(n, meta["BLOCK_N"]) * cdiv(k + col0 % 8, meta["BLOCK_K"]),
                count,
            ),
            chosen,
            *(dweight, dy, x, sigma, seed),
            *(m, *sizes[:2], split_rows, *sizes[2:]),
            origin(row0, col0, sample),
            factor,
            DTYPE=OPERANDS[operand],
            LOG_VARIANCE=log_variance,
            PRECISION=_precision(),
            VEC=vec,
        )
    if count == 1:
        return dweight[0], dbias
    whole = torch.empty(n, k, dtype=dtype, device=dy.device)
    return column_sum(whole, dweight.reshape(count, n * k)), dbias


def linear_bwd(
    dy,
    x,
    weight,
    bias,
    sigma,
    seed,
    row0,
    col0,
    sample,
    factor,
    log_variance,
    num_samples=1,
    activation="identity",
):
    """(dx, dweight, dbias, dsigma) of `linear`: with an activation one sample after another, in
    memory for one.

    dbias [N] also without a bias.
    """
    activation = None if activation == "identity" else activation
    _check(x, weight, num_samples, activation)
    flat_x, flat_weight, flat_dy = flat_rows(x), flat_rows(weight), flat_rows(dy).contiguous()
    single = num_samples == 1
    total = None
    for s in range(sample, sample + num_samples):
        draw = (row0, col0, s, factor, log_variance)
        dh = flat_dy
        if activation is not None:
            how = (draw, num_samples, activation, weight.dtype)
            dh = _forward(flat_x, flat_weight, bias, sigma.contiguous(), seed, *how, dy=flat_dy)
        # Sums over samples are kept in float32 and rounded once.
        dx, dsigma = linear_bwd_x(
            dh, flat_weight, sigma, seed, *draw, x.dtype if single else torch.float32
        )
        dweight, dbias = linear_bwd_weight(
            dh, flat_x, sigma, seed, *draw, weight.dtype, weight.dtype if single else torch.float32
        )
        grads = (dx, dweight, dbias, dsigma)
        total = grads if total is None else [a.add_(b) for a, b in zip(total, grads, strict=True)]
    dx, dweight, dbias, dsigma = total
    dbias = dbias.to(weight.dtype if bias is None else bias.dtype)
    return dx.to(x.dtype).reshape(x.shape), dweight.to(weight.dtype), dbias, dsigma
