"""Random shapes, strides, types, origins, threads and instruction sets against the float64
reference, by hypothesis.

500 cases of fixed seeds in `make test`, 20,000 in `make test-all`.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from capability_support import OFFERED
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import dipkernels as dip
from dipkernels import backends, functional, library, reference
from dipkernels.library import cpu_capability
from dipkernels.ops.draw import Draw
from dipkernels.ops.perturb import perturb, perturb_bwd, perturb_replay

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EPS = {torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-12, torch.float64: 2**-53}
Z_ERROR = 4e-6  # the contract's tolerance on z
MOST = 1500  # elements of a case
pytestmark = pytest.mark.skipif(
    "portable" not in library.load().cpu_capabilities, reason="needs the compiled library"
)


def few_and_many(few, many):
    """Numbers of cases of fixed seeds, the same on every machine."""
    return pytest.mark.parametrize("number", [few, pytest.param(many, marks=pytest.mark.slow)])


def check_cases(number, check, *strategies):
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    fixed = settings(
        max_examples=number, deadline=None, database=None, suppress_health_check=checks
    )
    seed(20261120)(fixed(given(*strategies)(check)))()


@pytest.fixture(autouse=True, scope="module")
def restore():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if OFFERED:
        cpu_capability("auto")


# ---- what a case is made of ----------------------------------------------------------------------

LAST_ROW0 = 2**62 - 2**20  # the last row that the operations take, less the rows of any case
rows0 = st.one_of(
    st.integers(0, 9),
    st.sampled_from([2**32 - 5, 2**32 - 1, 2**33 + 7, LAST_ROW0]),
    st.integers(0, LAST_ROW0),
)
columns0 = st.one_of(st.integers(0, 17), st.sampled_from([0, 8, 2**20 + 3, 2**35 - 4, 2**35 + 16]))
keys = st.integers(-(2**63), 2**63 - 1)
seeds = st.builds(
    lambda key, stream: torch.tensor([key, stream]), keys, st.integers(-3, 2**17) | keys
)


@st.composite
def shapes(draw, least=1):
    """1 to 4 dimensions, some empty or of one element, MOST elements at most, and the feature
    dimension."""
    ndim = draw(st.integers(least, 4))
    side = st.one_of(st.integers(1, 12), st.sampled_from([0, 1, 2, 8, 16, 17, 64, 129, 700]))
    shape, left = [], MOST
    for _ in range(ndim):
        shape.append(min(draw(side), max(left, 1)))
        left //= max(shape[-1], 1)
    shape = draw(st.permutations(shape))
    return tuple(shape), draw(st.integers(-ndim, ndim - 1))


@st.composite
def layouts(draw, values):
    """`values` (contiguous) in other memory: any order of dimensions, gaps, steps, an offset,
    expanded dimensions, flips."""
    kind = draw(
        st.sampled_from(
            ["dense", "dense", "order", "gaps", "expand", "flip", "channels_last", "slice"]
        )
    )
    if kind == "dense" or values.numel() == 0:
        return values
    ndim = values.dim()
    if kind == "channels_last" and ndim == 4:
        return values.to(memory_format=torch.channels_last)
    if kind == "flip":  # torch has no negative strides: a copy
        return values.flip(draw(st.integers(0, ndim - 1)))
    if kind == "expand":
        d = draw(st.integers(0, ndim - 1))
        return values.narrow(d, 0, 1).expand(values.shape)
    if kind == "slice":
        d = draw(st.integers(0, ndim - 1))
        wide = list(values.shape)
        step, first = draw(st.integers(1, 3)), draw(st.integers(0, 3))
        wide[d] = first + step * wide[d] + draw(st.integers(0, 2))
        memory = torch.full(wide, math.nan, dtype=values.dtype)
        view = memory.narrow(d, first, step * values.shape[d])
        view = view[tuple(slice(None, None, step) if i == d else slice(None) for i in range(ndim))]
        return view.copy_(values)
    order = draw(st.permutations(range(ndim)))
    strides, stride = [0] * ndim, 1 if kind == "order" else draw(st.integers(1, 2))
    for d in reversed(order):
        strides[d] = stride
        stride = stride * values.shape[d] + (0 if kind == "order" else draw(st.integers(0, 3)))
    offset = draw(st.integers(0, 5))
    memory = torch.full(
        (offset + 1 + sum((n - 1) * s for n, s in zip(values.shape, strides)),),
        math.nan,
        dtype=values.dtype,
    )
    return memory.as_strided(values.shape, strides, offset).copy_(values)


@st.composite
def perturbs(draw):
    shape, dim = draw(shapes())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtypes = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    x, du = (torch.randn(shape, generator=generator, dtype=torch.float64).to(d) for d in dtypes)
    log_variance = draw(st.booleans())
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    sigma = torch.rand(shape[dim], generator=generator, dtype=dtype) + 0.1
    sigma = sigma.square().log() if log_variance else sigma
    sample = draw(st.sampled_from([0, 1, 2**16 - 1]) | st.integers(0, 2**16 - 1))
    factor = draw(st.sampled_from([1.0, 0.5, 3.0]))
    where = (dim, draw(rows0), draw(columns0), sample, factor, log_variance)
    out_dtype = draw(st.sampled_from([None, None, *DTYPES]))
    machine = draw(st.sampled_from(OFFERED)), draw(st.integers(1, 3))
    tensors = [draw(layouts(t)) for t in (x, du, sigma)]
    return *tensors, draw(seeds), where, out_dtype, machine


# ---- the properties ------------------------------------------------------------------------------


def check_perturb(x, du, sigma, seed, where, out_dtype, machine):
    cpu_capability(machine[0])
    torch.set_num_threads(machine[1])
    dim, log_variance = where[0], where[-1]
    u = perturb(x, sigma, seed, Draw(*where), out_dtype)
    exact = reference.perturb(x, sigma, seed, *where, torch.float64)
    spread = torch.exp(sigma.double() / 2) if log_variance else sigma
    scale = float(spread.max()) * where[4] if sigma.numel() else 0.0
    tiny = 6e-8 if u.dtype is torch.float16 else 0.0
    allowed = (
        2 * (EPS[u.dtype] + EPS[torch.float32]) * (exact.abs() + 6 * scale * EPS[torch.float32])
        + scale * Z_ERROR
        + tiny
    )
    assert u.dtype == (out_dtype or x.dtype) and u.shape == x.shape
    assert u.stride() == torch.empty_like(x).stride()
    assert ((u.double() - exact).abs() <= allowed).all()
    dsigma = perturb_bwd(du, sigma, seed, Draw(*where))
    exact = reference.perturb_bwd(du, sigma.double(), seed, *where)
    rows = du.numel() // max(1, du.shape[dim])
    size = where[4] * (scale + 1) * (1 + (float(du.double().abs().max()) if du.numel() else 0.0))
    assert dsigma.dtype == sigma.dtype and dsigma.shape == sigma.shape
    assert ((dsigma.double() - exact).abs() <= 4e-6 * size * (rows + 1)).all()
    again, replayed = perturb_replay(du, x, sigma, seed, Draw(*where), out_dtype)
    assert torch.equal(again, u)
    # In the type of x where that is wider than du's.
    assert ((replayed.double() - exact).abs() <= 4e-6 * size * (rows + 1)).all()


@few_and_many(380, 15_000)
def test_perturb_matches_reference_whatever_comes(number):
    check_cases(number, lambda case: check_perturb(*case), perturbs())


def check_noise(shape_dim, where, seed, data, machine):
    """z is the reference's, and the noise of a window is the window of the noise."""
    (shape, dim), (row0, col0, sample) = shape_dim, where
    cpu_capability(machine[0])
    torch.set_num_threads(machine[1])
    z = functional.noise(shape, seed, dim=dim, row0=row0, col0=col0, sample=sample)
    exact = reference.noise(seed, shape, dim, row0, col0, sample)
    assert z.is_contiguous() and z.dtype is torch.float32
    assert ((z - exact).abs() <= Z_ERROR + 1e-6).all()
    if z.numel() == 0:
        return
    first = data.draw(st.integers(0, shape[dim] - 1))
    last = data.draw(st.integers(first + 1, shape[dim]))
    window = [n for d, n in enumerate(shape) if d != dim % len(shape)]
    window.insert(dim % len(shape), last - first)
    part = functional.noise(window, seed, dim=dim, row0=row0, col0=col0 + first, sample=sample)
    assert torch.equal(part, z.narrow(dim, first, last - first))
    if dim % len(shape) != 0:  # leading entries are rows
        start = data.draw(st.integers(0, shape[0] - 1))
        rows = z[0].numel() // shape[dim] * start
        rest = (shape[0] - start, *shape[1:])
        part = functional.noise(rest, seed, dim=dim, row0=row0 + rows, col0=col0, sample=sample)
        assert torch.equal(part, z[start:])


