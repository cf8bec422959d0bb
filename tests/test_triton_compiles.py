"""Every Triton launch that ships, compiled for GPUs that are not here: spills, shared memory, instruction counts."""

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1: there is nothing to compile", allow_module_level=True)

from triton_support import SHARED_MEMORY, compile_launch, load_kernels, recorded_launches  # noqa: E402

noise, perturb = load_kernels("noise", "perturb")
ARCHS = [80, 90, 100]


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def perturb_launches(shape, dim, dtype, num_samples=1, log_variance=True, col0=0):
    """Every kernel of noise, P, Q and the combined form, by name."""
    x, seed = meta(*shape, dtype=dtype), meta(2, dtype=torch.int64)
    sigma = meta(shape[dim], dtype=torch.float64 if dtype is torch.float64 else torch.float32)
    where = (sigma, seed, dim, 0, col0, 0, num_samples, 1.0, log_variance)
    with recorded_launches(noise, perturb) as launches:
        # Noise is drawn on the seed's device, by a name that `perturb` re-exports.
        noise.noise(seed, shape, dim, 0, col0, 0, num_samples)
        perturb.perturb(x, *where, None)
        perturb.perturb_bwd(x, *where)
        perturb.perturb_replay(x, x, *where, None)
    return dict(zip(["noise", "P", "Q", "sum", "PQ", "sum again"], launches, strict=True))


def check(compiled, arch):
    assert compiled.spills == 0, f"{compiled.name} sm_{arch}: {compiled.spills} bytes spilled"
    assert compiled.shared <= SHARED_MEMORY[arch]


def slots_per_element(compiled, launch):
    kwargs = launch[2]
    elements = kwargs["BLOCK_R"] * kwargs["BLOCK_K"] / (32 * compiled.num_warps)
    return sum(compiled.count().values()) / elements


@pytest.mark.parametrize("name, bound", [("P", 35.0), ("Q", 33.0), ("PQ", 38.0)])
def test_perturb_issue_slots_per_element(name, bound):
    """The pass is bound by instruction issue: one row tile's loop body on sm_90, bfloat16, K a multiple of 16."""
    launch = perturb_launches((8192, 8192), -1, torch.bfloat16)[name]
    compiled = compile_launch(launch, 90)
    check(compiled, 90)
    slots = slots_per_element(compiled, launch)
    print(f"{name}: {slots:.1f} issue slots per element, {compiled.registers} registers")
    assert slots <= bound
    opcodes = compiled.count()
    assert any(op.startswith("LDG") and op.endswith("128") for op in opcodes)  # 16-byte accesses


# Ordinary rows; K a multiple of 8 but not of 16; a prime K from the middle of a group; images; and S real samples.
CASES = {
    "rows": dict(shape=(8192, 8192), dim=-1),
    "k1000": dict(shape=(512, 1000), dim=-1),
    "prime": dict(shape=(512, 1009), dim=-1, col0=3),
    "narrow": dict(shape=(65536, 64), dim=-1),
    "nchw": dict(shape=(64, 256, 56, 56), dim=1),
    "samples": dict(shape=(512, 1024), dim=-1, num_samples=8),
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
QUICK = [("rows", torch.bfloat16), ("nchw", torch.float32), ("prime", torch.float64)]
ALL = [(case, dtype) for case in CASES for dtype in DTYPES]


def slow_unless(quick, cases):
    return [pytest.param(*case, marks=[] if case in quick else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case, dtype", slow_unless(QUICK, ALL))
def test_perturb_compiles_without_spills(case, dtype, arch):
    for launch in perturb_launches(dtype=dtype, **CASES[case]).values():
        check(compile_launch(launch, arch), arch)
