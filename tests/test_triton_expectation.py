"""The launches of triton_kernels/expectation.py, compiled for GPUs that are not here: no spills,
16-byte accesses."""

import gpu_expectation
import pytest
import torch
from test_triton_compiles import ARCHS, DTYPES, check, meta, slow_unless, wide
from triton_support import compile_launch, load_kernels, recorded_launches

from dipkernels.ops.activations import ACTIVATIONS

expectation, perturb = load_kernels("expectation", "perturb")
QUICK = [
    ("gelu_tanh", torch.bfloat16, 80),
    ("relu", torch.float32, 80),
    ("silu", torch.float32, 100),
]


@pytest.mark.parametrize("name, dtype, arch", slow_unless(QUICK, ACTIVATIONS, DTYPES, ARCHS))
def test_activation_compiles_without_spills(name, dtype, arch):
    mu = meta(4096, 1024, dtype=dtype)
    v = meta(1024, dtype=wide(dtype))
    with recorded_launches(expectation, perturb) as launches:
        expectation.expectation(mu, v, name)
        expectation.expectation_bwd(mu, mu, v, name)
    assert [launch[0].__name__ for launch in launches] == ["_expectation_kernel"] * 2 + [
        "_column_sum_kernel"
    ] * 2
    for launch in launches:
        check(compile_launch(launch, arch), arch)


@pytest.mark.parametrize("dtype, arch", slow_unless([(torch.bfloat16, 90)], DTYPES, ARCHS))
def test_activation_variance_compiles_without_spills(dtype, arch):
    for n, k in ((4096, 1024), (1000, 1009)):
        weight, sigma = meta(n, k, dtype=dtype), meta(k, dtype=wide(dtype))
        with recorded_launches(expectation, perturb) as launches:
            expectation.affine_variance(weight, sigma, True)
            expectation.affine_variance_bwd(
                meta(n, dtype=wide(dtype)), weight, sigma, False, weight
            )
        names = ["_variance_kernel", "_variance_bwd_kernel", "_column_sum_kernel"]
        assert [launch[0].__name__ for launch in launches] == names
        for launch in launches:
            compiled = compile_launch(launch, arch)
            check(compiled, arch)
            if k % 16 == 0:
                assert any(
                    op.startswith("LDG") and op.endswith(("128", "64")) for op in compiled.count()
                )


@pytest.mark.parametrize("name", slow_unless([("relu",), ("gelu_tanh",)], ACTIVATIONS))
def test_activation_issue_slots_per_element(name):
    """Of the longest loop, sm_90, bfloat16: what docs/measured_gpu_expectation.md counts with."""
    mu, v = meta(8192, 4096, dtype=torch.bfloat16), meta(4096)
    with recorded_launches(expectation, perturb) as launches:
        expectation.expectation(mu, v, name)
        expectation.expectation_bwd(mu, mu, v, name)
    for launch, expected in zip(launches[:2], gpu_expectation.EXPECTATION_SLOTS[name], strict=True):
        compiled, sizes = compile_launch(launch, 90), launch[2]
        check(compiled, 90)
        assert "min.NaN.f32" in compiled.ptx  # the interpreter keeps a NaN anyway
        of_an_element = 32 * compiled.num_warps / (sizes["BLOCK_R"] * sizes["BLOCK_N"])
        assert abs(sum(compiled.count().values()) * of_an_element - expected) <= 2
        assert (
            sum(n for op, n in compiled.count().items() if op.startswith("MUFU")) * of_an_element
            <= 2
        )
