"""The noise contract: the same integer words everywhere, z within 4e-6, the law, and the windows.
docs/maths.md, section 3."""

import hashlib
import subprocess

import numpy as np
import pytest
import torch
from capability_support import assert_same_everywhere
from header_support import header_module, read_vectors
from program_support import needs, printed
from source_support import ROOT

from dipkernels import backend, functional, library, reference

SEED = torch.tensor([0x0123456789ABCDEF, 0])
LANES = [("portable", "portable"), ("native", "portable"), ("native", "avx2"), ("native", "avx512")]


def lane(kind, lanes, function):
    module = header_module(kind)
    if not hasattr(module, f"{function}_{lanes}"):
        pytest.skip(f"this machine has no {lanes}")
    return getattr(module, f"{function}_{lanes}")


def philox_vectors():
    rows = np.array([[int(word, 16) for word in row] for row in read_vectors("philox4x32.txt")])
    return rows[:, :4], rows[:, 4:6], rows[:, 6:]


def noise_vectors():
    for row in read_vectors("noise.txt"):
        key, stream, sample, index, col = (int(v, 0) for v in row[:5])
        yield (
            torch.tensor([key, stream]),
            dict(sample=sample, row0=index, col0=col),
            torch.tensor([float(v) for v in row[5:]]),
        )


@pytest.mark.parametrize("kind, lanes", LANES)
def test_philox_matches_known_answers_in_headers(kind, lanes):
    for counter, key, words in zip(*philox_vectors(), strict=True):
        got = lane(kind, lanes, "philox")(np.tile(counter, (16, 1)), *key)
        assert (got == words).all()


def test_philox_matches_known_answers_in_reference():
    for counter, key, words in zip(*philox_vectors(), strict=True):
        got = reference.philox4x32(tuple(torch.tensor(counter)), tuple(torch.tensor(key)))
        assert [int(word) for word in got] == words.tolist()


@pytest.mark.parametrize("kind, lanes", LANES)
def test_philox_lanes_are_independent(kind, lanes):
    rng = np.random.default_rng(0)
    counter = rng.integers(0, 2**32, (64, 4))
    want = reference.philox4x32(
        tuple(torch.tensor(counter.T)), (torch.tensor(3), torch.tensor(2**31))
    )
    got = lane(kind, lanes, "philox")(counter, 3, 2**31)
    assert (got == torch.stack(want, dim=1).numpy()).all()


@pytest.mark.parametrize("kind, lanes", LANES)
def test_words_are_stored_in_groups_and_nowhere_else(kind, lanes):
    """Those of as many counters as there are lanes: four each, and no fifth."""
    count = {"portable": 1, "avx2": 8, "avx512": 16}[lanes]
    words = np.arange(5 * count, dtype=np.uint32).reshape(5, count)
    got = lane(kind, lanes, "stored")(words, 999)
    assert sorted(got[: 4 * count]) == list(range(4 * count)) and (got[4 * count :] == 999).all()


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_noise_matches_known_answers(name):
    with backend(name):
        for seed, where, z in noise_vectors():
            assert (functional.noise((1, 8), seed, **where)[0] - z).abs().max() < (
                4e-6 if name == "cpu" else 2e-7
            )


@pytest.mark.parametrize("kind, lanes", LANES[1:])
def test_noise_lanes_agree_bit_for_bit(kind, lanes):
    words = np.random.default_rng(1).integers(0, 2**32, 1 << 16)
    assert (lane(kind, lanes, "pairs")(words) == lane("portable", "portable", "pairs")(words)).all()


def test_noise_is_within_its_tolerance_for_every_radius_and_angle():
    i = np.arange(2**20, dtype=np.uint64)
    got = header_module("portable").pairs_portable((i << 12) | (i & 0xFFF))
    radius = np.sqrt(-2 * np.log((i + 0.5) / 2**20))
    angle = 2 * np.pi * ((i & 0xFFF) + 0.5) / 2**12
    assert np.abs(got[:, 0] - radius * np.cos(angle)).max() < 4e-6
    assert np.abs(got[:, 1] - radius * np.sin(angle)).max() < 4e-6
    assert np.abs(header_module("portable").radius(i << 12) - radius).max() < 4e-6


def test_noise_law_has_the_stated_moments():
    """By enumeration of every radius and every angle: variance 1 - 3e-7, kurtosis 2.99999, largest
    5.396."""
    r2 = -2 * np.log((np.arange(2**20) + 0.5) / 2**20)
    c = np.cos(2 * np.pi * (np.arange(2**12) + 0.5) / 2**12)
    variance = r2.mean() * (c**2).mean()
    assert abs(variance - (1 - 3e-7)) < 1e-7
    assert abs((r2**2).mean() * (c**4).mean() / variance**2 - 2.99999) < 1e-5
    assert abs(np.sqrt(r2.max()) * c.max() - 5.396) < 1e-3


