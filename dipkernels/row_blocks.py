"""y = mean over samples of act((x + sigma z_s) W^T + b) by blocks of rows.  docs/maths.md, section 4.

The implementation of `linear` where no fused kernel runs: the vendor's products. A block's noised rows and
pre-activations live for one sample, so memory does not grow with the samples. Backward draws and multiplies again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten


def _gelu_tanh(h: Tensor) -> Tensor:
    return F.gelu(h, approximate="tanh")


def _tanh_backward(dy: Tensor, h: Tensor) -> Tensor:
    return _aten.tanh_backward(dy, torch.tanh(h))


def _gelu_tanh_backward(dy: Tensor, h: Tensor) -> Tensor:
    return _aten.gelu_backward(dy, h, approximate="tanh")


# What the layers apply, and dy * act'(h) in one pass.
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": _gelu_tanh, "silu": F.silu, "tanh": torch.tanh}
_BACKWARDS = {
    "identity": lambda dy, h: dy,
    "relu": lambda dy, h: _aten.threshold_backward(dy, h, 0),
    "gelu": _aten.gelu_backward,
    "gelu_tanh": _gelu_tanh_backward,
    "silu": _aten.silu_backward,
    "tanh": _tanh_backward,
}
_IN_PLACE = {"relu": torch.relu_, "silu": lambda h: F.silu(h, inplace=True), "tanh": torch.tanh_}

_CPU_ROWS = 2048  # of a block: fewer make smaller products, and more sums of [N, K] in backward
_GPU_ROWS = 16384


def act_of(activation: str):
    """The function of an activation's name; "identity" is the affine layer's."""
    return ACTIVATIONS.get(activation, lambda h: h)


def _blocks(x: Tensor):
    """(first row, rows) over the flattened rows of x"""
    rows = x.reshape(-1, x.shape[-1])
    size = _CPU_ROWS if x.device.type == "cpu" else _GPU_ROWS
    for first in range(0, rows.shape[0], size):
        yield first, rows[first : first + size]


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def linear(
    x, weight, bias, sigma, seed, row0, col0, sample, num_samples, factor, log_variance, activation, out_dtype
) -> Tensor:
    dtype = weight.dtype
    num_rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    y = torch.empty(num_rows, weight.shape[0], dtype=out_dtype or x.dtype, device=x.device)
    act = _IN_PLACE.get(activation) or act_of(activation)
    for first, rows in _blocks(x):
        total = None
        for s in range(sample, sample + num_samples):
            u = torch.ops.dipkernels.perturb(
                rows, sigma, seed, -1, row0 + first, col0, s, 1, factor, log_variance, dtype
            )
            part = act(F.linear(u, weight, bias))
            total = part.to(_accumulator(dtype)) if total is None else total.add_(part)
        y[first : first + rows.shape[0]] = total.mul_(1 / num_samples)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def linear_bwd(
    dy, x, weight, bias, sigma, seed, row0, col0, sample, num_samples, factor, log_variance, activation
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """With dh_s = dy act'(h_s) / S, D = sum_s dh_s and G = sum_s dh_s^T z_s: dx = D W, dbias = sum D,
    dW = D^T x + G diag(sigma), dsigma_k = sum_n W_nk G_nk. So a sample costs two products, one of them the repeated
    forward, and not three."""
    dtype, wide = weight.dtype, _accumulator(weight.dtype)
    n, k = weight.shape
    flat_dy = dy.reshape(-1, n)
    noise_sum = torch.zeros(n, k, dtype=wide, device=x.device)  # G
    dh_sum = torch.empty(flat_dy.shape, dtype=dtype, device=x.device)  # D
    dbias = torch.zeros(n, dtype=wide, device=x.device)
    for first, rows in _blocks(x):
        block_dy = flat_dy[first : first + rows.shape[0]].to(dtype)
        total = None
        for s in range(sample, sample + num_samples):
            where = (-1, row0 + first, col0, s, 1)
            u = torch.ops.dipkernels.perturb(rows, sigma, seed, *where, factor, log_variance, dtype)
            dh = _BACKWARDS[activation](block_dy, F.linear(u, weight, bias))
            z = torch.ops.dipkernels.noise(seed, list(rows.shape), *where)
            if dtype is wide:
                noise_sum.addmm_(dh.t(), z.to(wide))
            else:
                noise_sum.add_(dh.t() @ z.to(dtype))
            total = dh.to(wide) if total is None else total.add_(dh)
        total.mul_(1 / num_samples)
        dbias.add_(total.sum(0))
        dh_sum[first : first + rows.shape[0]] = total
    scale = torch.exp(sigma / 2) if log_variance else sigma
    noise_sum.mul_(factor / num_samples)
    dsigma = torch.linalg.vecdot(noise_sum, weight.to(wide), dim=0).to(sigma.dtype)
    if log_variance:
        dsigma = dsigma * scale / 2
    flat_x = x.reshape(-1, k)
    dweight = noise_sum.mul_(scale).add_(dh_sum.t() @ flat_x.to(dtype)).to(dtype)
    dx = (dh_sum @ weight).to(x.dtype).reshape(x.shape)
    return dx, dweight, dbias.to(dtype if bias is None else bias.dtype), dsigma
