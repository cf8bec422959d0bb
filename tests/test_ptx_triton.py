"""Triton's kernels as its compiler made them, executed by tests/ptx against the float64 reference,
without a GPU.

The launchers are the real ones. What an approximate instruction returns is as far off as the PTX
manual allows, and memory that a kernel has to write starts as NaN.
"""

import itertools

import pytest
import torch
from cuda_support import check_last_rows
from ptx_triton_support import compiled
from source_support import module_at
from triton_support import load_kernels

from dipkernels import backends, library
from dipkernels.ops import perturb as projection
from dipkernels.ops.activations import ACTIVATIONS as PLAIN
from dipkernels.ops.draw import Draw

MODULES = noise, perturb, linear, expectation, gate, norm, tiles = load_kernels(
    "noise", "perturb", "linear", "expectation", "gate", "norm", "tiles"
)
(mixtures,) = load_kernels("mixtures")
reference = module_at("dipkernels/reference.py")
SEED = torch.tensor([0x0123456789ABCDEF, 5])
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
EPS = {F32: 2.0**-24, F16: 2.0**-11, BF16: 2.0**-8, F64: 2.0**-53}
INF, NAN = float("inf"), float("nan")
TIER = {F16: 0, BF16: 0, F32: 1, F64: 2}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def quick_of(every, quick):
    return [values if values in quick else slow(*values) for values in every]


@pytest.fixture(autouse=True)
def nan_in_new_memory():
    before = torch.are_deterministic_algorithms_enabled()
    precision = torch.get_float32_matmul_precision()
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before)
    torch.set_float32_matmul_precision(precision)


def on_gpu(arch, errors, **options):
    return compiled(*MODULES, arch=arch, errors=errors, **options)