@pytest.mark.parametrize(
    "kind, dtype",
    [("portable", torch.bfloat16), ("native", torch.bfloat16), ("portable", torch.float16)],
)
def test_storage_types_round_as_torch_rounds(kind, dtype):
    """Every value of the type, the ties between neighbours, both sides of the ties, infinities,
    NaNs of many payloads."""
    narrow = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype).float()
    bits = narrow.view(torch.int32)
    half = 2**15 if dtype is torch.bfloat16 else 2**12
    words = torch.cat([bits + step for step in (-1, 0, 1, half - 1, half, half + 1)])
    words = torch.cat(
        [
            words,
            torch.tensor(
                [0x7F800001, 0x7FFFFFFF, -1, -(2**23) + 1, 0x477FEFFF, 0x477FF000],
                dtype=torch.int32,
            ),
        ]
    )
    values = words.view(torch.float32)
    got, back = getattr(header_module(kind), str(dtype).removeprefix("torch."))(values.numpy())
    got, want = torch.from_numpy(got).view(dtype), values.to(dtype)
    number = ~values.isnan()
    assert torch.equal(got[number].view(torch.int16), want[number].view(torch.int16))
    assert got[~number].isnan().all() and (~number).any()
    assert torch.equal(torch.from_numpy(back)[number], want[number].float())


@pytest.mark.parametrize(
    "shape, dim", [((37, 200), -1), ((5, 33), -1), ((3, 20, 7, 9), 1), ((130, 1), 0), ((40,), 0)]
)
def test_noise_ignores_instruction_set_and_threads(shape, dim):
    where = {"dim": dim, "row0": 2**32 - 20, "col0": 3}
    assert_same_everywhere(lambda: [functional.noise(shape, SEED, **where)])


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_noise_numbers_rows_in_the_order_of_the_other_dimensions(name):
    with backend(name):
        flat = functional.noise((2 * 3 * 5, 16), SEED)
        assert torch.equal(functional.noise((2, 3, 5, 16), SEED).flatten(0, 2), flat)
        channels = functional.noise((2, 16, 3, 5), SEED, dim=1)
        assert torch.equal(channels.permute(0, 2, 3, 1).flatten(0, 2), flat)


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 5)])
def test_noise_of_nothing_is_empty(name, shape):
    with backend(name):
        assert functional.noise(shape, SEED).shape == shape


@pytest.mark.parametrize("k", [8, 520, 1032])  # 1032: a tile ends inside the next row
def test_noise_rows_go_beyond_32_bits(k):
    whole = functional.noise((4, k), SEED, row0=2**32 - 2)
    assert torch.equal(whole[2:], functional.noise((2, k), SEED, row0=2**32))
    assert not torch.equal(whole[2:], functional.noise((2, k), SEED, row0=0))
    assert (whole.double() - reference.standard_normal(SEED, 4, k, 2**32 - 2)).abs().max() < 4e-6


def test_noise_depends_on_every_part_of_its_seed():
    draws = [
        functional.noise((4, 8), torch.tensor(seed), sample=s)
        for seed, s in [
            ([1, 0], 0),
            ([2, 0], 0),
            ([1 + 2**32, 0], 0),
            ([1, 1], 0),
            ([1, 0], 1),
            ([-1, 0], 0),
        ]
    ]
    for a in range(len(draws)):
        for b in range(a):
            assert not torch.equal(draws[a], draws[b])
    # The stream counts modulo 2^16.
    assert torch.equal(draws[3], functional.noise((4, 8), torch.tensor([1, 1 + 2**16])))


@pytest.mark.skipif(
    "portable" not in library.load().cpu_capabilities, reason="needs the compiled library"
)
def test_noise_keeps_its_bits_from_one_release_to_the_next():
    """The contract allows 4e-6; the kernels' own bits change on purpose only, and then these digits
    and the release notes do."""
    with backend("cpu"):
        z = functional.noise((4096, 64), SEED, row0=2**32 - 7)
    assert hashlib.sha256(z.numpy().astype("<f4").tobytes()).hexdigest()[:16] == "ad737b5308ff64a4"


