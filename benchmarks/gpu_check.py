"""One command that proves and measures the GPU side: python benchmarks/gpu_check.py, no network, under ten minutes.

Needs torch for CUDA, nvcc, and from Python setuptools, ninja, numpy and pytest; no installation of this package: the source tree is used.
Builds the library for the GPU at hand, runs tests/gpu, then times kernels, layers and a transformer block, and writes
benchmarks/results/<gpu>-<date>.json, .png and .txt. Every section has a time limit; one that fails is recorded as
failed, the others still run, and the exit code is 1. --dry-run takes the same code through tiny shapes on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import itertools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

LIMIT_S = 570
COPY_BYTES = 1 << 30


@dataclass
class Check:
    """What the sections share: the device, the clock, and the record that is written."""

    dry: bool
    device: torch.device
    started: float = field(default_factory=time.monotonic)
    section_ends: float = 0.0
    record: dict = field(default_factory=dict)

    def left(self) -> float:
        return min(self.section_ends, self.started + LIMIT_S) - time.monotonic()

    @property
    def copy_bandwidth(self) -> float | None:
        return self.record.get("copy", {}).get("rows", [{}])[0].get("bytes_per_s")


SECTIONS: list[tuple[str, int, object]] = []


def section(limit_s: int):
    """Registers a function (Check) -> dict; it is given limit_s seconds and asks check.left()."""

    def register(function):
        SECTIONS.append((function.__name__, limit_s, function))
        return function

    return register


# ---- measuring -----------------------------------------------------------------------------------------------------


def synchronize(check: Check) -> None:
    if check.device.type == "cuda":
        torch.cuda.synchronize()


def seconds(check: Check, call, times: int) -> float:
    """Of one call, over `times` calls in a row, each with the index of its inputs."""
    if isinstance(call, OfKind):
        with kernels(call.kind):
            return seconds(check, call.call, times)
    if check.device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for i in range(times):
            call(i)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / times
    begin = time.perf_counter()
    for i in range(times):
        call(i)
    return (time.perf_counter() - begin) / times


def interleaved(check: Check, variants: dict, budget_s: float) -> dict[str, list[float]]:
    """Seconds per call of each variant, round by round: all variants in a round, so that drift meets them alike.

    A variant that raises is dropped and its error returned under its name instead of times.
    """
    times: dict = {}
    calls = {}
    for name, call in variants.items():
        try:
            for i in range(2 if check.dry else 5):
                call(i)
            synchronize(check)
            once = seconds(check, call, 2)
            calls[name] = max(1, min(200, int(0.01 / max(once, 1e-7)))) if not check.dry else 1
            times[name] = []
        except Exception as error:
            times[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    end = time.monotonic() + min(budget_s, max(check.left(), 0))
    rounds = 0
    while calls and (rounds < 3 or (time.monotonic() < end and rounds < 25)):
        for name, count in calls.items():
            times[name].append(seconds(check, variants[name], count))
        rounds += 1
        if check.dry and rounds == 3:
            break
    return times


def summarize(times: dict, base: str) -> dict:
    """Median seconds, and the median and quartiles of the per-round ratios to `base`."""
    out = {}
    for name, series in times.items():
        if isinstance(series, str):
            out[name] = {"error": series}
            continue
        out[name] = {"seconds": statistics.median(series), "rounds": len(series)}
        if isinstance(times.get(base), list):
            ratios = sorted(a / b for a, b in zip(series, times[base]))
            out[name]["ratio"] = statistics.median(ratios)
            out[name]["quartiles"] = [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]]
    return out


def sets_beyond_cache(check: Check, bytes_each: int) -> int:
    """How many input sets exceed the L2 cache together, three times over."""
    cache = (
        getattr(torch.cuda.get_device_properties(check.device), "L2_cache_size", 50 << 20)
        if check.device.type == "cuda"
        else 1
    )
    return max(2, min(64, -(-3 * cache // max(bytes_each, 1))))


# ---- what runs -----------------------------------------------------------------------------------------------------


def kernel_kinds(check: Check) -> tuple[str, ...]:
    from dipkernels import backends

    if check.dry:
        return ("cpu",)
    return ("cuda-fast", "cuda-exact", *(("triton",) if backends.has_triton() else ()))


@contextlib.contextmanager
def kernels(kind: str):
    """Everything inside runs on one backend, and for CUDA one tier."""
    from dipkernels import backends

    name, _, tier = kind.partition("-")
    if name == "cpu" and "portable" not in backends.library().cpu_capabilities:
        name = "reference"
    with backends.backend(name):
        if name == "cuda":
            backends._c_functions(backends.library().path).dip_set_cuda_exact(int(tier == "exact"))
        try:
            yield
        finally:
            if name == "cuda":
                backends._c_functions(backends.library().path).dip_set_cuda_exact(0)


@dataclass
class OfKind:
    """A call on one backend and tier; `seconds` chooses those once, outside the time that it takes."""

    kind: str
    call: object

    def __call__(self, i):
        with kernels(self.kind):
            return self.call(i)


def _seed(check: Check):
    return torch.tensor([12345, 0], device=check.device)


# ---- build and test ------------------------------------------------------------------------------------------------


def run_tool(check: Check, command: list[str], limit_s: float, **env) -> dict:
    """The command's return code and the end of what it said; raises where it fails."""
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **env},
            timeout=max(limit_s, 1),
            capture_output=True,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired as slow:
        tail = (slow.stdout or b"")[-2000:]
        raise RuntimeError(f"{' '.join(command[:4])}: ran past {limit_s:.0f} s; {tail!r}") from None
    output = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])}: exit code {done.returncode}\n{output[-6000:]}")
    return {"output_tail": output[-1500:]}


