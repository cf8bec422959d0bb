"""y = mean over samples of act((x + sigma z_s) W^T + b) by blocks of rows.  docs/maths.md, section 4.

The implementation of `linear` where no fused kernel runs: the vendor's products. A block's noised rows and
pre-activations live for one sample, or for several where there are few rows, so memory does not grow with the samples.
Backward draws again, and multiplies again what was not kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends

_aten = torch.ops.aten


def _gelu_tanh(h: Tensor) -> Tensor:
    return F.gelu(h, approximate="tanh")


def _tanh_backward(dy: Tensor, h: Tensor) -> Tensor:
    dh: Tensor = _aten.tanh_backward(dy, torch.tanh(h))
    return dh


def _gelu_tanh_backward(dy: Tensor, h: Tensor) -> Tensor:
    dh: Tensor = _aten.gelu_backward(dy, h, approximate="tanh")
    return dh


# What the layers apply, and dy * act'(h) in one pass.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": F.silu,
    "tanh": torch.tanh,
}
_BACKWARDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "identity": lambda dy, h: dy,
    "relu": lambda dy, h: _aten.threshold_backward(dy, h, 0),
    "gelu": _aten.gelu_backward,
    "gelu_tanh": _gelu_tanh_backward,
    "silu": _aten.silu_backward,
    "tanh": _tanh_backward,
}
_CPU_ROWS = 2048  # of a block, times its samples: fewer make smaller products, and more sums of [N, K] in backward
_GPU_ROWS = 16384


def act_of(activation: str) -> Callable[[Tensor], Tensor]:
    """The function of an activation's name; "identity" is the affine layer's."""
    return ACTIVATIONS.get(activation, lambda h: h)


def flat_rows(x: Tensor) -> Tensor:
    """[..., K] as [M, K], whatever is empty."""
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


def _blocks(x: Tensor, num_samples: int, num_kept: int) -> Iterator[tuple[int, Tensor, list[range]]]:
    """(first row, rows, ranges of samples that go through one product) over the flattened rows of x; the first num_kept
    samples and the others share no range"""
    # Whoever calls the operation itself passes no check of ops.
    if not 1 <= num_samples <= 2**16:
        raise ValueError(f"num_samples: expected 1 to {2**16}, got {num_samples}")
    if num_kept > num_samples:
        raise ValueError(f"num_kept: expected 0 to num_samples = {num_samples}, got {num_kept}")
    rows = flat_rows(x)
    size = _CPU_ROWS if x.device.type == "cpu" else _GPU_ROWS
    for first in range(0, rows.shape[0], size):
        block = rows[first : first + size]
        group = max(1, size // block.shape[0])
        parts = (range(num_kept), range(num_kept, num_samples))
        yield first, block, [part[i : i + group] for part in parts for i in range(0, len(part), group)]


def _num_kept(kept: Tensor | None, activation: str) -> int:
    """Samples whose pre-activations are in `kept`; relu's signs are none."""
    return 0 if kept is None or activation == "relu" else kept.shape[0]


