"""triton_kernels/expectation.py: y = E[act(mu + sqrt(v) z)], v = W^2 s^2, and back, each in one
pass.  docs/maths.md, section 7."""

import math

import torch
import triton
import triton.language as tl

from .activations import within
from .mixtures import MIXTURES
from .perturb import column_sum
from .tiles import cdiv, next_power_of_2, num_multiprocessors, on_device

BLOCK_N = 128


# By b = |a| sqrt(log2(e) / 2) = 0.849... |a|, so that phi(a) = 0.3989... 2^(-b^2).
@triton.jit
def _normal(b, P: tl.constexpr, NARROW: tl.constexpr):
    """(2^(-b^2), P Phi(-|a|) over it), b >= 0; NARROW: Phi to 2.1e-6, for 16-bit data"""
    if b.dtype == tl.float64:
        # the power is no subnormal number
        b = tl.minimum(b, 25.0, propagate_nan=tl.PropagateNan.ALL)
        power = tl.exp(-0.6931471805599453 * b * b)
        return power, P * (0.5 - 0.5 * tl.erf(b * 0.8325546111576977)) / power
    else:
        # r q(r), r = 1 / (1 + g b): polynomials of the least error of (1 + |a|) Phi(-|a|), the long
        # one that of csrc/cpu/vector_math.h times 0.3989. A root is one instruction, a quotient
        # several.
        if NARROW:
            root = tl.rsqrt(0.5062863096816541 * b + 1.0)
            r = root * root
            q = (P * -0.1198459684717369) * r + P * 0.3525664471002274
            q = q * r + P * 0.08196376029586246
            q = q * r + P * 0.185313635671265
        else:
            root = tl.rsqrt(0.3296748063043329 * b + 1.0)
            r = root * root
            q = (P * -0.10655090406258) * r + P * 0.3929544984006652
            q = q * r - P * 0.2420733740762095
            q = q * r + P * 0.2730720667873488
            q = q * r + P * 0.06580314959281855
            q = q * r + P * 0.1167945486748128
        return tl.exp2(-b * b), q * r


