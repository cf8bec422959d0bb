"""y = mean over samples of act((x + sigma z_s) W^T + b) by blocks of rows.  docs/maths.md, section 4.

The implementation of `linear` where no fused kernel runs: the vendor's products. A block's noised rows and
pre-activations live for a few samples at a time, so memory does not grow with the samples. Backward draws again, and
multiplies again where it was not kept what it needs of a sample: act'(h).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

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
# Of one product, rows times samples: fewer make it smaller, and more sums of [N, K] in backward.
_CPU_ROWS = 1024
_GPU_ROWS = 16384
_ELEMENTS = 2**20  # of one product's result, at least: a narrow layer takes more rows, but no more than it has
_CPU_GROUP = 8  # samples of one product, where there are that many: one pass sums them
# act' in a byte, exact at 0 and at 1: csrc/launch.h
_SLOPE_STEPS, _SLOPE_ZERO, _SLOPE_NAN = 200, 26, 255


def act_of(activation: str) -> Callable[[Tensor], Tensor]:
    """The function of an activation's name; "identity" is the affine layer's."""
    return ACTIVATIONS.get(activation, lambda h: h)


def flat_rows(x: Tensor) -> Tensor:
    """[..., K] as [M, K], whatever is empty."""
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


def linear_as(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b in x's dtype"""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _rows(x: Tensor) -> int:
    return _CPU_ROWS if x.device.type == "cpu" else _GPU_ROWS


