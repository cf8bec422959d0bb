"""u = f(x) + sigma z with f a norm, an activation, a gated product, against the float64 reference.
docs/maths.md, section 10."""

import itertools

import pytest
import torch
from capability_support import OFFERED, assert_same_everywhere
from sums_support import telling_terms
from timing import saved_bytes

from dipkernels import backend, functional, producers, reference
from dipkernels.library import cpu_capability
from dipkernels.ops import gate, norm, registry
from dipkernels.ops.activations import ACTIVATIONS as PLAIN
from dipkernels.ops.draw import Draw

SEED = torch.tensor([0x0123456789ABCDEF, 3])
ACTIVATIONS = list(PLAIN)


def backward(op, *arguments):
    """The operation, on a CPU; the fields of a draw go in one by one."""
    each = (a if isinstance(a, Draw) else (a,) for a in arguments)
    return registry.kernel(op, "cpu")(*(value for values in each for value in values))


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(sum(shape) + seed), dtype=torch.float64
    ).to(dtype)


def scale(k, log_variance=False, dtype=torch.float32):
    sigma = torch.rand(k, generator=torch.Generator().manual_seed(k), dtype=torch.float64) + 0.1
    return (sigma.square().log() if log_variance else sigma).to(dtype)


# ---- the reference: its gradients are the derivatives of its own forward -------------------------


def derivative(f, t, dt, step=1e-6):
    return (f(t + step * dt) - f(t - step * dt)) / (2 * step)


def assert_adjoint(f, t, gradient, du):
    """<du, f'(t) dt> = <gradient, dt>"""
    dt = randn(*t.shape, seed=5)
    difference = (du * derivative(f, t, dt)).sum() - (gradient * dt).sum()
    assert abs(difference) <= 1e-6 * (1 + du.abs().sum())


@pytest.mark.parametrize("log_variance", [False, True])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_reference_gradients_of_activations_are_its_derivatives(kind, log_variance):
    x, b, du = (randn(3, 10, 4, seed=i) for i in range(3))
    sigma = scale(10, log_variance).double()
    where = SEED, 1, 2**33 + 1, 3, 2, 0.5, log_variance, kind
    dx, _, dsigma = reference.gate_bwd(du, x, None, sigma, *where)
    assert_adjoint(lambda x: reference.gate(x, None, sigma, *where, None), x, dx, du)
    assert_adjoint(lambda s: reference.gate(x, None, s, *where, None), sigma, dsigma, du)
    da, db, dsigma = reference.gate_bwd(du, x, b, sigma, *where)
    assert_adjoint(lambda x: reference.gate(x, b, sigma, *where, None), x, da, du)
    assert_adjoint(lambda b: reference.gate(x, b, sigma, *where, None), b, db, du)
    assert_adjoint(lambda s: reference.gate(x, b, s, *where, None), sigma, dsigma, du)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_reference_gradients_of_norms_are_its_derivatives(kind, offset):
    x, weight, bias = randn(3, 4, 10), randn(10), randn(10, seed=1)
    du, sigma = randn(3, 4, 10, seed=2), scale(10).double()
    where = SEED, -1, 2**33 + 1, 3, 2, 0.5, False, kind

    def u(x, weight, bias, sigma):
        return reference.norm(x, weight, bias, sigma, *where, 1e-3, offset, None)[0]

    stats = reference.norm(x, weight, bias, sigma, *where, 1e-3, offset, None)[1]
    grads = reference.norm_bwd(du, x, stats, weight, bias, sigma, *where, offset)
    dx, dweight, dbias, dsigma = grads
    assert_adjoint(lambda t: u(t, weight, bias, sigma), x, dx, du)
    assert_adjoint(lambda t: u(x, t, bias, sigma), weight, dweight, du)
    assert_adjoint(lambda t: u(x, weight, t, sigma), bias, dbias, du)
    assert_adjoint(lambda t: u(x, weight, bias, t), sigma, dsigma, du)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_reference_norms_are_torchs(kind):
    x, weight, sigma = randn(3, 4, 10), randn(10), torch.zeros(10)
    bias = randn(10, seed=1) if kind == "layer" else None
    u, _ = reference.norm(x, weight, bias, sigma, SEED, *Draw(), kind, 1e-3, 0.0, None)
    if kind == "layer":
        want = torch.nn.functional.layer_norm(x, (10,), weight, bias, 1e-3)
    else:
        want = torch.nn.functional.rms_norm(x, (10,), weight, 1e-3)
    torch.testing.assert_close(u, want, rtol=1e-12, atol=1e-12)


