"""y = mean over samples of act((x + sigma z_s) W^T + b) by blocks of rows.  docs/maths.md, section
4.

The implementation of `linear` where no fused kernel runs: the vendor's products. A block's noised
rows and pre-activations live for a few samples at a time, so memory does not grow with the samples.
Backward draws again, and multiplies all but the first sample again.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import library
from .activations import BACKWARDS, act_of
from .pieces import flat_rows

# Of one product, rows times samples: on a CPU a quarter as many as x has, within these, so that its
# operands and result take little beside those of one draw. In float32 twice the least: products of
# 512 rows are slower there, by 5 % at 4096 x 4096.
_CPU_ROWS = (512, 2048)
_GPU_ROWS = 16384
# of one product's result, at least: a narrow layer takes more rows, but no more than it has
_ELEMENTS = 2**20
# A CPU takes several samples in one product, each of this many rows at least: so their sum stays in
# its cache. A GPU would launch a kernel for each.
_CPU_ROWS_EACH = 128
# of a weight's gradient, at once where it is scaled: so no float32 copy of the whole is made
_CPU_PART = 2**18
# Products that a weight's gradient of 16 bits sums in its own type on a CPU, as autograd sums those
# of as many calls; more are summed in float32. A GPU's library may round parts of one product to
# its result's type, and a variance's gradient is a small difference of such numbers.
_NARROW_SUMS = 32
_TILE = 512  # of a product in float32: rows, columns, and what it sums over at a time
# of x86 processors, for products: one of them will do
_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16"),
}


def _blocks(
    x: Tensor, weight: Tensor, sample: int, num_samples: int, activation: str
) -> tuple[list[slice], list[range]]:
    """Ranges of the rows x [M, K], and those of samples that go through one product."""
    # a mean of affine samples is one draw with less sigma
    if activation == "identity" and num_samples != 1:
        raise ValueError(f"num_samples: expected 1 with activation 'identity', got {num_samples}")
    # whoever calls the operation itself passes no check of Python's
    if not 1 <= num_samples <= 2**16:
        raise ValueError(f"num_samples: expected 1 to {2**16}, got {num_samples}")
    if sample + num_samples > 2**16:
        raise ValueError(
            f"sample: expected sample + num_samples <= {2**16}, got {sample} + {num_samples}"
        )
    m, on_cpu = x.shape[0], x.device.type == "cpu"
    least, most = _CPU_ROWS if on_cpu else (_GPU_ROWS, _GPU_ROWS)
    size = min(max(m // 4, least if weight.element_size() < 4 else 2 * least), most)
    size = max(size, min(m, _ELEMENTS // max(1, *weight.shape)))
    each = max(1, min(m, _CPU_ROWS_EACH if on_cpu else size))
    group = min(num_samples, max(1, size // each))
    rows = max(1, size // group)
    groups = [range(i, min(i + group, num_samples)) for i in range(0, num_samples, group)]
    return [slice(i, min(i + rows, m)) for i in range(0, m, rows)], groups


def _standard_deviation(sigma: Tensor, log_variance: bool) -> Tensor:
    return torch.exp(sigma / 2) if log_variance else sigma


def _is_compiled(t: Tensor) -> bool:
    return t.device.type == "cpu" and bool(library.load().cpu_capabilities)


def _noised(
    x: Tensor,
    sigma: Tensor,
    seed: Tensor,
    row0: int,
    col0: int,
    samples: range,
    factor: float,
    dtype: torch.dtype,
) -> Tensor:
    """u_s = x + factor sigma z_s, [samples, rows, K], sigma a standard deviation."""
    if _is_compiled(x):
        u = x.new_empty(len(samples), *x.shape, dtype=dtype)
        torch.ops.dipkernels.draw_samples(u, x, sigma, seed, row0, col0, samples.start, factor)
        return u
    draws = [
        torch.ops.dipkernels.perturb(x, sigma, seed, -1, row0, col0, s, factor, False, dtype)
        for s in samples
    ]
    return _stack(draws) if draws else x.new_empty(0, *x.shape, dtype=dtype)


def _noise_of(
    u: Tensor, seed: Tensor, row0: int, col0: int, samples: range, shift: Tensor | None = None
) -> Tensor:
    """z_s + shift of u_s [samples, rows, K], over u where the pass runs."""
    ones = torch.ones(u.shape[-1], device=u.device)
    if _is_compiled(u):
        sigma = None if shift is None else ones
        torch.ops.dipkernels.draw_samples(u, shift, sigma, seed, row0, col0, samples.start, 1.0)
        return u
    x = u.new_zeros(u.shape[-1]).expand(u.shape[1:]) if shift is None else shift
    return _noised(x, ones, seed, row0, col0, samples, 1.0, u.dtype)  # rounded as it is drawn


def _stack(tensors: list[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)


def _pre_activations(
    u: Tensor, weight: Tensor, bias: Tensor | None, first: Tensor | None
) -> Tensor:
    """h_s of the noised rows u_s [samples, rows, K]; before them the first sample's [rows, N],
    where it is given."""
    before = first is not None
    h = u.new_empty(len(u) + before, u.shape[1], len(weight))
    if first is not None:
        h[0].copy_(first)
    _affine(u.flatten(0, 1), weight, bias, h[before:].flatten(0, 1))
    return h


def _affine(u: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if _multiplies_in_float32(u):
        for place, product in _products(u, weight.t()):
            out[place] = product if bias is None else product.add_(bias[place[1]])
    elif bias is None:
        torch.mm(u, weight.t(), out=out)
    else:
        torch.addmm(bias, u, weight.t(), out=out)


@functools.cache
def _multiplies_fast(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies numbers of 16 bits as fast as float32, as far as torch
    knows."""
    told: Any = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch has none
    has = {name: told[name] for name in _INSTRUCTIONS[dtype] if name in told}
    # Intel's with both left this to AMX, which a virtual machine may lack: avx512_bf16 is half as
    # fast there as float32
    if str(told.get("cpu_name", "")).startswith("Intel") and told.get("avx512_fp16"):
        has.pop("avx512_bf16", None)
    return any(has.values()) or not has