@section(180)
def build(check: Check) -> dict:
    if check.dry:
        return {"skipped": "dry run"}
    major, minor = torch.cuda.get_device_capability()
    begin = time.monotonic()
    environment = {"DIPKERNELS_CUDA": "1", "DIPKERNELS_CUDA_ARCHS": f"{major}{minor}"}
    result = run_tool(check, [sys.executable, "setup.py", "build_ext", "--inplace"], check.left(), **environment)
    return {"build_s": time.monotonic() - begin, **result}


@section(210)
def tests(check: Check) -> dict:
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/gpu"]
    result = run_tool(check, command, check.left())
    (line,) = re.findall(r"^(?:=+ )?(\d+ (?:passed|skipped).*?)(?: =+)?$", result["output_tail"], re.M)[-1:] or [
        "no summary"
    ]
    if not check.dry and "passed" not in line:
        raise RuntimeError(f"tests/gpu: expected passing tests, got {line!r}")
    return {"summary": line, **result}


@section(100)
def sanitizer(check: Check) -> dict:
    """Every CUDA kernel once under memcheck, then racecheck, on odd shapes."""
    tool = shutil.which("compute-sanitizer")
    code = (
        "import torch; from dipkernels import ops\n"
        f"device = '{check.device.type}'; seed = torch.tensor([1, 2], device=device)\n"
        "for shape in [(33, 40), (5, 23), (2, 24, 8), (2, 13, 7)]:\n"
        "    for dtype in (torch.bfloat16, torch.float32):\n"
        "        x = torch.randn(shape, device=device).to(dtype); sigma = torch.ones(shape[1], device=device)\n"
        "        ops.perturb(x, sigma, seed, 1, 0, 0, 0, 1, 1.0, False, None)\n"
        "        ops.perturb_bwd(x, sigma, seed, 1, 0, 0, 0, 1, 1.0, False)\n"
        "        ops.perturb_replay(x, x, sigma, seed, 1, 0, 0, 0, 1, 1.0, False, None)\n"
    )
    if check.dry:
        return run_tool(check, [sys.executable, "-c", code], check.left())
    if tool is None:
        return {"skipped": "compute-sanitizer is not installed"}
    result = {}
    for name in ("memcheck", "racecheck"):
        command = [tool, "--tool", name, "--error-exitcode", "9", sys.executable, "-c", code]
        result[name] = run_tool(
            check, command, check.left() / (2 if name == "memcheck" else 1), DIPKERNELS_BACKEND="cuda"
        )
    return result


# ---- time: kernels -------------------------------------------------------------------------------------------------


