"""The oracle: every operation in plain PyTorch and float64, with the operations' own signatures.
docs/maths.md.

Slow and simple on purpose. Tests and benchmarks compare against it, and it is the backend where
nothing else runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32 of ten rounds: int64 tensors holding unsigned 32-bit words; broadcasts."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit product wraps in int64; its two halves are still the right bits.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((p1 >> 32) & _MASK32) ^ c1 ^ k0, p1 & _MASK32
        c2, c3 = ((p0 >> 32) & _MASK32) ^ c3 ^ k1, p0 & _MASK32
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def words(seed: Tensor, rows: Tensor, groups: Tensor, sample: int) -> Tensor:
    """The contract's integer words, int64 [rows, groups, 4]."""
    key, stream = seed[0], seed[1]
    last = ((stream & 0xFFFF) << 16) + sample
    row, group = rows[:, None], groups[None, :]
    counter = torch.broadcast_tensors(group & _MASK32, row & _MASK32, (row >> 32) & _MASK32, last)
    return torch.stack(philox4x32(counter, (key & _MASK32, (key >> 32) & _MASK32)), dim=-1)


def standard_normal(
    seed: Tensor, num_rows: int, num_cols: int, row0: int = 0, col0: int = 0, sample: int = 0
) -> Tensor:
    """z [num_rows, num_cols], float64.  docs/maths.md, section 3."""
    rows = torch.arange(num_rows, device=seed.device) + row0
    first, last = col0 // 8, -(-(col0 + num_cols) // 8)
    # [rows, groups, 4]
    w = words(seed, rows, torch.arange(first, last, device=seed.device), sample)
    radius = torch.sqrt(-2 * torch.log(((w >> 12).double() + 0.5) / 2**20))
    angle = 2 * math.pi * ((w & 0xFFF).double() + 0.5) / 2**12
    # [rows, groups, 4, 2]
    z = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return z.reshape(num_rows, 8 * (last - first)).narrow(1, col0 - 8 * first, num_cols)


def _matrix(x: Tensor) -> Tensor:
    """[..., K] as [M, K], float64; of no features, or of no rows, too."""
    return x.double().reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _as_rows(x: Tensor, dim: int) -> Tensor:
    """[rows, K] float64: rows in the order of the other dimensions."""
    return _matrix(x.movedim(dim, -1))


