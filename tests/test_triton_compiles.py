"""Every Triton launch that ships, compiled for GPUs that are not here: spills, shared memory,
instruction counts."""

import itertools

import gpu_expectation
import pytest
import torch
from layout_support import ALL, cases, fake_of, kinds_of
from triton_support import SHARED_MEMORY, compile_launch, load_kernels, recorded_launches, triton

noise, perturb, linear, blocks, tiles = load_kernels(
    "noise", "perturb", "linear", "blocks", "tiles"
)
ARCHS = [80, 90, 100]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def wide(dtype):
    return torch.float64 if dtype is torch.float64 else torch.float32


def perturb_launches(shape, dim, dtype, log_variance=True, col0=0):
    """Every kernel of noise, P, Q and the combined form, by name."""
    x, seed = meta(*shape, dtype=dtype), meta(2, dtype=torch.int64)
    sigma = meta(shape[dim], dtype=wide(dtype))
    where = (sigma, seed, dim, 0, col0, 0, 1.0, log_variance)
    with recorded_launches(noise, perturb) as launches:
        # Noise is drawn on the seed's device, by a name that `perturb` re-exports.
        noise.noise(seed, shape, dim, 0, col0, 0)
        perturb.perturb(x, *where, None)
        perturb.perturb_bwd(x, *where)
        perturb.perturb_replay(x, x, *where, None)
    names = ["noise", "P", "Q", "sum", "PQ", "sum again"]
    return dict(zip(names, launches, strict=True))


def check(compiled, arch):
    assert compiled.spills == 0, f"{compiled.name} sm_{arch}: {compiled.spills} bytes spilled"
    assert compiled.shared <= SHARED_MEMORY[arch]


def slots_per_element(compiled, launch):
    kwargs = launch[2]
    elements = kwargs["BLOCK_R"] * kwargs["BLOCK_K"] / (32 * compiled.num_warps)
    return sum(compiled.count().values()) / elements


@pytest.mark.parametrize("name, bound", [("P", 35.0), ("Q", 33.0), ("PQ", 38.0)])
def test_perturb_issue_slots_per_element(name, bound):
    """The pass is bound by instruction issue: one row tile's loop body on sm_90, bfloat16, K a
    multiple of 16."""
    launch = perturb_launches((8192, 8192), -1, torch.bfloat16)[name]
    compiled = compile_launch(launch, 90)
    check(compiled, 90)
    slots = slots_per_element(compiled, launch)
    print(f"{name}: {slots:.1f} issue slots per element, {compiled.registers} registers")
    assert slots <= bound and abs(slots - gpu_expectation.SLOTS[name, "Triton"]) <= 2
    opcodes = compiled.count()
    assert any(op.startswith("LDG") and op.endswith("128") for op in opcodes)  # 16-byte accesses


# Ordinary rows; K a multiple of 8 but not of 16; a prime K from the middle of a group; images.
CASES = {
    "rows": dict(shape=(8192, 8192), dim=-1),
    "k1000": dict(shape=(512, 1000), dim=-1),
    "prime": dict(shape=(512, 1009), dim=-1, col0=3),
    "narrow": dict(shape=(65536, 64), dim=-1),
    "nchw": dict(shape=(64, 256, 56, 56), dim=1),
}
# "rows" in bfloat16 for sm_90 are those of the issue slots above.
QUICK = [
    ("nchw", torch.float32, 90),
    ("prime", torch.float64, 80),
]


def slow_unless(quick, *axes):
    return [
        pytest.param(
            *case,
            marks=[] if case in quick else pytest.mark.slow,
            id="-".join(str(v) for v in case),
        )
        for case in itertools.product(*axes)
    ]


@pytest.mark.parametrize("case, dtype, arch", slow_unless(QUICK, CASES, DTYPES, ARCHS))
def test_perturb_compiles_without_spills(case, dtype, arch):
    for launch in perturb_launches(dtype=dtype, **CASES[case]).values():
        check(compile_launch(launch, arch), arch)


def linear_launches(m, k, n, dtype, arch, num_samples=1, activation=None, x_dtype=None, col0=0):
    """Every kernel of the fused linear, with the tiles that `blocks` picks for the architecture."""
    x = meta(m, k, dtype=x_dtype or dtype)
    dy = meta(m, n, dtype=dtype)
    weight = meta(n, k, dtype=dtype)
    bias = meta(n)
    sigma, seed = meta(k), meta(2, dtype=torch.int64)
    how = (0, col0, 0, 1.0, True)
    with recorded_launches(noise, perturb, linear, arch=arch) as launches:
        linear.linear(x, weight, bias, sigma, seed, *how, num_samples, activation)
        # One sample's launches are like the next one's.
        linear.linear_bwd(dy, x, weight, bias, sigma, seed, *how, 1, activation)
    return launches