def _multiplies_in_float32(t: Tensor) -> bool:
    """Where torch's own products of 16 bits take twice as long, or many times."""
    return t.device.type == "cpu" and t.dtype in _INSTRUCTIONS and not _multiplies_fast(t.dtype)


def _products(a: Tensor, b: Tensor) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """Parts of a b, each in float32 and with its place."""
    for i in range(0, len(a), _TILE):
        for j in range(0, b.shape[1], _TILE):
            rows, columns = slice(i, i + _TILE), slice(j, j + _TILE)
            left, right = a[rows], b[:, columns]
            product = a.new_zeros(len(left), right.shape[1], dtype=torch.float32)
            for part, other in zip(left.split(_TILE, 1), right.split(_TILE)):
                product.addmm_(part.float(), other.float())
            yield (rows, columns), product


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _has_passes(h: Tensor) -> bool:
    return _is_compiled(h) and h.dtype is not torch.float64


def _act_add(
    total: Tensor, h: Tensor, activation: str, out: Tensor | None = None, factor: float = 1.0
) -> None:
    """total [rows, N] += the sum over samples of act(h), h [samples, rows, N]; factor total into
    out."""
    if _has_passes(h):
        torch.ops.dipkernels.act_add(total, h, activation, out, factor)
        return
    for part in h:
        total.add_(act_of(activation)(part))
    if out is not None:
        torch.mul(total, factor, out=out)