# ---- the functions -------------------------------------------------------------------------------


def calls(kind, log_variance=False, dtype=torch.float64):
    """A producer of this kind as a function of its differentiable tensors, the plain f of those but
    sigma, and the tensors."""
    where = dict(row0=5, col0=2, sample=1, log_variance=log_variance)
    sigma = scale(10, log_variance, torch.float64 if dtype is torch.float64 else torch.float32)
    if kind in ("layer", "rms"):
        weights = randn(10, dtype=dtype), randn(10, seed=1, dtype=dtype)
        tensors = (randn(2, 3, 10, dtype=dtype), *weights, sigma)
        how = dict(kind=kind, eps=1e-3, offset=1.0)

        def run(x, weight, bias, sigma):
            return producers.norm(x, weight, bias, sigma, SEED, **how, **where)

        def plain(x, weight, bias):
            if kind == "layer":
                return torch.nn.functional.layer_norm(x, (10,), weight + 1, bias, 1e-3)
            return torch.nn.functional.rms_norm(x, (10,), weight + 1, 1e-3) + bias

    elif kind.startswith("gated "):
        tensors = randn(2, 10, 3, dtype=dtype), randn(2, 10, 3, seed=1, dtype=dtype), sigma

        def run(a, b, sigma):
            return producers.gate(a, b, sigma, SEED, kind=kind[6:], dim=1, **where)

        def plain(a, b):
            return PLAIN[kind[6:]](a) * b

    else:
        tensors = randn(2, 10, 3, dtype=dtype), sigma

        def run(x, sigma):
            return producers.activate(x, sigma, SEED, kind=kind, dim=1, **where)

        plain = PLAIN[kind]
    return run, plain, tensors


KINDS = ["layer", "rms", *ACTIVATIONS, "gated silu", "gated gelu", "gated gelu_tanh"]


@pytest.mark.parametrize("log_variance", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_producer_is_perturb_behind_the_plain_function(kind, log_variance):
    run, plain, tensors = calls(kind, log_variance)
    dim = -1 if kind in ("layer", "rms") else 1
    where = dict(row0=5, col0=2, sample=1, log_variance=log_variance)
    want = functional.perturb(plain(*tensors[:-1]), tensors[-1], SEED, dim=dim, **where)
    torch.testing.assert_close(run(*tensors), want, rtol=1e-9, atol=1e-9)


X = torch.ones(2, 8)


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(kind="batch"), "kind: expected one of"),
        (dict(sigma=torch.ones(7)), r"sigma: expected shape \(K,\) = \(8,\), got \(7,\)"),
    ],
)
@pytest.mark.parametrize(
    "call",
    [
        lambda kind="layer", **a: producers.norm(X, None, None, **a, kind=kind, eps=1e-5),
        lambda kind="silu", **a: producers.activate(X, **a, kind=kind),
        lambda kind="silu", **a: producers.gate(X, X, **a, kind=kind),
    ],
    ids=["norm", "activate", "gate"],
)
def test_producer_names_what_is_wrong(call, change, match):
    with pytest.raises(ValueError, match=match):
        call(**(dict(sigma=torch.ones(8), seed=SEED) | change))


# ---- the kernels ---------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EPS = {torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-12, torch.float64: 2**-53}
Z_ERROR = 4e-6  # the contract's tolerance on z
# One lane, one group, rows that a tile holds several of, whole tiles, a row of several tiles,
# primes, empty.
SHAPES = [(1, 1), (3, 8), (5, 64), (37, 129), (9, 768), (3, 2048), (70, 192), (2, 3, 40), (7,)]
SHAPES += [(0, 8), (4, 0), (2, 1031), (41, 45)]
DRAWS = [
    Draw(),
    Draw(row0=2**33 + 7, col0=24, sample=2, factor=0.5),
    Draw(col0=3, log_variance=True),
]


