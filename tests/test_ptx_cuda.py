"""csrc/cuda/perturb.cu as nvcc compiled it, host and device code, executed by tests/ptx against the float64 reference, without a GPU.

Every access is checked against the exact extent of its tensor, outputs start as NaN, and what an approximate instruction
returns is as far off as the PTX manual allows.
"""

import functools
import shutil

import numpy as np
import ptx
import pytest
import torch
from cuda_support import find_tool
from ptx_cuda_support import DTYPES, Library, Operand, PerturbArgs, build
from triton_support import load_reference

from dipkernels import backends
from dipkernels.ops.draw import Draw
from dipkernels.ops.perturb import noise, perturb

reference = load_reference()
missing = next((name for name in ("nvcc", "g++") if not (find_tool(name) or shutil.which(name))), None)
pytestmark = pytest.mark.skipif(missing is not None, reason=f"needs {missing}")

SEED = torch.tensor([0x0123456789ABCDEF, 5])
TIERS = ("fast", "exact")
F32, F64, F16, BF16 = DTYPES
# (architecture, which errors approximate instructions make: docs/reliability.md)
CONFIGS = [
    (80, 1),
    *(pytest.param((arch, errors), marks=pytest.mark.slow) for arch, errors in ((90, 2), (120, 3), (80, 0))),
]


@functools.cache
def _built(folder, arch):
    build(folder / str(arch), arch)
    return Library(folder / str(arch))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cuda")


@pytest.fixture(scope="session", params=CONFIGS, ids=lambda config: f"sm_{config[0]}-errors{config[1]}")
def library(request, folder):
    arch, errors = request.param
    library = _built(folder, arch)
    library.options = {"errors": errors}
    return library


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def run(library, tier, **kwargs):
    return library.perturb(tier, seed=SEED, **kwargs)


def where(kwargs, dim):
    return (dim, kwargs.get("row0", 0), kwargs.get("col0", 0), kwargs.get("sample", 0), kwargs.get("num_samples", 1),
            kwargs.get("factor", 1.0), kwargs.get("log_variance", False))  # fmt: skip


def check(library, tier, x=None, u=None, du=None, sigma=None, **kwargs):
    got_u, got_dsigma = run(library, tier, x=x, u=u, du=du, sigma=sigma, **kwargs)
    spread = torch.exp(sigma.double() / 2) if kwargs.get("log_variance") else sigma.double()
    scale = 4e-6 * kwargs.get("factor", 1.0) * spread.max().item() if sigma.numel() else 0.0
    if u is not None:
        want = reference.perturb(x, sigma, SEED, *where(kwargs, 1), torch.float64)
        eps = torch.finfo(u.dtype).eps if u.dtype is not torch.float64 else 0.0
        error = (got_u.double() - want).abs() - eps * want.abs() - 1e-7
        assert not got_u.isnan().any() and (error.numel() == 0 or error.max() <= scale), (got_u, want)
    if du is not None:
        want = reference.perturb_bwd(du, sigma, SEED, *where(kwargs, 1))
        rows = du.numel() // max(du.shape[1], 1)
        largest = du.double().abs().max().item() if du.numel() else 0.0
        torch.testing.assert_close(got_dsigma, want, rtol=1e-5, atol=3e-5 * rows**0.5 * largest)
    return got_u, got_dsigma


def tensors(*shape, dtypes=(torch.float32,) * 3):
    """x, u, du of a shape and sigma of its second dimension"""
    g = torch.Generator().manual_seed(sum(shape))
    x, du = (torch.randn(shape, generator=g).to(dtypes[i]) for i in (0, 2))
    sigma = torch.rand(shape[1], generator=g) + 0.1
    return x, torch.empty(shape, dtype=dtypes[1]), du, sigma


MODES = {"P": (True, False), "Q": (False, True), "PQ": (True, True)}