@section(10)
def copy_bandwidth(check: Check) -> dict:
    """Device memory's own rate: bytes read plus bytes written by a large copy."""
    size = 1 << 16 if check.dry else COPY_BYTES
    source = torch.randn(size // 4, device=check.device)
    target = torch.empty_like(source)
    times = interleaved(check, {"copy": lambda i: target.copy_(source)}, 2)["copy"]
    rate = 2 * size / statistics.median(times)
    check.record["copy"] = {"rows": [{"bytes_per_s": rate}]}
    return {"bytes_per_s": rate}


def _agrees(check: Check, x, sigma, u, dsigma) -> None:
    """Some rows of u, and all of dsigma where that is affordable, against the float64 reference."""
    from dipkernels import reference

    rows = min(64, x.shape[0])
    want = reference.perturb(x[-rows:], sigma, _seed(check), 1, x.shape[0] - rows, 0, 0, 1, 1.0, False, torch.float64)
    error = (u[-rows:].double() - want).abs() - torch.finfo(u.dtype).eps * want.abs()
    if not error.max() <= 1e-5:
        raise AssertionError(f"perturb is off by {error.max().item():.2e} at {tuple(x.shape)} {x.dtype}")
    if x.numel() <= 1 << 22:
        want = reference.perturb_bwd(x, sigma, _seed(check), 1, 0, 0, 0, 1, 1.0, False)
        if not torch.allclose(dsigma, want, rtol=1e-3, atol=1e-3 * x.shape[0] ** 0.5):
            raise AssertionError(
                f"perturb_bwd is off by {(dsigma - want).abs().max().item():.2e} at {tuple(x.shape)} {x.dtype}"
            )


def _perturb_rows(check: Check, dtype: torch.dtype, m: int, k: int) -> list[dict]:
    from dipkernels import ops

    size = m * k * torch.empty((), dtype=dtype).element_size()
    xs = [torch.randn(m, k, device=check.device).to(dtype) for _ in range(min(sets_beyond_cache(check, size), 16))]
    sigma, seed, where = torch.full((k,), 0.1, device=check.device), _seed(check), (1, 0, 0, 0, 1, 1.0, False)
    kinds = kernel_kinds(check)

    def x(i):
        return xs[i % len(xs)]

    forms = {  # passes over memory of x's size, and the call
        "P": (2, lambda i: ops.perturb(x(i), sigma, seed, *where, None)),
        "Q": (1, lambda i: ops.perturb_bwd(x(i), sigma, seed, *where)),
        "PQ": (3, lambda i: ops.perturb_replay(x(i), x(i + 1), sigma, seed, *where, None)),
    }
    for kind in kinds:
        with kernels(kind):
            _agrees(check, xs[0], sigma, forms["P"][1](0), forms["Q"][1](0))
    rows = []
    for form, (passes, call) in forms.items():
        variants: dict = {kind: OfKind(kind, call) for kind in kinds}
        if form == "P":
            narrow = sigma.to(dtype)
            variants["x + sigma * randn_like(x)"] = lambda i, narrow=narrow: x(i) + narrow * torch.randn_like(x(i))
        timed = summarize(interleaved(check, variants, 1.0), kinds[0])
        for entry in timed.values():
            if "seconds" in entry and check.copy_bandwidth:
                entry["share_of_copy_bandwidth"] = passes * size / entry["seconds"] / check.copy_bandwidth
        rows.append({"form": form, "dtype": str(dtype), "m": m, "k": k, "variants": timed})
    return rows


@section(60)
def perturb(check: Check) -> dict:
    """P, Q and both in one pass: microseconds, and the share of the copy's bandwidth."""
    shapes = [(64, 24)] if check.dry else [(8192, 8192), (8192, 4096), (65536, 64), (4096, 1024), (32, 1024)]
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for m, k in shapes:
            rows += _perturb_rows(check, dtype, m, k)
            if check.left() < 5:
                return {"rows": rows, "cut_short": True}
    return {"rows": rows}


# ---- time: layers --------------------------------------------------------------------------------------------------


class Eager(nn.Module):
    """The expression that the layer replaces."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear
        self.log_variance = nn.Parameter(torch.full((linear.in_features,), -4.6, device=linear.weight.device))

    def forward(self, x):
        sigma = torch.exp(self.log_variance / 2).to(x.dtype)
        return self.linear(x + sigma * torch.randn_like(x))


def _layers(linear: nn.Linear) -> dict[str, nn.Module]:
    import dipkernels as dip

    return {
        "linear": linear,
        "eager": Eager(copy.deepcopy(linear)),
        "dip": dip.convert(copy.deepcopy(linear), init_variance=0.01),
    }


def _forward_and_step(module, xs, dy):
    def forward(i):
        with torch.no_grad():
            return module(xs[i % len(xs)])

    def step(i):
        x = xs[i % len(xs)]
        for p in module.parameters():
            p.grad = None
        x.grad = None
        module(x).backward(dy)

    return {"forward": forward, "step": step}


def _saved_bytes(module, x) -> int:
    """What autograd keeps of one forward pass, each storage once, without the parameters."""
    own, kept = {p.untyped_storage().data_ptr() for p in module.parameters()}, {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    return sum(kept.values())


def _peak_bytes(check: Check, call) -> int | None:
    if check.device.type != "cuda":
        return None
    call(0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@section(110)
def layers(check: Check) -> dict:
    """Forward and training step over nn.Linear; the eager expression, and torch.compile of both, beside the layer."""
    shapes = (
        [(32, 16, 24)]
        if check.dry
        else [(8192, 4096, 4096), (8192, 4096, 1024), (4096, 1024, 1024), (65536, 64, 64), (32, 1024, 1024)]
    )
    rows = []
    for m, k, n in shapes:
        dtype = torch.float32 if check.dry else torch.bfloat16
        base = nn.Linear(k, n, device=check.device, dtype=dtype)
        count = min(sets_beyond_cache(check, m * k * 2), 8)
        xs = [torch.randn(m, k, device=check.device, dtype=dtype, requires_grad=True) for _ in range(count)]
        dy = torch.randn(m, n, device=check.device, dtype=dtype)
        modules = _layers(base)
        # torch.compile is given the shapes that the targets name; its compilations would not fit the time for all.
        compiled = (
            {}
            if check.dry or m == 65536
            else {
                f"{name}, compiled": torch.compile(copy.deepcopy(modules[name]), dynamic=False)
                for name in ("eager", "dip")
            }
        )
        runs = {name: _forward_and_step(module, xs, dy) for name, module in {**modules, **compiled}.items()}
        for what in ("forward", "step"):
            variants = {}
            for name, functions in runs.items():
                if name == "dip":
                    for kind in kernel_kinds(check):
                        variants[f"dip {kind}"] = OfKind(kind, functions[what])
                else:
                    variants[name] = functions[what]
            timed = summarize(interleaved(check, variants, 2.0), "linear")
            if "seconds" in timed["linear"]:
                flops = 2 * m * n * k * (1 if what == "forward" else 3)
                timed["linear"]["tflop_per_s"] = flops / timed["linear"]["seconds"] / 1e12
            rows.append({"what": what, "m": m, "k": k, "n": n, "dtype": str(dtype), "variants": timed})
        memory = {}
        for name, module in modules.items():
            memory[name] = {
                "saved_bytes": _saved_bytes(module, xs[0]),
                "peak_bytes": _peak_bytes(check, runs[name]["step"]),
            }
        rows[-1]["memory"] = memory
        if check.left() < 15:
            return {"rows": rows, "cut_short": True}
    return {"rows": rows}


class Averaged(nn.Module):
    """The mean over `samples` draws of act(layer(x)), one call after another."""

    def __init__(self, layer: nn.Module, activation: str, samples: int = 1):
        super().__init__()
        self.layer, self.activation, self.samples = layer, activation, samples

    def forward(self, x):
        from dipkernels.row_blocks import ACTIVATIONS

        act = ACTIVATIONS[self.activation]
        total = act(self.layer(x))
        for _ in range(self.samples - 1):
            total = total + act(self.layer(x))
        return total / self.samples if self.samples > 1 else total


@section(60)
def averaging(check: Check) -> dict:
    """Behind an activation: the exact mean over act(nn.Linear), and eight real samples in one pass over eight calls."""
    import dipkernels as dip

    samples, rows = 2 if check.dry else 8, []
    for m, k, n in [(16, 24, 16)] if check.dry else [(8192, 4096, 4096), (4096, 1024, 1024)]:
        options = {"device": check.device, "dtype": torch.float32 if check.dry else torch.bfloat16}
        xs = [torch.randn(m, k, **options, requires_grad=True) for _ in range(2)]
        dy, plain = torch.randn(m, n, **options), nn.Linear(k, n, **options)
        for activation in ("relu", "gelu", "silu"):
            make = {"activation": activation, "init_variance": 0.01, **options}
            modules = {
                "act(linear)": Averaged(plain, activation),
                "analytic": dip.DIPLinear(k, n, estimator="analytic", **make),
                f"{samples} calls": Averaged(Eager(plain), activation, samples),
                f"mean of {samples}": dip.DIPLinear(k, n, estimator="mean", num_samples=samples, **make),
            }
            names = list(modules)
            # With the same weights the expectation is near the mean, and both are near the plain layer.
            with torch.no_grad():
                for name in (names[1], names[3]):
                    modules[name].weight.copy_(plain.weight)
                    modules[name].bias.copy_(plain.bias)
                    off = (modules[name](xs[0]) - modules[names[0]](xs[0])).float().abs().mean()
                    if not off < 0.2:
                        raise AssertionError(f"{name} behind {activation} is off by {off.item():.3f} on average")
            runs = {name: _forward_and_step(module, xs, dy) for name, module in modules.items()}
            for what, base in itertools.product(("forward", "step"), (names[0], names[2])):
                pair = names[:2] if base == names[0] else names[2:]
                timed = summarize(interleaved(check, {name: runs[name][what] for name in pair}, 0.7), base)
                for name in pair:
                    if what == "step" and "seconds" in timed[name]:
                        timed[name]["peak_bytes"] = _peak_bytes(check, runs[name][what])
                rows.append({"form": activation, "what": what, "m": m, "k": k, "n": n, "variants": timed})
            if check.left() < 8:
                return {"rows": rows, "cut_short": True}
    return {"rows": rows}


@section(20)
def graph(check: Check) -> dict:
    """A small layer's training step in a CUDA graph, where launches cost little."""
    m, k, n = (8, 16, 16) if check.dry else (32, 1024, 1024)
    dtype = torch.float32 if check.dry else torch.bfloat16
    x = torch.randn(m, k, device=check.device, dtype=dtype, requires_grad=True)
    dy = torch.randn(m, n, device=check.device, dtype=dtype)
    variants = {}
    for name, module in _layers(nn.Linear(k, n, device=check.device, dtype=dtype)).items():
        step = _forward_and_step(module, [x], dy)["step"]
        if check.dry:
            variants[name] = step
            continue
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for i in range(3):
                step(i)
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            step(0)
        variants[name] = lambda i, captured=captured: captured.replay()
    return {"m": m, "k": k, "n": n, "variants": summarize(interleaved(check, variants, 3.0), "linear")}


def _crossover_row(check: Check, fused, m: int, k: int, n: int) -> dict:
    from dipkernels import ops

    options = {"device": check.device, "dtype": torch.float32 if check.dry else torch.bfloat16}
    xs = [torch.randn(m, k, **options) for _ in range(min(sets_beyond_cache(check, m * k * 2), 8))]
    weight, bias = torch.randn(n, k, **options) / k**0.5, torch.randn(n, **options)
    sigma, seed = torch.full((k,), 0.1, device=check.device), _seed(check)

    def two_step(i):
        return F.linear(ops.perturb(xs[i % len(xs)], sigma, seed, 1, 0, 0, 0, 1, 1.0, False, None), weight, bias)

    variants: dict = {"two-step": OfKind(kernel_kinds(check)[0], two_step)}
    if fused is not None:
        variants["fused"] = lambda i: fused(xs[i % len(xs)], weight, bias, sigma, seed, 0, 0, 0, 1, 1.0, False)
        got, want = variants["fused"](0).float(), variants["two-step"](0).float()
        if not (got - want).abs().max() <= 0.05 * want.abs().max():
            raise AssertionError(f"fused linear is off by {(got - want).abs().max().item():.2e} at {(m, k, n)}")
    return {"m": m, "k": k, "n": n, "variants": summarize(interleaved(check, variants, 0.4), "two-step")}


@section(40)
def crossover(check: Check) -> dict:
    """Triton's fused linear, which samples inside the product, against P and then the vendor's product."""
    fused = None
    if not check.dry or os.environ.get("TRITON_INTERPRET") == "1":
        from dipkernels.triton_kernels.linear import linear as fused
    shapes = [(m, k, n) for k in (1024, 4096) for n in (64, 128, 256, 512, 1024) for m in (16, 256, 4096)]
    rows = []
    for shape in [(8, 16, 16)] if check.dry else shapes:
        rows.append(_crossover_row(check, fused, *shape))
        if check.left() < 3:
            return {"rows": rows, "cut_short": True}
    return {"rows": rows}


# ---- time: a block -------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A transformer block: LayerNorm, attention, LayerNorm, MLP."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        b, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def _noised_by_hand(block: Block) -> Block:
    block = copy.deepcopy(block)
    for name in ("qkv", "out", "up", "down"):
        setattr(block, name, Eager(getattr(block, name)))
    return block


@section(90)
def block(check: Check) -> dict:
    """The training step of a block: ours, in eager mode and compiled, over torch.compile of the eager expression."""
    import dipkernels as dip

    b, t, width, heads = (2, 8, 16, 2) if check.dry else (16, 1024, 1024, 16)
    dtype = torch.float32 if check.dry else torch.bfloat16
    plain = Block(width, heads).to(check.device, dtype)
    modules = {
        "plain": plain,
        "dip": dip.convert(copy.deepcopy(plain), init_variance=0.01),
        "eager": _noised_by_hand(plain),
    }
    if not check.dry:
        modules |= {
            f"{name}, compiled": torch.compile(copy.deepcopy(module), dynamic=False)
            for name, module in list(modules.items())
        }
    xs = [torch.randn(b, t, width, device=check.device, dtype=dtype, requires_grad=True) for _ in range(2)]
    dy = torch.randn_like(xs[0])
    steps = {name: _forward_and_step(module, xs, dy)["step"] for name, module in modules.items()}
    base = "eager" if check.dry else "eager, compiled"
    timed = summarize(interleaved(check, steps, 6.0), base)
    for name, step in steps.items():
        if "seconds" in timed[name]:
            timed[name]["peak_bytes"] = _peak_bytes(check, step)
    return {"batch": b, "tokens": t, "width": width, "base": base, "variants": timed}


# ---- the record ----------------------------------------------------------------------------------------------------


def machine(check: Check) -> dict:
    def git(*arguments):
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    gpu = {}
    if check.device.type == "cuda":
        properties = torch.cuda.get_device_properties(check.device)
        gpu = {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "devices": torch.cuda.device_count(),
        }
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": check.device.type,
        **gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton_version,
        "commit": git("rev-parse", "HEAD"),
        "modified": bool(git("status", "--porcelain", "--untracked-files=no")),
        "dry_run": check.dry,
    }