def randn(*shape, dtype=F32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


CONFIGS = {80: 1, 90: 2}  # architecture: which errors

# ---- noise and perturb

# shape, dim, col0: the latter past the sixth group, so that dividing by 9 in place of 8 shows
CASES = {
    "rows": ((19, 40), -1, 0),
    "many rows": ((300, 264), -1, 0),
    "odd": ((19, 41), -1, 35),
    "one": ((1, 1), -1, 0),
    "wide": ((5, 1000), -1, 0),
    "nchw": ((2, 16, 7, 5), 1, 0),
    "nchw odd": ((3, 21, 5, 5), 1, 59),
}
PERTURBS = quick_of(
    list(itertools.product(CASES, [BF16, F16, F32, F64], CONFIGS)),
    [("rows", BF16, 80), ("odd", F32, 80), ("nchw odd", F16, 80)],
)


@pytest.mark.parametrize("case, dtype, arch", PERTURBS)
def test_compiled_perturb_matches_reference(case, dtype, arch):
    shape, dim, col0 = CASES[case]
    x, du = randn(*shape, dtype=dtype), randn(*shape[::-1]).reshape(shape).to(dtype)
    sigma = torch.rand(shape[dim], dtype=F64 if dtype is F64 else F32) + 0.1
    where = (sigma, SEED, dim, 2**32 - 7, col0, 2, 0.5, False)
    with on_gpu(arch, CONFIGS[arch]):
        u, dsigma = perturb.perturb(x, *where, None), perturb.perturb_bwd(du, *where)
        both = perturb.perturb_replay(du, x, *where, None)
        z = noise.noise(SEED, shape, dim, 2**32 - 7, col0, 2)
    assert torch.equal(both[0], u)
    want = reference.perturb(x.double(), *where, F64)
    want_sum = reference.perturb_bwd(du.double(), sigma.double(), *where[1:])
    assert ((u.double() - want).abs() - EPS[dtype] * want.abs()).max() <= 4e-6
    for total in (dsigma, both[1]):
        assert (total.double() - want_sum).abs().max() <= 3e-5 * (u.numel() / shape[dim]) ** 0.5
    if "portable" not in library.load().cpu_capabilities:
        return
    # The bits of the CPU's kernels.
    with backends.backend("cpu"):
        assert torch.equal(z, projection.noise(SEED, shape, Draw(*where[2:])))
        assert torch.equal(u, projection.perturb(x, sigma, SEED, Draw(*where[2:]), None))


def strided():
    base = randn(2, 10, 24, 6)
    yield "transposed", base[0, :, :, 0].t(), -1
    yield "channels_last", base.to(memory_format=torch.channels_last), 1
    yield "sliced columns", base[:, :, 3:20, 0], -1
    yield "expanded rows", base[0, :1, :, 2].expand(7, 24), -1
    yield "cropped image", base[:, :, 2:5, 1:4], 1
    yield "four stubborn dimensions", base.permute(2, 0, 3, 1)[::8, ::3], 1


@pytest.mark.parametrize("arch", [80, slow(90)])
@pytest.mark.parametrize(
    "name",
    [
        *("transposed", "four stubborn dimensions"),
        *map(slow, ("channels_last", "sliced columns", "expanded rows", "cropped image")),
    ],
)
def test_compiled_perturb_takes_any_strides(name, arch):
    x, dim = next((x, dim) for known, x, dim in strided() if known == name)
    where = (torch.rand(x.shape[dim]) + 0.1, SEED, dim, 9, 0, 0, 1.0, False)
    with on_gpu(arch, CONFIGS[arch]):
        u = perturb.perturb(x, *where, None)
        both = perturb.perturb_replay(x.contiguous(), x, *where, None)
    assert ((u.double() - reference.perturb(x, *where, F64)).abs() <= 5e-6 * (1 + x.abs())).all()
    assert torch.equal(both[0], u)
    torch.testing.assert_close(both[1], reference.perturb_bwd(x, *where), rtol=1e-5, atol=1e-4)
    assert u.stride() == both[0].stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("key, stream", [(-1, 2**40 + 65537), (-(2**63), -1)])
def test_compiled_noise_takes_any_seed(key, stream):
    seed, where = torch.tensor([key, stream]), (-1, 2**32 - 3, 8, 7)
    with on_gpu(80, 1):
        z = noise.noise(seed, (6, 16), *where)
    torch.testing.assert_close(z, reference.noise(seed, (6, 16), *where), rtol=0, atol=4e-6)


@pytest.mark.parametrize("arch", [80, slow(90)])
def test_compiled_perturb_passes_on_what_is_no_ordinary_number(arch):
    x, du = randn(6, 8), randn(6, 8)
    x[0, 0], x[0, 1], x[1, 0], x[1, 1] = NAN, INF, -INF, 1e-40
    where = (SEED, -1, 0, 0, 0, 1.0)
    with on_gpu(arch, CONFIGS[arch]):
        subnormal = torch.full((8,), 1e-40)
        u = perturb.perturb(x, subnormal, *where, False, None)
        assert u[0, 0].isnan() and u[0, 1] == INF and u[1, 0] == -INF and u[1, 1] != 0
        assert ((u - x).abs()[x.isfinite()] <= 6e-40).all()
        logs = torch.tensor([-1e4, -200.0, -170.0, 0.0, 170.0, 200.0, INF, -INF])
        u = perturb.perturb(torch.zeros(6, 8), logs, *where, True, None)
        z = noise.noise(SEED, (6, 8), -1, 0, 0, 0)
        du[0, 0], du[0, 1] = NAN, INF
        sums = perturb.perturb_bwd(du, subnormal, *where, False)
    assert not u.isnan().any() and (u[:, [0, 7]] == 0).all() and u[:, [5, 6]].isinf().all()
    want = torch.exp(logs[1:5].double() / 2) * z[:, 1:5].double()
    # exp takes subnormal results for 0: at most 1.2e-38 off, times z.
    torch.testing.assert_close(u[:, 1:5].double(), want, rtol=2e-5, atol=7e-38)
    assert sums[0].isnan() and sums[1].isinf() and sums[2:].isfinite().all()


def test_launchers_take_no_rows_and_no_columns():
    how = (SEED, -1, 0, 0, 0, 1.0, False)
    with on_gpu(80, 1):
        for m, n in ((0, 4), (4, 0)):
            x, sigma = torch.zeros(m, n), torch.ones(n)
            assert noise.noise(SEED, (m, n), *how[1:5]).shape == x.shape
            u, dsigma = perturb.perturb_replay(x, x, sigma, *how, None)
            assert perturb.perturb(x, sigma, *how, None).shape == u.shape == x.shape
            dmu, *sums = expectation.expectation_bwd(x, x, sigma, "relu")
            assert expectation.expectation(x, sigma, "relu").shape == dmu.shape == x.shape
            assert torch.equal(expectation.affine_variance(x, sigma, False), torch.zeros(m))
            dweight, dv = expectation.affine_variance_bwd(torch.ones(m), x, sigma, False, None)
            assert dweight.shape == x.shape
            for total in (dsigma, perturb.perturb_bwd(x, sigma, *how), *sums, dv):
                assert torch.equal(total, torch.zeros(n))
        x, weight = torch.zeros(0, 4, 8), randn(3, 8)
        how = (torch.ones(8), SEED, 0, 0, 0, 1.0, False)
        assert linear.linear(x, weight, None, *how).shape == (0, 4, 3)
        dx, *grads = linear.linear_bwd(torch.zeros(0, 4, 3), x, weight, None, *how)
    assert dx.shape == x.shape and [g.shape for g in grads] == [(3, 8), (3,), (8,)]
    assert not any(g.any() for g in grads)
    with on_gpu(80, 1):
        x, weight, bias = torch.zeros(2, 3, 0), torch.zeros(4, 0), randn(4)
        how = (torch.ones(0), SEED, 0, 0, 0, 1.0, False)
        assert torch.equal(linear.linear(x, weight, bias, *how), bias.expand(2, 3, 4))
        grads = linear.linear_bwd(torch.ones(2, 3, 4), x, weight, bias, *how)
    assert [g.shape for g in grads] == [(2, 3, 0), (4, 0), (4,), (0,)]
    assert torch.equal(grads[2], torch.full((4,), 6.0))


def test_launchers_refuse_cpu_tensors():
    with pytest.raises(RuntimeError, match="expected CUDA tensors"):
        perturb.perturb(randn(2, 8), torch.ones(8), SEED, -1, 0, 0, 0, 1.0, False, None)


# ---- linear

LINEARS = {  # m, k, n, col0, samples, activation
    "square": (128, 128, 128, 0, 1, None),
    "deep": (64, 520, 64, 0, 1, None),
    "tall": (300, 40, 72, 0, 1, None),
    "odd": (37, 41, 29, 35, 1, None),
    "odd deep": (70, 301, 45, 53, 1, None),
    "relu": (33, 40, 50, 0, 2, "relu"),
    "gelu": (64, 64, 64, 0, 2, "gelu"),
    "gelu_tanh odd": (33, 41, 50, 50, 1, "gelu_tanh"),
    "silu": (40, 96, 64, 0, 1, "silu"),
    "tanh": (17, 24, 16, 0, 2, "tanh"),
}
PRECISIONS = [(d, x, "high") for d, x in ((BF16, BF16), (F16, F16), (BF16, F32), (F32, F32))]
PRECISIONS += [(F32, F32, "highest")]
LINEAR_CASES = quick_of(
    [(case, *p, arch) for case, p, arch in itertools.product(LINEARS, PRECISIONS, CONFIGS)],
    [
        ("square", BF16, BF16, "high", 90),
        ("odd", F16, F16, "high", 80),
        ("relu", BF16, F32, "high", 80),
    ],
)


@pytest.mark.parametrize("case, dtype, x_dtype, precision, arch", LINEAR_CASES)
def test_compiled_linear_and_its_gradients_match_reference(case, dtype, x_dtype, precision, arch):
    m, k, n, col0, samples, act = LINEARS[case]
    torch.set_float32_matmul_precision(precision)
    x, weight = randn(m, k, dtype=x_dtype), (randn(n, k) / k**0.5).to(dtype)
    bias, dy, sigma = randn(n).to(dtype), randn(m, n).to(dtype), torch.rand(k) + 0.1
    how = (2**32 - 5, col0, 1, 0.5, act is not None, samples)
    with on_gpu(arch, CONFIGS[arch]):
        y = linear.linear(x, weight, bias, sigma, SEED, *how, act)
        got = linear.linear_bwd(dy, x, weight, bias, sigma, SEED, *how, act)
    wide = [t.double() for t in (x, weight, bias, sigma)]
    want = reference.linear_bwd(dy.double(), *wide, SEED, *how, act or "identity")
    want = (reference.linear(*wide, SEED, *how, act or "identity", F64), *want)
    # A product of operands rounded to eps errs, entry by entry, by about eps sqrt(depth) of the
    # entries' spread.
    eps = 2e-6 if precision == "highest" else 2.0**-10 if dtype is F32 else EPS[dtype]
    for name, a, b in zip(("y", "dx", "dweight", "dbias", "dsigma"), (y, *got), want, strict=True):
        assert a.isfinite().all(), name
        # next to 0 rounding takes an entry to the other side, whose slope is another
        if act == "relu":
            assert (a.double() - b).norm() <= 40 * eps * b.norm(), name
        else:
            assert (a.double() - b).abs().max() <= 12 * eps * (b.std().item() + 1e-3), name


@pytest.mark.parametrize("arch", [80, slow(90)])
def test_compiled_linear_of_the_identity_is_perturb(arch):
    x, sigma, how = randn(20, 24), torch.rand(24), (5, 3, 0, 1.0, False)
    torch.set_float32_matmul_precision("highest")
    with on_gpu(arch, CONFIGS[arch]):
        u = perturb.perturb(x, sigma, SEED, -1, *how, None)
        assert torch.equal(linear.linear(x, torch.eye(24), None, sigma, SEED, *how), u)


@pytest.mark.parametrize("arch", [80, slow(90)])
def test_compiled_linear_takes_any_strides(arch):
    x, weight, bias, sigma = randn(9, 24), randn(5, 24), randn(10)[::2], torch.rand(48)[1::2]
    how = (5, 3, 0, 1.0, False, 1, "gelu")
    padded = torch.cat([x, x], 1)
    given = [
        (x, weight, bias, sigma),
        (x, weight, randn(1).expand(5), sigma),
        (padded[:, 3:27], weight.t().contiguous().t(), bias, sigma),
    ]
    with on_gpu(arch, CONFIGS[arch]):
        for strided in given:
            dense = [t.contiguous() for t in strided]
            assert torch.equal(*(linear.linear(*each, SEED, *how) for each in (strided, dense)))
            dy = strided[0][:, :5]
            grads = [linear.linear_bwd(dy, *each, SEED, *how) for each in (strided, dense)]
            assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("arch", [80, slow(90)])
def test_compiled_linear_bwd_weight_splits_the_rows_in_a_fixed_order(arch, monkeypatch):
    torch.set_float32_matmul_precision("highest")
    x, dy, sigma, how = randn(150, 24), randn(150, 17), torch.rand(24), (0, 0, 0, 1.0, False)
    with on_gpu(arch, CONFIGS[arch]):
        whole = linear.linear_bwd_weight(dy, x, sigma, SEED, *how)
        monkeypatch.setattr(linear, "splits", lambda *sizes: 3)
        parts, again, narrow = (
            linear.linear_bwd_weight(dy, x, sigma, SEED, *how, out_dtype=dtype)
            for dtype in (None, F32, F16)
        )
    assert torch.equal(parts[0], again[0]) and torch.equal(parts[1], whole[1])
    torch.testing.assert_close(parts[0], whole[0], rtol=0, atol=1e-4)
    assert torch.equal(narrow[0], parts[0].half()) and narrow[1].dtype is F16


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"activation": "selu"}, ValueError, "activation: expected one of"),
        ({"num_samples": 2}, ValueError, "expected 1 with activation 'identity', got 2"),
        ({"x": torch.ones(2, 8).double()}, TypeError, "x: expected one of .* got torch.float64"),
    ],
)
def test_linear_names_what_is_wrong(change, error, match):
    given = {"x": torch.ones(2, 8), "weight": torch.ones(3, 8), "bias": None}
    given |= {"sigma": torch.ones(8), "seed": SEED, "row0": 0, "col0": 0, "sample": 0}
    given |= {"factor": 1.0, "log_variance": False, **change}
    with pytest.raises(error, match=match):
        linear.linear(**given)
    with pytest.raises(error, match=match):
        linear.linear_bwd(torch.ones(2, 3), **given)