def take(mode, x, u, du):
    write, total = MODES[mode]
    return {"x": x if write else None, "u": u if write else None, "du": du if total else None}


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "dtypes", [(F32,) * 3, (F16,) * 3, (BF16,) * 3, (F64,) * 3, (F32, BF16, BF16), (F32, F16, F16), (F64, F32, F16)]
)
@pytest.mark.parametrize("shape", [(19, 40), (3, 16, 12)], ids=["rows", "channels"])
def test_compiled_cuda_matches_reference(library, tier, mode, dtypes, shape):
    x, u, du, sigma = tensors(*shape, dtypes=dtypes)
    check(library, tier, **take(mode, x, u, du), sigma=sigma)


# one element; one past a group; a prime; more columns than a block has, and more rows than the grid; empty both ways
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (5, 9), (13, 31), (3, 520), (300, 8), (0, 8), (4, 0), (1, 1, 7), (2, 13, 49), (40, 3, 2), (0, 8, 4)],
)
def test_compiled_cuda_odd_shapes(library, shape):
    x, u, du, sigma = tensors(*shape)
    check(library, "fast", x, u, du, sigma)
    check(library, "fast", x, u, None, sigma)


@pytest.mark.parametrize("shape", [(6, 24), (2, 16, 8)], ids=["rows", "channels"])
@pytest.mark.parametrize(
    "window",
    [{"row0": 5}, {"row0": 2**33 - 3}, {"row0": 2**32 - 2}, {"col0": 8}, {"col0": 3, "row0": 2**40}, {"sample": 7}],
)
def test_compiled_cuda_windows(library, shape, window):
    x, u, du, sigma = tensors(*shape)
    check(library, "exact", x, u, du, sigma, **window)