def assert_within(got, exact, bound):
    assert got.shape == exact.shape
    beyond = (got.double() - exact).abs() - bound
    assert (beyond <= 0).all(), beyond.max()


def close(got, exact, tolerance, rounding):
    """Within one rounding to got's type of what is within `tolerance` of `exact`."""
    assert torch.isfinite(got).all()
    places = 2 * rounding * EPS[got.dtype] * exact.abs()
    assert_within(got, exact, places + tolerance + 6e-8 * (got.dtype is torch.float16))


def error(dtype):
    """Of the float32 or float64 arithmetic in between, for numbers of size 1."""
    return 1e-14 if dtype is torch.float64 else 2e-6


def assert_sum_close(got, exact, rows, dtype, size=4.0):
    terms = (error(dtype) * size + Z_ERROR) * (rows + 1) ** 0.5
    assert_within(got, exact, terms + (2 * EPS[got.dtype] + 2e-6) * exact.abs())


# Every shape in two types; every draw and type at few shapes.
@pytest.mark.parametrize(
    "shape, draw, dtype",
    [
        *((shape, DRAWS[i % 3], dtype) for i, shape in enumerate(SHAPES) for dtype in DTYPES[:2]),
        *itertools.product(((5, 64), (7, 129)), DRAWS, DTYPES),
    ],
)
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_matches_reference(kind, shape, draw, dtype):
    k = shape[-1]
    x, du = 3 * randn(*shape) + 1, randn(*shape, seed=1).to(dtype)
    x, sigma = x.to(dtype), scale(k, draw.log_variance)
    weight, bias, how = randn(k, seed=2).to(dtype), randn(k, seed=3).float(), (kind, 1e-5, 0.5)
    u, stats = norm.norm(x, weight, bias, sigma, SEED, draw, *how, None)
    exact, exact_stats = reference.norm(x.double(), weight, bias, sigma, SEED, *draw, *how, None)
    assert u.dtype is dtype and u.shape == x.shape and stats.shape == exact_stats.shape
    size = 4 + 3 * exact.abs()
    close(u, exact, error(dtype) * size + Z_ERROR, 1)
    torch.testing.assert_close(stats.double(), exact_stats, rtol=2e-6, atol=2e-6)
    grads = backward("norm_bwd", du, x, stats, weight, bias, sigma, SEED, draw, kind, 0.5)
    wide = (t.double() for t in (weight, bias, sigma))  # gradients that are not rounded
    wants = reference.norm_bwd(du.double(), x.double(), exact_stats, *wide, SEED, *draw, kind, 0.5)
    spread = exact_stats[-1].max().item() if exact_stats.numel() else 1.0
    close(grads[0], wants[0], 10 * error(dtype) * (1 + spread) * (1 + wants[0].abs()), 1)
    for got, want, like in zip(grads[1:], wants[1:], (weight, bias, sigma), strict=True):
        assert got.dtype == like.dtype
        assert_sum_close(got, want.double(), x.numel() // max(1, k), dtype, 40.0)


def test_norm_without_weight_and_bias_and_sigma(capability):
    x, du = randn(70, 192, dtype=torch.float32), randn(70, 192, seed=1, dtype=torch.float32)
    sigma = scale(192)
    for weight, bias in ((None, None), (scale(192), None), (None, scale(192))):
        how = "layer", 1e-5, 1.0, None
        u, stats = norm.norm(x, weight, bias, sigma, SEED, Draw(), *how)
        want, _ = reference.norm(x.double(), weight, bias, sigma, SEED, *Draw(), *how)
        torch.testing.assert_close(u.double(), want, rtol=1e-5, atol=1e-5)
        without, full = (
            backward("norm_bwd", du, x, stats, weight, bias, s, SEED, Draw(), "layer", 1.0)
            for s in (None, sigma)
        )
        sizes = [0 if t is None else 192 for t in (weight, bias)]
        assert [t.numel() for t in without[1:]] == [*sizes, 0]
        assert all(torch.equal(a, b) for a, b in zip(without[:3], full))


CHANNELS = [((2, 13, 5, 3), 1), ((2, 16, 12, 12), 1), ((9, 31), 0), ((70, 11, 2, 2), 1)]


# Every shape with one activation, one draw and two types; every activation and type at few shapes.
@pytest.mark.parametrize(
    "kind, shape, dim, draw, dtype",
    [
        *(
            (ACTIVATIONS[i % len(ACTIVATIONS)], shape, dim, DRAWS[i % 3], dtype)
            for i, (shape, dim) in enumerate([*((shape, -1) for shape in SHAPES), *CHANNELS])
            for dtype in DTYPES[:2]
        ),
        *(
            (kind, shape, dim, DRAWS[i % 3], dtype)
            for shape, dim in (((5, 64), -1), ((2, 13, 5, 3), 1))
            for i, kind in enumerate(ACTIVATIONS)
            for dtype in DTYPES
        ),
        *((kind, (20, 768), -1, Draw(), dtype) for kind in ACTIVATIONS for dtype in DTYPES[:2]),
    ],
)
def test_activations_and_gates_match_reference(kind, shape, dim, draw, dtype):
    draw = draw._replace(dim=dim)
    a, b, du = (randn(*shape, seed=i).mul(2).to(dtype) for i in range(3))
    sigma = scale(shape[dim], draw.log_variance)
    rows = a.numel() // max(1, shape[dim])
    u = gate.gate(a, None, sigma, SEED, draw, kind, None)
    exact = reference.gate(a.double(), None, sigma, SEED, *draw, kind, None)
    assert u.dtype is dtype
    close(u, exact, error(dtype) * (1 + exact.abs()) + Z_ERROR, 1)
    u = gate.gate(a, b, sigma, SEED, draw, kind, None)
    exact = reference.gate(a.double(), b.double(), sigma, SEED, *draw, kind, None)
    close(u, exact, error(dtype) * (1 + exact.abs()) * (1 + b.double().abs()) + Z_ERROR, 1)
    dx, none, dsigma = backward("gate_bwd", du, a, None, sigma, SEED, draw, kind)
    assert none.shape == (0,)
    wide = [t.double() for t in (du, a, b)]
    want, _, want_dsigma = reference.gate_bwd(*wide[:2], None, sigma.double(), SEED, *draw, kind)
    close(dx, want, 4 * error(dtype) * (1 + wide[0].abs()), 1)
    assert_sum_close(dsigma, want_dsigma.double(), rows, dtype)
    da, db, again = backward("gate_bwd", du, a, b, sigma, SEED, draw, kind)
    want_da, want_db, _ = reference.gate_bwd(*wide, sigma, SEED, *draw, kind)
    size = (1 + wide[0].abs()) * (1 + wide[1].abs()) * (1 + wide[2].abs())
    close(da, want_da, 4 * error(dtype) * size, 1)
    close(db, want_db, 4 * error(dtype) * size, 1)
    assert torch.equal(again, dsigma) and dsigma.dtype == sigma.dtype
    none = backward("gate_bwd", du, a, b, None, SEED, draw, kind)
    assert torch.equal(none[0], da) and torch.equal(none[1], db) and none[2].numel() == 0


def everything(shape, dtype=torch.float32, transform=lambda t: t):
    """Every result of every operation on rows of this shape; what is read may lie elsewhere in
    memory."""
    draw = Draw(row0=2**32 - 2, col0=16)
    x, b, du = (transform(randn(*shape, seed=i, dtype=dtype)) for i in range(3))
    k = shape[-1]
    sigma, weight, bias = scale(k), randn(k).to(dtype), randn(k, seed=1).to(dtype)
    for kind in ("layer", "rms"):
        u, stats = norm.norm(x, weight, bias, sigma, SEED, draw, kind, 1e-5, 0.0, None)
        yield from (u, stats)
        yield from backward("norm_bwd", du, x, stats, weight, bias, sigma, SEED, draw, kind, 0.0)
    # float64 calls the library's exp
    for kind in ("gelu", "silu", "relu") if dtype is not torch.float64 else ("relu",):
        for factor in (None, b):
            yield gate.gate(x, factor, sigma, SEED, draw, kind, None)
            yield from backward("gate_bwd", du, x, factor, sigma, SEED, draw, kind)


@pytest.mark.parametrize(
    "op, bad",
    [
        *(("norm", name) for name in ("weight", "bias", "sigma")),
        *(("norm_bwd", name) for name in ("du", "stats", "weight", "bias", "sigma")),
        *(("gate", name) for name in ("b", "sigma")),
        *(("gate_bwd", name) for name in ("du", "b", "sigma")),
    ],
)
@pytest.mark.parametrize("cut", [lambda t: t[..., :-1], lambda t: t[None]])
def test_producers_library_by_itself_stays_inside_its_buffers(op, bad, cut):
    """Called without the checks in Python."""
    x, column = torch.ones(4, 8), torch.ones(8)
    drawn, kind = {"sigma": column, "seed": SEED, "draw": Draw()}, "layer"
    normed = {"x": x, "weight": column, "bias": column}
    good = {
        "norm": normed | drawn | {"kind": kind, "eps": 1e-5, "offset": 0.0, "out_dtype": None},
        "norm_bwd": {"du": x, "x": x, "stats": torch.ones(2, 4)} | normed | drawn,
        "gate": {"a": x, "b": x} | drawn | {"activation": "silu", "out_dtype": None},
        "gate_bwd": {"du": x, "a": x, "b": x} | drawn | {"activation": "silu"},
    }
    good["norm_bwd"] |= {"kind": kind, "offset": 0.0}
    backward(op, *good[op].values())
    with pytest.raises(RuntimeError, match=f"{bad}: expected"):
        backward(op, *(good[op] | {bad: cut(good[op][bad])}).values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(130, 200), (70, 192), (40, 64), (5, 1024), (70, 13)])