def _line(name: str, entry: dict) -> str:
    if "error" in entry:
        return f"    {name:28s} {entry['error']}"
    text = f"    {name:28s} {entry['seconds'] * 1e6:10.1f} us"
    if "ratio" in entry:
        low, high = entry["quartiles"]
        text += f"   x {entry['ratio']:.3f} [{low:.3f}, {high:.3f}]"
    if "share_of_copy_bandwidth" in entry:
        text += f"   {entry['share_of_copy_bandwidth']:.0%} of copy"
    if entry.get("peak_bytes") is not None:
        text += f"   peak {entry['peak_bytes'] / 2**20:.0f} MiB"
    return text


def summary(record: dict) -> str:
    lines = [", ".join(f"{k} {v}" for k, v in record["machine"].items() if v not in (None, {}))]
    for name, result in record["sections"].items():
        cut = ", cut short" if result.get("cut_short") else ""
        lines.append(f"\n{name}: {result['status']}, {result['elapsed_s']:.0f} s{cut}")
        if "error" in result:
            lines.append("    " + result["error"].strip().replace("\n", "\n    "))
        for key in ("skipped", "summary", "build_s", "bytes_per_s"):
            if key in result:
                lines.append(f"    {key}: {result[key]}")
        for row in [*result.get("rows", []), *([result] if "variants" in result else [])]:
            sizes = [str(row[key]) for key in ("m", "k", "n", "batch", "tokens", "width") if key in row]
            lines.append(
                " ".join(["  ", *(row[key] for key in ("form", "what", "dtype") if key in row), " x ".join(sizes)])
            )
            lines += [_line(variant, entry) for variant, entry in row["variants"].items()]
            for layer, kept in row.get("memory", {}).items():
                lines.append(f"    {layer:28s} saved {kept['saved_bytes']} bytes, peak {kept['peak_bytes']}")
    return "\n".join(lines) + "\n"


