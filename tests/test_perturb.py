"""P: u = x + sigma z, its adjoint Q, and both at once, against the float64 reference.
docs/maths.md, sections 1, 5, 6."""

import math

import pytest
import torch
from capability_support import assert_same_everywhere
from sums_support import LARGE, block_rows, telling_rows
from torch.autograd import gradcheck, gradgradcheck

from dipkernels import backend, functional, reference
from dipkernels.ops.draw import Draw
from dipkernels.ops.perturb import perturb, perturb_bwd, perturb_replay

SEED = torch.tensor([0x0123456789ABCDEF, 3])
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EPS = {torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-12, torch.float64: 2**-53}
Z_ERROR = 4e-6  # the contract's tolerance on z


def arguments(dim=-1, row0=0, col0=0, sample=0, factor=1.0, log_variance=False):
    return dim, row0, col0, sample, factor, log_variance


def inputs(shape, dim=-1, dtype=torch.float32, log_variance=False):
    generator = torch.Generator().manual_seed(sum(shape) + 1)
    x, du = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)
    )
    sigma = torch.rand(shape[dim], generator=generator) + 0.1
    return x, du, sigma.square().log() if log_variance else sigma


def check_u(u, x, sigma, where, out_dtype=None):
    exact = reference.perturb(x, sigma, SEED, *where, torch.float64)
    scale = 6.0 if where[-1] else sigma.abs().max().item() if sigma.numel() else 0.0
    # One rounding of the result, and of the float32 sum before it; z to its tolerance.
    allowed = 2 * (EPS[u.dtype] + EPS[torch.float32]) * exact.abs() + scale * Z_ERROR
    allowed += 6e-8 * (u.dtype == torch.float16)
    assert ((u.double() - exact).abs() <= allowed).all()
    assert u.dtype == (out_dtype or x.dtype) and u.shape == x.shape


def check_dsigma(dsigma, du, sigma, where):
    exact = reference.perturb_bwd(du, sigma.double(), SEED, *where)
    rows = du.numel() // max(1, du.shape[where[0]])
    assert ((dsigma.double() - exact).abs() <= 2e-6 * math.sqrt(rows + 1) * (1 + exact.abs())).all()
    assert dsigma.dtype == sigma.dtype and dsigma.shape == sigma.shape


# One lane, one group, one tile and its neighbours, a row of many tiles, short rows that tiles cut,
# primes, empty.
ROWS = [(1, 1), (3, 8), (17, 129), (16, 128), (5, 1031), (3, 768), (200, 24), (2, 3, 40), (7,)]
ROWS += [(41, 45), (90, 19)]
SHAPES = [(shape, -1) for shape in (*ROWS, (0, 8), (4, 0))]
SHAPES += [
    ((2, 13, 5, 3), 1),
    ((2, 16, 12, 12), 1),
    ((3, 24, 200), 1),
    ((9, 31), 0),
    ((4, 5, 6), 1),
    ((70, 11, 2, 2), 1),  # many short planes
]
WHERES = [
    dict(),
    dict(row0=2**33 + 7, col0=24, sample=2),
    dict(col0=3, sample=9, factor=0.5, log_variance=True),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", WHERES)
@pytest.mark.parametrize("shape, dim", SHAPES)
def test_perturb_matches_reference(shape, dim, options, dtype):
    where = arguments(dim, **options)
    x, du, sigma = inputs(shape, dim, dtype, where[-1])
    check_u(perturb(x, sigma, SEED, Draw(*where), None), x, sigma, where)
    dsigma = perturb_bwd(du, sigma, SEED, Draw(*where))
    check_dsigma(dsigma, du, sigma, where)
    u, replayed = perturb_replay(du, x, sigma, SEED, Draw(*where), None)
    assert torch.equal(u, perturb(x, sigma, SEED, Draw(*where), None))
    assert torch.equal(replayed, dsigma)


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(33, 70), (40, 64)])
def test_perturb_rounds_once_to_the_asked_type(shape, dtype, out_dtype):
    x, du, sigma = inputs(shape, dtype=dtype)
    where = arguments()
    u = perturb(x, sigma, SEED, Draw(*where), out_dtype)
    check_u(u, x, sigma, where, out_dtype)
    if dtype != torch.float64:
        assert torch.equal(u, perturb(x, sigma, SEED, Draw(*where), torch.float32).to(out_dtype))
    mixed, dsigma = perturb_replay(du.to(out_dtype), x, sigma, SEED, Draw(*where), out_dtype)
    assert torch.equal(mixed, u)
    check_dsigma(dsigma, du.to(out_dtype), sigma, where)


