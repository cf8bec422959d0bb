"""The oracle: every operation in plain PyTorch and float64, with the operations' own signatures.  docs/maths.md.

Slow and simple on purpose. Tests and benchmarks compare against it, and it is the backend where nothing else runs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor], rounds: int = 10) -> tuple[Tensor, ...]:
    """Philox4x32: int64 tensors holding unsigned 32-bit words; broadcasts."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
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


def standard_normal(seed: Tensor, num_rows: int, num_cols: int, row0: int = 0, col0: int = 0, sample: int = 0) -> Tensor:
    """z [num_rows, num_cols], float64.  docs/maths.md, section 3."""
    rows = torch.arange(num_rows, device=seed.device) + row0
    first, last = col0 // 8, -(-(col0 + num_cols) // 8)
    w = words(seed, rows, torch.arange(first, last, device=seed.device), sample)  # [rows, groups, 4]
    radius = torch.sqrt(-2 * torch.log(((w >> 12).double() + 0.5) / 2**20))
    angle = 2 * math.pi * ((w & 0xFFF).double() + 0.5) / 2**12
    z = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)  # [rows, groups, 4, 2]
    return z.reshape(num_rows, 8 * (last - first))[:, col0 - 8 * first : col0 - 8 * first + num_cols]


def _mean_normal(seed, num_rows, num_cols, row0, col0, sample, num_samples):
    """zbar = mean over s of z(sample + s), float64 [num_rows, num_cols]"""
    return sum(standard_normal(seed, num_rows, num_cols, row0, col0, sample + s) for s in range(num_samples)) / num_samples


def _as_rows(x: Tensor, dim: int) -> Tensor:
    """[rows, K] float64: rows in the order of the other dimensions."""
    k = x.shape[dim]
    return x.double().movedim(dim, -1).reshape(math.prod(x.shape) // k if k else 0, k)


def _from_rows(rows: Tensor, like: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """[rows, K] back to `like`'s shape and strides."""
    moved = like.movedim(dim, -1).shape
    return torch.empty_like(like, dtype=dtype).copy_(rows.reshape(moved).movedim(-1, dim))


def _sigma(sigma: Tensor, log_variance: bool) -> Tensor:
    return torch.exp(sigma.double() / 2) if log_variance else sigma.double()


def noise(seed, shape, dim, row0, col0, sample, num_samples):
    """z[i, j], float32"""
    like = torch.empty(shape, dtype=torch.float32, device=seed.device)
    rows = _as_rows(like, dim)
    return _from_rows(_mean_normal(seed, *rows.shape, row0, col0, sample, num_samples), like, dim, torch.float32)


def perturb(x, sigma, seed, dim, row0, col0, sample, num_samples, factor, log_variance, out_dtype):
    """u[i, j] = x[i, j] + factor * sigma[j] * z[i, j]"""
    rows = _as_rows(x, dim)
    z = _mean_normal(seed, *rows.shape, row0, col0, sample, num_samples)
    return _from_rows(rows + factor * _sigma(sigma, log_variance) * z, x, dim, out_dtype or x.dtype)


def perturb_bwd(du, sigma, seed, dim, row0, col0, sample, num_samples, factor, log_variance):
    """dsigma[j] = factor * sum_i du[i, j] * z[i, j];  times sigma[j] / 2 for the log-variance"""
    rows = _as_rows(du, dim)
    z = _mean_normal(seed, *rows.shape, row0, col0, sample, num_samples)
    dsigma = factor * (rows * z).sum(0)
    return (dsigma * _sigma(sigma, True) / 2 if log_variance else dsigma).to(sigma.dtype)


def perturb_replay(du, x, sigma, seed, dim, row0, col0, sample, num_samples, factor, log_variance, out_dtype):
    """(u, dsigma): `perturb` and `perturb_bwd` of one draw"""
    where = (dim, row0, col0, sample, num_samples, factor, log_variance)
    return perturb(x, sigma, seed, *where, out_dtype), perturb_bwd(du, sigma, seed, *where)
