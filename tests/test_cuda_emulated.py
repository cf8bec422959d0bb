"""csrc/cuda/perturb.cu compiled by g++ under tests/cuda_emulator and run against the float64 reference, without a GPU.

Every access is checked against the exact extent of its tensor (address and alignment sanitizers), outputs start as NaN,
and the order in which a block's threads run is varied.
"""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from dipkernels import backends, reference
from dipkernels.ops.draw import Draw
from dipkernels.ops.perturb import noise, perturb

FOLDER = Path(__file__).parent / "cuda_emulator"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # as in launch.h
SEED = torch.tensor([0x0123456789ABCDEF, 5])
TIERS = {"fast": 0, "exact": 1}
FORWARD, BACKWARD, SHUFFLED = range(3)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    program = tmp_path_factory.mktemp("emulator") / "run_perturb"
    fma = ["-mfma"] if "fma" in Path("/proc/cpuinfo").read_text().split() else []
    flags = [
        "-std=c++20",
        "-O0",
        "-ffp-contract=off",
        *fma,
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
    ]
    command = ["g++", *flags, "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DDIP_EMULATOR", f"-I{FOLDER}"]
    result = subprocess.run(
        [*command, str(FOLDER / "run_perturb.cpp"), "-o", str(program)], capture_output=True, text=True
    )
    if "cannot find" in result.stderr and "san" in result.stderr:
        pytest.skip("needs g++'s address and undefined-behaviour sanitizers")
    assert result.returncode == 0, result.stderr
    return program


def _span(t):
    """The memory that t covers, gaps included, as one dimension."""
    return (
        torch.as_strided(t, (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride()) if n),), (1,))
        if t.numel()
        else t.flatten()
    )


def _raw(t):
    return _span(t).contiguous().view(torch.uint8).numpy().tobytes()


def run(emulator, tier, *, x=None, u=None, du=None, sigma=None, row0=0, col0=0, sample=0, num_samples=1, factor=1.0,
        log_variance=False, order=FORWARD, multiprocessors=3, misalign=(0, 0, 0), forms=1, streams=1, capture=0,
        said=None):  # fmt: skip
    """(u, dsigma), each None where not asked for. `u` gives the output's dtype, shape and strides.

    [M, K] is the rows layout, [B, C, inner] the channels one. said: a list that gets how many kernels were launched, and
    the offset in bytes of the first element read. forms, streams, capture: as in run_perturb.cpp.
    """
    like = next(t for t in (u, du) if t is not None)
    outer, features, inner = (like.shape[0], like.shape[1], 1) if like.dim() == 2 else like.shape
    header = [outer, features, inner, row0, col0, sample, num_samples]
    header += [
        -1 if sigma is None else DTYPES.index(sigma.dtype),
        int(log_variance),
        TIERS[tier],
        order,
        multiprocessors,
        forms,
        streams,
        capture,
    ]
    packed = struct.pack("15q", *header) + struct.pack("d", factor) + struct.pack("2q", *SEED.tolist())
    for t, shift in zip((x, u, du), misalign, strict=True):
        if t is None:
            packed += struct.pack("5q", -1, 0, 0, 0, 0)
            continue
        size = _span(t).numel() * t.element_size()
        packed += struct.pack("5q", DTYPES.index(t.dtype), t.stride(0), t.stride(1), size, shift * t.element_size())
    data = packed + b"".join(_raw(t) for t in (x, du, sigma) if t is not None)
    result = subprocess.run([str(emulator)], input=data, capture_output=True)
    assert result.returncode == 0, result.stderr.decode()[-3000:]
    out = bytearray(result.stdout[:-16])
    if said is not None:
        said += struct.unpack("2q", result.stdout[-16:])
    dsigma = None
    if du is not None and sigma is not None:
        n = sigma.numel() * sigma.element_size()
        dsigma = torch.frombuffer(out[len(out) - n :], dtype=sigma.dtype) if n else sigma.clone()
        out = out[: len(out) - n]
    if u is None:
        assert not out
        return None, dsigma
    memory = torch.frombuffer(out, dtype=u.dtype) if out else torch.empty(0, dtype=u.dtype)
    written = torch.as_strided(memory, u.shape, u.stride()) if u.numel() else u
    gaps = torch.ones(memory.shape, dtype=torch.bool)
    if u.numel():
        torch.as_strided(gaps, u.shape, u.stride()).fill_(False)
    assert memory[gaps].isnan().all(), "an element between two rows was written"
    return written, dsigma


