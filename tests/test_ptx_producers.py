"""The producers' Triton kernels (norms, activations, gates with noise) as its compiler made them,
executed by tests/ptx against the float64 reference, without a GPU: as in test_ptx_triton.py."""

import itertools

import pytest
import torch
from test_ptx_triton import (
    BF16,
    CONFIGS,
    EPS,
    F16,
    F32,
    F64,
    FAR,
    NAMES,
    PLAIN,
    SEED,
    gate,
    nan_in_new_memory,  # noqa: F401
    norm,
    on_gpu,
    quick_of,
    reference,
    slow,
    strided,
)

from dipkernels import backends, library
from dipkernels import ops as cpu
from dipkernels.ops.draw import Draw

DTYPES = [BF16, F16, F32, F64]
KINDS = ["layer", "rms"]
INF, NAN = float("inf"), float("nan")
HAS_CPU = "portable" in library.load().cpu_capabilities
# What float32 arithmetic of a few operations loses, approximate instructions included; float64's.
FINE = {F64: 4e-14}
FINE |= dict.fromkeys((BF16, F16, F32), 2e-6)


def numbers(*shape, dtype=F32, seed=0):
    generator = torch.Generator().manual_seed(sum(shape) + 1000 * seed)
    return (2 * torch.randn(shape, generator=generator, dtype=F64)).to(dtype)


def wide(dtype):
    return F64 if dtype is F64 else F32


def spread(k, dtype, log_variance=False):
    """sigma, or its logarithm; every second one is 0, where u is f(x) and nothing else"""
    sigma = torch.rand(k, generator=torch.Generator().manual_seed(k), dtype=F64) + 0.1
    sigma[::2] = 0
    return (sigma.square().log() if log_variance else sigma).to(wide(dtype))


def assert_near(got, want, dtype, noise=0.0, size=None):
    """got is want, rounded once to dtype; noise: what z's own tolerance adds; size: of the terms
    that made it"""
    want = want.double()
    assert got.dtype is dtype and got.shape == want.shape
    rounding = 0 if dtype is F64 else EPS[dtype]
    size = 1 + want.abs() if size is None else size
    # float16 has subnormal numbers from 6e-5 on
    error = (got.double() - want).abs() - rounding * want.abs() - 6e-8 * (dtype is F16)
    assert (error <= FINE[dtype] * size + noise).all(), (error.max(), got, want)


def noise_bound(sigma, log_variance, factor, shape, dim):
    s = sigma.double().div(2).exp() if log_variance else sigma.double()
    view = [1] * len(shape)
    view[dim] = -1
    return 4e-6 * factor * s.view(view).expand(shape)


# ---- activations and gated products

GATES = {  # shape, dim, col0
    "one": ((1, 1), -1, 0),
    "odd": ((5, 41), -1, 35),
    "rows": ((19, 40), -1, 0),
    "many rows": ((600, 24), -1, 0),
    "nchw": ((2, 16, 7, 5), 1, 0),
    "nchw odd": ((3, 21, 5, 5), 1, 59),
}
GATE_CASES = quick_of(
    list(itertools.product(GATES, NAMES, DTYPES, CONFIGS)),
    [("odd", "silu", BF16, 80), *(("odd", name, F32, 80) for name in NAMES)],
)