windows = st.tuples(rows0, columns0, st.integers(0, 9))
machines = st.tuples(st.sampled_from(OFFERED or ["portable"]), st.integers(1, 3))


@few_and_many(60, 2_500)
def test_noise_of_a_window_is_the_window_whatever_comes(number):
    check_cases(number, check_noise, shapes(), windows, seeds, st.data(), machines)


@st.composite
def linears(draw):
    shape, _ = draw(shapes())
    k, n = shape[-1], draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    log_variance = draw(st.booleans())
    sigma = (torch.rand(k, generator=generator, dtype=torch.float64) + 0.1).float().double()
    options = dict(
        row0=draw(rows0),
        col0=draw(columns0),
        sample=draw(st.integers(0, 9)),
        num_samples=draw(st.integers(1, 3)),
        log_variance=log_variance,
        keep=draw(st.sampled_from(["auto", "u", "x"])),
    )
    bias = normal(n) if draw(st.booleans()) else None
    x = draw(layouts(normal(*shape)))
    sigma = sigma.log() if log_variance else sigma
    return x, normal(n, k), bias, sigma, draw(seeds), normal(*shape[:-1], n), options


def check_linear(x, weight, bias, sigma, seed, dy, options):
    """y and every gradient in float64, against the same layer written out with the reference's
    noise."""
    keep = {k: v for k, v in options.items() if k != "keep" and k != "log_variance"}
    num_samples = keep.pop("num_samples")
    factor = num_samples**-0.5
    z = reference.noise(seed, x.shape, -1, keep["row0"], keep["col0"], keep["sample"]).double()
    results = []
    for ours in (True, False):
        leaves = [
            None if t is None else t.detach().clone().requires_grad_()
            for t in (x, weight, bias, sigma)
        ]
        lx, lw, lb, ls = leaves
        if ours:
            y = functional.dip_linear(lx, lw, lb, ls, seed, **options)
        else:
            s = torch.exp(ls / 2) if options["log_variance"] else ls
            y = F.linear(lx + factor * s * z, lw, lb)
        results.append([y, *torch.autograd.grad(y, [t for t in leaves if t is not None], dy)])
    size = 1e-5 * (1 + x.numel()) * (1 + weight.shape[0])
    torch.testing.assert_close(*results, rtol=1e-5, atol=size)