# With a = alpha mu, t = a^2 and phi its density, of a column: polynomials in t, the tuples of their
# coefficients.
@triton.jit
def _values(beta, SERIES: tl.constexpr, FIRST: tl.constexpr, M: tl.constexpr, ODD: tl.constexpr):
    """P of E[sum_j d_j (c x)^2j phi(c x)] = phi P(t), or with ODD of a phi P(t), by _series"""
    coefficients = ()
    power = beta if ODD else tl.sqrt(beta)
    for degree in tl.static_range(M):
        total = beta * 0.0
        # in powers of 1 - beta = c^2 v beta, from the highest on
        for i in tl.static_range(M - degree):
            total = (
                total * (1.0 - beta) + SERIES[FIRST + degree * M - degree * (degree - 1) // 2 + i]
            )
        coefficients = coefficients + (power * total,)
        power = power * beta
    return coefficients


@triton.jit
def _bell_rule(of, N: tl.constexpr, factor):
    """d/dmu of phi of(t), over a phi; factor: alpha"""
    coefficients = ()
    for i in tl.static_range(N):
        total = factor * 0.0
        if i + 1 < len(of):
            total += (2.0 * (i + 1)) * of[i + 1]
        if i < len(of):
            total -= of[i]
        coefficients = coefficients + (factor * total,)
    return coefficients


@triton.jit
def _product_rule(of, N: tl.constexpr, factor, MORE: tl.constexpr):
    """d/dmu of a phi of(t), and MORE alpha phi, over phi; factor: alpha"""
    coefficients = ()
    for i in tl.static_range(N):
        total = factor * 0.0
        if i < len(of):
            total += (2.0 * i + 1.0) * of[i]
        if i > 0:
            total -= of[i - 1]
        else:
            total += MORE
        coefficients = coefficients + (factor * total,)
    return coefficients


@triton.jit
def _plus(of, constant):
    """A polynomial and a constant; () is 0"""
    coefficients = (constant,)
    if len(of) > 0:
        coefficients = (of[0] + constant,)
    for i in tl.static_range(1, len(of)):
        coefficients = coefficients + (of[i],)
    return coefficients


@triton.jit
def _polynomial(of, t):
    y = of[len(of) - 1]
    for i in tl.static_range(1, len(of)):
        y = y * t + of[len(of) - 1 - i]
    return y


@triton.jit
def _in_b(of, SCALE: tl.constexpr):
    """The coefficients in b^2 = t / (2 ln 2), times SCALE"""
    coefficients = ()
    for i in tl.static_range(len(of)):
        coefficients = coefficients + (of[i] * (SCALE * 1.3862943611198906**i),)
    return coefficients


@triton.jit
def _plain(x, ACTIVATION: tl.constexpr):
    """(act(x), act'(x), act''(x) / 2); gelu needs none: its expectation is one for v = 0 too"""
    if ACTIVATION == "relu":
        slope = tl.where(x <= 0.0, 0.0, 1.0)  # a NaN stays one
        return tl.where(x <= 0.0, 0.0, x), slope, slope * 0.0
    elif ACTIVATION == "tanh":
        t = 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0
        return t, 1.0 - t * t, -t * (1.0 - t * t)
    else:
        # What a 0 multiplies stays finite: infinity times 0 is no number. Beyond FAR slopes are 0
        # or 1, and a quotient that is 1 but for its last bits is not blown up by x.
        FAR: tl.constexpr = (
            1000.0 if x.dtype == tl.float64 else 6.0 if ACTIVATION == "gelu_tanh" else 20.0
        )
        above = tl.maximum(x, -1000.0, propagate_nan=tl.PropagateNan.ALL)
        near = within(x, FAR)
        d0, d1, d2 = x, near * 0.0 + 1.0, near * 0.0
        if ACTIVATION == "gelu_tanh":
            d0 = 1.5957691216057308 * (x + 0.044715 * x * x * x)
            d1 = 1.5957691216057308 * (1.0 + 0.134145 * near * near)
            d2 = 1.5957691216057308 * 0.26829 * near
        elif ACTIVATION == "quick_gelu":
            d0, d1 = 1.702 * x, d1 * 1.702
        s = 1.0 / (1.0 + tl.exp(-d0))
        ds = s * (1.0 - s) * d1
        return (
            above * s,
            s + near * ds,
            ds + 0.5 * near * ((1.0 - 2.0 * s) * d1 * ds + s * (1.0 - s) * d2),
        )


@triton.jit
def _tile(block, M, N, col, col_mask, BLOCK_R: tl.constexpr):
    """Offsets and mask of a block of rows, [BLOCK_R, BLOCK_N] each"""
    row = tl.cast(block, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    return (row * N)[:, None] + col[None, :], (row < M)[:, None] & col_mask[None, :]


@triton.jit
def _expectation_kernel(
    y_ptr,  # [M, N] contiguous, written: y, or dmu where there is dy
    # [2, row programs, N] float32 (float64 for float64 data), written where there is dy:
    # sums of dy * d/dv and of dmu
    partial_ptr,
    mu_ptr,  # [M, N] contiguous
    dy_ptr,  # [M, N] contiguous, or None
    v_ptr,  # [N] float32 or float64
    M,
    N,
    ACTIVATION: tl.constexpr,
    TERMS: tl.constexpr,  # (c, p) of every term; none: relu
    SERIES: tl.constexpr,  # of every term, M_SERIES (M_SERIES + 1) / 2 numbers: _series
    M_SERIES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # where
    col = tl.cast(tl.program_id(0), tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_mask = col < N
    dtype: tl.constexpr = tl.float64 if mu_ptr.dtype.element_ty == tl.float64 else tl.float32
    NARROW: tl.constexpr = mu_ptr.dtype.element_ty.primitive_bitwidth == 16
    v_of = tl.load(v_ptr + col, mask=col_mask, other=1.0).to(dtype)
    v = v_of[None, :]
    zero = v <= 0.0  # not of a NaN, which stays one
    # A root takes subnormal numbers for 0, and their reciprocal for infinity: the least normal one
    # stands in for them.
    least = tl.maximum(v, 1.1754943508222875e-38, propagate_nan=tl.PropagateNan.ALL)
    safe = tl.where(zero, 1.0, least)
    deviation = tl.sqrt(safe)
    inverse = 1.0 / deviation
    total_dv = tl.zeros([BLOCK_R, BLOCK_N], dtype)
    total_dmu = tl.zeros([BLOCK_R, BLOCK_N], dtype)
    for block in range(tl.program_id(1), tl.cdiv(M, BLOCK_R), tl.num_programs(1)):
        at, mask = _tile(block, M, N, col, col_mask, BLOCK_R)
        # load
        mu = tl.load(mu_ptr + at, mask=mask, other=0.0).to(dtype)
        # compute
        # With sum p = 1 and T = sum p Phi(-|a|), y = max(mu, 0) - |mu| T + sum phi P, tanh's is
        # sign(mu) (1 - 2 T) + sum a phi P, and slopes are alike: small terms, each a multiple of
        # its power, are added to what is exact, however the p cancel.
        # its square is finite
        size = tl.minimum(tl.abs(mu), 1e15, propagate_nan=tl.PropagateNan.ALL)
        small = tl.zeros([BLOCK_R, BLOCK_N], dtype)
        small_slope = tl.zeros([BLOCK_R, BLOCK_N], dtype)
        half_curvature = tl.zeros([BLOCK_R, BLOCK_N], dtype)
        if ACTIVATION == "relu":
            power, ratio = _normal(size * (inverse * 0.8493218002880191), 1.0, NARROW)
            small = power * (deviation * 0.3989422804014327 - size * ratio)
            small_slope = -power * ratio
            half_curvature = (0.5 * inverse * 0.3989422804014327) * power
        for i in tl.static_range(len(TERMS) // 2):
            # c = TERMS[2 i] and p = TERMS[2 i + 1], never in a variable: that would be float32 for
            # float64 data too. What depends on v alone is computed once, before the loop over rows.
            variance = v if ACTIVATION == "gelu" else safe
            beta = 1.0 / (1.0 + (TERMS[2 * i] * TERMS[2 * i]) * variance)
            # Not c sqrt(beta): behind a huge variance beta is subnormal, then 0, and v alpha would
            # be 0 with it.
            alpha = 1.0 / tl.sqrt(variance + 1.0 / (TERMS[2 * i] * TERMS[2 * i]))
            b = size * (alpha * 0.8493218002880191)
            if M_SERIES > 0:  # powers of it are finite, and its power of two is 0 or next to it
                b = tl.minimum(b, 16.0, propagate_nan=tl.PropagateNan.ALL)
            values = _values(
                beta, SERIES, i * (M_SERIES * (M_SERIES + 1) // 2), M_SERIES, ACTIVATION == "tanh"
            )
            if ACTIVATION == "tanh":
                power, ratio = _normal(b, 2.0 * TERMS[2 * i + 1], NARROW)
                small += power * ratio
                if M_SERIES > 0:
                    small -= (b * power) * _polynomial(_in_b(values, 0.4697186393498257), b * b)
                slopes = _product_rule(values, M_SERIES + 1, alpha, 2.0 * TERMS[2 * i + 1])
                curvatures = _bell_rule(slopes, M_SERIES + 1, 0.5 * alpha)
                small_slope += power * _polynomial(_in_b(slopes, 0.3989422804014327), b * b)
                half_curvature += (b * power) * _polynomial(
                    _in_b(curvatures, 0.4697186393498257), b * b
                )
            else:
                power, ratio = _normal(b, TERMS[2 * i + 1], NARROW)
                slopes = _bell_rule(values, M_SERIES if M_SERIES > 0 else 1, alpha)
                slopes = _plus(slopes, TERMS[2 * i + 1] * beta)
                # in an order that stays finite
                values = _plus(values, TERMS[2 * i + 1] * alpha * variance)
                curvatures = _product_rule(
                    slopes, M_SERIES + 1 if M_SERIES > 0 else 2, 0.5 * alpha, TERMS[2 * i + 1]
                )
                small += power * (
                    _polynomial(_in_b(values, 0.3989422804014327), b * b) - size * ratio
                )
                small_slope += power * (
                    b * _polynomial(_in_b(slopes, 0.4697186393498257), b * b) - ratio
                )
                half_curvature += power * _polynomial(_in_b(curvatures, 0.3989422804014327), b * b)
        if ACTIVATION == "tanh":
            y = tl.where(mu < 0.0, small - 1.0, 1.0 - small)
            slope = small_slope
            half_curvature = tl.where(mu < 0.0, -half_curvature, half_curvature)
        else:
            y = tl.maximum(mu, 0.0) + small
            slope = tl.where(mu < 0.0, -small_slope, 1.0 + small_slope)
        # store
        if dy_ptr is not None:
            dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(dtype)
            y = dy * slope
            total_dv += dy * half_curvature
            total_dmu += y
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
    if ACTIVATION != "gelu":  # noqa: SIM102
        # Rarely, and known only when it runs: over what was stored, so that it costs the others
        # nothing.
        if tl.min(v_of) <= 0.0:
            plain_dv = tl.zeros([BLOCK_R, BLOCK_N], dtype)
            plain_dmu = tl.zeros([BLOCK_R, BLOCK_N], dtype)
            for block in range(tl.program_id(1), tl.cdiv(M, BLOCK_R), tl.num_programs(1)):
                at, mask = _tile(block, M, N, col, col_mask & (v_of <= 0.0), BLOCK_R)
                mu = tl.load(mu_ptr + at, mask=mask, other=0.0).to(dtype)
                y, slope, half_curvature = _plain(mu, ACTIVATION)
                if dy_ptr is not None:
                    dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(dtype)
                    y = dy * slope
                    plain_dv += dy * half_curvature
                    plain_dmu += y
                tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
            total_dv = tl.where(zero, plain_dv, total_dv)
            total_dmu = tl.where(zero, plain_dmu, total_dmu)
    if dy_ptr is not None:
        out = tl.cast(tl.program_id(1), tl.int64) * N + col
        tl.store(partial_ptr + out, tl.sum(total_dv, axis=0), mask=col_mask)
        out += tl.cast(tl.num_programs(1), tl.int64) * N
        tl.store(partial_ptr + out, tl.sum(total_dmu, axis=0), mask=col_mask)


def _mixture(activation: str, dtype: torch.dtype):
    """(c, p, d) for data of that type"""
    if activation == "relu":
        return (), (), ()
    return MIXTURES[activation][2 if dtype is torch.float64 else 1 if dtype is torch.float32 else 0]


def _series(d: tuple[float, ...], odd: bool) -> list[float]:
    """E (x + s z)^n has n! / ((n - 2 i)! i! 2^i) x^(n - 2 i) s^(2 i): for l = 0 .. m - 1, d_j times
    that of n = 2 j (+ 1), i = j - l, j = m - 1 .. l"""
    numbers = []
    for last in range(len(d)):
        for j in range(len(d) - 1, last - 1, -1):
            n, i = 2 * j + odd, j - last
            numbers.append(
                d[j] * math.factorial(n) / (math.factorial(n - 2 * i) * math.factorial(i) * 2**i)
            )
    return numbers


def _rows(activation: str, dtype: torch.dtype) -> int:
    """Rows of a tile, which are the elements of a thread: few enough that every term's values fit
    the registers."""
    if dtype is torch.float64:
        return 1
    if len(_mixture(activation, dtype)[0]) > 1:
        return 2
    return 8


def _grid(mu, activation):
    """Blocks of columns, and programs that share the rows of one: few, as each first computes what
    depends on v alone."""
    n = mu.shape[-1]
    col_blocks = cdiv(n, BLOCK_N)
    row_blocks = cdiv(mu.numel() // n, _rows(activation, mu.dtype))
    return col_blocks, min(row_blocks, cdiv(4 * num_multiprocessors(mu.device), col_blocks))


def _launch(out, partial, mu, dy, v, activation, grid):
    n, (c, p, d) = mu.shape[-1], _mixture(activation, mu.dtype)
    with on_device(mu):
        _expectation_kernel[grid](
            *(out, partial, mu, dy, v.contiguous()),
            *(mu.numel() // n, n),
            ACTIVATION=activation,
            TERMS=tuple(x for term in zip(c, p, strict=True) for x in term),
            SERIES=tuple(x for term in d for x in _series(term, activation == "tanh")),
            M_SERIES=len(d[0]) if d else 0,
            BLOCK_R=_rows(activation, mu.dtype),
            BLOCK_N=BLOCK_N,
            # else the compiler would now and then rather spill than take what there are
            maxnreg=255,
        )


def expectation(mu, v, activation):
    """y [..., N] = E[act(mu + sqrt(v) z)], v [N]; where v is 0, act(mu)."""
    mu = mu.contiguous()
    y = torch.empty_like(mu)
    if y.numel():
        _launch(y, None, mu, None, v, activation, _grid(mu, activation))
    return y


def expectation_bwd(dy, mu, v, activation):
    """(dmu, dv [N], sum [N]): dy times d/dmu, and the sums over rows of dy times d/dv and of dmu,
    in one pass and a fixed order."""
    mu, dy = mu.contiguous(), dy.contiguous()
    dmu = torch.empty_like(mu)
    if dmu.numel() == 0:
        return dmu, torch.zeros_like(v), torch.zeros_like(v)
    grid, wide = _grid(mu, activation), torch.promote_types(mu.dtype, torch.float32)
    partial = torch.empty(2, grid[1], mu.shape[-1], dtype=wide, device=mu.device)
    _launch(dmu, partial, mu, dy, v, activation, grid)
    return dmu, *(column_sum(v.new_empty(v.shape), part) for part in partial)


# ---- the variance v, and back --------------------------------------------------------------------


@triton.jit
def _square(
    sigma_ptr,  # [K]: sigma, or ln(sigma^2) if LOG_VARIANCE
    col,  # [BK]
    mask,  # [BK]
    LOG_VARIANCE: tl.constexpr,
    dtype: tl.constexpr,
):
    """(s^2, its derivative by sigma, which is s^2 again if LOG_VARIANCE), [BK] each"""
    sigma = tl.load(sigma_ptr + col, mask=mask, other=0.0).to(dtype)
    if LOG_VARIANCE:
        square = tl.exp(sigma)
        return square, square
    else:
        return sigma * sigma, 2.0 * sigma


@triton.jit
def _variance_kernel(
    v_ptr,  # [N] float32 or float64, written
    weight_ptr,  # [N, K] contiguous
    sigma_ptr,  # [K], of v's type
    N,
    K,
    LOG_VARIANCE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # where
    row = tl.cast(tl.program_id(0), tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = v_ptr.dtype.element_ty
    total = tl.zeros([BLOCK_N, BLOCK_K], dtype)
    for first in range(0, K, BLOCK_K):
        col = first + tl.arange(0, BLOCK_K)
        mask = (row < N)[:, None] & (col < K)[None, :]
        # load
        weight = tl.load(weight_ptr + (row * K)[:, None] + col[None, :], mask=mask, other=0.0).to(
            dtype
        )
        square, _ = _square(sigma_ptr, col, col < K, LOG_VARIANCE, dtype)
        # compute
        total += weight * weight * square[None, :]
    # store
    tl.store(v_ptr + row, tl.sum(total, axis=1), mask=row < N)


@triton.jit
def _variance_bwd_kernel(
    dweight_ptr,  # [N, K] contiguous, written
    given_ptr,  # [N, K] contiguous, added to dweight, or None
    partial_ptr,  # [row programs, K], of sigma's type, written: sums of dv * dv/dsigma
    dv_ptr,  # [N], of sigma's type
    weight_ptr,  # [N, K] contiguous
    sigma_ptr,  # [K]
    N,
    K,
    LOG_VARIANCE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # where
    col = tl.cast(tl.program_id(0), tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    col_mask = col < K
    dtype: tl.constexpr = partial_ptr.dtype.element_ty
    square, slope = _square(sigma_ptr, col, col_mask, LOG_VARIANCE, dtype)
    total = tl.zeros([BLOCK_N, BLOCK_K], dtype)
    for block in range(tl.program_id(1), tl.cdiv(N, BLOCK_N), tl.num_programs(1)):
        row = tl.cast(block, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (row < N)[:, None] & col_mask[None, :]
        at = (row * K)[:, None] + col[None, :]
        # load
        weight = tl.load(weight_ptr + at, mask=mask, other=0.0).to(dtype)
        dv = tl.load(dv_ptr + row, mask=row < N, other=0.0)
        # compute
        scaled = weight * dv[:, None]
        total += scaled * weight
        dweight = 2.0 * scaled * square[None, :]
        if given_ptr is not None:
            dweight += tl.load(given_ptr + at, mask=mask, other=0.0).to(dtype)
        # store
        tl.store(dweight_ptr + at, dweight.to(dweight_ptr.dtype.element_ty), mask=mask)
    out = tl.cast(tl.program_id(1), tl.int64) * K + col
    tl.store(partial_ptr + out, slope * tl.sum(total, axis=0), mask=col_mask)


def _weight_tile(sigma, n, k):
    """(BLOCK_N, BLOCK_K)"""
    block_k = min(next_power_of_2(k), 256)
    elements = 1024 if sigma.dtype is torch.float64 else 2048
    return min(next_power_of_2(n), elements // block_k), block_k


def affine_variance(weight, sigma, log_variance):
    """v [N] = sum over k of s_k^2 W_nk^2."""
    weight, sigma, (n, k) = weight.contiguous(), sigma.contiguous(), weight.shape
    v = torch.empty(n, dtype=sigma.dtype, device=sigma.device)
    if weight.numel() == 0:
        return v.zero_()
    block_k = min(next_power_of_2(k), 512)
    # rows enough for every multiprocessor
    block_n = 4 if n >= 4 * 2 * num_multiprocessors(weight.device) else 1
    with on_device(weight):
        _variance_kernel[(cdiv(n, block_n),)](
            v, weight, sigma, n, k, LOG_VARIANCE=log_variance, BLOCK_N=block_n, BLOCK_K=block_k
        )
    return v


def affine_variance_bwd(dv, weight, sigma, log_variance, given):
    """(given + dweight, dsigma) of `affine_variance`, in one pass and a fixed order."""
    given, (n, k) = None if given is None else given.contiguous(), weight.shape
    weight, sigma, dv = weight.contiguous(), sigma.contiguous(), dv.contiguous()
    dweight, dsigma = torch.empty_like(weight), torch.empty_like(sigma)
    if weight.numel() == 0:
        return dweight, dsigma.zero_()
    block_n, block_k = _weight_tile(sigma, n, k)
    col_blocks, row_blocks = cdiv(k, block_k), cdiv(n, block_n)
    programs = min(row_blocks, cdiv(8 * num_multiprocessors(weight.device), col_blocks))
    partial = torch.empty(programs, k, dtype=sigma.dtype, device=sigma.device)
    block, tensors = {"BLOCK_N": block_n, "BLOCK_K": block_k}, (dweight, given, partial, dv, weight)
    with on_device(weight):
        _variance_bwd_kernel[(col_blocks, programs)](
            *tensors, sigma, n, k, LOG_VARIANCE=log_variance, **block
        )
    return dweight, column_sum(dsigma, partial)