def _from_rows(rows: Tensor, like: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """[rows, K] back to `like`'s shape and strides."""
    moved = like.movedim(dim, -1).shape
    return torch.empty_like(like, dtype=dtype).copy_(rows.reshape(moved).movedim(-1, dim))


def _sigma(sigma: Tensor, log_variance: bool) -> Tensor:
    return torch.exp(sigma.double() / 2) if log_variance else sigma.double()


def noise(
    seed: Tensor, shape: Sequence[int], dim: int, row0: int, col0: int, sample: int
) -> Tensor:
    """z[i, j], float32"""
    like = torch.empty(shape, dtype=torch.float32, device=seed.device)
    m, k = _as_rows(like, dim).shape
    return _from_rows(standard_normal(seed, m, k, row0, col0, sample), like, dim, torch.float32)


def perturb(
    x: Tensor,
    sigma: Tensor,
    seed: Tensor,
    dim: int,
    row0: int,
    col0: int,
    sample: int,
    factor: float,
    log_variance: bool,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """u[i, j] = x[i, j] + factor * sigma[j] * z[i, j]"""
    rows = _as_rows(x, dim)
    z = standard_normal(seed, rows.shape[0], rows.shape[1], row0, col0, sample)
    return _from_rows(rows + factor * _sigma(sigma, log_variance) * z, x, dim, out_dtype or x.dtype)


def perturb_bwd(
    du: Tensor,
    sigma: Tensor,
    seed: Tensor,
    dim: int,
    row0: int,
    col0: int,
    sample: int,
    factor: float,
    log_variance: bool,
) -> Tensor:
    """dsigma[j] = factor * sum_i du[i, j] * z[i, j];  times sigma[j] / 2 for the log-variance"""
    rows = _as_rows(du, dim)
    z = standard_normal(seed, rows.shape[0], rows.shape[1], row0, col0, sample)
    dsigma = factor * (rows * z).sum(0)
    return (dsigma * _sigma(sigma, True) / 2 if log_variance else dsigma).to(sigma.dtype)


def perturb_replay(
    du: Tensor, x: Tensor, sigma: Tensor, seed: Tensor, *draw_and_dtype: Any
) -> tuple[Tensor, Tensor]:
    """(u, dsigma): `perturb` and `perturb_bwd` of one draw, with the arguments of the former"""
    *draw, _ = draw_and_dtype
    return perturb(x, sigma, seed, *draw_and_dtype), perturb_bwd(du, sigma, seed, *draw)


# ---- activations: (f, f', f'') -------------------------------------------------------------------


Derivatives = tuple[Tensor, Tensor, Tensor]


def _normal(x: Tensor) -> tuple[Tensor, Tensor]:
    """(phi, Phi)"""
    return torch.exp(-x * x / 2) / math.sqrt(2 * math.pi), torch.special.ndtr(x)


def _relu(x: Tensor) -> Derivatives:
    return x.clamp(min=0), (~(x <= 0)).to(x.dtype), torch.zeros_like(x)  # at NaN as torch's


def _gelu(x: Tensor) -> Derivatives:
    pdf, cdf = _normal(x)
    return x * cdf, cdf + x * pdf, (2 - x * x) * pdf


def _silu(x: Tensor) -> Derivatives:
    s = torch.sigmoid(x)
    ds = s * (1 - s)
    return x * s, s + x * ds, ds * (2 + x * (1 - 2 * s))


def _quick_gelu(x: Tensor) -> Derivatives:
    y, slope, curvature = _silu(1.702 * x)
    return y / 1.702, slope, 1.702 * curvature


def _tanh(x: Tensor) -> Derivatives:
    t = torch.tanh(x)
    return t, 1 - t * t, -2 * t * (1 - t * t)


def _gelu_tanh(x: Tensor) -> Derivatives:
    c = 2 * math.sqrt(2 / math.pi)
    s = torch.sigmoid(c * (x + 0.044715 * x**3))
    d1, d2 = c * (1 + 0.134145 * x * x), c * 0.26829 * x
    ds = s * (1 - s) * d1
    return x * s, s + x * ds, 2 * ds + x * ((1 - 2 * s) * d1 * ds + s * (1 - s) * d2)


def _identity(x: Tensor) -> Derivatives:
    return x, torch.ones_like(x), torch.zeros_like(x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Derivatives]] = {
    "identity": _identity,
    "relu": _relu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
    "quick_gelu": _quick_gelu,
    "tanh": _tanh,
}


def _expectation(mu: Tensor, v: Tensor, activation: str) -> Derivatives:
    """(E f, E f', E f'' / 2) at mu + sqrt(v) z, float64; the last two are d/dmu and d/dv.
    docs/maths.md, section 7."""
    mu, v = mu.double(), v.double()
    f, s = _ACTIVATIONS[activation], torch.sqrt(v)
    if activation == "relu":
        safe = torch.where(s == 0, 1.0, s)
        pdf, cdf = _normal(mu / safe)
        y, slope, curvature = f(mu)
        return (
            torch.where(s == 0, y, mu * cdf + s * pdf),
            torch.where(s == 0, slope, cdf),
            torch.where(s == 0, curvature, pdf / (2 * safe)),
        )
    # The trapezoidal rule: for a function analytic in a strip it converges faster than any power of
    # the step. Over z where s is small, else over mu + s z.
    wide, step = s > 1, 0.25
    small = torch.where(wide, 1.0, s)
    sums = [torch.zeros_like(mu + s) for _ in range(3)]
    for i in range(-36, 37):
        z = i * step
        weight = step * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        for total, value in zip(sums, f(mu + small * z)):
            total += weight * value
    if bool(wide.any()):
        large = torch.where(wide, s, 1.0)
        sums = [torch.where(wide, *both) for both in zip(_wide(mu, large, activation, step), sums)]
    return sums[0], sums[1], sums[2] / 2


def _wide(mu: Tensor, s: Tensor, activation: str, step: float) -> list[Tensor]:
    """[E f, E f', E f''] at mu + s z: those of gelu, or for tanh of 2 Phi(x) - 1, in closed form,
    and of what f has beside it, which is 0 far out, by the trapezoidal rule."""
    r = torch.rsqrt(1 + s * s)
    a = mu * r
    pdf, cdf = _normal(a)
    x = torch.arange(-160, 161, dtype=mu.dtype, device=mu.device) * step
    if activation == "tanh":
        sums = [2 * cdf - 1, 2 * r * pdf, -2 * r * r * a * pdf]
        density, distribution = _normal(x)
        near = (2 * distribution - 1, 2 * density, -2 * x * density)
    else:
        sums = [
            mu * cdf + s * s * r * pdf,
            cdf + r * r * a * pdf,
            r * pdf * (1 + r * r - (r * a) ** 2),
        ]
        near = _gelu(x)
    rests = [value - other for value, other in zip(_ACTIVATIONS[activation](x), near)]
    for i, at in enumerate(x.tolist()):
        weight = _normal((at - mu) / s)[0] / s * step
        sums = [total + weight * rest[i] for total, rest in zip(sums, rests)]
    return sums


def expectation(mu: Tensor, v: Tensor, activation: str) -> Tensor:
    """y[i, j] = E[act(mu[i, j] + sqrt(v[j]) z)]"""
    return _expectation(mu, v, activation)[0].to(mu.dtype).contiguous()


def expectation_bwd(
    dy: Tensor, mu: Tensor, v: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(dmu[i, j], dv[j], sum[j]): dy times d/dmu, and the sums over i of dy times d/dv and of
    dmu"""
    _, slope, half_curvature = _expectation(mu, v, activation)
    dmu, dv = dy.double() * slope, dy.double() * half_curvature
    sums = [
        (t.flatten(0, -2).sum(0) if mu.dim() > 1 else t).to(v.dtype, copy=True) for t in (dv, dmu)
    ]
    return dmu.to(mu.dtype, copy=True).contiguous(), sums[0], sums[1]


def affine_variance(weight: Tensor, sigma: Tensor, log_variance: bool) -> Tensor:
    """v[n] = sum_k sigma[k]^2 W[n, k]^2"""
    return (weight.double().square() @ _sigma(sigma, log_variance).square()).to(sigma.dtype)


def affine_variance_bwd(
    dv: Tensor, weight: Tensor, sigma: Tensor, log_variance: bool, given: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(given + dweight, dsigma) of `affine_variance`"""
    w, s = weight.double(), _sigma(sigma, log_variance)
    dweight, dsquare = 2 * dv.double()[:, None] * s.square() * w, dv.double() @ w.square()
    if given is not None:
        dweight = dweight + given
    return dweight.to(weight.dtype), (dsquare * (s.square() if log_variance else 2 * s)).to(
        sigma.dtype
    )


# ---- the mean over samples behind an activation --------------------------------------------------


def _samples(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: Tensor,
    seed: Tensor,
    *draw_and_act: Any,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each sample (z, u, h) in float64: u = x + factor sigma z, h = u W^T + b; rows
    flattened."""
    row0, col0, sample, factor, log_variance, num_samples, activation = draw_and_act
    if activation == "identity" and num_samples != 1:
        raise ValueError(f"num_samples: expected 1 with activation 'identity', got {num_samples}")
    if num_samples < 1:
        raise ValueError(f"num_samples: expected 1 or more, got {num_samples}")
    rows = _matrix(x)
    for s in range(sample, sample + num_samples):
        z = standard_normal(seed, rows.shape[0], rows.shape[1], row0, col0, s)
        u = rows + factor * _sigma(sigma, log_variance) * z
        yield z, u, u @ weight.double().t() + (0 if bias is None else bias.double())


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, seed: Tensor, *draw_and_act: Any
) -> Tensor:
    """y[i, n] = 1/S sum_s act(sum_k (x[i, k] + factor * sigma[k] * z_s[i, k]) * W[n, k] + b[n])

    draw_and_act: row0, col0, sample, factor, log_variance, num_samples = S, activation, out_dtype.
    """
    *_, num_samples, activation, out_dtype = draw_and_act
    samples = _samples(x, weight, bias, sigma, seed, *draw_and_act[:-1])
    total: Any = sum(_ACTIVATIONS[activation](h)[0] for _, _, h in samples)
    y: Tensor = (total / num_samples).to(out_dtype or x.dtype)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: Tensor,
    seed: Tensor,
    *draw_and_act: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias, dsigma) of `linear`; draw_and_act as its, without out_dtype"""
    _, _, _, factor, log_variance, num_samples, activation = draw_and_act
    dx = dweight = dbias = dsigma = torch.zeros((), dtype=torch.float64, device=x.device)
    for z, u, h in _samples(x, weight, bias, sigma, seed, *draw_and_act):
        dh = dy.double().reshape(h.shape) * _ACTIVATIONS[activation](h)[1] / num_samples
        du = dh @ weight.double()
        dx, dweight, dbias = dx + du, dweight + dh.t() @ u, dbias + dh.sum(0)
        dsigma = dsigma + factor * (du * z).sum(0)
    if log_variance:
        dsigma = dsigma * _sigma(sigma, True) / 2
    bias_dtype = weight.dtype if bias is None else bias.dtype
    dx, dweight = dx.to(x.dtype).reshape(x.shape), dweight.to(weight.dtype)
    return dx, dweight, dbias.to(bias_dtype), dsigma.to(sigma.dtype)


# ---- producers: the projection in what makes a layer's input.  docs/maths.md, section 10 ---------


def gate(a: Tensor, b: Tensor | None, sigma: Tensor, seed: Tensor, *draw_and_act: Any) -> Tensor:
    """u[i, j] = act(a[i, j]) * b[i, j] + factor * sigma[j] * z[i, j]; b None: 1

    draw_and_act: the draw as in `perturb`, activation, out_dtype.
    """
    *draw, activation, out_dtype = draw_and_act
    y = _ACTIVATIONS[activation](a.double())[0]
    return _noised(y if b is None else y * b, a, sigma, seed, *draw, out_dtype)


def gate_bwd(
    du: Tensor, a: Tensor, b: Tensor | None, sigma: Tensor | None, seed: Tensor, *draw_and_act: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(da = du * b * act'(a), db = du * act(a), dsigma as `perturb_bwd`'s), empty for what is
    None"""
    *draw, activation = draw_and_act
    f, slope, _ = _ACTIVATIONS[activation](a.double())
    dy, db = du.double(), du.new_empty(0, dtype=torch.float32)
    if b is not None:
        dy, db = dy * b, torch.empty_like(b).copy_(dy * f)
    da = torch.where(slope == 0, 0, dy * slope)  # of infinity too
    return torch.empty_like(a).copy_(da), db, _dsigma(du, sigma, seed, *draw)


def _noised(y: Tensor, like: Tensor, sigma: Tensor, seed: Tensor, *draw_and_dtype: Any) -> Tensor:
    """`perturb` of y, float64, in the strides of `like`, and of its dtype where none is named"""
    *draw, out_dtype = draw_and_dtype
    how = (*draw, out_dtype or like.dtype)
    return perturb(torch.empty_like(like, dtype=torch.float64).copy_(y), sigma, seed, *how)


def _dsigma(du: Tensor, sigma: Tensor | None, seed: Tensor, *draw: Any) -> Tensor:
    if sigma is None:
        return du.new_empty(0, dtype=torch.float32)
    return perturb_bwd(du, sigma, seed, *draw)


def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sigma: Tensor,
    seed: Tensor,
    *draw_and_norm: Any,
) -> tuple[Tensor, Tensor]:
    """(u, stats): h[i, j] = (x[i, j] - mean[i]) * rstd[i], u = h * (offset + weight[j]) + bias[j] +
    factor * sigma[j] * z[i, j], stats = [mean[i], rstd[i]]; for "rms" the mean is 0 and stats =
    [rstd[i]]

    draw_and_norm: the draw as in `perturb`, kind, eps, offset, out_dtype.
    """
    *draw, kind, eps, offset, out_dtype = draw_and_norm
    rows = _matrix(x)
    mean = rows.mean(1) if kind == "layer" else torch.zeros_like(rows[:, :1].sum(1))
    rstd = torch.rsqrt((rows - mean[:, None]).square().mean(1) + eps)
    y = (rows - mean[:, None]) * rstd[:, None] * _norm_weight(weight, offset) + (
        0 if bias is None else bias.double()
    )
    wide = torch.promote_types(x.dtype, torch.float32)
    stats = torch.stack((mean, rstd) if kind == "layer" else (rstd,)).to(wide)
    stats = stats if x.shape[-1] else torch.zeros_like(stats)  # of nothing
    return _noised(y.reshape(x.shape), x.contiguous(), sigma, seed, *draw, out_dtype), stats


def norm_bwd(
    du: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sigma: Tensor | None,
    seed: Tensor,
    *draw_and_norm: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias, dsigma): g = du * (offset + weight), dx = rstd * (g - mean_j g - h *
    mean_j(g * h)), without mean_j g for "rms"; dweight = sum_i du * h, dbias = sum_i du; empty
    where there is no weight, bias or sigma

    draw_and_norm: the draw as in `perturb`, kind, offset.
    """
    *draw, kind, offset = draw_and_norm
    rows, g = _matrix(x), _matrix(du)
    mean = stats[0].double()[:, None] if kind == "layer" else 0.0
    rstd = stats[-1].double()[:, None]
    h = (rows - mean) * rstd
    dweight, dbias = du.new_empty(0, dtype=torch.float32), du.new_empty(0, dtype=torch.float32)
    if weight is not None:
        dweight = (g * h).sum(0).to(weight.dtype)
    if bias is not None:
        dbias = g.sum(0).to(bias.dtype)
    g = g * _norm_weight(weight, offset)
    shift = g.mean(1, keepdim=True) if kind == "layer" else 0.0
    dx = g - h * (g * h).mean(1, keepdim=True) - shift
    dx = (dx * rstd).reshape(x.shape).to(x.dtype).contiguous()
    return dx, dweight, dbias, _dsigma(du, sigma, seed, *draw)


def _norm_weight(weight: Tensor | None, offset: float) -> Tensor | float:
    return 1.0 if weight is None else offset + weight.double()