def test_perturb_of_a_large_tensor_is_that_of_its_parts(capability):
    """From 16 MiB of float32 on, u is written past the caches."""
    x, _, sigma = inputs((4102, 1032))
    u = perturb(x, sigma, SEED, Draw(*arguments(row0=5)), None)
    parts = [
        perturb(x[i : i + 600], sigma, SEED, Draw(*arguments(row0=5 + i)), None)
        for i in range(0, 4102, 600)
    ]
    assert torch.equal(u, torch.cat(parts))


def test_perturb_rounds_ties_to_even(capability):
    """In bfloat16, where one sum in 2^16 is a tie; of as many elements as it takes to meet some of
    either kind."""
    x, _, sigma = inputs((1024, 1024), dtype=torch.bfloat16)
    where = arguments()
    wide, u = (perturb(x, sigma, SEED, Draw(*where), dtype) for dtype in (torch.float32, None))
    bits = wide.view(torch.int32)
    for last in (0, 1):
        assert ((bits & 0x1FFFF) == 0x8000 + last * 0x10000).sum() > 2
    assert torch.equal(u, wide.to(torch.bfloat16))


def test_perturb_keeps_subnormal_halves_where_floats_are_flushed(capability):
    """By torch.set_flush_denormal: what is subnormal in float16 is not in float32."""
    x = torch.arange(1, 2**10, dtype=torch.int16).view(torch.float16)[None]
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor flushes nothing")
    try:
        u = perturb(x, torch.zeros(x.shape[1]), SEED, Draw(*arguments()), None)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(u.view(torch.int16), x.view(torch.int16))