def test_producers_ignore_instruction_set_and_threads(shape, dtype):
    assert_same_everywhere(lambda: everything(shape, dtype))


def test_producers_ignore_strides():
    each_another = itertools.cycle((lambda t: t.t().contiguous().t(), torch.clone))
    want = list(everything((12, 40)))
    for transform in (
        lambda t: torch.cat((t, t), -1)[:, :40],
        lambda t: t.t().contiguous().t(),
        lambda t: t.repeat_interleave(3, 0)[::3],
        lambda t: t[:, None].expand(12, 2, 40)[:, 0],
        lambda t: t.repeat_interleave(2, 1)[:, ::2],  # in no layout of the kernels'
        *[lambda t: next(each_another)(t)] * 2,  # two of three, then the third
    ):
        got = list(everything((12, 40), transform=transform))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_gives_dense_rows_as_torchs_own(name, kind):
    x = torch.randn(3, 40, 4, 5).permute(0, 2, 3, 1)
    dense = torch.empty(x.shape).stride()
    sigma = torch.ones(40)
    with backend(name):
        for each in (x, torch.empty_like(x, device="meta")):
            place = (sigma.to(each.device), SEED.to(each.device), Draw(), kind)
            u, stats = norm.norm(each, None, None, *place, 1e-5, 0.0, None)
            dx, *_ = backward("norm_bwd", each, each, stats, None, None, *place, 0.0)
            assert u.stride() == dx.stride() == dense


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_of_no_rows_takes_any_strides(kind):
    x = torch.empty(0, 28)[:, ::7].requires_grad_()
    sigma = torch.ones(4, requires_grad=True)
    u = producers.norm(x, None, None, sigma, SEED, kind=kind, eps=1e-5)
    u.sum().backward()
    assert u.shape == x.grad.shape == (0, 4) and torch.equal(sigma.grad, torch.zeros(4))


