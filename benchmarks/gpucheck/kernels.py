"""Kernels: the copy and the product that all is measured against, P and Q, a small layer's graph,
the fused linear."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import gpu_expectation
import peers
import timing
import torch
import torch.nn.functional as F
from torch import Tensor

from dipkernels import backends, reference
from dipkernels.ops import perturb as projection
from dipkernels.ops.draw import Draw
from gpucheck.child import Check, Rows

DRAW = Draw(1)
KEY = 12345


def in_turns(check: Check, calls: dict, base: str, budget_s: float, peaks: bool = False) -> dict:
    """timing.interleave with every call in every round; a rehearsal only shows that it runs.
    peaks: and the most that tensors take during each call."""
    rounds = {"rounds": (2, 2), "at_least_s": 0.0} if check.rehearsal else {"rounds": (5, 60)}
    how = {"budget_s": budget_s, "always": tuple(calls), **rounds}
    timed = timing.interleave(calls, base, check.device, **how)
    for name, call in calls.items() if peaks else ():
        if "seconds" in timed[name]:
            timed[name]["peak_bytes"] = peak(call, check.device)
    return timed


def peak(call: Callable[[], object], device: torch.device) -> int | None:
    return timing.peak_bytes(call, device) if device.type == "cuda" else None


def half(check: Check) -> torch.dtype:
    # Triton's interpreter has no bfloat16
    return torch.float32 if check.rehearsal else torch.bfloat16


def kinds(check: Check) -> tuple[str, ...]:
    """The backends that run on the device."""
    device = check.device.type
    interpreted = check.rehearsal and check.machine.get("interpreter_problem")
    triton = ("triton",) if backends.runs_on("triton", device) and not interpreted else ()
    if check.rehearsal:
        return ("cpu" if backends.runs_on("cpu", device) else "reference", *triton)
    return (*(("cuda",) if backends.runs_on("cuda", device) else ()), *triton)


def seed(check: Check) -> Tensor:
    return torch.tensor([KEY, 0], device=check.device)


# ---- copy ----------------------------------------------------------------------------------------


def copy(check: Check) -> Rows:
    size, side = (1 << 16, 32) if check.rehearsal else (1 << 30, 8192)
    return [
        ("copy", lambda: {"bytes_per_s": timing.copy_rate(check.device, size), "bytes": 2 * size}),
        (
            "product",
            lambda: {
                "flop_per_s": timing.matmul_rate(check.device, half(check), side),
                "side": side,
            },
        ),
    ]


# ---- perturb -------------------------------------------------------------------------------------


def check_values(x: Tensor, sigma: Tensor, key: Tensor) -> None:
    """The last rows of u, and all of dsigma where that is affordable, against the float64
    reference."""
    u, dsigma = (
        projection.perturb(x, sigma, key, DRAW, None),
        projection.perturb_bwd(x, sigma, key, DRAW),
    )
    rows = min(64, x.shape[0])
    want = reference.perturb(
        x[-rows:], sigma, key, *DRAW._replace(row0=x.shape[0] - rows), torch.float64
    )
    error = (u[-rows:].double() - want).abs() - torch.finfo(u.dtype).eps * want.abs()
    if not error.max() <= 1e-5:
        raise AssertionError(
            f"perturb: expected u within 1e-5 of the reference, got {error.max().item():.2e}"
        )
    if x.numel() <= 1 << 22:
        want = reference.perturb_bwd(x, sigma, key, *DRAW)
        error = (dsigma - want).abs() - 1e-3 * want.abs()
        if not error.max() <= 1e-3 * x.shape[0] ** 0.5:
            raise AssertionError(
                f"perturb_bwd: expected dsigma of the reference, off by {error.max().item():.2e}"
            )


class Inputs:
    """Enough tensors of one type and shape that none is found in L2 when its turn comes."""

    def __init__(self, check: Check, dtype: torch.dtype, m: int, k: int) -> None:
        self.bytes = m * k * dtype.itemsize
        self.count = timing.sets_beyond_cache(self.bytes, check.device)
        self.beyond_cache = self.count == timing.sets_beyond_cache(
            self.bytes, check.device, most=1 << 30
        )
        self.xs = [torch.randn(m, k, device=check.device).to(dtype) for _ in range(self.count)]
        self.targets = [torch.empty_like(x) for x in self.xs]
        self.sigma, self.key = torch.full((k,), 0.1, device=check.device), seed(check)
        for kind in kinds(check):
            with backends.backend(kind):
                check_values(self.xs[0], self.sigma, self.key)

    def in_a_row(self, call: Callable[..., object], device: torch.device) -> Callable[[], object]:
        """call(x, du, target) for every set."""
        return timing.captured(
            call, self.xs, self.xs[1:] + self.xs[:1], self.targets, device=device
        )


inputs = functools.lru_cache(maxsize=1)(Inputs)


def per_call(timed: dict[str, dict], count: int) -> dict[str, dict]:
    """What was measured of `count` calls in a row, of one. Ratios stay."""
    for entry in timed.values():
        for key in {"seconds", "over_base_s"} & entry.keys():
            entry[key] /= count
        if "over_base_quartiles_s" in entry:
            entry["over_base_quartiles_s"] = [t / count for t in entry["over_base_quartiles_s"]]
    return timed


# Of x's bytes, what a form reads and writes.
TRAFFIC = {"P": 2, "Q": 1, "PQ": 3}


def perturb_row(check: Check, form: str, dtype: torch.dtype, m: int, k: int) -> dict:
    """Time over that of a copy of x in the same rounds; the share is that of the copy's bytes a
    second."""
    given = inputs(check, dtype, m, k)
    sigma, key, narrow = given.sigma, given.key, given.sigma.to(dtype)
    call = {
        "P": lambda x, du, target: projection.perturb(x, sigma, key, DRAW, None),
        "Q": lambda x, du, target: projection.perturb_bwd(du, sigma, key, DRAW),
        "PQ": lambda x, du, target: projection.perturb_replay(du, x, sigma, key, DRAW, None),
    }[form]
    variants = {"copy": given.in_a_row(lambda x, du, target: target.copy_(x), check.device)}
    for kind in kinds(check):
        with backends.backend(kind):  # what a graph captures here, it replays anywhere
            variants[kind] = given.in_a_row(call, check.device)
        if check.device.type != "cuda":
            variants[kind] = timing.Within(
                functools.partial(backends.backend, kind), variants[kind]
            )
    if form == "P":
        variants["x + sigma * randn_like(x)"] = given.in_a_row(
            lambda x, du, target: x + narrow * torch.randn_like(x), check.device
        )
    timed = in_turns(check, variants, "copy", 0.4)
    for kind in kinds(check):
        if given.beyond_cache and "ratio" in timed[kind]:
            timed[kind]["share_of_copy"] = TRAFFIC[form] / 2 / timed[kind]["ratio"]
        if dtype is torch.bfloat16:
            name = check.machine.get("gpu", "")
            timed[kind]["expected_s"] = gpu_expectation.pass_seconds(name, form, kind, m * k)
    return {"beyond_cache": given.beyond_cache, "variants": per_call(timed, given.count)}


def perturb(check: Check) -> Rows:
    """P, Q and both in one pass."""
    shapes = [(8192, 8192), (8192, 4096), (4096, 1024), (65536, 64), (32, 1024)]
    cases = [(half(check), shape) for shape in shapes] + [
        (torch.float32, shape) for shape in shapes[:2]
    ]
    cases = [(torch.float32, (64, 24))] if check.rehearsal else cases
    rows: Rows = []
    for (dtype, (m, k)), form in itertools.product(cases, TRAFFIC):
        name = f"{form} {str(dtype).removeprefix('torch.')} {m}x{k}"
        rows.append((name, functools.partial(perturb_row, check, form, dtype, m, k)))
    return rows


# ---- a small layer in a graph --------------------------------------------------------------------


def graph_row(check: Check, m: int, k: int, n: int) -> dict:
    """A training step as a CUDA graph, where launches cost little."""
    plain, x, dy = peers.inputs_of((m, k, n), half(check), check.device)
    variants = {}
    for name in ("linear", "dip", "eager"):
        step = timing.training_step(peers.build(name, plain), x, dy)
        variants[name] = timing.captured(lambda _, step=step: step(), [None], device=check.device)
    return {"variants": in_turns(check, variants, "linear", 1.5)}


def graph(check: Check) -> Rows:
    shapes = (
        [(8, 16, 16)]
        if check.rehearsal
        else [(32, 1024, 1024), (512, 1024, 1024), (4096, 1024, 1024)]
    )
    return [(f"{m}x{k}x{n}", functools.partial(graph_row, check, m, k, n)) for m, k, n in shapes]


# ---- the fused linear ----------------------------------------------------------------------------


def crossover_row(check: Check, m: int, k: int, n: int) -> dict:
    """Triton's fused linear, which samples inside the product, over P and then the vendor's
    product."""
    options = {"device": check.device, "dtype": half(check)}
    xs = [
        torch.randn(m, k, **options)
        for _ in range(timing.sets_beyond_cache(2 * m * k, check.device, most=8))
    ]
    weight, bias = torch.randn(n, k, **options) / k**0.5, torch.randn(n, **options)
    sigma, key = torch.full((k,), 0.1, device=check.device), seed(check)

    def two_step(x: Tensor) -> Tensor:
        return F.linear(projection.perturb(x, sigma, key, DRAW, None), weight, bias)

    def fused(x: Tensor) -> Tensor:
        from dipkernels.triton_kernels.linear import linear

        return linear(x, weight, bias, sigma, key, *DRAW[1:])

    calls = {"two-step": (kinds(check)[0], two_step)}
    if "triton" in kinds(check):
        calls["fused"] = ("triton", fused)
    variants, results = {}, {}
    for name, (kind, call) in calls.items():
        with backends.backend(kind):
            results[name] = call(xs[0]).float()
            variants[name] = timing.captured(call, xs, device=check.device)
    if "fused" in results:
        error, largest = (
            (results["fused"] - results["two-step"]).abs().max(),
            results["two-step"].abs().max(),
        )
        if not error <= 0.05 * largest:
            raise AssertionError(f"fused: expected the two steps' y, off by {error.item():.2e}")
    return {"variants": per_call(in_turns(check, variants, "two-step", 0.3), len(xs))}


def crossover(check: Check) -> Rows:
    sizes = [(m, k) for m in (4096, 256) for k in (4096, 1024)] + [(16, 1024)]
    shapes = [(m, k, n) for m, k in sizes for n in (128, 256, 64, 512, 1024)]
    shapes = [(8, 16, 16)] if check.rehearsal else shapes
    return [
        (f"{m}x{k}x{n}", functools.partial(crossover_row, check, m, k, n)) for m, k, n in shapes
    ]