@pytest.mark.parametrize("case, name, dtype, arch", GATE_CASES)
def test_compiled_activations_and_gates_match_reference(case, name, dtype, arch):
    shape, dim, col0 = GATES[case]
    a, b, du = (numbers(*shape, dtype=dtype, seed=i) for i in range(3))
    log_variance = name in ("silu", "relu")
    sigma = spread(shape[dim], dtype, log_variance)
    where = (sigma, SEED, dim, 2**32 - 7, col0, 2, 0.5, log_variance, name)
    with on_gpu(arch, CONFIGS[arch], multiprocessors=1):
        y = gate.gate(a, None, *where, None)
        dx, empty, dsigma = gate.gate_bwd(du, a, None, *where)
        u, (da, db, total) = gate.gate(a, b, *where, None), gate.gate_bwd(du, a, b, *where)
        none = gate.gate_bwd(du, a, b, None, *where[1:])
    exact, (a, b, du) = (sigma.double(), *where[1:]), (t.double() for t in (a, b, du))
    noise = noise_bound(sigma, log_variance, 0.5, shape, dim)
    assert_near(y, reference.gate(a, None, *exact, None), dtype, noise)
    assert_near(u, reference.gate(a, b, *exact, None), dtype, noise)
    want, _, want_dsigma = reference.gate_bwd(du, a, None, *exact)
    assert_near(dx, want, dtype, size=1 + du.abs())
    assert empty.shape == (0,)
    size = 1 + (du * b).abs() + (du * a).abs()
    for got, want in zip((da, db), reference.gate_bwd(du, a, b, *exact)[:2], strict=True):
        assert_near(got, want, dtype, size=size)
    rows = a.numel() / shape[dim]
    assert_near(dsigma, want_dsigma, sigma.dtype, noise=2e-5 * rows**0.5)
    # tiles of other sizes add in another order
    torch.testing.assert_close(total, dsigma, rtol=1e-5, atol=2e-5 * rows**0.5)
    assert torch.equal(none[0], da) and torch.equal(none[1], db) and none[2].numel() == 0


@pytest.mark.parametrize("arch", [80, slow(90)])
def test_compiled_relu_has_the_gradient_of_torch_to_the_bit(arch):
    a, du = (numbers(5, 41, seed=i) for i in range(2))
    du[:, ::3], du[0] = INF, -INF
    where = (None, SEED, -1, 0, 0, 0, 1.0, False, "relu")
    with on_gpu(arch, CONFIGS[arch]):
        found = [
            gate.gate_bwd(du, a, None, *where)[0],
            gate.gate_bwd(torch.ones_like(du), a, du, *where)[0],  # the other factor, infinite
        ]
    want = torch.ops.aten.threshold_backward(du, a, 0)
    for da in found:
        assert torch.equal(da.view(torch.int32), want.view(torch.int32))


@pytest.mark.parametrize("arch", [80, slow(90)])
@pytest.mark.parametrize("name", [slow(name) for name, *_ in strided()])
def test_compiled_gates_take_any_strides(name, arch):
    a, dim = next((x, dim) for known, x, dim in strided() if known == name)
    b, du = numbers(*a.shape), numbers(*a.shape[::-1]).movedim(0, -1).reshape(a.shape)
    if a.dim() == 2:
        du = numbers(*a.shape[::-1]).t()
    where = (spread(a.shape[dim], F32), SEED, dim, 9, 3, 1, 1.0, False, "gelu")
    with on_gpu(arch, CONFIGS[arch]):
        for given in ((a, b, du), (b, a, du)):
            dense = [t.contiguous() for t in given]
            us = [gate.gate(*each[:2], *where, None) for each in (given, dense)]
            assert torch.equal(*us)
            grads, want = (gate.gate_bwd(d, a, b, *where) for a, b, d in (given, dense))
            assert torch.equal(grads[0], want[0]) and torch.equal(grads[1], want[1])
            torch.testing.assert_close(grads[2], want[2], rtol=1e-5, atol=1e-4)


# ---- norms

NORMS = {  # shape, col0, columns of a program where not its own
    "one": ((1, 1), 0, None),
    "odd": ((5, 41), 35, None),
    "rows": ((19, 40), 0, None),
    "three": ((2, 5, 24), 0, None),
    "many rows": ((70, 520), 53, None),
    "split": ((5, 37), 35, 16),
    "blocks": ((9, 768), 0, None),
    "long": ((2, 4104), 0, None),
}
AFFINE = {  # weight, bias, offset
    "both": (True, True, 0.5),
    "weight": (True, False, 0.0),
    "bias": (False, True, 0.0),
    "none": (False, False, 0.0),
}
NORM_CASES = quick_of(
    [
        *itertools.product(NORMS, KINDS, ["both"], DTYPES, CONFIGS),
        *itertools.product(["odd", "split"], KINDS, ["weight", "bias", "none"], DTYPES, CONFIGS),
    ],
    [
        ("odd", "layer", "both", F32, 80),
        ("split", "rms", "weight", BF16, 80),
        ("blocks", "layer", "both", BF16, 90),
    ],
)