@pytest.mark.parametrize("rows", [1000, 2049, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norm_sums_over_the_stated_blocks_of_rows(capability, rows, dtype):
    x, bias, sigma = torch.zeros(rows, 64, dtype=dtype), torch.zeros(64), torch.ones(64)
    where = (SEED, Draw(), "layer")
    _, stats = norm.norm(x, None, bias, sigma, *where, 1e-5, 0.0, None)
    terms = telling_terms(rows, 64, dtype)
    _, _, dbias, _ = backward("norm_bwd", terms, x, stats, None, bias, sigma, *where, 0.0)
    assert torch.equal(dbias, torch.ones(64))


def test_norm_sums_no_worse_than_torch():
    """Twice the error of the same sums in plain PyTorch, + 1e-6 a root of a row."""
    x, du = randn(6000, 40, dtype=torch.float32), randn(6000, 40, seed=1, dtype=torch.float32)
    weight, bias = (randn(40, seed=i, dtype=torch.float32) for i in range(2))
    sigma, how = scale(40), ("layer", 0.0)
    _, stats = norm.norm(x, weight, bias, sigma, SEED, Draw(), "layer", 1e-5, 0.0, None)
    got = backward("norm_bwd", du, x, stats, weight, bias, sigma, SEED, Draw(), *how)
    wide = (t.double() for t in (weight, bias, sigma))
    exact = reference.norm_bwd(du.double(), x.double(), stats, *wide, SEED, *Draw(), *how)
    _, mean, rstd = torch.native_layer_norm(x, (40,), weight, bias, 1e-5)
    plain = torch.ops.aten.native_layer_norm_backward(
        du, x, (40,), mean, rstd, weight, bias, [True] * 3
    )
    for ours, torchs, want in list(zip(got, plain, exact))[:3]:
        least = 1e-6 * 6000**0.5
        assert (ours - want).abs().max() <= 2 * (torchs - want).abs().max() + least


@pytest.mark.parametrize("capability", OFFERED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_far_out_near_zero_and_not_numbers(kind, dtype, capability):
    """Values to the last places that torch's float32 has, slopes to 2e-6 or their limits."""
    near = [1e-45, 1e-40, 1e-30, 1e-10, 1e-4, 0.01, 0.3]
    far = [2.0, 4.0, 5.5, 8.5, 20.0, 40.0, 90.0, 1e4, 1e20, 1e30, 1e38]
    numbers = [v for size in (*near, *far, float("inf")) for v in (size, -size)]
    x = torch.tensor([*numbers, 0.0, float("nan")], dtype=torch.float64).to(dtype)
    x = x.repeat(30, 1)  # a whole tile of the CPU kernels, and a part of one
    zero, ones = torch.zeros(x.shape[1]), torch.ones_like(x)
    try:
        cpu_capability(capability)
        y = gate.gate(x, None, zero, SEED, Draw(), kind, None)
        dx, *_ = backward("gate_bwd", ones, x, None, zero, SEED, Draw(), kind)
    finally:
        cpu_capability("auto")
    leaf = x.double().requires_grad_()
    want = PLAIN[kind](leaf)
    (slope,) = torch.autograd.grad(want, leaf, ones.double())
    # of numbers whose powers even float64 does not hold
    limit = (leaf > 0).double() * (kind != "tanh")
    slope = torch.where(slope.isnan() & ~x.isnan(), limit, slope)
    finite, want = x.isfinite(), want.detach()
    least = torch.finfo(dtype).smallest_normal
    size = torch.where(x > -2, want.abs(), 1 + x.double().abs().clamp(max=10))
    rounding = 2 * EPS[dtype] * want.abs()
    assert ((y - want).abs() <= error(dtype) * size + rounding + least)[finite].all()
    fine = (dx - slope).abs() <= 4 * error(dtype) + 2 * EPS[dtype] * slope.abs()
    if kind == "gelu" and dtype is torch.float64:
        fine |= dx.isnan() & x.isinf()  # torch's too
    assert fine[~x.isnan()].all(), (x, dx, slope)
    assert y[:, -1].isnan().all()
    assert dx[:, -1].isnan().all() or (kind == "relu" and (dx[:, -1] == 1).all())
    high, low = y[x == float("inf")], y[x == -float("inf")]
    if kind == "tanh":
        assert ((high - 1).abs() <= 1e-6).all() and ((low + 1).abs() <= 1e-6).all()
    else:  # torch's low ones are infinity times 0
        assert high.isinf().all() and ((low == 0) | low.isnan()).all()


@pytest.mark.parametrize("shape", [(3, 1024), (40, 63), (5, 200)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_has_the_gradients_of_torch_to_the_bit(dtype, shape, capability):
    """Behind x <= 0 they are 0, of infinity too, and not -0; in a whole tile and in part of one."""
    x, b, du = (randn(*shape, seed=i, dtype=dtype) for i in range(3))
    for at, value in enumerate([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40]):
        x.view(-1)[at::29] = value
    du.view(-1)[::31], du.view(-1)[1::31], du.view(-1)[2::31] = -0.0, float("inf"), -float("inf")
    sigma = scale(shape[1], dtype=torch.promote_types(dtype, torch.float32))
    draw, dead = Draw(), x <= 0
    for factor in (None, b):
        da, _, _ = backward("gate_bwd", du, x, factor, sigma, SEED, draw, "relu")
        exact, _, _ = reference.gate_bwd(du, x, factor, sigma, SEED, *draw, "relu")
        assert ((da == 0) & ~da.signbit())[dead].all() and (exact == 0)[dead].all()
        assert torch.equal(da.isinf(), du.isinf() & ~dead)
        if factor is None:
            assert torch.equal(da, torch.ops.aten.threshold_backward(du, x, 0))


# ---- the law: u is P of an f(x) that was not rounded ---------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, dim", [((9, 768), -1), ((5, 33), -1), ((2, 13, 5, 3), 1)])
def test_producer_draws_what_perturb_draws_to_the_bit(shape, dim, dtype):
    where = dict(row0=2**32 - 1, col0=8, sample=3)
    x, sigma = randn(*shape, dtype=dtype), scale(shape[dim])
    one = torch.ones_like(x)
    want = functional.perturb(x.relu(), sigma, SEED, dim=dim, **where)  # relu rounds nothing
    assert torch.equal(producers.activate(x, sigma, SEED, kind="relu", dim=dim, **where), want)
    assert torch.equal(producers.gate(x, one, sigma, SEED, kind="relu", dim=dim, **where), want)
    if dim == -1:
        k = shape[-1]
        zero, bias = torch.zeros(k, dtype=dtype), randn(k, dtype=dtype)
        want = functional.perturb(bias.expand(shape).contiguous(), sigma, SEED, **where)
        got = producers.norm(x, zero, bias, sigma, SEED, kind="layer", eps=1e-5, **where)
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_producer_of_16_bit_data_rounds_once(kind):
    run, _, tensors = calls(kind, dtype=torch.bfloat16)
    wide = run(*(t.float() for t in tensors))
    assert torch.equal(run(*tensors), wide.bfloat16())


# ---- autograd ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_producer_keeps_for_backward_what_the_plain_function_keeps(kind):
    run, _, tensors = calls(kind, dtype=torch.float32)
    tensors = [t.requires_grad_() for t in tensors]
    rows, operands = tensors[0].numel() // 10, 2 if kind.startswith("gated") else 1
    of_rows = 4 * rows * {"layer": 2, "rms": 1}.get(kind, 0)
    # the seed, sigma, weight, bias
    of_columns = 16 + sum(t.nbytes for t in tensors if t.dim() == 1)
    assert saved_bytes(lambda: run(*tensors)) <= operands * tensors[0].nbytes + of_rows + of_columns


@pytest.mark.parametrize("kind", KINDS)
def test_producer_jvp_matches_finite_differences(kind):
    run, _, tensors = calls(kind, log_variance=True)
    tangents = [randn(*t.shape, seed=7) for t in tensors]
    _, got = torch.func.jvp(run, tensors, tuple(tangents))
    step = 1e-6
    ahead = run(*(t + step * d for t, d in zip(tensors, tangents)))
    behind = run(*(t - step * d for t, d in zip(tensors, tangents)))
    torch.testing.assert_close(got, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7)


def test_producer_under_autocast_rounds_once_to_its_type():
    x, sigma = randn(4, 16, dtype=torch.float32), scale(16)
    with torch.autocast("cpu", torch.bfloat16):
        u = producers.norm(x, None, None, sigma, SEED, kind="layer", eps=1e-5)
    want = producers.norm(x, None, None, sigma, SEED, kind="layer", eps=1e-5)
    assert torch.equal(u, want.bfloat16())