def _act_add_bwd(
    total: Tensor, h: Tensor, dy: Tensor, activation: str, out: Tensor | None, factor: float
) -> Tensor:
    """dh = dy act'(h), [samples, rows, N], over h where the pass runs; total [rows, N] += its sum
    over samples, factor total into out."""
    if _has_passes(h):
        torch.ops.dipkernels.act_add_bwd(total, h, dy, activation, out, factor)
        return h
    dhs = [BACKWARDS[activation](dy, part) for part in h]
    for dh in dhs:
        total.add_(dh)
    if out is not None:
        torch.mul(total, factor, out=out)
    return _stack(dhs)


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matrices [N, K] by ranges of their rows; on a GPU whole, for each would launch a kernel."""
    n, k = tensors[0].shape
    rows = _CPU_PART // max(1, k) if tensors[0].device.type == "cpu" else n
    yield from zip(*(t.split(max(1, rows)) for t in tensors))


def _add_product(total: Tensor, a: Tensor, b: Tensor, factor: float = 1.0) -> None:
    """total [N, K] += factor a b."""
    if _multiplies_in_float32(a):
        for place, product in _products(a, b):
            total[place].add_(product, alpha=factor)
    elif total.dtype is a.dtype:
        total.addmm_(a, b, alpha=factor)
    elif a.device.type == "cpu":
        total.add_(torch.mm(a, b), alpha=factor)
    else:
        total.add_(torch.mm(a, b, out_dtype=total.dtype), alpha=factor)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: Tensor,
    seed: Tensor,
    row0: int,
    col0: int,
    sample: int,
    factor: float,
    log_variance: bool,
    num_samples: int,
    activation: str,
    out_dtype: torch.dtype | None,
    first: Tensor | None = None,
) -> Tensor:
    """The operation `linear`."""
    n, dtype, flat = weight.shape[0], weight.dtype, flat_rows(x)
    y = torch.empty(flat.shape[0], n, dtype=out_dtype or x.dtype, device=x.device)
    blocks, groups = _blocks(flat, weight, sample, num_samples, activation)
    samples, scale = range(sample, sample + num_samples), _standard_deviation(sigma, log_variance)
    for block in blocks:
        rows = flat[block].contiguous()
        total = torch.zeros(rows.shape[0], n, dtype=_accumulator(dtype), device=x.device)
        for group in groups:
            kept = None if first is None or group.start else flat_rows(first)[block]
            part = samples[group.start : group.stop][kept is not None :]
            u = _noised(rows, scale, seed, row0 + block.start, col0, part, factor, dtype)
            h = _pre_activations(u, weight, bias, kept)
            _act_add(
                total, h, activation, y[block] if group is groups[-1] else None, 1 / num_samples
            )
            del u, h  # before the next ones
    return y.reshape(*x.shape[:-1], n)


def linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: Tensor,
    seed: Tensor,
    row0: int,
    col0: int,
    sample: int,
    factor: float,
    log_variance: bool,
    num_samples: int,
    activation: str,
    first: Tensor | None = None,
    over_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operation `linear_bwd`.

    With dh_s = dy act'(h_s), D = 1/S sum_s dh_s and G = 1/S sum_s dh_s^T z_s: dx = D W, dbias = sum
    D, dW = D^T x + G diag(factor sigma), dsigma_k = factor sum_n W_nk G_nk. So a sample costs two
    products, the first but one. h_s is made by the product that made it in forward: behind relu
    another rounding would be another sign.

    In float32 the first costs none. G = H + D^T z_0, and z_s - z_0 in H is 0 there: dW = D^T u_0 +
    H diag(factor sigma), dsigma_k = factor (sum_n W_nk H_nk + sum_m dx_mk z_0,mk). H is larger than
    G by up to the root of S, which 16 bits would feel.

    over_first: D, which has the size of `first`, takes its memory, block by block.
    """
    n, dtype, wide = weight.shape[0], weight.dtype, _accumulator(weight.dtype)
    flat, flat_dy, scale = flat_rows(x), flat_rows(dy), _standard_deviation(sigma, log_variance)
    samples = range(sample, sample + num_samples)
    blocks, groups = _blocks(flat, weight, sample, num_samples, activation)
    few = len(blocks) * len(groups) <= _NARROW_SUMS
    sum_type = dtype if few and x.device.type == "cpu" else wide
    shifts = dtype.itemsize >= 4  # z_s - z_0 in place of z_s
    noise_sum = torch.zeros(weight.shape, dtype=sum_type, device=x.device)  # H, or else G
    row_sum = torch.zeros(n, dtype=wide, device=x.device)
    flat_first = None if first is None else flat_rows(first)
    sums = flat_first if over_first else None  # D
    if sums is None:
        sums = torch.empty(flat.shape[0], n, dtype=dtype, device=x.device)
    for block in blocks:
        rows, block_dy = flat[block].contiguous(), flat_dy[block].to(dtype).contiguous()
        where, shift = (seed, row0 + block.start, col0), None
        if shifts:
            blank = torch.empty_like(rows, dtype=dtype)[None]
            shift = _noise_of(blank, *where, samples[:1])[0].neg_()
        total = torch.zeros(len(rows), n, dtype=wide, device=x.device)
        for group in groups:
            kept = None if flat_first is None or group.start else flat_first[block]
            part = samples[group.start : group.stop]
            u = _noised(rows, scale, *where, part, factor, dtype)
            h = _pre_activations(u[kept is not None :], weight, bias, kept)
            z = _noise_of(u, *where, part, shift)
            del u  # before what follows it
            dh = _act_add_bwd(
                total,
                h,
                block_dy,
                activation,
                sums[block] if group is groups[-1] else None,
                1 / num_samples,
            )
            del h
            if shifts and not group.start:
                z, dh = z[1:], dh[1:]
            _add_product(noise_sum, dh.flatten(0, 1).t(), z.flatten(0, 1), 1 / num_samples)
            del z, dh
        row_sum.add_(total.sum(0))
    dsigma = torch.zeros(weight.shape[1], dtype=wide, device=x.device)
    for noise, w in _parts(noise_sum, weight):
        dsigma.add_(torch.linalg.vecdot(noise.to(wide), w.to(wide), dim=0), alpha=factor)
        noise.mul_(factor * scale)
    dweight, read = noise_sum, flat  # and now the other term of it
    if shifts:
        read = _noised(flat.contiguous(), scale, seed, row0, col0, samples[:1], factor, dtype)[0]
    _add_product(dweight, sums.t(), read.to(dtype))
    del read  # before dx, which is as large
    dx = sums.new_empty(len(sums), weight.shape[1])
    _affine(sums, weight.t(), None, dx)
    if shifts:
        of_first = -1, row0, col0, sample, factor, False
        dsigma.add_(torch.ops.dipkernels.perturb_bwd(dx, scale, seed, *of_first))
    if log_variance:
        dsigma.mul_(scale / 2)
    dbias = row_sum.mul_(1 / num_samples).to(dtype if bias is None else bias.dtype)
    return dx.to(x.dtype).reshape(x.shape), dweight.to(dtype), dbias, dsigma.to(sigma.dtype)