@pytest.mark.parametrize("stride, vec", [(2**31 - 8, 8), (2**31, 1), (2**33, 1)])
def test_strides_are_divided_by_8_where_32_bits_hold_them(stride, vec):
    """What comes divided is multiplied again in 32 bits: rows further apart, or longer ones, come as
    they are."""
    x = torch.empty_strided((2, 5, 64), (stride, 64, 1), device="meta")
    assert tiles.tiling(-1, 0, 4096, torch.empty_like(x), x).vec == vec
    assert tiles.tiling(-1, 0, 4096, torch.empty(stride, device="meta")).vec == vec
    assert linear._divided(0, 64, x[:, -1].stride(0)) == (vec, [64 // vec, stride // vec])


@pytest.mark.parametrize("sizes", [(3, 64), (64, 3)])
def test_blocks_of_rows_lie_along_the_longer_row_dimension(sizes):
    x = torch.empty(sizes[0], sizes[1] + 1, 16, device="meta")[:, :-1]
    tiling = tiles.tiling(-1, 0, 4096, x)
    assert (tiling.num_outer, tiling.num_inner) == (3, 64)


@pytest.mark.parametrize("k, tile", [(64, "bwd_x"), (63, "bwd_x_unaligned")])
def test_rows_off_16_bytes_have_a_tile_of_their_own(monkeypatch, k, tile):
    def blocks(op, *sizes):
        raise LookupError(op)

    monkeypatch.setattr(linear, "blocks", blocks)
    given = torch.ones(2, 8), torch.ones(8, k), torch.ones(k), SEED, 0, 0, 0, 1.0, False
    with pytest.raises(LookupError, match=f"^{tile}$"):
        linear.linear_bwd_x(*given)


def test_float32_products_are_as_exact_as_cublas_is_told():
    """By either of torch's two interfaces, of which the older one cannot be read after the newer
    one was set."""
    for precision, want in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")):
        torch.set_float32_matmul_precision(precision)
        assert linear._precision() == want
    torch.set_float32_matmul_precision("highest")
    for precision in ("tf32", "ieee", "none"):
        torch.backends.cuda.matmul.fp32_precision = precision
        assert linear._precision() == ("tf32" if precision == "tf32" else "ieee")


FAR = [-INF, -1e38, -1e30, -1e20, -1e4, -1e-40, 0.0, 1e-40, 1e4, 1e20, 1e30, 1e38, INF, NAN]
NAMES = list(PLAIN)


@pytest.mark.parametrize(
    "name, arch",
    quick_of(list(itertools.product(NAMES, CONFIGS)), [("relu", 80), ("gelu_tanh", 80)]),
)
def test_compiled_linear_far_out_and_not_numbers(name, arch):
    """x W^T is FAR: with W one column, sigma 0 and the bias nothing, what is behind the activation
    is x itself."""
    torch.set_float32_matmul_precision("highest")
    x, one, zero = torch.tensor(FAR)[:, None], torch.ones(1, 1), torch.zeros(1)
    how = (0, 0, 0, 1.0, False, 1)
    with on_gpu(arch, CONFIGS[arch]):
        y = linear.linear(x, one, None, zero, SEED, *how, name)
        dx = linear.linear_bwd(torch.ones_like(x), x, one, None, zero, SEED, *how, name)[0]
    leaf = x.double().requires_grad_()
    want = PLAIN[name](leaf)
    (slope,) = torch.autograd.grad(want, leaf, torch.ones_like(want))
    # of numbers whose square even float64 does not hold
    slope = torch.where(slope.isnan(), (leaf > 0).double(), slope)
    ordinary = x.isfinite()
    torch.testing.assert_close(y[ordinary].double(), want[ordinary].detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx[ordinary].double(), slope[ordinary], rtol=1e-5, atol=2e-5)
    assert y[-1].isnan() and (name in ("relu",) or dx[-1].isnan())
    assert abs(y[-2] - 1) <= 1e-6 if name == "tanh" else y[-2] == INF


# ---- the exact mean behind an activation

MEANS = quick_of(
    list(itertools.product(NAMES, [BF16, F32, F64], CONFIGS)),
    [("relu", BF16, 80), ("tanh", F32, 80), ("gelu", F32, 90), ("gelu_tanh", F32, 80)],
)


@pytest.mark.parametrize("name, dtype, arch", MEANS)
def test_compiled_activation_matches_reference(name, dtype, arch):
    mu, dy = (3 * randn(37, 200)).to(dtype), randn(200, 37).reshape(37, 200).to(dtype)
    v = (4 * torch.rand(200) ** 3).to(F64 if dtype is F64 else F32)
    v[100] = 0
    with on_gpu(arch, CONFIGS[arch]):
        y = expectation.expectation(mu, v, name)
        dmu, dv, total = expectation.expectation_bwd(dy, mu, v, name)
    wide = (mu.double(), v.double(), name)
    want = reference.expectation(*wide)
    want_dmu, want_dv, want_total = reference.expectation_bwd(dy.double(), *wide)
    of_mixture = mixtures.BOUNDS.get(name, (0, 0, 0))[TIER[dtype]]
    bound = of_mixture + (2.1e-6 if dtype is BF16 else 3e-7)
    size, rounding = 1 + mu.double().abs(), EPS[dtype] if dtype is not F64 else 0
    assert ((y - want).abs() <= bound * size + rounding * want.abs() + 1e-6).all()
    allowed = (40 * bound + 2e-6 + rounding) * (1 + dy.double().abs())
    assert ((dmu - want_dmu).abs() <= allowed).all()
    # the curvature of relu and its like grows as 1 / sqrt(v); without variance it is the plain one
    keep = (v > 1e-3) | (v == 0)
    assert ((dv - want_dv).abs() <= (60 * of_mixture + 2e-6) * 37)[keep].all()
    assert ((total - want_total).abs() <= 37 * (60 * bound + 4e-6)).all()


VARIANCES = [0.0, 1e-45, 1e-40, 1e-38, 1e-30, 1.0, 1e37, 8.6e37, 2e38, 3.2e38]


@pytest.mark.parametrize("errors", [0, 1])
@pytest.mark.parametrize(
    "name, arch",
    quick_of(
        list(itertools.product(NAMES, CONFIGS)), [("relu", 80), ("silu", 80), ("gelu_tanh", 80)]
    ),
)
def test_compiled_activation_of_any_variance(name, arch, errors):
    """Subnormal ones, whose root a GPU takes for 0, ordinary and huge ones, whose reciprocal is
    subnormal."""
    mu = torch.tensor([-1e30, -1e20, -2.0, -1e-20, -1e-40, 0.0, 1e-40, 1e-20, 2.0, 1e20, 1e30])
    v = torch.tensor(VARIANCES)
    grid = mu[:, None].expand(-1, len(v)).contiguous()
    with on_gpu(arch, errors):
        y = expectation.expectation(grid, v, name)
        dmu, dv, total = expectation.expectation_bwd(torch.ones_like(grid), grid, v, name)
    assert all(t.isfinite().all() for t in (y, dmu, dv, total))
    deviation = v.double().sqrt()
    near = grid.double().abs() <= 2
    huge = near & (v > 1e30)
    if name == "tanh":
        assert (y.abs() <= 1 + 1e-6).all() and (y[huge].abs() <= 1e-6).all()
    else:
        # Behind a huge variance each is relu: E = deviation phi(0) next to mu = 0.
        want = (deviation * 0.3989422804014327).expand_as(grid)[huge]
        assert ((y[huge].double() / want - 1).abs() <= 1e-5).all()
        assert ((dmu[huge] - 0.5).abs() <= 1e-5).all()
    # Behind hardly any it is the activation.
    little = v < 1e-20
    plain = PLAIN[name](grid.double())
    bound = mixtures.BOUNDS.get(name, (0, 0, 0))[1] + 1e-6
    assert ((y.double() - plain)[little & near].abs() <= bound).all()
    far = (grid.double().abs() > 1e10) & (v < 1e10)
    torch.testing.assert_close(y.double()[far], plain[far], rtol=1e-6, atol=1e-6)
    slope = (grid > 0).double() * (name != "tanh")
    assert ((dmu.double() - slope)[far].abs() <= 1e-5).all()


@pytest.mark.parametrize(
    "name, dtype, arch",
    quick_of(
        list(itertools.product(NAMES, [F32, BF16, F64], CONFIGS)),
        [("relu", F32, 80), ("silu", F32, 80)],
    ),
)
def test_compiled_activation_of_infinities_and_nans(name, dtype, arch):
    wide = F64 if dtype is F64 else F32
    mu = torch.tensor([-INF, INF, NAN, 1.0]).to(dtype)[:, None].expand(-1, 4).contiguous()
    v = torch.tensor([0.0, 1e-8, 1.0, NAN], dtype=wide)
    dy = torch.ones_like(mu)
    with on_gpu(arch, CONFIGS[arch]):
        y = expectation.expectation(mu, v, name)
        dmu, dv, _ = expectation.expectation_bwd(dy, mu, v, name)
    low = -1 if name == "tanh" else 0
    assert (y[0, :3] - low).abs().max() <= 1e-6
    assert ((y[1, :3] - 1).abs() <= 1e-6).all() if name == "tanh" else (y[1, :3] == INF).all()
    for row, slope in ((0, 0.0), (1, float(name != "tanh"))):
        assert ((dmu[row, :3] - slope).abs() <= 1e-5).all()
    assert y[2, :3].isnan().all() and y[3, :3].isfinite().all()
    # A variance that is no number makes none.
    assert y[:, 3].isnan().all() and dmu[:, 3].isnan().all() and dv[3].isnan()


@pytest.mark.parametrize("arch", [80, slow(90)])
@pytest.mark.parametrize("weight_dtype, sigma_dtype", [(BF16, F32), slow(F32, F32), slow(F64, F64)])
@pytest.mark.parametrize("log_variance", [True, slow(False)])
def test_compiled_activation_variance_matches_reference(
    weight_dtype, sigma_dtype, log_variance, arch
):
    for n, k in ((5, 7), (70, 264)):
        weight, sigma = randn(n, k).to(weight_dtype), torch.rand(k, dtype=sigma_dtype)
        dv, given = torch.randn(n, dtype=sigma_dtype), randn(k, n).t().to(weight_dtype)

        def results(module, how=(weight, sigma, log_variance), dv=dv, given=given):
            return module.affine_variance(*how), *module.affine_variance_bwd(dv, *how, given)

        with on_gpu(arch, CONFIGS[arch]):
            got = results(expectation)
        want = results(reference)
        tolerance = 1e-2 if weight_dtype is BF16 else 1e-4 if sigma_dtype is F32 else 1e-10
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype and torch.allclose(a, b, rtol=tolerance, atol=tolerance / 10)


# ---- what ptxas may do, and tensors beyond 2^31 elements


@pytest.mark.slow
@pytest.mark.parametrize("case", ["rows", "nchw odd"])
def test_compiled_perturb_keeps_its_bits_where_products_and_sums_may_be_fused(case):
    shape, dim, col0 = CASES[case]
    x, sigma = randn(*shape), torch.rand(shape[dim]) + 0.1
    where = (sigma, SEED, dim, 2**32 - 7, col0, 2, 0.5, False)
    results = []
    for contract in (False, True):
        with on_gpu(80, 1, contract=contract):
            results.append(perturb.perturb(x, *where, None))
    assert torch.equal(*results)


def last(grid):
    """The last column of blocks, and of it those that may meet the last rows"""
    grid = (*grid, 1, 1)[:3]
    return [(grid[0] - 1, y, grid[2] - 1) for y in range(max(0, grid[1] - 4), grid[1])]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(70001, 40000), (70001, 40001), (3, 1000, 800000)])
def test_compiled_perturb_beyond_two_to_the_31_elements(shape):
    """The last blocks of the launch that a GPU would get, on memory that is only reserved."""
    torch.use_deterministic_algorithms(False)  # else torch.empty would fill it
    k, inner = shape[1], shape[2] if len(shape) == 3 else 1
    x, sigma = torch.empty(shape, dtype=BF16), torch.ones(k)
    with on_gpu(80, 1, multiprocessors=132, ctas=last) as launches:
        u = perturb.perturb(x, sigma, SEED, 1, 0, 0, 0, 1.0, False, None)
    assert len(launches) == 1
    first = k - k % 256 if k % 256 and inner == 1 else k - 8
    check_last_rows(u, SEED, first, reference.standard_normal)