def narrow(monkeypatch, columns):
    """Programs of so many columns, so that a short row is in several"""
    if columns:
        monkeypatch.setattr(norm, "TILE_ELEMENTS", columns)
        monkeypatch.setattr(norm, "MAX_WARPS", 4)


def check_norm(x, du, weight, bias, where, eps, offset, arch):
    """u, stats and every gradient, of one launch each"""
    sigma, log_variance, kind = where[0], where[7], where[8]
    with on_gpu(arch, CONFIGS[arch], multiprocessors=1):
        u, stats = norm.norm(x, weight, bias, *where, eps, offset, None)
        grads = norm.norm_bwd(du, x, stats, weight, bias, *where, offset)
        none = norm.norm_bwd(du, x, stats, weight, bias, None, *where[1:], offset)
    exact = (sigma.double(), *where[1:])
    w, b = (None if t is None else t.double() for t in (weight, bias))
    want, want_stats = reference.norm(x.double(), w, b, *exact, eps, offset, None)
    noise = noise_bound(sigma, log_variance, where[6], x.shape, -1)
    # rstd's error is relative, and h's then too
    assert_near(u, want, x.dtype, noise, 2 + want.abs())
    assert_near(stats, want_stats, stats.dtype)
    assert stats.shape == (1 + (kind == "layer"), x.shape[:-1].numel())
    wants = reference.norm_bwd(du.double(), x.double(), stats.double(), w, b, *exact, offset)
    largest = stats[-1].max().item() * 4 * du.double().abs().max()
    assert_near(grads[0], wants[0], x.dtype, size=largest)
    size = 10 + 4 * du.double().abs().sum()
    for got, want, like in zip(grads[1:3], wants[1:3], (weight, bias), strict=True):
        assert_near(got, want, F32 if like is None else like.dtype, size=size)
    assert_near(grads[3], wants[3], sigma.dtype, noise=2e-5 * (x.numel() / x.shape[-1]) ** 0.5)
    assert all(torch.equal(*both) for both in zip(none[:3], grads[:3], strict=True))
    assert none[3].numel() == 0


@pytest.mark.parametrize("case, kind, affine, dtype, arch", NORM_CASES)
def test_compiled_norm_and_its_gradients_match_reference(
    case, kind, affine, dtype, arch, monkeypatch
):
    shape, col0, columns = NORMS[case]
    narrow(monkeypatch, columns)
    x, du = (numbers(*shape, dtype=dtype, seed=i) + 0.5 * i for i in range(2))
    weight, bias = (numbers(shape[-1], dtype=dtype, seed=i) for i in range(2))
    has_weight, has_bias, offset = AFFINE[affine]
    log_variance = kind == "layer"
    sigma = spread(shape[-1], dtype, log_variance)
    where = (sigma, SEED, -1, 2**32 - 3, col0, 1, 0.5, log_variance, kind)
    given = (weight if has_weight else None, bias if has_bias else None)
    check_norm(x, du, *given, where, 1e-5, offset, arch)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_norm_leaves_the_statistics_of_other_programs_alone(kind):
    """One program after the other; the last one's block of rows ends outside of the tensor."""
    x, where = numbers(33, 64), (spread(64, F32), SEED, -1, 0, 0, 0, 1.0, False, kind)
    with on_gpu(80, 1, threads=1) as launches:
        _, stats = norm.norm(x, None, None, *where, 1e-5, 0.0, None)
    assert launches[0][1] == (2,)
    want = reference.norm(x.double(), None, None, *where, 1e-5, 0.0, None)[1]
    assert_near(stats, want, F32)


