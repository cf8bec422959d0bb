"""noise and perturb in Triton's interpreter against the float64 reference; started by
test_triton_interpreter.py."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton_support import load_kernels, load_reference, patch_interpreter

patch_interpreter()
noise, perturb, tiles = load_kernels("noise", "perturb", "tiles")
reference = load_reference()
noise_words, normal_pair, load_seed = noise.noise_words, noise.normal_pair, noise.load_seed

TOLERANCE = 4e-6  # of z, by the contract
KEY = 0x0123456789ABCDEF
# (shape, dim): one column, one group, one past it, a prime, channels first with odd and even sizes,
# one dimension.
SHAPES = [
    ((1, 1), -1),
    ((16, 8), -1),
    ((17, 9), 1),
    ((5, 13), 0),
    ((2, 7, 17), 1),
    ((3, 4, 6, 5), 1),
    ((11,), 0),
]
EMPTY = [((0, 8), -1), ((4, 0), -1), ((3, 0, 2), 2)]


def make_seed(key=KEY, stream=3):
    return torch.tensor([key, stream])


def make(shape, dim, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    x, du = torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype)
    sigma = torch.rand(shape[dim], generator=generator, dtype=torch.float64) + 0.1
    return x, du, sigma.to(torch.float64 if dtype is torch.float64 else torch.float32)


def assert_near(got, want, eager):
    """At most twice the error that the same expression has in plain PyTorch, + 1e-6: the project's
    policy."""
    allowed = 2 * (eager.double() - want.double()).abs().max().item() + 1e-6
    assert (got.double() - want.double()).abs().max().item() <= allowed + TOLERANCE


@triton.jit
def _words_kernel(
    out_ptr,
    seed_ptr,
    row0,
    group0,
    sample,
    R: tl.constexpr,
    G: tl.constexpr,
    ROWS_LAST: tl.constexpr,
):
    key, last_word = load_seed(seed_ptr, sample)
    row = tl.cast(row0, tl.int64) + tl.arange(0, R)
    group = tl.cast(group0, tl.int64) + tl.arange(0, G)
    w0, w1, w2, w3 = noise_words(key, last_word, row, group, ROWS_LAST)
    if ROWS_LAST:  # noqa: SIM108
        off = tl.arange(0, R)[None, :] * G + tl.arange(0, G)[:, None]
    else:
        off = tl.arange(0, R)[:, None] * G + tl.arange(0, G)[None, :]
    tl.store(out_ptr + off * 4, w0.to(tl.int64))
    tl.store(out_ptr + off * 4 + 1, w1.to(tl.int64))
    tl.store(out_ptr + off * 4 + 2, w2.to(tl.int64))
    tl.store(out_ptr + off * 4 + 3, w3.to(tl.int64))


@pytest.mark.parametrize("key, stream", [(KEY, 0), (-1, 2**40 + 65537), (-(2**63), -1)])
@pytest.mark.parametrize("rows_last", [False, True])
def test_noise_words_are_the_contracts_bits(key, stream, rows_last):
    seed, row0, group0, sample = make_seed(key, stream), 2**32 - 2, 5, 7
    out = torch.empty(4, 8, 4, dtype=torch.int64)
    _words_kernel[(1,)](out, seed, row0, group0, sample, R=4, G=8, ROWS_LAST=rows_last)
    assert torch.equal(
        out, reference.words(seed, torch.arange(4) + row0, torch.arange(8) + group0, sample)
    )


@triton.jit
def _pair_kernel(w_ptr, z_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    even, odd = normal_pair(tl.load(w_ptr + at).to(tl.uint32))
    tl.store(z_ptr + 2 * at, even)
    tl.store(z_ptr + 2 * at + 1, odd)


def all_radii_and_angles():
    """2^20 words in which every radius occurs once and every angle 256 times"""
    i = np.arange(2**20, dtype=np.int64)
    return i << 12 | (i * 2654435761 >> 7) % 4096


def test_noise_pairs_are_accurate_for_every_radius():
    w = all_radii_and_angles()
    z = torch.empty(2**20, 2)
    _pair_kernel[(16,)](torch.from_numpy(w), z, BLOCK=2**16)
    radius, angle = (
        np.sqrt(-2 * np.log(((w >> 12) + 0.5) / 2**20)),
        2 * np.pi * ((w & 0xFFF) + 0.5) / 4096,
    )
    want = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    assert np.abs(z.numpy() - want).max() <= TOLERANCE


@pytest.mark.parametrize(
    "sample, row, col, want",
    [
        (
            0,
            5,
            0,
            [
                -0.2667177,
                -0.1194537,
                0.3566937,
                0.9528818,
                -0.6610492,
                0.9043018,
                -1.0313795,
                0.2357624,
            ],
        ),
        (
            2,
            2**33 + 7,
            24,
            [
                0.0830502,
                1.5678196,
                1.3100422,
                0.2470309,
                0.2191672,
                1.1622764,
                0.4230856,
                0.1695719,
            ],
        ),
    ],
)
def test_noise_known_answers(sample, row, col, want):
    z = noise.noise(make_seed(stream=0), (1, 8), -1, row, col, sample)
    assert (z - torch.tensor([want])).abs().max() < 2e-6


@pytest.mark.parametrize("shape, dim", SHAPES + EMPTY)
def test_noise_matches_reference(shape, dim):
    where = (dim, 2**32 - 3, 59, 2)  # rows cross 2^32, columns start inside a group
    z = noise.noise(make_seed(), shape, *where)
    assert z.shape == shape and z.is_contiguous()
    if z.numel() > 0:
        assert torch.allclose(
            z, reference.noise(make_seed(), shape, *where), rtol=0, atol=TOLERANCE
        )


@pytest.mark.parametrize("shape, dim, row0, col0", [((7, 21), -1, 4, 3), ((3, 21, 5), 1, 5, 9)])
def test_noise_of_a_window_is_the_window_of_the_noise(shape, dim, row0, col0):
    full_shape = list(shape)
    full_shape[0] += 1
    full_shape[dim] += col0
    full = noise.noise(make_seed(), full_shape, dim, 0, 0, 0).movedim(dim, -1)
    rows_per_entry = shape[2] if len(shape) == 3 else 1
    part = noise.noise(make_seed(), shape, dim, rows_per_entry, col0, 0).movedim(dim, -1)
    assert torch.equal(part, full[1:, ..., col0:])


def test_noise_ignores_tile_shape(monkeypatch):
    shape = (2, 9, 3)  # the interpreter's time goes with the number of programs
    want = {dim: noise.noise(make_seed(), shape, dim, 1, 2, 0) for dim in (1, 2)}
    for block in [(1, 8), (2, 16), (32, 64)]:
        monkeypatch.setattr(tiles, "block_shape", lambda *sizes, block=block: block)
        for dim, z in want.items():
            assert torch.equal(noise.noise(make_seed(), shape, dim, 1, 2, 0), z)


def test_noise_equals_the_compiled_cpu_kernels():
    dipkernels = pytest.importorskip("dipkernels")
    if not hasattr(torch.ops.dipkernels, "noise") or not dipkernels.backends.library().loaded:
        pytest.skip("the compiled library is not built")
    where = ((24, 1003), -1, 2**32 - 5, 3, 1)
    assert torch.equal(
        noise.noise(make_seed(), *where), torch.ops.dipkernels.noise(make_seed(), *where)
    )


@pytest.mark.parametrize("shape, dim", SHAPES + EMPTY)
@pytest.mark.parametrize(
    "dtype, log_variance",
    [(torch.float32, False), (torch.float32, True), (torch.float16, True), (torch.float64, False)],
)
def test_perturb_and_its_adjoint_match_reference(shape, dim, dtype, log_variance):
    x, du, sigma = make(shape, dim, dtype)
    where = (sigma, make_seed(), dim, 2**32 - 3, 53, 1, 0.5, log_variance)
    u, dsigma = perturb.perturb(x, *where, None), perturb.perturb_bwd(du, *where)
    both = perturb.perturb_replay(du, x, *where, None)
    assert (
        u.dtype == x.dtype
        and u.shape == x.shape
        and dsigma.dtype == sigma.dtype
        and dsigma.shape == sigma.shape
    )
    assert torch.equal(both[0], u) and both[1].shape == sigma.shape
    if x.numel() == 0:
        assert torch.equal(dsigma, torch.zeros_like(sigma)) and torch.equal(both[1], dsigma)
        return
    exact = reference.perturb(x.double(), sigma.double(), *where[1:], None)
    assert_near(u, exact, exact.to(dtype))
    want = reference.perturb_bwd(du.double(), sigma.double(), *where[1:])
    # Sums over the rows: the tolerance grows with the square root of their number.
    tolerance = 2e-6 * (x.numel() // x.shape[dim]) ** 0.5
    assert torch.allclose(dsigma.double(), want, rtol=0, atol=tolerance)
    assert torch.allclose(both[1].double(), want, rtol=0, atol=tolerance)


def strided_inputs():
    base = torch.randn(2, 10, 24, 6, generator=torch.Generator().manual_seed(1))
    yield "transposed", base[0, :, :, 0].t(), -1
    yield "sliced columns", base[:, :, 3:20, 0], -1
    yield "every other row", base[0, ::2, :, 1], -1
    yield "expanded rows", base[0, :1, :, 2].expand(7, 24), -1
    yield "expanded everywhere", torch.tensor(1.5).expand(5, 9), -1
    yield "channels_last", base.to(memory_format=torch.channels_last), 1
    yield "channels first", base, 1
    yield "cropped image", base[:, :, 2:5, 1:4], 1
    yield "four stubborn dimensions", base.permute(2, 0, 3, 1)[::8, ::3], 1


@pytest.mark.parametrize(
    "x, dim", [pytest.param(x, dim, id=name) for name, x, dim in strided_inputs()]
)
def test_perturb_takes_any_strides(x, dim):
    sigma = torch.rand(x.shape[dim]) + 0.1
    where = (sigma, make_seed(), dim, 9, 0, 0, 1.0, False)
    dense = x.contiguous()
    u, dsigma = perturb.perturb(x, *where, None), perturb.perturb_bwd(x, *where)
    assert torch.equal(u, perturb.perturb(dense, *where, None))
    assert u.stride() == torch.empty_like(x).stride()
    assert torch.allclose(dsigma, perturb.perturb_bwd(dense, *where), rtol=1e-5, atol=1e-5)
    # A gradient rarely has its input's strides.
    for du, other in [(x, dense), (dense, x)]:
        both = perturb.perturb_replay(du, other, *where, None)
        assert torch.equal(both[0], u) and both[0].stride() == torch.empty_like(other).stride()
        assert torch.allclose(both[1], dsigma, rtol=1e-5, atol=1e-5)


def test_perturb_rounds_to_the_asked_type():
    x, _, sigma = make((9, 16), -1)
    where = (sigma, make_seed(), -1, 0, 0, 0, 1.0, False)
    assert torch.equal(
        perturb.perturb(x, *where, torch.float16), perturb.perturb(x, *where, None).half()
    )


def test_perturb_bwd_sums_many_row_blocks_in_a_fixed_order(monkeypatch):
    # 20 row blocks over 8 programs
    monkeypatch.setattr(tiles, "block_shape", lambda *sizes: (2, 8))
    _, du, sigma = make((39, 8), -1)
    where = (sigma, make_seed(), -1, 0, 0, 0, 1.0, False)
    first = perturb.perturb_bwd(du, *where)
    assert torch.equal(first, perturb.perturb_bwd(du, *where))
    assert torch.allclose(
        first.double(), reference.perturb_bwd(du, *where).double(), rtol=0, atol=3e-5
    )


# Rows that the blocks divide and rows that they do not, more blocks than programs, images.
@pytest.mark.parametrize(
    "shape, dim, block",
    [((1, 8), -1, None), ((9, 8), -1, (2, 8)), ((8, 6), 0, (2, 8)), ((3, 8, 5, 4), 1, None)],
)
def test_perturb_rows_from_the_end_change_no_u(monkeypatch, shape, dim, block):
    if block:
        monkeypatch.setattr(tiles, "block_shape", lambda *sizes: block)
    x, du, sigma = make(shape, dim)
    where = (sigma, make_seed(), dim, 3, 5, 0, 1.0, False)
    found = {}
    for from_end in (False, True):
        monkeypatch.setattr(perturb, "P_FROM_END", from_end)
        monkeypatch.setattr(perturb, "SUMS_FROM_END", from_end)
        both = perturb.perturb_replay(du, x, *where, None)
        found[from_end] = perturb.perturb(x, *where, None), *both, perturb.perturb_bwd(du, *where)
    for there, back in zip(found[False][:2], found[True][:2], strict=True):
        assert torch.equal(there, back)
    want = reference.perturb_bwd(du.double(), sigma.double(), *where[1:])
    for dsigma in found[True][2:]:
        assert torch.allclose(dsigma.double(), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("op", ["perturb", "perturb_bwd"])
def test_perturb_walks_its_rows_as_asked(monkeypatch, op):
    """20 row blocks over 8 programs of P, whose blocks from the end are neighbours, or 4 of Q,
    whose stay apart."""
    monkeypatch.setattr(tiles, "block_shape", lambda *sizes: (2, 8))
    monkeypatch.setattr(tiles, "num_multiprocessors", lambda device: 1)
    x, _, sigma = make((39, 8), -1)
    where, rows_at, seen = (sigma, make_seed(), -1, 0, 0, 0, 1.0, False), perturb.rows_at, []

    def spy(row_block, *rest):
        seen.append(
            int(row_block.handle.data.item() if hasattr(row_block, "handle") else row_block)
        )
        return rows_at(row_block, *rest)

    monkeypatch.setattr(perturb, "rows_at", spy)
    for from_end in (False, True):
        monkeypatch.setattr(perturb, "P_FROM_END", from_end)
        monkeypatch.setattr(perturb, "SUMS_FROM_END", from_end)
        getattr(perturb, op)(x, *where, *([None] if op == "perturb" else []))
    there, back = seen[:20], seen[20:]
    programs = 8 if op == "perturb" else 4
    assert there == [block for program in range(programs) for block in range(program, 20, programs)]
    assert back == (list(range(19, -1, -1)) if op == "perturb" else [19 - block for block in there])


def test_perturb_refuses_cpu_tensors_outside_the_interpreter(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    x, _, sigma = make((2, 8), -1)
    with pytest.raises(RuntimeError, match="expected CUDA tensors"):
        perturb.perturb(x, sigma, make_seed(), -1, 0, 0, 0, 1.0, False, None)