def plot(record: dict, path: Path) -> None:
    """The layer's forward and step over nn.Linear, shape by shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = record["sections"].get("layers", {}).get("rows", [])
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), squeeze=False)
    for axis, what in zip(axes[0], ("forward", "step")):
        chosen = [row for row in rows if row["what"] == what]
        names = list(dict.fromkeys(name for row in chosen for name in row["variants"] if name != "linear"))
        for i, name in enumerate(names):
            points = [(j + 0.8 * i / max(len(names), 1), row["variants"][name]["ratio"])
                      for j, row in enumerate(chosen) if "ratio" in row["variants"].get(name, {})]  # fmt: skip
            axis.bar([p[0] for p in points], [p[1] for p in points], width=0.8 / max(len(names), 1), label=name)
        axis.set_xticks(
            [j + 0.35 for j in range(len(chosen))],
            [f"{row['m']}x{row['k']}x{row['n']}" for row in chosen],
            rotation=20,
            fontsize=8,
        )
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_title(f"{what}, time over nn.Linear")
    axes[0][0].legend(fontsize=7)
    figure.suptitle(", ".join(str(record["machine"].get(key)) for key in ("gpu", "torch", "date")))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _errors(result: dict):
    """Of the variants that did not run."""
    for row in [*result.get("rows", []), result]:
        for name, entry in row.get("variants", {}).items():
            if "error" in entry:
                yield f"{name}: {entry['error']}"


def run(check: Check) -> dict:
    record = check.record
    record["machine"] = machine(check)
    record["sections"] = {}
    for name, limit_s, function in SECTIONS:
        begin = time.monotonic()
        check.section_ends = begin + limit_s
        if check.left() < 2:
            record["sections"][name] = {"status": "failed", "elapsed_s": 0.0, "error": "no time was left"}
            continue
        try:
            result = {"status": "ok", **function(check)}
            if "skipped" in result:
                result["status"] = "skipped"
            if errors := sorted(set(_errors(result))):
                result |= {"status": "failed", "error": "\n".join(errors)}
        except Exception as error:
            result = {
                "status": "failed",
                "error": f"{type(error).__name__}: {error}",
                "traceback": traceback.format_exc(),
            }
        result["elapsed_s"] = time.monotonic() - begin
        record["sections"][name] = result
        print(f"{name}: {result['status']}, {result['elapsed_s']:.0f} s", flush=True)
        if check.device.type == "cuda":
            with contextlib.suppress(Exception):
                torch.cuda.empty_cache()
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes on the CPU: checks this program, measures nothing"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        print(
            f"gpu_check: torch {torch.__version__} finds no CUDA device; --dry-run checks the program without one",
            file=sys.stderr,
        )
        return 2
    check = Check(arguments.dry_run, torch.device("cpu" if arguments.dry_run else "cuda"))
    record = run(check)
    gpu = re.sub(r"\W+", "-", record["machine"].get("gpu", "dry-run")).strip("-").lower()
    stem = arguments.out / f"{gpu}-{record['machine']['date'][:10]}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        plot(record, stem.with_suffix(".png"))
    except Exception as error:
        record["plot_error"] = f"{type(error).__name__}: {error}"
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    text = summary(record)
    stem.with_suffix(".txt").write_text(text)
    print(text)
    failed = [name for name, result in record["sections"].items() if result["status"] == "failed"]
    print(f"gpu_check: {'FAILED: ' + ', '.join(failed) if failed else 'passed'}; {stem}.json")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