def _blocks(x: Tensor, n: int, num_samples: int) -> tuple[list[slice], list[range]]:
    """Ranges of the rows x [M, K], and those of samples that go through one product."""
    group = _CPU_GROUP if x.device.type == "cpu" else 1
    size = max(_rows(x), min(x.shape[0], _ELEMENTS // max(1, n, x.shape[1])))
    group = min(num_samples, max(group, size // max(1, x.shape[0])))
    step = max(1, size // group)
    groups = [range(i, min(i + group, num_samples)) for i in range(0, num_samples, group)]
    return [slice(i, min(i + step, x.shape[0])) for i in range(0, x.shape[0], step)], groups


def slopes_form(activation: str, dtype: torch.dtype, num_samples: int, num_kept: int) -> tuple[int, torch.dtype]:
    """Of what is kept of act'(h): its first dimension and dtype.  Relu: a bit of each sample; another activation in
    bfloat16, whose own rounding is as coarse: a byte of each kept one; else a number of the weight's type."""
    if activation == "relu":
        return (num_samples + 7) // 8, torch.uint8
    return num_kept, torch.uint8 if dtype is torch.bfloat16 else dtype


def _num_kept(kept: Tensor | None, activation: str, num_samples: int) -> int:
    """Samples of which backward finds act' at hand, the first ones."""
    if kept is None:
        return 0
    return num_samples if activation == "relu" else kept.shape[0]


def _check_samples(num_samples: int, num_kept: int) -> None:
    # Whoever calls the operation itself passes no check of ops.
    if not 1 <= num_samples <= 2**16:
        raise ValueError(f"num_samples: expected 1 to {2**16}, got {num_samples}")
    if num_kept > num_samples:
        raise ValueError(f"num_kept: expected 0 to num_samples = {num_samples}, got {num_kept}")


# sigma as a standard deviation, which is computed once for all draws, seed, first row and column, factor
_Draw = tuple[Tensor, Tensor, int, int, float]


def _standard_deviation(sigma: Tensor, log_variance: bool) -> Tensor:
    return torch.exp(sigma / 2) if log_variance else sigma


def _draws(
    rows: Tensor, how: _Draw, samples: range, num_given: int, dtype: torch.dtype, with_z: bool
) -> tuple[Tensor, Tensor]:
    """u_s = rows + factor sigma z_s of all samples but the first num_given, and z_s of all, [samples, rows, K] each."""
    sigma, seed, row0, col0, factor = how
    others = samples[num_given:]
    if rows.device.type == "cpu" and backends.library().cpu_capabilities:
        u = rows.new_empty(len(others), *rows.shape, dtype=dtype)
        z = rows.new_empty(len(samples) if with_z else 0, *rows.shape, dtype=dtype)
        for part, to_u, to_z in ((samples[:num_given], None, z[:num_given]), (others, u, z[num_given:])):
            if len(part):
                to = (to_u, to_z if with_z else None)
                torch.ops.dipkernels.draw_samples(*to, rows, sigma, seed, row0, col0, part.start, factor)
        return u, z

    def draw(x: Tensor, sigma: Tensor, samples: range, factor: float) -> Tensor:
        draws = [
            torch.ops.dipkernels.perturb(x, sigma, seed, -1, row0, col0, s, 1, factor, False, dtype) for s in samples
        ]
        return _stack(draws, 0) if draws else rows.new_empty(0, *rows.shape, dtype=dtype)

    zero, one = rows.new_zeros(rows.shape[-1]).expand(rows.shape), torch.ones_like(sigma)
    return draw(rows, sigma, others, factor), draw(zero, one, samples if with_z else samples[:0], 1.0)


def _stack(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0].unsqueeze(dim) if len(tensors) == 1 else torch.stack(tensors, dim)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b^T + bias. In float32 on a CPU with AVX-512 straight by oneDNN: torch gives it to MKL, which is slower on an AMD
    machine."""
    if b.is_mkldnn or (a.dtype is torch.float32 and _has_onednn(a) and a.numel() and b.numel()):
        y: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
        return y
    return F.linear(a, b, bias)


def _packed(weight: Tensor, rows: int) -> Tensor:
    """For several calls of _product, in the order in which one of so many rows reads it: else each brings it there."""
    offered = weight.dtype in (torch.float32, torch.bfloat16) and _has_onednn(weight)
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows) if offered and weight.numel() else weight


def _has_onednn(t: Tensor) -> bool:
    return t.device.type == "cpu" and _offers_onednn()


@functools.cache
def _offers_onednn() -> bool:
    names = ("_linear_pointwise", "_reorder_linear_weight")
    offered = torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)
    return offered and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _has_passes(h: Tensor) -> bool:
    return h.device.type == "cpu" and bool(backends.library().cpu_capabilities) and h.dtype is not torch.float64


def _act_add(
    total: Tensor, h: Tensor, activation: str, slopes: Tensor | None = None, first: int = 0, out: Tensor | None = None,
    factor: float = 1.0,
) -> None:  # fmt: skip
    """total [rows, N] += the sum over samples of act(h), h [samples, rows, N]; what backward needs of them into slopes;
    factor total into out."""
    if _has_passes(h):
        torch.ops.dipkernels.act_add(total, h, activation, slopes, first, out, factor)
        return
    for i, part in enumerate(h, first):
        total.add_(act_of(activation)(part))
        if slopes is None:
            continue
        if activation == "relu":
            slopes[i // 8] |= (~(part <= 0)).to(torch.uint8) << i % 8
        elif i < slopes.shape[0]:
            slope = _BACKWARDS[activation](torch.ones_like(part), part)
            slopes[i] = slope if slopes.is_floating_point() else _encode_slopes(slope)
    if out is not None:
        torch.mul(total, factor, out=out)


def _encode_slopes(slope: Tensor) -> Tensor:
    """act' as a byte."""
    return (slope.float() * _SLOPE_STEPS + _SLOPE_ZERO).round().nan_to_num(_SLOPE_NAN).to(torch.uint8)


def _decode_slopes(code: Tensor) -> Tensor:
    return torch.where(code == _SLOPE_NAN, torch.nan, (code.float() - _SLOPE_ZERO) / _SLOPE_STEPS)


def _act_add_bwd(
    total: Tensor, h: Tensor, bias: Tensor | None, dy: Tensor, activation: str, slopes: Tensor | None, first: int,
    num_samples: int, out: Tensor | None, factor: float,
) -> Tensor:  # fmt: skip
    """dh = dy act'(h + bias), [N, samples, rows], of dy [rows, N]; total [N, rows] += its sum over samples, factor total into
    out.  slopes [:, rows, N] has act' of the first samples, and h [others, N, rows] is that of the others.  bias [N]: of a
    product by columns, which adds none."""
    how = (activation, slopes, first, num_samples, out, factor)
    if _has_passes(h):
        fused: Tensor = torch.ops.dipkernels.act_add_bwd(total, h, bias, dy, *how)
        return fused
    dy, num_given, dhs = dy.t(), num_samples - h.shape[0], []
    for i in range(num_samples):
        if i >= num_given or slopes is None:
            part = h[i - num_given] if bias is None else h[i - num_given] + bias[:, None]
            dhs.append(_BACKWARDS[activation](dy, part))
        elif activation == "relu":
            dhs.append(torch.where((slopes[(first + i) // 8].t() >> (first + i) % 8 & 1).bool(), dy, 0))
        else:
            slope = slopes[first + i].t()
            dhs.append(dy * (slope if slope.is_floating_point() else _decode_slopes(slope)).to(dy.dtype))
        total.add_(dhs[-1])
    if out is not None:
        torch.mul(total, factor, out=out)
    return _stack(dhs, 1)


def _mean(
    x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, seed: Tensor, row0: int, col0: int, sample: int,
    num_samples: int, factor: float, log_variance: bool, activation: str, out_dtype: torch.dtype | None,
    kept: Tensor | None = None,
) -> Tensor:  # fmt: skip
    _check_samples(num_samples, _num_kept(kept, activation, num_samples))
    n, dtype, wide = weight.shape[0], weight.dtype, _accumulator(weight.dtype)
    flat = flat_rows(x)
    y = torch.empty(flat.shape[0], n, dtype=out_dtype or x.dtype, device=x.device)
    blocks, groups = _blocks(flat, n, num_samples)
    samples, scale = range(sample, sample + num_samples), _standard_deviation(sigma, log_variance)
    packed = _packed(weight, len(groups[0]) * len(flat[blocks[0]])) if len(blocks) * len(groups) > 3 else weight
    for block in blocks:
        rows, how = flat[block].contiguous(), (scale, seed, row0 + block.start, col0, factor)
        total = torch.zeros(rows.shape[0], n, dtype=wide, device=x.device)
        for group in groups:
            u, _ = _draws(rows, how, samples[group.start : group.stop], 0, dtype, with_z=False)
            h = _product(u.flatten(0, 1), packed, bias).view(len(group), rows.shape[0], n)
            slopes, out = None if kept is None else kept[:, block], y[block] if group is groups[-1] else None
            _act_add(total, h, activation, slopes, group.start, out, 1 / num_samples)
            del u, h  # before the next ones
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
    """(y, kept): kept is act' of the first num_kept samples in slopes_form, [:, rows, N]."""
    where = (row0, col0, sample, num_samples, factor, log_variance)
    first, dtype = slopes_form(activation, weight.dtype, num_samples, num_kept)
    make = torch.zeros if activation == "relu" else torch.empty  # bits are added to what is there
    kept = make(first, x.shape[:-1].numel(), weight.shape[0], dtype=dtype, device=x.device)
    return _mean(x, weight, bias, sigma, seed, *where, activation, out_dtype, kept), kept


def _sample_sums(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, how: _Draw, samples: range, activation: str, kept: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """With dh_s = dy act'(h_s): D^T [N, M] of D = 1/S sum_s dh_s, its sum over rows [N], and G = sum_s dh_s^T z_s [N, K].
    The compiled passes work by columns, dh^T [N, rows], as a CPU's products over rows read it fastest; the others by rows."""
    scale, seed, row0, col0, factor = how
    n, dtype, wide, num_samples = weight.shape[0], weight.dtype, _accumulator(weight.dtype), len(samples)
    num_kept = _num_kept(kept, activation, num_samples)
    _check_samples(num_samples, num_kept)
    noise_sum = torch.zeros(weight.shape, dtype=wide, device=x.device)
    row_sum = torch.zeros(n, dtype=wide, device=x.device)
    sums = torch.empty(n, x.shape[0], dtype=dtype, device=x.device)
    blocks, groups = _blocks(x, n, num_samples)
    by_columns = _has_passes(weight)
    for block in blocks:
        rows, block_how = x[block].contiguous(), (scale, seed, row0 + block.start, col0, factor)
        block_dy = dy[block].to(dtype).contiguous()
        slopes = None if kept is None else kept[:, block]
        total = torch.zeros((n, len(rows)) if by_columns else (len(rows), n), dtype=wide, device=x.device)
        total = total if by_columns else total.t()
        for group in groups:
            given = min(max(num_kept - group.start, 0), len(group))
            part = samples[group.start : group.stop]
            u, z = _draws(rows, block_how, part, given, dtype, with_z=True)
            if by_columns:
                h = _product(weight, u.flatten(0, 1)).view(n, len(u), len(rows)).transpose(0, 1)
            else:
                h = _product(u.flatten(0, 1), weight, bias).view(len(u), len(rows), n).transpose(1, 2)
            last = (group.start, len(group), sums[:, block] if group is groups[-1] else None, 1 / num_samples)
            dh = _act_add_bwd(total, h, bias if by_columns else None, block_dy, activation, slopes, *last)
            _act_add(noise_sum, _product(dh.flatten(1), z.flatten(0, 1).t())[None], "identity")
            del u, z, h, dh  # before the next ones
        row_sum.add_(total.sum(1))
    return sums, row_sum.mul_(1 / num_samples), noise_sum


def linear_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, seed: Tensor, row0: int, col0: int, sample: int,
    num_samples: int, factor: float, log_variance: bool, activation: str, kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx = D W, dbias = sum D, dW = D^T x + G diag(factor sigma) / S, dsigma_k = factor / S sum_n W_nk G_nk, with the D and G of
    _sample_sums. So a sample costs one product, and one more where h_s is made again because act'(h_s) was not kept."""
    dtype, wide = weight.dtype, _accumulator(weight.dtype)
    flat, scale = flat_rows(x), _standard_deviation(sigma, log_variance)
    samples = range(sample, sample + num_samples)
    sums, row_sum, noise_sum = _sample_sums(
        flat_rows(dy), flat, weight, bias, (scale, seed, row0, col0, factor), samples, activation, kept
    )
    if dtype is torch.float32:  # where the product copies columns: some at a time
        dx = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
        for i in range(0, flat.shape[0], _rows(x)):
            dx[i : i + _rows(x)] = _product(sums[:, i : i + _rows(x)].t(), weight.t())
    else:
        dx = _product(sums.t(), weight.t()).to(x.dtype)
    dweight = _product(sums, flat.to(dtype).t())
    del sums
    dweight = dweight.to(wide)
    noise_sum.mul_(factor / num_samples)
    dsigma = torch.linalg.vecdot(noise_sum, weight.to(wide), dim=0).to(sigma.dtype)
    if log_variance:
        dsigma = dsigma * scale / 2
    dweight.addcmul_(noise_sum, scale.to(wide))
    dbias = row_sum.to(dtype if bias is None else bias.dtype)
    return dx.reshape(x.shape), dweight.to(dtype), dbias, dsigma


linear_keep_bwd = linear_bwd