def where(kwargs, dim):
    return (dim, kwargs.get("row0", 0), kwargs.get("col0", 0), kwargs.get("sample", 0), kwargs.get("num_samples", 1),
            kwargs.get("factor", 1.0), kwargs.get("log_variance", False))  # fmt: skip


def check(emulator, tier, x=None, u=None, du=None, sigma=None, **kwargs):
    got_u, got_dsigma = run(emulator, tier, x=x, u=u, du=du, sigma=sigma, **kwargs)
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


F32, F64, F16, BF16 = DTYPES
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
def test_cuda_matches_reference(emulator, tier, mode, dtypes, shape):
    x, u, du, sigma = tensors(*shape, dtypes=dtypes)
    check(emulator, tier, **take(mode, x, u, du), sigma=sigma)


# one element; one past a group; a prime; more columns than a block has, and more rows than the grid; empty both ways
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (5, 9), (13, 31), (3, 520), (300, 8), (0, 8), (4, 0), (1, 1, 7), (2, 13, 49), (40, 3, 2), (0, 8, 4)],
)
def test_cuda_odd_shapes(emulator, shape):
    x, u, du, sigma = tensors(*shape)
    check(emulator, "fast", x, u, du, sigma)
    check(emulator, "fast", x, u, None, sigma)


@pytest.mark.parametrize("shape", [(6, 24), (2, 16, 8)], ids=["rows", "channels"])
@pytest.mark.parametrize(
    "window",
    [{"row0": 5}, {"row0": 2**33 - 3}, {"row0": 2**32 - 2}, {"col0": 8}, {"col0": 3, "row0": 2**40}, {"sample": 7}],
)
def test_cuda_windows(emulator, shape, window):
    x, u, du, sigma = tensors(*shape)
    check(emulator, "exact", x, u, du, sigma, **window)