@pytest.mark.parametrize(
    "bad, error",
    [
        (dict(shape=(2, 8), seed=torch.tensor([1, 2, 3])), "seed: expected shape"),
        (dict(shape=(2, 8), seed=torch.tensor([1.0, 2.0])), "seed: expected dtype"),
        (dict(shape=(-1, 8)), "shape: expected an integer >= 0"),
        (dict(shape=(2, 8), dim=2), "dim: expected"),
        (dict(shape=(2, 8), sample=65536), "sample: expected"),
        (dict(shape=(2, 8), row0=-1), "row0: expected"),
        (dict(shape=(2, 8), row0=2**63 - 1), "row0: expected an integer from 0"),
        (dict(shape=(2, 8), col0=2**63 - 1), "col0: expected an integer from 0"),
        (dict(shape=(2, 8), sample=2**63 - 1), "sample: expected"),
    ],
)
def test_noise_rejects(bad, error):
    arguments = {"seed": SEED, **bad}
    with pytest.raises((ValueError, TypeError), match=error):
        functional.noise(**arguments)
    # the library by itself
    with pytest.raises((ValueError, TypeError, RuntimeError), match=error.split(":")[0]):
        where = {"dim": -1, "row0": 0, "col0": 0, "sample": 0} | {
            k: v for k, v in arguments.items() if k not in ("seed", "shape")
        }
        torch.ops.dipkernels.noise(arguments["seed"], arguments["shape"], *where.values())


# ---- the law, by sampling ------------------------------------------------------------------------


def check_law(rows, cols):
    """Moments to the sixth, Kolmogorov-Smirnov, tails, correlations: each within 5 standard
    errors."""
    from scipy import stats

    n = rows * cols
    z = functional.noise((rows, cols), torch.tensor([42, 7])).double()
    for power, moment in enumerate((0, 1, 0, 3, 0, 15), start=1):
        spread = (np.prod(np.arange(1.0, 2 * power, 2)) - moment**2) ** 0.5  # E z^2p = (2p - 1)!!
        assert abs((z**power).mean() - moment) < 5 * spread / n**0.5 + 1e-5
    ordered = z.flatten().sort().values.numpy()
    distance = np.abs(stats.norm.cdf(ordered) - (np.arange(n) + 0.5) / n).max()
    assert distance < 1.95 / n**0.5 + 2**-12  # p about 1e-3, plus the lattice of angles
    for bound in (2.0, 3.0, 4.0):
        share = 2 * stats.norm.sf(bound)
        assert abs((z.abs() > bound).double().mean() - share) < 5 * (share / n) ** 0.5
    others = {
        "column": z.roll(1, dims=1),
        "row": z.roll(1, dims=0),
        "sample": functional.noise((rows, cols), torch.tensor([42, 7]), sample=1).double(),
        "stream": functional.noise((rows, cols), torch.tensor([42, 8])).double(),
        "key": functional.noise((rows, cols), torch.tensor([43, 7])).double(),
    }
    for name, other in others.items():
        assert abs((z * other).mean()) < 5 / n**0.5, name
        assert abs(((z**2 - 1) * (other**2 - 1)).mean()) < 5 * 2 / n**0.5, name


def test_noise_is_standard_normal():
    check_law(2048, 512)


@needs("g++")
def test_the_battery_reads_the_words_of_the_contract(tmp_path):
    """tools/verify/battery_words.cpp: of one draw, or word by word of eight that differ in one
    number."""
    source = ROOT / "tools" / "verify" / "battery_words.cpp"
    program = tmp_path / "words"
    printed("g++", "-std=c++17", "-O1", source, "-o", program)
    rows, groups = torch.arange(2), torch.arange(128)
    for stream, change in {
        "layer": lambda i: (SEED, rows, 0),
        "layers": lambda i: (SEED + torch.tensor([0, i]), rows, 0),
        "samples": lambda i: (SEED, rows, i),
        "steps": lambda i: (SEED + torch.tensor([i, 0]), rows, 0),
        "rows": lambda i: (SEED, rows + (i << 32), 0),
    }.items():
        draws = [
            reference.words(seed, row, groups, sample).reshape(2, -1)
            for seed, row, sample in map(change, range(1 if stream == "layer" else 8))
        ]
        want = torch.stack(draws, dim=-1).numpy().astype("<u4").tobytes()
        words = subprocess.Popen([program, stream, tmp_path / "count"], stdout=subprocess.PIPE)
        got = words.stdout.read(len(want))
        words.stdout.close()
        words.wait(timeout=60)
        assert got == want, stream


@pytest.mark.slow
def test_noise_is_standard_normal_on_1e8_draws():
    check_law(100_000, 1008)