MATRIX_UNIT = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
# Large; few rows; K a multiple of 8 but not of 16; nothing aligned; float32 activations under
# autocast; averaging.
LINEARS = {
    "large": dict(m=4096, k=1024, n=1024),
    "few rows": dict(m=32, k=1024, n=1024),
    "narrow": dict(m=65536, k=64, n=64),
    "k1000": dict(m=4096, k=1000, n=1000),
    "odd": dict(m=4093, k=1009, n=1013, col0=3),
    "autocast": dict(m=4096, k=1024, n=1024, x_dtype=torch.float32),
    "gelu": dict(m=4096, k=1024, n=1024, num_samples=4, activation="gelu"),
    "gelu_tanh": dict(m=4096, k=1024, n=1024, num_samples=4, activation="gelu_tanh"),
    "silu, odd": dict(m=4093, k=1009, n=1013, num_samples=4, activation="silu"),
}
QUICK_LINEARS = [
    ("large", torch.bfloat16, 100),
    ("gelu", torch.bfloat16, 90),
]


@pytest.mark.parametrize(
    "case, dtype, arch", slow_unless(QUICK_LINEARS, LINEARS, DTYPES[:3], ARCHS)
)
def test_linear_compiles_without_spills_for_the_matrix_units(case, dtype, arch):
    launches = linear_launches(dtype=dtype, arch=arch, **LINEARS[case])
    assert len(launches) >= 4
    for launch in launches:
        compiled = compile_launch(launch, arch)
        check(compiled, arch)
        if launch[0].__name__ == "_column_sum_kernel":
            continue
        if dtype is torch.float32:
            # Full precision was asked for: no tf32 product anywhere.
            assert "tf32" not in compiled.ptx
        else:
            # wgmma takes 64 rows at least; fewer go to the older instruction.
            large = LINEARS[case]["m"] >= 64
            assert (
                MATRIX_UNIT[arch if large else 80] in compiled.ptx
                or MATRIX_UNIT[arch] in compiled.ptx
            )


def test_results_lie_as_their_fakes_say_in_every_layout():
    """As tests/test_ops.py has it of the other backends. Without a GPU: nothing is launched."""
    modules = load_kernels("perturb", "gate", "expectation", "norm", "linear", "tiles")
    found = set()
    with recorded_launches(*modules):
        for op, arguments in cases("meta"):
            run = next(getattr(module, op) for module in modules if hasattr(module, op))
            assert kinds_of(run(*arguments)) == fake_of(op, arguments), op
            found.add(op)
    assert found == ALL


def test_a_launch_computes_its_grid_as_triton_would_without_its_wrappers(monkeypatch):
    for a, b in itertools.product([1, 2, 3, 8, 255, 256, 257, 2**31, 2**40 + 1], [1, 3, 8, 4096]):
        assert tiles.cdiv(a, b) == triton.cdiv(a, b)
        assert tiles.next_power_of_2(a) == triton.next_power_of_2(a)
    for name in ("cdiv", "next_power_of_2"):  # which take microseconds
        monkeypatch.delattr(triton, name)
    assert len(perturb_launches((8, 64), -1, torch.bfloat16)) == 6
    assert len(linear_launches(32, 64, 64, torch.bfloat16, 90)) >= 4


@pytest.mark.parametrize("op", blocks.TABLE[80])
def test_blocks_are_powers_of_two_that_matrix_instructions_take(op):
    for arch, m, n, k, itemsize, regular in itertools.product(
        [75, 80, 86, 90, 120], [1, 33, 9999], [1, 40, 5000], [1, 70, 5000], [2, 4], [True, False]
    ):
        chosen = blocks.blocks(op, arch, m, n, k, itemsize, regular)
        for size in (chosen.BLOCK_M, chosen.BLOCK_N, chosen.BLOCK_K):
            assert size >= 16 and size & (size - 1) == 0
        assert chosen in blocks.candidates(chosen, op)


@pytest.mark.parametrize("op", blocks.TABLE[80])
def test_tiles_are_timed_anew_for_another_layer_and_for_no_other_number_of_rows(op):
    """DIPKERNELS_AUTOTUNE=1: batches of many sizes would be timed without end."""
    chosen = blocks.blocks(op, 90, 4096, 1024, 1024, 2)
    kernel = linear._linear_bwd_weight_kernel if op == "bwd_weight" else linear._linear_fwd_kernel
    tuned = linear._tuned(kernel, op, chosen)
    assert tuned.keys == ["N", "K"] and len(tuned.configs) == len(blocks.candidates(chosen, op)) > 1