TILED = [((65, 200), -1), ((40, 64), -1), ((70, 13), -1), ((5, 768), -1)]
TILED += [((3, 20, 7, 9), 1), ((2, 16, 20, 20), 1), ((70, 11, 3, 3), 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, dim", TILED)
def test_perturb_ignores_instruction_set_and_threads(shape, dim, dtype):
    x, du, sigma = inputs(shape, dim, dtype)
    where = arguments(dim, row0=2**32 - 2, col0=16)

    def results():
        yield perturb(x, sigma, SEED, Draw(*where), None)
        yield from perturb_replay(du, x, sigma, SEED, Draw(*where), None)

    assert_same_everywhere(results)


def strided(x):
    """The same values in other memory: sliced, transposed, stepped, flipped by index, expanded."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), math.nan, dtype=x.dtype)
    wide[..., 1 : x.shape[-1] + 1] = x
    yield wide[..., 1 : x.shape[-1] + 1]
    stepped = torch.full((*x.shape[:-1], 2 * x.shape[-1]), math.nan, dtype=x.dtype)
    stepped[..., ::2] = x
    yield stepped[..., ::2]
    yield x.transpose(0, -1).contiguous().transpose(0, -1)
    if x.dim() == 4:
        yield x.to(memory_format=torch.channels_last)
        yield x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)
    if x.dim() >= 2:
        rows = torch.full((3 * x.shape[0], *x.shape[1:]), math.nan, dtype=x.dtype)
        rows[::3] = x
        yield rows[::3]


STRIDED = [((37, 64), -1), ((37, 64), 0), ((5, 33), -1), ((50,), 0)]
STRIDED += [((3, 4, 40), 1), ((2, 24, 5, 6), 1), ((2, 24, 5, 6), -1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape, dim", STRIDED)
def test_perturb_ignores_strides(shape, dim, dtype):
    x, du, sigma = inputs(shape, dim, dtype)
    where = arguments(dim)
    u, dsigma = perturb_replay(du, x, sigma, SEED, Draw(*where), None)
    for other in strided(x):
        assert torch.equal(other, x)
        got = perturb(other, sigma, SEED, Draw(*where), None)
        assert torch.equal(got, u)
        assert got.stride() == torch.empty_like(other).stride()
        assert torch.equal(perturb_replay(du, other, sigma, SEED, Draw(*where), None)[0], u)
    for other in strided(du):
        alone = perturb_bwd(other, sigma, SEED, Draw(*where))
        replayed = perturb_replay(other, x, sigma, SEED, Draw(*where), None)[1]
        torch.testing.assert_close(alone, dsigma, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(replayed, dsigma, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "axes, dim", [((1, 0), -1), ((0, 2, 1), -1), ((0, 2, 3, 1), -1), ((1, 0, 2), 0)]
)
def test_perturb_of_features_that_lie_apart_copies_nothing(axes, dim):
    x = torch.randn(6, 24, 4, 5)[(..., *[0] * (4 - len(axes)))].contiguous().permute(axes)
    sigma, where = torch.ones(x.shape[dim]), Draw(*arguments(dim))
    with torch.profiler.profile() as trace:
        perturb(x, sigma, SEED, where, None)
        perturb_replay(x, x, sigma, SEED, where, None)
        perturb_bwd(x, sigma, SEED, where)
    assert not {"aten::copy_", "aten::clone"} & {event.name for event in trace.events()}


def test_perturb_takes_expanded_gradients():
    x, _, sigma = inputs((6, 20))
    ones = torch.ones(()).expand(6, 20)
    got = perturb_bwd(ones, sigma, SEED, Draw(*arguments()))
    want = functional.noise((6, 20), SEED).sum(0)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    x = x.requires_grad_()
    functional.perturb(x, sigma, SEED).sum().backward()
    assert torch.equal(x.grad, torch.ones(6, 20))


def test_perturb_of_a_window_is_the_window():
    x, _, sigma = inputs((12, 40))
    u = functional.perturb(x, sigma, SEED)
    window = functional.perturb(x[3:9, 5:22], sigma[5:22], SEED, row0=3, col0=5)
    assert torch.equal(window, u[3:9, 5:22])


def test_perturb_passes_nan_and_infinity_through():
    x = torch.tensor([[math.nan, math.inf, -math.inf, 1.0] * 4] * 65)
    sigma = torch.full((16,), 0.1)
    for dtype in DTYPES:
        u = functional.perturb(x.to(dtype), sigma, SEED)
        assert torch.equal(u.isnan(), x.isnan())
        for infinity in (math.inf, -math.inf):
            assert torch.equal(u == infinity, x == infinity)


def test_perturb_of_several_samples_has_the_law_of_their_mean():
    u = functional.perturb(torch.zeros(4000, 64), torch.ones(64), SEED, num_samples=16)
    n = u.numel()
    assert abs(u.double().var().item() * 16 - 1) < 5 * (2 / n) ** 0.5
    assert abs(u.double().mean().item()) < 5 / (16 * n) ** 0.5


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("log_variance", [False, True])
@pytest.mark.parametrize("shape, dim", [((2, 9), -1), ((2, 5, 2), 1), ((4,), 0)])
def test_perturb_gradcheck_and_gradgradcheck(name, shape, dim, log_variance):
    x, _, sigma = inputs(shape, dim, torch.float64, log_variance)
    arguments = x.requires_grad_(), sigma.double().requires_grad_()

    def run(x, sigma):
        return functional.perturb(x, sigma, SEED, dim=dim, num_samples=2, log_variance=log_variance)

    with backend(name):
        assert gradcheck(run, arguments) and gradgradcheck(run, arguments)


def test_perturb_replays_in_backward():
    """Three forwards before one backward, against finite differences of the same three draws."""
    seeds = [torch.tensor([k, 0]) for k in range(3)]
    x, _, sigma = inputs((4, 9), dtype=torch.float64)

    def loss(sigma):
        return sum(
            functional.perturb(x, sigma, seed).sin().sum() * (i + 1) for i, seed in enumerate(seeds)
        )

    sigma = sigma.double().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(sigma), sigma)
    step = 1e-6
    for j in range(9):
        shift = torch.zeros(9, dtype=torch.float64)
        shift[j] = step
        difference = (loss(sigma.detach() + shift) - loss(sigma.detach() - shift)) / (2 * step)
        assert abs(difference - gradient[j]) < 1e-6


def test_perturb_sum_is_no_worse_than_torch():
    """Twice the error of the same sum in plain PyTorch, + 1e-6 a root of a row."""
    _, du, sigma = inputs((20000, 24))
    where = arguments()
    exact = reference.perturb_bwd(du, sigma.double(), SEED, *where)
    plain = (du * functional.noise(du.shape, SEED)).sum(0)
    ours = perturb_bwd(du, sigma, SEED, Draw(*where))
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-6 * 20000**0.5


@pytest.mark.parametrize(
    "shape, dim, unit",
    [
        ((1000, 64), -1, 64),
        ((2049, 64), -1, 64),
        ((3, 40, 700), 1, 128),
        ((9, 40, 700), 1, 128),
        ((600, 40, 7), 1, 126),  # whole images
    ],
)
def test_perturb_sums_over_the_stated_blocks_of_rows(capability, shape, dim, unit):
    z = functional.noise(shape, SEED, dim=dim).movedim(dim, -1).reshape(-1, shape[dim])
    first, second, last = telling_rows(len(z), unit)
    du = torch.zeros_like(z)
    du[first], du[second] = 1, LARGE
    # Of the columns those where a gradient's product with z is -LARGE z of the other row, exactly.
    exact = torch.zeros(shape[dim], dtype=torch.bool)
    for toward in (0.0, -math.inf, math.inf):
        found = torch.nextafter(-LARGE * z[second] / z[last], torch.tensor(toward))
        found = -LARGE * z[second] / z[last] if toward == 0 else found
        fits = (found.double() * z[last].double()).float() == -LARGE * z[second]
        du[last] = torch.where(fits, found, du[last])
        exact |= fits
    assert exact.sum() > 20
    lead = [n for i, n in enumerate(shape) if i != dim % len(shape)]
    du = du.reshape(*lead, -1).movedim(-1, dim).contiguous()
    dsigma = perturb_bwd(du, torch.ones(shape[dim]), SEED, Draw(*arguments(dim)))
    assert torch.equal(dsigma[exact], z[first][exact])


@pytest.mark.parametrize(
    "shape, dim, stride, unit",
    [
        ((20000, 13), -1, 1, 64),
        ((20000, 16), -1, 1, 64),
        ((20000, 61), -1, 1, 64),
        ((4000, 1027), -1, 1, 64),
        ((2, 8, 204800), 1, 128, 128),  # one term in each tile of 128 pixels
        ((60000, 8, 7), 1, 7, 126),  # one in each image
    ],
)
def test_perturb_sums_go_to_float64_after_32_terms(capability, shape, dim, stride, unit):
    """float32 loses a 1 beside 2^25. Of a block's many ones those that stand beside it in 32 terms
    may be lost, and no more."""
    z = functional.noise(shape, SEED, dim=dim).movedim(dim, -1).reshape(-1, shape[dim])
    block = block_rows(len(z), unit)
    ones = list(range(stride, block - stride, stride))
    products = torch.zeros_like(z)
    products[ones] = 1
    products[0], products[block - stride] = 2.0**25, -(2.0**25)
    lead = [n for i, n in enumerate(shape) if i != dim % len(shape)]
    du = (products / z).reshape(*lead, -1).movedim(-1, dim).contiguous()
    dsigma = perturb_bwd(du, torch.ones(shape[dim]), SEED, Draw(*arguments(dim)))
    assert dsigma.min() > len(ones) - 2 * 31 - 8


class TestTorchFunc:
    def run(self, x, sigma):
        return functional.perturb(x, sigma, SEED, log_variance=True)

    def setup_method(self):
        self.x, self.dx, self.sigma = inputs((6, 10), dtype=torch.float64, log_variance=True)
        self.sigma = self.sigma.double()
        self.dsigma = torch.linspace(-1, 1, 10, dtype=torch.float64)

    def test_perturb_jvp_matches_finite_differences(self):
        u, tangent = torch.func.jvp(self.run, (self.x, self.sigma), (self.dx, self.dsigma))
        step = 1e-6
        ahead = self.run(self.x + step * self.dx, self.sigma + step * self.dsigma)
        behind = self.run(self.x - step * self.dx, self.sigma - step * self.dsigma)
        torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7)
        assert torch.equal(u, self.run(self.x, self.sigma))
        for inputs, tangents in (((self.x,), (self.dx,)), ((self.sigma,), (self.dsigma,))):
            run = (
                (lambda x: self.run(x, self.sigma))
                if inputs[0] is self.x
                else (lambda s: self.run(self.x, s))
            )
            assert torch.func.jvp(run, inputs, tangents)[1].shape == self.x.shape

    def test_perturb_hessian_forward_over_reverse(self):
        def loss(sigma):
            return self.run(self.x, sigma).pow(3).sum()

        got = torch.func.hessian(loss)(self.sigma)
        want = torch.autograd.functional.hessian(loss, self.sigma)
        torch.testing.assert_close(got, want)

    def test_perturb_vmap_draws_by_a_batched_seed(self):
        seeds = torch.tensor([[1, 0], [2, 0]])
        got = torch.func.vmap(
            lambda seed: functional.perturb(self.x, self.sigma, seed, log_variance=True)
        )(seeds)
        want = [functional.perturb(self.x, self.sigma, seed, log_variance=True) for seed in seeds]
        assert torch.equal(got, torch.stack(want))


SPREAD = torch.zeros(4, dtype=torch.int64)[::2]
BAD_FOR_BOTH = [  # for the function and for the library by itself
    (dict(sigma=torch.ones(1, 8)), "sigma: expected shape"),
    (dict(sigma=torch.ones(7)), r"sigma: expected shape \(K,\) = \(8,\), got \(7,\)"),
    (dict(sigma=torch.ones(8, dtype=torch.float16)), "sigma: expected torch.float32"),
    (dict(seed=torch.zeros(3, dtype=torch.int64)), "seed: expected shape"),
    (dict(seed=torch.zeros(2)), "seed: expected dtype"),
    (dict(seed=SPREAD), "seed: expected its two numbers side by side"),
    (dict(x=torch.ones(4, 8, dtype=torch.int32)), "x: expected one of"),
    (dict(dim=2), "dim: expected"),
]
BAD = [
    *BAD_FOR_BOTH,
    (dict(sigma=torch.ones(8, device="meta")), "sigma: expected device"),
    (dict(sigma=-torch.ones(8)), "sigma: expected values >= 0"),
    (dict(sigma=torch.full((8,), math.nan)), "sigma: expected values >= 0"),
    (dict(seed=torch.zeros(2, dtype=torch.int64, device="meta")), "seed: expected device"),
    (dict(x=torch.ones(())), "dim: expected"),
    (dict(dtype=torch.int32), "dtype: expected"),
]
FAR = [dict(sample=65536), dict(row0=-1), *({n: 2**63 - 1} for n in ("row0", "col0", "sample"))]


@pytest.mark.parametrize("bad, error", BAD)
def test_perturb_rejects(bad, error):
    good = {"x": torch.ones(4, 8), "sigma": torch.ones(8), "seed": SEED}
    with pytest.raises((ValueError, TypeError), match=error):
        functional.perturb(**{**good, **bad})


@pytest.mark.parametrize(
    "bad", [*(bad for bad, _ in BAD_FOR_BOTH), *FAR, dict(out_dtype=torch.int32)]
)
def test_perturb_library_by_itself_stays_inside_its_buffers(bad):
    good = dict(x=torch.ones(4, 8), sigma=torch.ones(8), seed=SEED, dim=-1, row0=0, col0=0)
    good |= dict(sample=0, factor=1.0, log_variance=False, out_dtype=None)
    with pytest.raises(RuntimeError, match="expected"):
        torch.ops.dipkernels.perturb(*{**good, **bad}.values())


@pytest.mark.parametrize("bad", [lambda du: du[:3], lambda du: du.int()])
def test_perturb_replay_library_by_itself_rejects_another_shape_or_type(bad):
    x, du, sigma = inputs((4, 8))
    with pytest.raises(RuntimeError, match="expected"):
        torch.ops.dipkernels.perturb_replay(bad(du), x, sigma, SEED, *arguments(), None)