def _noised(
    rows: Tensor, sigma: Tensor, seed: Tensor, row0: int, col0: int, samples: list[int], factor: float, log_variance: bool,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """rows + factor sigma z of each sample, one below the other: [samples * rows, K]"""
    where = [(-1, row0, col0, sample, 1) for sample in samples]
    us: list[Tensor] = [torch.ops.dipkernels.perturb(rows, sigma, seed, *w, factor, log_variance, dtype) for w in where]
    return us[0] if len(us) == 1 else torch.cat(us)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b^T + bias. On a CPU with AVX-512 straight by oneDNN: torch gives float32 to MKL, which is slower on an AMD machine,
    and takes a longer way in bfloat16, except for columns, which this one would copy."""
    if (
        (a.dtype is torch.float32 or (a.dtype is torch.bfloat16 and a.is_contiguous()))
        and a.device.type == "cpu"
        and _has_onednn()
        and a.numel()
        and b.numel()
    ):
        y: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
        return y
    return F.linear(a, b, bias)


@functools.cache
def _has_onednn() -> bool:
    offered = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return offered and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _act_add(total: Tensor, h: Tensor, activation: str) -> None:
    """total [rows, N] += the sum over samples of act(h), h [samples, rows, N]"""
    if _has_passes(h, activation):
        torch.ops.dipkernels.act_add(total, h, activation)
    else:
        for part in act_of(activation)(h):
            total.add_(part.to(total.dtype))


def _act_add_bwd(total: Tensor, h: Tensor, dy: Tensor, activation: str) -> Tensor:
    """dh = dy act'(h), [samples, rows, N]; total [rows, N] += its sum over samples"""
    if _has_passes(h, activation):
        fused: Tensor = torch.ops.dipkernels.act_add_bwd(total, h, dy, activation)
        return fused
    dh = _BACKWARDS[activation](dy.expand_as(h), h)
    for part in dh:
        total.add_(part.to(total.dtype))
    return dh


def _has_passes(h: Tensor, activation: str) -> bool:
    compiled = h.device.type == "cpu" and bool(backends.library().cpu_capabilities)
    return compiled and h.dtype is not torch.float64 and activation != "identity"


def _mean(
    x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, seed: Tensor, row0: int, col0: int, sample: int,
    num_samples: int, factor: float, log_variance: bool, activation: str, out_dtype: torch.dtype | None,
    kept: Tensor | None = None,
) -> Tensor:  # fmt: skip
    n, dtype, wide = weight.shape[0], weight.dtype, _accumulator(weight.dtype)
    num_rows = flat_rows(x).shape[0]
    y = torch.empty(num_rows, n, dtype=out_dtype or x.dtype, device=x.device)
    num_kept = _num_kept(kept, activation)
    for first, rows, groups in _blocks(x, num_samples, num_kept):
        block = slice(first, first + rows.shape[0])
        total = torch.zeros(rows.shape[0], n, dtype=wide, device=x.device)
        for group in groups:
            samples = [sample + i for i in group]
            u = _noised(rows, sigma, seed, row0 + first, col0, samples, factor, log_variance, dtype)
            h = _product(u, weight, bias).view(len(group), rows.shape[0], n)
            if kept is not None and activation == "relu":
                for i, part in zip(group, h, strict=True):
                    torch.ops.dipkernels.relu_add(total, kept[i // 8, block], part, i % 8)
                continue
            if kept is not None and group.start < num_kept:
                kept[group.start : group.stop, block] = h
            _act_add(total, h, activation)
        y[block] = total.mul_(1 / num_samples)
    return y.reshape(*x.shape[:-1], n)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, seed: Tensor, row0: int, col0: int, sample: int,
    num_samples: int, factor: float, log_variance: bool, activation: str, out_dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    where = (row0, col0, sample, num_samples, factor, log_variance)
    return _mean(x, weight, bias, sigma, seed, *where, activation, out_dtype)


def linear_keep(
    x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, seed: Tensor, row0: int, col0: int, sample: int,
    num_samples: int, factor: float, log_variance: bool, activation: str, num_kept: int, out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, kept): of relu a bit per sample, uint8 [ceil(S / 8), rows, N]; of another activation h_s of the first num_kept
    samples, [num_kept, rows, N]."""
    where = (row0, col0, sample, num_samples, factor, log_variance)
    shape = (x.shape[:-1].numel(), weight.shape[0])
    if activation == "relu":
        kept = torch.zeros(-(-num_samples // 8), *shape, dtype=torch.uint8, device=x.device)
    else:
        kept = torch.empty(num_kept, *shape, dtype=weight.dtype, device=x.device)
    return _mean(x, weight, bias, sigma, seed, *where, activation, out_dtype, kept), kept


def linear_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, seed: Tensor, row0: int, col0: int, sample: int,
    num_samples: int, factor: float, log_variance: bool, activation: str, kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """With dh_s = dy act'(h_s) / S, D = sum_s dh_s and G = sum_s dh_s^T z_s: dx = D W, dbias = sum D,
    dW = D^T x + G diag(sigma), dsigma_k = sum_n W_nk G_nk. So a sample costs one product, and one more where h_s is made
    again where it was not kept."""
    dtype, wide = weight.dtype, _accumulator(weight.dtype)
    n, k = weight.shape
    flat_dy = flat_rows(dy)
    dx = torch.empty(flat_dy.shape[0], k, dtype=x.dtype, device=x.device)
    dweight, noise_sum = torch.zeros(2, n, k, dtype=wide, device=x.device)  # noise_sum: G
    dbias = torch.zeros(n, dtype=wide, device=x.device)
    zero, one = x.new_zeros(1, k, dtype=dtype), torch.ones_like(sigma)
    by_signs = kept is not None and activation == "relu"
    num_kept = _num_kept(kept, activation)
    for first, rows, groups in _blocks(x, num_samples, num_kept):
        block = slice(first, first + rows.shape[0])
        block_dy = flat_dy[block].to(dtype)
        if (
            kept is not None and by_signs
        ):  # by columns, as the product over rows reads them: turned once for all samples
            block_dy, signs = block_dy.t().contiguous(), kept[:, block].transpose(1, 2).contiguous()
        total = torch.zeros(block_dy.shape, dtype=wide, device=x.device)  # D, or its transpose by_signs
        for group in groups:
            where = (seed, row0 + first, col0, [sample + i for i in group])
            if by_signs:
                dhs = [torch.ops.dipkernels.relu_add_bwd(total, signs[i // 8], block_dy, i % 8) for i in group]
                columns = dhs[0] if len(dhs) == 1 else torch.cat(dhs, 1)
            else:
                if kept is not None and group.start < num_kept:
                    h = kept[group.start : group.stop, block]
                else:
                    u = _noised(rows, sigma, *where, factor, log_variance, dtype)
                    h = _product(u, weight, bias).view(len(group), rows.shape[0], n)
                columns = flat_rows(_act_add_bwd(total, h, block_dy, activation)).t()
            z = _noised(zero.expand(rows.shape), one, *where, 1.0, False, dtype)
            noise_sum.add_(_product(columns, z.t()))
        total.mul_(1 / num_samples)
        total = total if by_signs else total.t()
        dbias.add_(total.sum(1))
        columns = total.to(dtype)
        dx[block] = _product(columns.t(), weight.t())
        dweight.add_(_product(columns, rows.to(dtype).t()))
    scale = torch.exp(sigma / 2) if log_variance else sigma
    noise_sum.mul_(factor / num_samples)
    dsigma = torch.linalg.vecdot(noise_sum, weight.to(wide), dim=0).to(sigma.dtype)
    if log_variance:
        dsigma = dsigma * scale / 2
    dweight.addcmul_(noise_sum, scale.to(wide))
    dbias = dbias.to(dtype if bias is None else bias.dtype)
    return dx.reshape(x.shape), dweight.to(dtype), dbias, dsigma


linear_keep_bwd = linear_bwd