@few_and_many(60, 2_500)
def test_dip_linear_and_its_gradients_match_reference_whatever_comes(number):
    check_cases(number, lambda case: check_linear(*case), linears())


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_the_last_origin_is_numbered_without_overflow_and_a_layers_rows_are_counted(name):
    """2^62 itself is the last: beyond it tests/test_arguments.py has every function refuse."""
    seed, far = torch.tensor([1, 2]), 2**62
    exact = reference.noise(seed, (3, 9, 5), 1, far, far, 0)
    with backends.backend(name):
        got = functional.noise((3, 9, 5), seed, dim=1, row0=far, col0=far)
        assert (got - exact).abs().max() < 1e-5
        layer = dip.DIPLinear(9, 4)
        with dip.fixed_noise(1, row0=2**61), pytest.raises(ValueError, match="row0: expected"):
            layer(torch.zeros(2, 3, 9))  # three rows an entry


@pytest.mark.parametrize(
    "shape", [(0,), (1, 2, 0, 1), (0, 3, 2), (3, 0, 2), (2, 3, 0), (1, 0, 1, 5), (2, 0, 0, 3)]
)
def test_empty_tensors_are_as_good_as_others(shape):
    """Wherever the feature dimension is: an empty result, and sums of nothing."""
    seed = torch.tensor([1, 2])
    for dim in range(len(shape)):
        assert functional.noise(shape, seed, dim=dim).shape == shape
        for dtype in DTYPES:
            x, sigma = torch.empty(shape, dtype=dtype), torch.ones(shape[dim], requires_grad=True)
            u = functional.perturb(x, sigma, seed, dim=dim)
            u.sum().backward()
            assert u.shape == shape and torch.equal(sigma.grad, torch.zeros(shape[dim]))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_tangents_have_the_type_of_the_result(dtype):
    """Forward mode, whichever of the inputs moves."""
    x, sigma, seed = torch.randn(3, 9), torch.rand(9), torch.tensor([1, 2])
    dx, dsigma = torch.randn(3, 9), torch.randn(9)

    def of_both(x, sigma):
        return functional.perturb(x, sigma, seed, dtype=dtype)

    for run, inputs, tangents in (
        (lambda x: of_both(x, sigma), (x,), (dx,)),
        (lambda sigma: of_both(x, sigma), (sigma,), (dsigma,)),
        (of_both, (x, sigma), (dx, dsigma)),
    ):
        u, du = torch.func.jvp(run, inputs, tangents)
        assert u.dtype == du.dtype == (dtype or torch.float32) and u.shape == du.shape


@pytest.mark.parametrize("activation", ["tanh", "silu"])
def test_gradients_of_an_averaged_activation_are_the_same_with_and_without_a_graph(activation):
    """Backward, backward under create_graph and torch.func compute three ways what one mean over
    samples defines."""
    generator = torch.Generator().manual_seed(1)
    x, weight, dy = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((5, 9), (4, 9), (5, 4))
    )
    sigma, seed = torch.rand(9, generator=generator, dtype=torch.float64), torch.tensor([1, 2])
    act = functional.ACTIVATIONS[activation]

    def averaged(x, weight, sigma):
        options = dict(num_samples=3, sample=2, activation=activation, estimator="mean")
        return functional.dip_linear(x, weight, None, sigma, seed, **options)

    def explicit(x, weight, sigma):
        z = [reference.noise(seed, x.shape, -1, 0, 0, s).double() for s in (2, 3, 4)]
        return sum(act(F.linear(x + sigma * part, weight)) for part in z) / 3

    want = torch.func.vjp(explicit, x, weight, sigma)[1](dy)
    leaves = [t.clone().requires_grad_() for t in (x, weight, sigma)]
    for create_graph in (False, True):
        got = torch.autograd.grad(averaged(*leaves), leaves, dy, create_graph=create_graph)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    y, pull = torch.func.vjp(averaged, x, weight, sigma)
    torch.testing.assert_close(y, explicit(x, weight, sigma), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pull(dy), want, rtol=1e-5, atol=1e-5)