@pytest.mark.parametrize("shape", [(6, 24), (2, 16, 8)], ids=["rows", "channels"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_compiled_cuda_means_samples_and_scales(library, shape, dtype):
    x, u, du, sigma = tensors(*shape, dtypes=(dtype,) * 3)
    check(library, "fast", x, u, du, sigma, num_samples=3, sample=2)
    check(library, "fast", x, u, du, sigma.log(), log_variance=True, factor=0.5)
    check(library, "fast", x, u, du, sigma.double(), factor=0.25)


def test_compiled_cuda_strides(library):
    x, u, du, sigma = tensors(9, 32, dtypes=(BF16,) * 3)
    wide = torch.randn(9, 80).bfloat16()
    check(library, "fast", wide[:, :32], u, wide[:, 40:72], sigma)  # aligned slices
    check(library, "fast", wide[:, 3:35], u, wide[:, 8:40], sigma)  # x on no boundary
    check(library, "fast", x, torch.empty(9, 44, dtype=BF16)[:, :32], du, sigma)  # rows of u 8 bytes off a boundary
    check(library, "fast", x, u, torch.ones(1, 32).bfloat16().expand(9, 32), sigma)  # stride 0: the gradient of a sum
    x, u, du, sigma = tensors(3, 16, 8)
    wide = torch.randn(3, 20, 24)
    check(library, "fast", wide[:, 2:18, 8:16], u, wide[:, :16, 1:9], sigma)
    check(library, "fast", x, u, torch.ones(1, 16, 1).expand(3, 16, 8).contiguous(), sigma)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [(7, 24), (2, 16, 8)], ids=["rows", "channels"])
@pytest.mark.parametrize("misalign", [(1, 0, 0), (0, 2, 0), (0, 0, 4)])
def test_compiled_cuda_unaligned_pointers(library, dtype, shape, misalign):
    x, u, du, sigma = tensors(*shape, dtypes=(dtype,) * 3)
    aligned = check(library, "exact", x, u, du, sigma)
    shifted = check(library, "exact", x, u, du, sigma, misalign=misalign)
    assert torch.equal(aligned[0], shifted[0])
    torch.testing.assert_close(aligned[1], shifted[1])


@pytest.mark.parametrize("shape", [(70, 264), (9, 24, 20)], ids=["rows", "channels"])
def test_compiled_cuda_ignores_the_order_of_blocks(library, shape, monkeypatch):
    x, u, du, sigma = tensors(*shape)
    want = run(library, "fast", x=x, u=u, du=du, sigma=sigma)
    backwards = {"ctas": lambda grid: [(x, y, 0) for y in reversed(range(grid[1])) for x in reversed(range(grid[0]))]}
    for options in (backwards, {"threads": 1}, {**backwards, "threads": 512}):
        monkeypatch.setattr(library, "options", library.options | options)
        got = run(library, "fast", x=x, u=u, du=du, sigma=sigma)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("shape", [(70, 264), (9, 24, 20)], ids=["rows", "channels"])
def test_compiled_cuda_noise_ignores_grid(library, shape):
    x, u, _, sigma = tensors(*shape)
    one, many = (run(library, "fast", x=x, u=u, sigma=sigma, multiprocessors=n)[0] for n in (1, 132))
    assert torch.equal(one, many)


# Grids so small that a thread takes many rows, in pairs and alone, and runs of pixels that wrap to the next image.
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("shape", [(501, 264), (500, 9), (230, 3, 20), (90, 3, 50)])
def test_compiled_cuda_threads_stride_over_rows(library, tier, shape):
    x, u, du, sigma = tensors(*shape)
    for mode in MODES:
        check(library, tier, **take(mode, x, u, du), sigma=sigma, multiprocessors=1)


# From either end and with either end of the sum; two calls, for the tickets that the last block gives back.
@pytest.mark.parametrize("shape", [(501, 264), (230, 3, 20)])
def test_compiled_cuda_forms_give_one_u_and_the_sum(library, shape):
    x, u, du, sigma = tensors(*shape)
    wanted = run(library, "exact", x=x, u=u, sigma=sigma)[0]
    for form in ("exact, from the start", *2 * ("exact, one launch from the end",)):
        assert torch.equal(run(library, form, x=x, u=u, sigma=sigma)[0], wanted)
        for mode in ("Q", "PQ"):
            check(library, form, **take(mode, x, u, du), sigma=sigma, multiprocessors=9)


# More partial rows than the 32 that a block of the second stage reads at a time.
@pytest.mark.parametrize("shape", [(300, 264), (80, 24, 130)], ids=["rows", "channels"])
def test_compiled_cuda_sums_many_partial_rows(library, shape):
    _, _, du, sigma = tensors(*shape)
    check(library, "fast", du=du, sigma=sigma, multiprocessors=132)


@pytest.mark.skipif("portable" not in backends.library().cpu_capabilities, reason="the compiled library is not built")
@pytest.mark.parametrize("shape", [(33, 40), (5, 23), (3, 16, 12)])
def test_compiled_cuda_exact_tier_is_the_cpu_to_the_bit(library, shape):
    with backends.backend("cpu"):
        for kwargs in ({}, {"row0": 2**33 + 1, "col0": 24, "sample": 9}, {"num_samples": 2}):
            want = noise(SEED, shape, Draw(1, *where(kwargs, 1)[1:5]))
            got, _ = run(library, "exact", u=torch.empty(shape), **kwargs)
            assert torch.equal(got, want)
        for dtype in (F32, F16, BF16):
            x, u, _, sigma = tensors(*shape, dtypes=(dtype,) * 3)
            got, _ = run(library, "exact", x=x, u=u, sigma=sigma)
            assert torch.equal(got, perturb(x, sigma, SEED, Draw(1), None))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("shape", [(6, 16), (2, 8, 8)], ids=["rows", "channels"])
def test_compiled_cuda_passes_on_what_is_no_ordinary_number(library, tier, shape):
    x, u, du, _ = tensors(*shape)
    x[0, 0], x[0, 1], x[1, 0], x[1, 1] = float("nan"), float("inf"), -float("inf"), 1e-40
    subnormal = torch.full((shape[1],), 1e-40)
    got = run(library, tier, x=x, u=u, sigma=subnormal)[0]
    assert torch.equal(got[0, 0].isnan(), x[0, 0].isnan()) and torch.equal(
        got[1], x[1].where(x[1].abs() > 1e-30, got[1])
    )
    assert ((got - x).abs()[x.isfinite()] <= 6e-40).all() and (got != 0).any()
    huge = torch.full((shape[1],), 1e38)
    got = run(library, tier, x=torch.zeros_like(x), u=u, sigma=huge)[0]
    want = reference.perturb(torch.zeros_like(x), huge, SEED, *where({}, 1), torch.float64)
    finite = want.abs() < 3e38
    assert torch.allclose(got.double()[finite], want[finite], rtol=0, atol=4e-6 * 1e38)
    assert got[want.abs() > 3.5e38].isinf().all()
    logs = torch.tensor([-1e4, -200.0, -170.0, 0.0, 170.0, 200.0, float("inf"), float("-inf")])
    logs = logs.repeat(shape[1] // 8)
    got = run(library, tier, x=torch.zeros_like(x), u=u, sigma=logs, log_variance=True)[0].movedim(1, -1)
    assert not got.isnan().any() and (got[..., [0, 7]] == 0).all() and got[..., [5, 6]].isinf().all()
    z = run(library, tier, u=u)[0].movedim(1, -1)
    for column in (1, 2, 3, 4):
        want = torch.exp(logs[column].double() / 2) * z[..., column].double()
        assert torch.allclose(got[..., column].double(), want, rtol=2e-6, atol=6e-45)  # s is a few quanta
    first = du.view(*shape[:2], -1)[0, :, 0]
    first[0], first[1] = float("nan"), float("inf")
    sums = run(library, tier, du=du, sigma=subnormal)[1]
    assert sums[0].isnan() and sums[1].isinf() and sums[2:].isfinite().all()


def test_compiled_cuda_reports_what_is_missing(library):
    """An old driver and an old GPU: one clear line each."""
    problem = library.load(3).stub_problem
    old_driver, no_image, other, fine = (problem(error) for error in (35, 209, 9, 0))
    assert b"driver offers CUDA 12.4" in old_driver and b"13.0" in old_driver
    assert b"8.0" in no_image and b"7.7" in no_image
    assert b"cudaErrorStub" in other and fine is None


def test_every_compiled_cuda_kernel_ran(library):
    """Last: of all that the file launched."""
    ran = {name for name, *_ in library.launches}
    if len(library.launches) > 300:  # the whole file ran
        assert ran == set(library.module.kernels)


# ---- beyond 2^31 elements


def last(grid):
    """The last column of blocks, and of it those that may meet the last rows"""
    return [(grid[0] - 1, y, grid[2] - 1) for y in range(max(0, grid[1] - 4), grid[1])]


@pytest.mark.slow
@pytest.mark.parametrize("inner", [1, 800000])
def test_compiled_cuda_beyond_two_to_the_31_elements(folder, inner):
    """The last blocks of the launch that a GPU would get, on memory that is only reserved."""
    from ptx_triton_support import bytes_at

    library = _built(folder, 80)
    outer, features = (70001, 40000) if inner == 1 else (3, 1000)
    shape = (outer, features) if inner == 1 else (outer, features, inner)
    x, u = torch.empty(shape, dtype=BF16), torch.empty(shape, dtype=BF16)
    a, memory, sigma = PerturbArgs(), ptx.Memory(), torch.ones(features)
    a.outer, a.features, a.inner, a.num_samples, a.factor = outer, features, inner, 1, 1.0
    a.seed, a.sigma = memory.add(SEED.numpy()), memory.add(sigma.numpy())
    for name, t in (("x", x), ("u", u)):
        address = memory.add(bytes_at(t.data_ptr(), t.data_ptr() + t.nbytes))
        setattr(a, name, Operand(address, 3, t.stride(0), t.stride(1)))
    before, library.options = library.options, {"ctas": last}
    try:
        library.call(a, "exact", memory, 3000)  # so many multiprocessors that a thread has few rows
    finally:
        library.options = before
    written = u[:, -8:].ne(0).any(1).nonzero()
    assert np.prod(shape) > 2**31 and written[-1][0] == outer - 1
    for at in written[-3:].tolist():
        row = at[0] * inner + (at[1] if inner > 1 else 0)
        got = u[at[0], -8:] if inner == 1 else u[at[0], -8:, at[1]]
        want = reference.standard_normal(SEED, 1, 8, row, features - 8)[0]
        assert ((got.double() - want).abs() - 2.0**-8 * want.abs()).max() <= 4e-6
