"""csrc/cuda/perturb.cu as nvcc compiled it, host and device code, executed by tests/ptx against the
float64 reference, without a GPU.

Every access is checked against the exact extent of its tensor, outputs start as NaN, and what an
approximate instruction returns is as far off as the PTX manual allows.
"""

import functools
import random

import ptx
import pytest
import torch
from cuda_support import check_last_rows
from program_support import needs
from ptx_cuda_host import build
from ptx_cuda_support import DTYPES, Library, Operand, PerturbArgs
from source_support import module_at

from dipkernels import backends, library
from dipkernels.ops.draw import Draw
from dipkernels.ops.perturb import noise, perturb

reference = module_at("dipkernels/reference.py")
pytestmark = needs("nvcc", "g++")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


SEED = torch.tensor([0x0123456789ABCDEF, 5])
HAS_CPU = "portable" in library.load().cpu_capabilities
F32, F64, F16, BF16 = DTYPES
# (architecture, which errors approximate instructions make: docs/reliability.md)
CONFIGS = [(80, 1), *(slow(config) for config in ((90, 2), (120, 3), (80, 0)))]


@functools.cache
def _built(folder, arch):
    build(folder / str(arch), arch)
    return Library(folder / str(arch))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cuda")


@pytest.fixture(
    scope="session", params=CONFIGS, ids=lambda config: f"sm_{config[0]}-errors{config[1]}"
)
def library(request, folder):
    arch, errors = request.param
    library = _built(folder, arch)
    library.options = {"errors": errors}
    return library


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def run(library, **kwargs):
    return library.perturb(seed=SEED, **kwargs)


def where(kwargs, dim):
    given = {"row0": 0, "col0": 0, "sample": 0, "factor": 1.0, "log_variance": False}
    return dim, *(kwargs.get(name, value) for name, value in given.items())


def check(library, x=None, u=None, du=None, sigma=None, **kwargs):
    """Against the float64 reference, and u against the CPU's kernels: to the bit."""
    got_u, got_dsigma = run(library, x=x, u=u, du=du, sigma=sigma, **kwargs)
    spread = torch.exp(sigma.double() / 2) if kwargs.get("log_variance") else sigma.double()
    scale = 4e-6 * kwargs.get("factor", 1.0) * spread.max().item() if sigma.numel() else 0.0
    if u is not None:
        want = reference.perturb(x, sigma, SEED, *where(kwargs, 1), torch.float64)
        eps = torch.finfo(u.dtype).eps if u.dtype is not torch.float64 else 0.0
        error = (got_u.double() - want).abs() - eps * want.abs() - 1e-7
        assert not got_u.isnan().any() and (error <= scale).all(), (got_u, want)
        # the C library's exp rounds otherwise than CUDA's
        if HAS_CPU and not kwargs.get("log_variance"):
            with backends.backend("cpu"):
                assert torch.equal(got_u, perturb(x, sigma, SEED, Draw(*where(kwargs, 1)), u.dtype))
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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "dtypes",
    [*((d,) * 3 for d in DTYPES), (F32, BF16, BF16), (F32, F16, F16), (F64, F32, F16)],
)
@pytest.mark.parametrize("shape", [(19, 40), (3, 16, 12)], ids=["rows", "channels"])
def test_compiled_cuda_matches_reference(library, mode, dtypes, shape):
    x, u, du, sigma = tensors(*shape, dtypes=dtypes)
    check(library, **take(mode, x, u, du), sigma=sigma)


# one element; one past a group; a prime; more columns than a block has, and more rows than the
# grid; empty both ways
@pytest.mark.parametrize(
    "shape",
    [
        *((1, 1), (5, 9), (13, 31), (3, 520), (300, 8), (0, 8), (4, 0)),
        *((1, 1, 7), (2, 13, 49), (40, 3, 2), (0, 8, 4)),
    ],
)
def test_compiled_cuda_odd_shapes(library, shape):
    x, u, du, sigma = tensors(*shape)
    check(library, x, u, du, sigma)
    check(library, x, u, None, sigma)


@pytest.mark.parametrize("shape", [(6, 24), (2, 16, 8)], ids=["rows", "channels"])
@pytest.mark.parametrize(
    "window",
    [
        {"row0": 5},
        {"row0": 2**33 - 3},
        {"row0": 2**32 - 2},
        {"col0": 8},
        {"col0": 3, "row0": 2**40},
        {"sample": 7},
    ],
)
def test_compiled_cuda_windows(library, shape, window):
    x, u, du, sigma = tensors(*shape)
    check(library, x, u, du, sigma, **window)


