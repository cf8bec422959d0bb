"""The launches of triton_kernels/norm.py and gate.py, compiled for GPUs that are not here: no
spills, 16-byte accesses."""

import gpu_expectation
import pytest
import torch
from test_triton_compiles import ARCHS, DTYPES, check, meta, slots_per_element, slow_unless, wide
from triton_support import compile_launch, load_kernels, recorded_launches

from dipkernels.ops.activations import ACTIVATIONS

gate, norm, perturb, tiles = load_kernels("gate", "norm", "perturb", "tiles")
DRAW = (-1, 0, 0, 0, 1.0, True)


def compiled(launches, arch):
    for launch in launches:
        result = compile_launch(launch, arch)
        check(result, arch)
        yield result


QUICK_NORMS = [("layer", 1024, torch.bfloat16, 90), ("rms", 5120, torch.bfloat16, 90)]


# Above 4096 columns, 2048 of float64, a program does not hold a row.
@pytest.mark.parametrize(
    "kind, k, dtype, arch",
    slow_unless(QUICK_NORMS, ["layer", "rms"], [192, 768, 1024, 4096, 5120, 9000], DTYPES, ARCHS),
)
def test_norm_compiles_without_spills(kind, k, dtype, arch):
    x = meta(4096, k, dtype=dtype)
    sigma = meta(k, dtype=wide(dtype))
    seed = meta(2, dtype=torch.int64)
    weight, stats = meta(k, dtype=dtype), meta(2 if kind == "layer" else 1, 4096, dtype=wide(dtype))
    bias = weight if kind == "layer" else None
    with recorded_launches(norm, perturb) as launches:
        norm.norm(x, weight, bias, sigma, seed, *DRAW, kind, 1e-5, 0.0, None)
        norm.norm_bwd(x, x, stats, weight, bias, sigma, seed, *DRAW, kind, 0.0)
    names = [launch[0].__name__ for launch in launches]
    sums = ["_norm_sums_kernel"] if k > (2048 if dtype is torch.float64 else 4096) else []
    assert names == [
        "_norm_fwd_kernel",
        *sums,
        "_norm_bwd_kernel",
        *["_column_sum_kernel"] * (2 + (kind == "layer")),
    ]
    results = list(compiled(launches, arch))
    if k % 16 == 0:
        assert all(
            any(op.startswith("LDG") and op.endswith(("128", "64")) for op in r.count())
            for r in results[:2]
        )


@pytest.mark.parametrize("k", [768, 1280, 1536, 2560, 3584, 4096, 5120, 7168, 8192, 14336])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norm_draws_for_few_lanes_without_a_column(k, dtype):
    """Of the widths of transformers most are no power of two, as a tile is; each lane draws."""
    x, sigma, seed = meta(4096, k, dtype=dtype), meta(k), meta(2, dtype=torch.int64)
    with recorded_launches(norm) as launches:
        norm.norm(x, None, None, sigma, seed, *DRAW, "rms", 1e-5, 0.0, None)
    tile = launches[0][2]
    lanes = tile["COL_BLOCKS"] * tile["BLOCK_K"]
    assert k <= lanes < 8 / 7 * k + 0.5 or k * dtype.itemsize > 32768


QUICK_GATES = [("silu", torch.bfloat16, 90)]


@pytest.mark.parametrize(
    "name, dtype, arch",
    slow_unless(QUICK_GATES, ACTIVATIONS, DTYPES, ARCHS),
)
def test_gate_compiles_without_spills(name, dtype, arch):
    for shape, dim in (((4096, 1024), -1), ((32, 64, 56, 56), 1)):
        x, seed = meta(*shape, dtype=dtype), meta(2, dtype=torch.int64)
        where = (meta(shape[dim], dtype=wide(dtype)), seed, dim, *DRAW[1:], name)
        with recorded_launches(gate, perturb, tiles) as launches:
            for b in (None, x):
                gate.gate(x, b, *where, None)
                gate.gate_bwd(x, x, b, *where)
        names = ["perturb_fwd_kernel", "_gate_bwd_kernel", "_column_sum_kernel"] * 2
        assert [launch[0].__name__ for launch in launches] == names
        results = list(compiled(launches, arch))
        # of float64, tiles are so small that a thread has one number of each operand
        widths = ("128", "64") if dtype is torch.float64 else ("128",)
        wide_loads = [
            any(op.startswith("LDG") and op.endswith(widths) for op in r.count()) for r in results
        ]
        assert all(wide_loads[i] for i in (0, 1, 3, 4))


@pytest.mark.slow
@pytest.mark.parametrize("name", gpu_expectation.PRODUCER_SLOTS)
def test_producer_issue_slots_per_element(name):
    x, weight = meta(8192, 4096, dtype=torch.bfloat16), meta(4096, dtype=torch.bfloat16)
    where = (meta(4096), meta(2, dtype=torch.int64), *DRAW)
    with recorded_launches(gate, norm, perturb, tiles) as launches:
        if name in ("layer", "rms"):
            stats = meta(2 if name == "layer" else 1, 8192)
            tensors = (weight, weight if name == "layer" else None)
            norm.norm(x, *tensors, *where, name, 1e-5, 0.0, None)
            norm.norm_bwd(x, x, stats, *tensors, *where, name, 0.0)
        else:
            b, act = x if name.startswith("gated ") else None, name.removeprefix("gated ")
            gate.gate(x, b, *where, act, None)
            gate.gate_bwd(x, x, b, *where, act)
    slots = [slots_per_element(compile_launch(launch, 90), launch) for launch in launches[:2]]
    print(f"{name}: {slots[0]:.1f} and {slots[1]:.1f} issue slots per element")
    assert slots == pytest.approx(gpu_expectation.PRODUCER_SLOTS[name], abs=2)