@pytest.mark.slow
@pytest.mark.parametrize("arch", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_norm_takes_any_strides_and_types(kind, arch):
    x, du = numbers(6, 24), numbers(6, 24, seed=1)
    sigma, where = spread(24, F32), (SEED, -1, 9, 3, 1, 1.0, False, kind)
    for weight, bias in (
        (numbers(24, dtype=BF16), numbers(24, dtype=F64)),
        (numbers(48)[::2], numbers(1).expand(24)),
    ):
        plain = None if weight is None else weight.contiguous(), bias.contiguous()
        with on_gpu(arch, CONFIGS[arch]):
            u, stats = norm.norm(x, *plain, sigma, *where, 1e-5, 0.0, None)
            grads = norm.norm_bwd(du, x, stats, *plain, sigma, *where, 0.0)
            for strange in (x.t().contiguous().t(), torch.cat((x, x), 1)[:, :24]):
                again = norm.norm(strange, weight, bias, sigma, *where, 1e-5, 0.0, None)
                assert torch.equal(again[0], u) and torch.equal(again[1], stats)
                slope = du.t().contiguous().t()
                again = norm.norm_bwd(slope, strange, stats, weight, bias, sigma, *where, 0.0)
                assert all(map(torch.equal, again, grads))
            half = norm.norm(x, *plain, sigma, *where, 1e-5, 0.0, F16)[0]
        assert torch.equal(half, u.half())
        want = reference.norm(x.double(), *plain, sigma, *where, 1e-5, 0.0, None)[0]
        assert_near(u, want, F32, noise_bound(sigma, False, 1.0, x.shape, -1), 2 + want.abs())


def test_launchers_of_producers_take_no_rows_and_no_columns():
    draw = (-1, 0, 0, 0, 1.0, False)
    with on_gpu(80, 1):
        for shape in ((0, 4), (4, 0)):
            x, sigma = torch.zeros(shape), torch.ones(shape[1])
            where = (sigma, SEED, *draw)
            assert gate.gate(x, None, *where, "relu", None).shape == x.shape
            dx, _, dsigma = gate.gate_bwd(x, x, None, *where, "relu")
            assert dx.shape == x.shape and torch.equal(dsigma, torch.zeros_like(sigma))
            u, stats = norm.norm(x, sigma, None, *where, "layer", 1e-5, 0.0, None)
            grads = norm.norm_bwd(x, x, stats, sigma, None, *where, "layer", 0.0)
            assert u.shape == grads[0].shape == x.shape
            assert all(torch.equal(grads[i], torch.zeros_like(sigma)) for i in (1, 3))


# ---- bits


@pytest.mark.skipif(not HAS_CPU, reason="the compiled library is not built")
@pytest.mark.parametrize(
    "dtype, arch", quick_of(list(itertools.product(DTYPES, CONFIGS)), [(BF16, 80)])
)
def test_compiled_producers_draw_what_the_cpu_draws_to_the_bit(dtype, arch):
    """Behind what rounds nothing: relu, a product with 1, a norm of weight 0."""
    x, bias = numbers(9, 40, dtype=dtype), numbers(40, dtype=dtype)
    sigma, one, zero = torch.rand(40, dtype=wide(dtype)), torch.ones_like(x), torch.zeros_like(bias)
    draw = (-1, 2**32 - 5, 3, 2, 0.5, False)
    with on_gpu(arch, CONFIGS[arch]):
        got = [gate.gate(x, b, sigma, SEED, *draw, "relu", None) for b in (None, one)]
        for kind in KINDS:
            u, _ = norm.norm(x, zero, bias, sigma, SEED, *draw, kind, 1e-5, 0.0, None)
            got.append(u)
    with backends.backend("cpu"):
        relu = cpu.perturb.perturb(x.relu(), sigma, SEED, Draw(*draw), None)
        flat = cpu.perturb.perturb(bias.expand(9, 40).contiguous(), sigma, SEED, Draw(*draw), None)
    assert all(map(torch.equal, got, (relu, relu, flat, flat)))


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("name", [*map(slow, (*NAMES, *KINDS))])
def test_compiled_producer_of_16_bit_data_rounds_once(name, dtype):
    tensors = [numbers(9, 40, dtype=dtype, seed=i) for i in range(2)]
    where = (torch.rand(40), SEED, -1, 5, 3, 2, 0.5, False, name)

    def results(x, b):
        if name in KINDS:
            return [norm.norm(x, None, None, *where, 1e-5, 0.0, None)[0]]
        return [gate.gate(x, factor, *where, None) for factor in (None, b)]

    with on_gpu(80, 1):
        narrowed, full = results(*tensors), results(*(t.float() for t in tensors))
    assert all(torch.equal(u, wide.to(dtype)) for u, wide in zip(narrowed, full, strict=True))


# ---- numbers out of the ordinary

NEAR = [1e-45, 1e-40, 1e-38, 1e-30, 1e-20, 1e-10, 1e-6, 1e-4, 1e-3, 0.01, 0.1, 0.3, 0.7, 1.0]
OUT = [3.0, 5.5, 6.5, 9.0, 19.0, 21.0, 40.0, 90.0, 800.0]
ODD = torch.tensor([*FAR[:-1], *NEAR, *OUT, *(-v for v in NEAR + OUT), NAN], dtype=F64)


@pytest.mark.parametrize("errors", [0, 1, slow(2), slow(3)])
@pytest.mark.parametrize(
    "name, dtype, arch",
    quick_of(
        list(itertools.product(NAMES, DTYPES, CONFIGS)), [("silu", F32, 80), ("tanh", F32, 80)]
    ),
)
def test_compiled_activations_of_any_number(name, dtype, arch, errors):
    """Zero, subnormal, tiny, large, huge, infinite numbers and NaN: as accurate as the plain
    function's float32, for a tiny argument too"""
    x = ODD.to(dtype)[None]
    zero = torch.zeros(x.shape[1], dtype=wide(dtype))
    where = (zero, SEED, -1, 0, 0, 0, 1.0, False, name)
    ones = torch.ones_like(x)
    with on_gpu(arch, errors):
        y, (dx, *_) = gate.gate(x, None, *where, None), gate.gate_bwd(ones, x, None, *where)
        u, (da, db, _) = gate.gate(x, ones, *where, None), gate.gate_bwd(ones, x, ones, *where)
    assert torch.equal(u.nan_to_num(7), y.nan_to_num(7)), "gated with 1"
    assert torch.equal(da.nan_to_num(7), dx.nan_to_num(7)), "gated with 1"
    leaf = x.double().requires_grad_()
    want = PLAIN[name](leaf)
    slope = torch.autograd.grad(want, leaf, ones.double())[0]
    # of numbers whose powers even float64 does not hold
    slope = torch.where(slope.isnan() & ~x.isnan(), (leaf > 0).double() * (name != "tanh"), slope)
    finite, want = x.isfinite(), want.detach()
    for got in (y, db):
        error = (got.double() - want).abs() - EPS[dtype] * want.abs()
        # 1 + erf and 1 + tanh cancel where the argument is large and negative, as torch's do
        bound = FINE[dtype] * torch.where(x > -2, want.abs(), 1 + x.double().abs().clamp(max=10))
        least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert (error <= bound + 2 * least)[finite].all(), (x[finite], got[finite], want[finite])
        high, low = got[x == INF], got[x == -INF]
        if name == "tanh":
            assert ((high - 1).abs() <= 1e-6).all() and ((low + 1).abs() <= 1e-6).all()
        else:  # torch's low ones are infinity times 0
            assert (high == INF).all() and ((low == 0) | low.isnan()).all()
    error = (dx.double() - slope).abs() - EPS[dtype] * slope.abs()
    fine = error <= 2 * FINE[dtype]
    if name == "gelu":
        fine |= dx.isnan() & x.isinf()  # torch's too
    assert fine[~x.isnan()].all(), (x, dx, slope)
    for got in (y, db, *(() if name == "relu" else (dx,))):
        assert got[x.isnan()].isnan().all()


@pytest.mark.parametrize("errors", [0, 1, slow(2), slow(3)])
@pytest.mark.parametrize(
    "kind, dtype, arch",
    quick_of(list(itertools.product(KINDS, DTYPES, CONFIGS)), [("layer", F32, 80)]),
)
def test_compiled_norm_of_any_numbers(kind, dtype, arch, errors):
    """Rows of zeros, of one number, subnormal, tiny and huge ones, behind an eps that is anything;
    a NaN or an infinity stays in its row."""
    base = numbers(24, dtype=F64)
    base[3] = 0
    big = {F16: 1e3, F64: 1e100}.get(dtype, 1e15)
    tiny = [1e-45, 1e-40, 1e-30, 1e-22, 1e-21, 1e-20, 1e-19, 1e-18, 1e-10, 1e-6]
    rows = [base * 0, base * 0 + 3, *(base * v for v in (*tiny, 1.0, 30.0, big)), base, base]
    x = torch.stack(rows).to(dtype)
    x[-2, 5], x[-1, 7] = INF, NAN
    du, zero = numbers(*x.shape, dtype=dtype), torch.zeros(24, dtype=wide(dtype))
    variance = x.double().square().mean(1) - (x.double().mean(1) ** 2 if kind == "layer" else 0)
    variance = torch.where(x.double().std(1) == 0, 0.0, variance) if kind == "layer" else variance
    for eps in (1e-5, 1e-12, 1e-37, 1e-42, 0.0):
        where = (zero, SEED, -1, 0, 0, 0, 1.0, False, kind)
        with on_gpu(arch, errors):
            u, stats = norm.norm(x, None, None, *where, eps, 0.0, None)
            dx = norm.norm_bwd(du, x, stats, None, None, *where, 0.0)[0]
        # float32 holds no square of a smaller number: torch's float32 has 0 / sqrt(eps) there, or
        # 0 / 0. A subnormal sum has few digits.
        least = 1e-300 if dtype is F64 else 1e-43
        some = variance + eps > least
        some[-2:] = False
        assert u[some].isfinite().all() and (u[some].abs() <= 24**0.5 * 1.01).all()
        exact = (variance > 1e-290 if dtype is F64 else variance > 1e-36) | (eps > 1e-38)
        exact[-2:] = False
        want, want_stats = reference.norm(x.double(), None, None, *where, eps, 0.0, None)
        mean = want_stats[0] if kind == "layer" else want_stats[0] * 0
        rstd = want_stats[-1]
        # x - mean lacks what float32 lacks of the mean
        lost = mean.abs().double() * rstd
        assert_near(u[exact], want[exact], dtype, size=(2 + want.abs() + lost[:, None])[exact])
        ratio, lost = (stats[-1] / rstd)[exact].to(stats.dtype), lost[exact]
        assert_near(ratio, torch.ones_like(ratio), ratio.dtype, size=2 + lost + 1e-6 * lost**2)
        exactly = (du.double(), x.double(), stats.double())
        want_dx = reference.norm_bwd(*exactly, None, None, *where, 0.0)[0]
        exact &= (want_dx.abs() < torch.finfo(dtype).max).all(1)
        size = (8 * du.double().abs().max() * stats[-1].double())[:, None]
        assert_near(dx[exact], want_dx[exact], dtype, size=size[exact])
        assert u[-1].isnan().all() and dx[-1].isnan().all() and u[-2, 5].isnan()