@pytest.mark.parametrize("shape", [(6, 24), (2, 16, 8)], ids=["rows", "channels"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_compiled_cuda_samples_and_scales(library, shape, dtype):
    x, u, du, sigma = tensors(*shape, dtypes=(dtype,) * 3)
    check(library, x, u, du, sigma, sample=2)
    check(library, x, u, du, sigma.log(), log_variance=True, factor=0.5)
    check(library, x, u, du, sigma.double(), factor=0.3)


def test_compiled_cuda_strides(library):
    x, u, du, sigma = tensors(9, 32, dtypes=(BF16,) * 3)
    wide = torch.randn(9, 80).bfloat16()
    check(library, wide[:, :32], u, wide[:, 40:72], sigma)  # aligned slices
    check(library, wide[:, 3:35], u, wide[:, 8:40], sigma)  # x on no boundary
    # rows of u 8 bytes off a boundary
    check(library, x, torch.empty(9, 44, dtype=BF16)[:, :32], du, sigma)
    # stride 0: the gradient of a sum
    check(library, x, u, torch.ones(1, 32).bfloat16().expand(9, 32), sigma)
    x, u, du, sigma = tensors(3, 16, 8)
    wide = torch.randn(3, 20, 24)
    check(library, wide[:, 2:18, 8:16], u, wide[:, :16, 1:9], sigma)
    check(library, x, u, torch.ones(1, 16, 1).expand(3, 16, 8).contiguous(), sigma)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [(7, 24), (2, 16, 8)], ids=["rows", "channels"])
@pytest.mark.parametrize("misalign", [(1, 0, 0), (0, 2, 0), (0, 0, 4)])
def test_compiled_cuda_unaligned_pointers(library, dtype, shape, misalign):
    x, u, du, sigma = tensors(*shape, dtypes=(dtype,) * 3)
    aligned = check(library, x, u, du, sigma)
    shifted = check(library, x, u, du, sigma, misalign=misalign)
    assert torch.equal(aligned[0], shifted[0])
    torch.testing.assert_close(aligned[1], shifted[1])


@pytest.mark.parametrize("shape", [(70, 264), (9, 24, 20)], ids=["rows", "channels"])
def test_compiled_cuda_ignores_the_order_of_blocks(library, shape, monkeypatch):
    x, u, du, sigma = tensors(*shape)
    want = run(library, x=x, u=u, du=du, sigma=sigma)
    backwards = {
        "ctas": lambda grid: [
            (x, y, 0) for y in reversed(range(grid[1])) for x in reversed(range(grid[0]))
        ]
    }
    for options in (backwards, {"threads": 1}, {**backwards, "threads": 512}):
        monkeypatch.setattr(library, "options", library.options | options)
        got = run(library, x=x, u=u, du=du, sigma=sigma)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("shape", [(70, 264), (9, 24, 20)], ids=["rows", "channels"])
def test_compiled_cuda_noise_ignores_grid(library, shape):
    x, u, _, sigma = tensors(*shape)
    one, many = (run(library, x=x, u=u, sigma=sigma, multiprocessors=n)[0] for n in (1, 132))
    assert torch.equal(one, many)


# Grids so small that a thread takes many rows, in pairs and alone, and runs of pixels that wrap to
# the next image.
@pytest.mark.parametrize("shape", [(501, 264), (500, 9), (230, 3, 20), (90, 3, 50)])
def test_compiled_cuda_threads_stride_over_rows(library, shape):
    x, u, du, sigma = tensors(*shape)
    for mode in MODES:
        check(library, **take(mode, x, u, du), sigma=sigma, multiprocessors=1)


# More partial rows than the 32 that a block of the second stage reads at a time.
@pytest.mark.parametrize("shape", [(300, 264), (80, 24, 130)], ids=["rows", "channels"])
def test_compiled_cuda_sums_many_partial_rows(library, shape):
    _, _, du, sigma = tensors(*shape)
    check(library, du=du, sigma=sigma, multiprocessors=132)


# ---- forms: the walk over the rows, and where the sum ends


def quick_of(every, quick):
    return [shape if shape in quick else slow(shape) for shape in every]


# One element; one column of blocks; several, of which the last is part; many rows; images
FORM_SHAPES = quick_of(
    [(1, 1), (301, 8), (70, 264), (13, 31), (40, 3, 14), (9, 24, 20), (5, 130, 6)],
    [(13, 31), (9, 24, 20)],
)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", FORM_SHAPES)
def test_compiled_cuda_rows_from_the_end_change_no_u(library, shape, dtype):
    x, u, du, sigma = tensors(*shape, dtypes=(dtype,) * 3)
    for given in ({}, {"x": x, "sigma": sigma}, {"x": x, "sigma": sigma, "du": du, "col0": 3}):
        for place in ({"row0": 2**32 - 2}, {"sample": 2}):
            walks = ("from the start", "from the end")
            there, back = (run(library, u=u, **given, **place, form=form)[0] for form in walks)
            assert torch.equal(there, back)


@pytest.mark.parametrize("shape", [(70, 264), (3, 16, 300)], ids=["rows", "channels"])
@pytest.mark.parametrize(
    "mode, forms", [("P", ["default", "from the end"]), ("PQ", ["from the end"])]
)
def test_compiled_cuda_walks_start_where_the_form_says(library, shape, mode, forms, monkeypatch):
    """The first block alone writes the first row, or the last one."""
    x, u, du, sigma = tensors(*shape)
    monkeypatch.setattr(library, "options", library.options | {"ctas": lambda grid: [(0, 0, 0)]})
    for form in ("from the start", *forms):
        got, _ = run(library, **take(mode, x, u, du), sigma=sigma, form=form, multiprocessors=1000)
        written = got.movedim(1, -1)[..., 0].flatten().isfinite()
        assert written[-1 if form in forms else 0] and not written[0 if form in forms else -1]


@pytest.mark.parametrize("form", ["from the end", "one launch", "one launch from the end"])
@pytest.mark.parametrize(
    "shape", [*FORM_SHAPES, *quick_of([(0, 8), (4, 0), (0, 8, 4), (3, 520)], [(0, 8)])]
)
def test_compiled_cuda_sums_in_every_form_match_reference(library, shape, form):
    x, u, du, sigma = tensors(*shape)
    how = {"log_variance": True, "factor": 0.5, "form": form, "multiprocessors": 20}
    for mode in ("Q", "PQ"):
        check(library, **take(mode, x, u, du), sigma=sigma.log(), **how)
    check(library, du=du.double(), sigma=sigma.double(), col0=5, form=form)


def launches_of(library, **given):
    """What run gives, and how many kernels that took"""
    before = len(library.launches)
    return *run(library, **given), len(library.launches) - before


def without_tickets(library, **given):
    """The same where more streams than have tickets called before"""
    host, library.host, library.refuse = library.host, 1, lambda name: 1
    try:
        for stream in range(100, 356):
            with pytest.raises(RuntimeError, match="launch was refused"):
                run(library, **given, stream=stream)
        library.refuse = lambda name: 0
        return launches_of(library, **given, stream=99)
    finally:
        library.host, library.refuse = host, lambda name: 0


# Grids of several rows of blocks, which arrive one by one and together.
@pytest.mark.parametrize(
    "shape, mode, dtype",
    [((1500, 8), "Q", BF16), ((300, 70), "PQ", F32), slow((3, 16, 900), "Q", F64)],
)
def test_compiled_cuda_sum_in_one_launch_ignores_which_block_is_last(
    library, shape, mode, dtype, monkeypatch
):
    x, u, du, sigma = tensors(*shape, dtypes=(dtype,) * 3)
    given = {**take(mode, x, u, du), "sigma": sigma, "form": "one launch", "multiprocessors": 8}
    _, want, count = without_tickets(library, **given)  # a second launch adds the same partials up
    assert count == 2

    def arriving(order):
        def blocks(grid):
            every = [(x, y, 0) for y in range(grid[1]) for x in range(grid[0])]
            assert grid[1] > 2
            return order(every)

        return {"ctas": blocks}

    shuffles = (functools.partial(_shuffled, seed=i) for i in range(2))
    orders = [list, lambda every: every[::-1], *shuffles]
    for options in ({}, *({**arriving(order), "threads": 1} for order in orders)):
        with monkeypatch.context() as patch:
            patch.setattr(library, "options", library.options | options)
            _, got, count = launches_of(library, **given)
        assert count == 1 and torch.equal(got, want)
    assert not library.module.variables.any()  # every ticket is zero again


def _shuffled(every, seed):
    return random.Random(seed).sample(every, len(every))


@pytest.mark.parametrize("capturing", [False, True])
@pytest.mark.parametrize("shape, mode", [((1500, 8), "Q"), slow((3, 16, 900), "PQ")])
def test_compiled_cuda_streams_do_not_share_tickets(library, shape, mode, capturing, monkeypatch):
    """The blocks of three streams' launches, interleaved; of captured launches too, which may be
    replayed side by side."""
    x, u, du, sigma = tensors(*shape)
    given = {**take(mode, x, u, du), "sigma": sigma, "form": "one launch", "multiprocessors": 8}
    want = run(library, **given)
    monkeypatch.setattr(library, "queue", [])
    streams = (1, 1, 1) if capturing else (11, 12, 13)
    results = [run(library, **given, stream=stream, capturing=capturing) for stream in streams]
    assert len(library.queue) == 3  # one launch each
    blocks = [
        (i, (x, y, 0))
        for i, (_, g, _) in enumerate(library.queue)
        for y in range(g[1])
        for x in range(g[0])
    ]
    for i, block in _shuffled(blocks, seed=1):
        library.queue[i][2]([block])
    for got in results:
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not library.module.variables.any()


def test_compiled_cuda_sum_of_one_row_of_blocks_takes_one_launch(library):
    """In any form: the block waits for no other."""
    for shape in ((8, 264), (2, 24, 20)):
        _, _, du, sigma = tensors(*shape)
        count = 3 if len(shape) == 2 else 1
        assert launches_of(library, du=du, sigma=sigma, multiprocessors=count)[2] == 1


def _sum_in_order(terms, threads, blocks, lanes, from_end):
    """dsigma as docs/maths.md, section 5, has it added up on CUDA; terms [M, K] in float32."""
    rows, k = terms.shape
    order = torch.arange(rows).flip(0) if from_end else torch.arange(rows)
    sums = torch.zeros(blocks * threads, k)
    for place, row in enumerate(order.tolist()):
        sums[place % len(sums)] += terms[row]
    sums = sums.view(blocks, threads, k)
    while (half := sums.shape[1] // 2) > 0:
        sums = sums[:, :half] + sums[:, half:]
    total = torch.zeros(k, dtype=F64)
    for lane in range(lanes):
        part = torch.zeros(k, dtype=F64)
        for partial in sums[lane::lanes, 0]:
            part += partial
        total += part
    return total.float()


# threads: of a block along rows; blocks: along rows; lanes: that add the partials up.
@pytest.mark.parametrize(
    "form, threads, blocks, lanes",
    [
        ("default", 8, 30, 32),
        ("from the end", 8, 30, 32),
        ("one launch", 32, 10, 4),
        ("one launch from the end", 32, 10, 4),
    ],
)
def test_compiled_cuda_sums_in_the_stated_order(library, form, threads, blocks, lanes):
    z, _ = run(library, u=torch.empty(300, 264))
    # so that du z is exact
    du = 2.0 ** torch.randint(-8, 8, z.shape, generator=torch.Generator().manual_seed(1))
    _, got = run(library, du=du, sigma=torch.ones(264), form=form, multiprocessors=20)
    from_end = form.endswith("from the end")
    assert torch.equal(got, _sum_in_order(du * z, threads, blocks, lanes, from_end))
    assert not torch.equal(got, _sum_in_order(du * z, threads, blocks, lanes, not from_end))


# ---- bits, numbers out of the ordinary, errors


@pytest.mark.skipif(not HAS_CPU, reason="the compiled library is not built")
@pytest.mark.parametrize("shape", [(33, 40), (5, 23), (3, 16, 12)])
def test_compiled_cuda_noise_is_the_cpu_to_the_bit(library, shape):
    with backends.backend("cpu"):
        for kwargs in ({}, {"row0": 2**33 + 1, "col0": 24, "sample": 9}):
            want = noise(SEED, shape, Draw(*where(kwargs, 1)))
            assert torch.equal(run(library, u=torch.empty(shape), **kwargs)[0], want)


@pytest.mark.parametrize("shape", [(6, 16), (2, 8, 8)], ids=["rows", "channels"])
def test_compiled_cuda_passes_on_what_is_no_ordinary_number(library, shape):
    x, u, du, _ = tensors(*shape)
    x[0, 0], x[0, 1], x[1, 0], x[1, 1] = float("nan"), float("inf"), -float("inf"), 1e-40
    subnormal = torch.full((shape[1],), 1e-40)
    got = run(library, x=x, u=u, sigma=subnormal)[0]
    assert torch.equal(got[0, 0].isnan(), x[0, 0].isnan())
    assert torch.equal(got[1], x[1].where(x[1].abs() > 1e-30, got[1]))
    assert ((got - x).abs()[x.isfinite()] <= 6e-40).all() and (got != 0).any()
    huge = torch.full((shape[1],), 1e38)
    got = run(library, x=torch.zeros_like(x), u=u, sigma=huge)[0]
    want = reference.perturb(torch.zeros_like(x), huge, SEED, *where({}, 1), torch.float64)
    finite = want.abs() < 3e38
    assert torch.allclose(got.double()[finite], want[finite], rtol=0, atol=4e-6 * 1e38)
    assert got[want.abs() > 3.5e38].isinf().all()
    logs = torch.tensor([-1e4, -200.0, -170.0, 0.0, 170.0, 200.0, float("inf"), float("-inf")])
    logs = logs.repeat(shape[1] // 8)
    got = run(library, x=torch.zeros_like(x), u=u, sigma=logs, log_variance=True)[0].movedim(1, -1)
    assert not got.isnan().any()
    assert (got[..., [0, 7]] == 0).all() and got[..., [5, 6]].isinf().all()
    z = run(library, u=u)[0].movedim(1, -1)
    for column in (1, 2, 3, 4):
        want = torch.exp(logs[column].double() / 2) * z[..., column].double()
        # s is a few quanta
        assert torch.allclose(got[..., column].double(), want, rtol=2e-6, atol=6e-45)
    first = du.view(*shape[:2], -1)[0, :, 0]
    first[0], first[1] = float("nan"), float("inf")
    sums = run(library, du=du, sigma=subnormal)[1]
    assert sums[0].isnan() and sums[1].isinf() and sums[2:].isfinite().all()


@pytest.mark.parametrize("kernel", ["perturb_rows", "perturb_channels", "column_sum"])
def test_compiled_cuda_reports_a_refused_launch_and_goes_on(library, kernel, monkeypatch):
    x, u, du, sigma = tensors(*((70, 264) if kernel != "perturb_channels" else (9, 24, 20)))
    with (
        monkeypatch.context() as patch,
        pytest.raises(RuntimeError, match="CUDA error cudaErrorStub: a launch was refused"),
    ):
        patch.setattr(library, "refuse", lambda name: 9 if kernel in name else 0)
        run(library, du=du, sigma=sigma)
    check(library, x, u, du, sigma)


def test_every_compiled_cuda_kernel_ran(library):
    """Last: of all that the file launched."""
    ran = {name for name, *_ in library.launches}
    if len(library.launches) > 300:  # the whole file ran
        assert ran == set(library.module.kernels)


# ---- beyond 2^31 elements


def last(grid):
    """The last column of blocks, and of it those that take the last rows, where the walk begins"""
    return [(grid[0] - 1, y, grid[2] - 1) for y in range(min(4, grid[1]))]


@pytest.mark.slow
@pytest.mark.parametrize("inner", [1, 800000])
def test_compiled_cuda_beyond_two_to_the_31_elements(folder, inner):
    """The last blocks of the launch that a GPU would get, on memory that is only reserved."""
    library = _built(folder, 80)
    outer, features = (70001, 40000) if inner == 1 else (3, 1000)
    shape = (outer, features) if inner == 1 else (outer, features, inner)
    x, u = torch.empty(shape, dtype=BF16), torch.empty(shape, dtype=BF16)
    a, memory, sigma = PerturbArgs(), ptx.Memory(), torch.ones(features)
    a.outer, a.features, a.inner, a.draw.factor = outer, features, inner, 1.0
    a.draw.seed, a.draw.sigma = memory.add(SEED.numpy()), memory.add(sigma.numpy())
    for name, t in (("x", x), ("u", u)):
        address = memory.add(t.view(torch.int16).numpy())
        setattr(a, name, Operand(address, 3, t.stride(0), t.stride(1)))
    before, library.options = library.options, {"ctas": last}
    try:
        # so many multiprocessors that a thread has few rows
        library.call(a, "default", memory, 3000)
    finally:
        library.options = before
    check_last_rows(u, SEED, features - 8, reference.standard_normal)