@pytest.mark.parametrize("shape", [(6, 24), (2, 16, 8)], ids=["rows", "channels"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_cuda_means_samples_and_scales(emulator, shape, dtype):
    x, u, du, sigma = tensors(*shape, dtypes=(dtype,) * 3)
    check(emulator, "fast", x, u, du, sigma, num_samples=3, sample=2)
    check(emulator, "fast", x, u, du, sigma.log(), log_variance=True, factor=0.5)
    check(emulator, "fast", x, u, du, sigma.double(), factor=0.25)


def test_cuda_strides(emulator):
    x, u, du, sigma = tensors(9, 32, dtypes=(BF16,) * 3)
    wide = torch.randn(9, 80).bfloat16()
    check(emulator, "fast", wide[:, :32], u, wide[:, 40:72], sigma)  # aligned slices
    check(emulator, "fast", wide[:, 3:35], u, wide[:, 8:40], sigma)  # x on no boundary
    check(emulator, "fast", x, torch.empty(9, 44, dtype=BF16)[:, :32], du, sigma)  # rows of u 8 bytes off a boundary
    check(emulator, "fast", x, u, torch.ones(1, 32).bfloat16().expand(9, 32), sigma)  # stride 0: the gradient of a sum
    x, u, du, sigma = tensors(3, 16, 8)
    wide = torch.randn(3, 20, 24)
    check(emulator, "fast", wide[:, 2:18, 8:16], u, wide[:, :16, 1:9], sigma)
    check(emulator, "fast", x, u, torch.ones(1, 16, 1).expand(3, 16, 8).contiguous()[:, :, :], sigma)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [(7, 24), (2, 16, 8)], ids=["rows", "channels"])
@pytest.mark.parametrize("misalign", [(1, 0, 0), (0, 2, 0), (0, 0, 4)])
def test_cuda_unaligned_pointers(emulator, dtype, shape, misalign):
    x, u, du, sigma = tensors(*shape, dtypes=(dtype,) * 3)
    aligned = check(emulator, "exact", x, u, du, sigma)
    shifted = check(emulator, "exact", x, u, du, sigma, misalign=misalign)
    assert torch.equal(aligned[0], shifted[0])
    torch.testing.assert_close(aligned[1], shifted[1])


@pytest.mark.parametrize("shape", [(70, 264), (9, 24, 20)], ids=["rows", "channels"])
def test_cuda_sum_ignores_thread_order(emulator, shape):
    """A missing barrier would make the sums depend on which thread runs first."""
    x, u, du, sigma = tensors(*shape)
    results = [
        run(emulator, "fast", x=x, u=u, du=du, sigma=sigma, order=order) for order in (FORWARD, BACKWARD, SHUFFLED)
    ]
    for got in results[1:]:
        assert torch.equal(got[0], results[0][0]) and torch.equal(got[1], results[0][1])


@pytest.mark.parametrize("shape", [(70, 264), (9, 24, 20)], ids=["rows", "channels"])
def test_cuda_noise_ignores_grid(emulator, shape):
    x, u, _, sigma = tensors(*shape)
    one, many = (run(emulator, "fast", x=x, u=u, sigma=sigma, multiprocessors=n)[0] for n in (1, 132))
    assert torch.equal(one, many)


# Grids so small that a thread takes many rows, in pairs and alone, and runs of pixels that wrap to the next image.
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("shape", [(501, 264), (500, 9), (230, 3, 20), (90, 3, 50)])
def test_cuda_threads_stride_over_rows(emulator, tier, shape):
    x, u, du, sigma = tensors(*shape)
    for mode in MODES:
        check(emulator, tier, **take(mode, x, u, du), sigma=sigma, multiprocessors=1)


# More partial rows than the 32 that a block of the second stage reads at a time.
@pytest.mark.parametrize("shape", [(300, 264), (80, 24, 130)], ids=["rows", "channels"])
def test_cuda_sums_many_partial_rows(emulator, shape):
    _, _, du, sigma = tensors(*shape)
    check(emulator, "fast", du=du, sigma=sigma, multiprocessors=132)


# ---- forms: the walk over the rows, and where the sum ends; bits of `forms` as in csrc/ops.cpp ---------------------------

P_FROM_END, SUMS_FROM_END, ONE_LAUNCH = 1, 2, 4
# (M, K) and (B, C, inner): one element; one column of blocks; several, of which the last is part; many rows; images
FORM_SHAPES = [(1, 1), (301, 8), (70, 264), (13, 31), (40, 3, 14), (9, 24, 20), (5, 130, 6)]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", FORM_SHAPES)
def test_cuda_rows_from_the_end_change_no_u(emulator, shape, dtype):
    x, u, du, sigma = tensors(*shape, dtypes=(dtype,) * 3)
    for given in (
        {},
        {"x": x, "sigma": sigma},
        {"x": x, "sigma": sigma, "du": du},
        {"x": x, "sigma": sigma, "col0": 3},
    ):
        for where in ({"row0": 2**32 - 2}, {"num_samples": 2}):
            there, back = (run(emulator, "fast", u=u, **given, **where, forms=forms)[0] for forms in (0, 3))
            assert torch.equal(there, back)


# The first element that the first thread reads: of the last row, or of the last run of four pixels.
@pytest.mark.parametrize("shape, last", [((70, 264), 69 * 264), ((3, 16, 12), 2 * 16 * 12 + 8)])
def test_cuda_walks_start_where_the_form_says(emulator, shape, last):
    x, u, du, sigma = tensors(*shape)
    walks = {"P": [0, last, 0, last], "Q": [0, 0, last, last], "PQ": [0, 0, last, last]}
    for mode, starts in walks.items():
        found = []
        for forms in range(4):
            run(emulator, "fast", **take(mode, x, u, du), sigma=sigma, forms=forms, said=(said := []))
            found.append(said[1])
        pixels = 2 if mode == "PQ" and len(shape) == 3 and last else 0  # its runs are half as long
        assert found == [4 * (at + pixels if at else 0) for at in starts], mode


@pytest.mark.parametrize("forms", [SUMS_FROM_END, ONE_LAUNCH, 7])
@pytest.mark.parametrize("shape", [*FORM_SHAPES, (0, 8), (4, 0), (0, 8, 4), (3, 520)])
def test_cuda_sums_in_every_form_match_reference(emulator, shape, forms):
    x, u, du, sigma = tensors(*shape)
    for mode in ("Q", "PQ"):
        check(emulator, "fast", **take(mode, x, u, du), sigma=sigma.log(), log_variance=True, factor=0.5, forms=forms,
              multiprocessors=20)  # fmt: skip
    check(emulator, "fast", du=du.double(), sigma=sigma.double(), col0=5, forms=forms)


# Grids of several rows of blocks, which arrive forward, backward and shuffled.
@pytest.mark.parametrize(
    "shape, mode, dtype",
    [((301, 8), "Q", BF16), ((300, 70), "PQ", F32), ((3, 16, 100), "Q", F64)],
)
def test_cuda_sum_in_one_launch_ignores_which_block_is_last(emulator, shape, mode, dtype):
    x, u, du, sigma = tensors(*shape, dtypes=(dtype,) * 3)

    def sums(launches, **kwargs):
        said = []
        given = {**take(mode, x, u, du), "sigma": sigma, "forms": ONE_LAUNCH, "multiprocessors": 8}
        _, dsigma = run(emulator, "fast", **given, said=said, **kwargs)
        assert said[0] == launches
        return dsigma

    want = sums(2, capture=2)  # no tickets: a second launch adds the same partials up
    for order in (FORWARD, BACKWARD, SHUFFLED, SHUFFLED + 1):
        assert torch.equal(sums(1, order=order), want)
    # Blocks of three streams' launches, interleaved; run_perturb.cpp compares their results.
    for capture in (0, 1):
        assert torch.equal(sums(3, order=SHUFFLED + 2, streams=3, capture=capture), want)


def test_cuda_sum_of_one_row_of_blocks_takes_one_launch(emulator):
    """In any form: the block waits for no other."""
    for shape in ((8, 264), (2, 24, 20)):
        _, _, du, sigma = tensors(*shape)
        run(emulator, "fast", du=du, sigma=sigma, multiprocessors=3 if len(shape) == 2 else 1, said=(said := []))
        assert said[0] == 1


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
    "forms, threads, blocks, lanes",
    [(0, 8, 30, 32), (SUMS_FROM_END, 8, 30, 32), (ONE_LAUNCH, 32, 10, 4), (SUMS_FROM_END | ONE_LAUNCH, 32, 10, 4)],
)
def test_cuda_sums_in_the_stated_order(emulator, forms, threads, blocks, lanes):
    z, _ = run(emulator, "fast", u=torch.empty(300, 264))
    du = 2.0 ** torch.randint(-8, 8, z.shape, generator=torch.Generator().manual_seed(1))  # so that du z is exact
    _, got = run(emulator, "fast", du=du, sigma=torch.ones(264), forms=forms, multiprocessors=20)
    from_end = bool(forms & SUMS_FROM_END)
    assert torch.equal(got, _sum_in_order(du * z, threads, blocks, lanes, from_end))
    assert not torch.equal(got, _sum_in_order(du * z, threads, blocks, lanes, not from_end))


@pytest.mark.skipif("portable" not in backends.library().cpu_capabilities, reason="the compiled library is not built")
@pytest.mark.parametrize("shape", [(33, 40), (5, 23), (3, 16, 12)])
def test_cuda_exact_tier_is_the_cpu_to_the_bit(emulator, shape):
    with backends.backend("cpu"):
        for kwargs in ({}, {"row0": 2**33 + 1, "col0": 24, "sample": 9}, {"num_samples": 2}):
            want = noise(SEED, shape, Draw(1, *where(kwargs, 1)[1:5]))
            got, _ = run(emulator, "exact", u=torch.empty(shape), **kwargs)
            assert torch.equal(got, want)
        for dtype in (F32, F16, BF16):
            x, u, _, sigma = tensors(*shape, dtypes=(dtype,) * 3)
            got, _ = run(emulator, "exact", x=x, u=u, sigma=sigma)
            assert torch.equal(got, perturb(x, sigma, SEED, Draw(1), None))


def test_cuda_reports_what_is_missing(emulator, tmp_path):
    """An old driver and an old GPU: one clear line each. The runtime's errors are emulated."""
    source = tmp_path / "problems.cpp"
    source.write_text(
        f'#include "{FOLDER.parent.parent}/csrc/cuda/perturb.cu"\n'
        "int main() {\n"
        "  for (auto e : {cudaErrorInsufficientDriver, cudaErrorNoKernelImageForDevice,"
        " cudaErrorInvalidConfiguration, cudaSuccess}) {\n"
        '    emulator::next_error = e; const char* p = dip::cuda_problem(); std::printf("%s\\n", p ? p : "none");\n'
        "  }\n}\n"
    )
    binary = tmp_path / "problems"
    build = [
        "g++",
        "-std=c++20",
        "-O0",
        "-DDIP_EMULATOR",
        "-Wno-unknown-pragmas",
        f"-I{FOLDER}",
        str(source),
        "-o",
        str(binary),
    ]
    subprocess.run(build, check=True, capture_output=True)
    driver, image, other, fine = subprocess.run(
        [str(binary)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert "driver offers CUDA 12.4" in driver and "13.0" in driver
    assert "8.0" in image and "7.7" in image
    assert "cudaErrorEmulated" in other and fine == "none"
