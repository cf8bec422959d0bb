"""Layers and a block beside nn.Linear and the eager expression, compiled and not, and averages
behind an activation."""

from __future__ import annotations

import functools
import itertools

import networks
import peers
import timing
import torch
from torch import Tensor, nn

import dipkernels as dip
from dipkernels import backends
from dipkernels.ops.activations import ACTIVATIONS
from gpucheck.child import Check, Rows
from gpucheck.kernels import half, in_turns, kinds, peak


def prepare(check: Check) -> None:
    """Before each shape: nothing compiled is left, so that the limit of recompilations is never
    near.

    peers.build makes reaching it an error; torch alone would run the rest in eager mode and say
    nothing.
    """
    peers.forget_compiled()
    if check.rehearsal:
        peers.compile_backend = "eager"


# ---- layers --------------------------------------------------------------------------------------


class Shape:
    """The variants of one layer, checked, and inputs that L2 does not hold."""

    def __init__(self, check: Check, m: int, k: int, n: int) -> None:
        prepare(check)
        options = {"device": check.device, "dtype": half(check)}
        plain = nn.Linear(k, n, **options)
        count = timing.sets_beyond_cache(2 * m * k, check.device, most=8)
        self.xs = [torch.randn(m, k, **options, requires_grad=True) for _ in range(count)]
        self.dy = torch.randn(m, n, **options)
        self.modules = {name: peers.build(name, plain) for name in ("linear", "eager", "dip")}
        self.modules |= {
            f"{name}, compiled": peers.build(f"{name}, compiled", plain)
            for name in ("eager", "dip")
        }
        self.failed: dict[str, dict] = {}
        for name, module in self.modules.items():
            try:
                peers.check_linear(name, module, plain, self.xs[0], self.dy)
            except Exception as error:
                self.failed[name] = {"error": f"{type(error).__name__}: {error}"[:1000]}

    def call(self, name: str, what: str):
        module = self.modules[name]
        if what == "forward":
            return timing.rotate(module, self.xs)
        steps = [timing.training_step(module, x, self.dy) for x in self.xs]
        return timing.rotate(lambda step: step(), steps)


shape = functools.lru_cache(maxsize=1)(Shape)


def layer_row(check: Check, what: str, m: int, k: int, n: int) -> dict:
    given = shape(check, m, k, n)
    variants: dict = {}
    for name in given.modules:
        if name in given.failed:
            continue
        if name == "dip":
            for kind in kinds(check):
                context = functools.partial(backends.backend, kind)
                variants[f"dip {kind}"] = timing.Within(context, given.call(name, what))
        else:
            variants[name] = given.call(name, what)
    timed = in_turns(check, variants, "linear", 1.5)
    flops = 2 * m * n * k * (1 if what == "forward" else 3)
    timed["linear"]["flop_per_s"] = flops / timed["linear"]["seconds"]
    row = {"variants": timed | given.failed}
    if what == "step":
        right = [name for name in ("linear", "eager", "dip") if name not in given.failed]
        row["memory"] = {name: memory(check, given, name) for name in right}
    return row


def memory(check: Check, given: Shape, name: str) -> dict:
    module, x = given.modules[name], given.xs[0]
    saved = timing.saved_bytes(timing.forward(module, x), list(module.parameters()))
    return {"saved_bytes": saved, "peak_bytes": peak(given.call(name, "step"), check.device)}


def layers(check: Check) -> Rows:
    shapes = [
        (8192, 8192, 8192),
        (8192, 4096, 4096),
        (4096, 1024, 1024),
        (8192, 4096, 1024),
        (32, 1024, 1024),
        (65536, 64, 64),
    ]
    shapes = [(32, 16, 24)] if check.rehearsal else shapes
    return [
        (f"{what} {m}x{k}x{n}", functools.partial(layer_row, check, what, m, k, n))
        for (m, k, n), what in itertools.product(shapes, ("forward", "step"))
    ]


# ---- a block -------------------------------------------------------------------------------------


def block_row(check: Check, batch: int, tokens: int, width: int, heads: int) -> dict:
    """The training step of a transformer block over torch.compile of the eager expression."""
    prepare(check)
    plain = networks.TransformerBlock(width, heads).to(check.device, half(check))
    x = torch.randn(
        batch, tokens, width, device=check.device, dtype=half(check), requires_grad=True
    )
    dy = torch.randn_like(x)
    names = ("linear", "dip", "eager")
    modules = {
        name: peers.build(name, plain)
        for name in (*names, *(f"{name}, compiled" for name in names))
    }
    peers.check_converted(modules["dip"], x.detach()[:1])
    steps = {name: timing.training_step(module, x, dy) for name, module in modules.items()}
    return {"variants": in_turns(check, steps, "eager, compiled", 6.0, peaks=True)}


def block(check: Check) -> Rows:
    sizes = (2, 8, 16, 2) if check.rehearsal else (16, 1024, 1024, 16)
    name = f"transformer block {'x'.join(map(str, sizes[:3]))}"
    return [(name, functools.partial(block_row, check, *sizes))]


# ---- averages behind an activation ---------------------------------------------------------------


class Averaged(nn.Module):
    """The mean over `samples` draws of act(layer(x)), one call after another."""

    def __init__(self, layer: nn.Module, activation: str, samples: int = 1) -> None:
        super().__init__()
        self.layer, self.act, self.samples = layer, ACTIVATIONS[activation], samples

    def forward(self, x: Tensor) -> Tensor:
        total = self.act(self.layer(x))
        for _ in range(self.samples - 1):
            total = total + self.act(self.layer(x))
        return total / self.samples if self.samples > 1 else total


def averaging_row(check: Check, activation: str, what: str, m: int, k: int, n: int) -> dict:
    """The exact mean over act(nn.Linear), and real samples in one pass over as many calls."""
    samples = 2 if check.rehearsal else 8
    options = {"device": check.device, "dtype": half(check)}
    x, dy = torch.randn(m, k, **options, requires_grad=True), torch.randn(m, n, **options)
    plain = nn.Linear(k, n, **options)
    make = {"activation": activation, "init_variance": peers.VARIANCE, **options}
    base, calls = f"{activation}(linear)", f"{samples} calls"
    modules = {
        base: Averaged(plain, activation),
        "exact mean": dip.DIPLinear(k, n, estimator="analytic", **make),
        calls: Averaged(peers.build("eager", plain), activation, samples),
        f"mean of {samples}": dip.DIPLinear(k, n, estimator="mean", num_samples=samples, **make),
    }
    for name in ("exact mean", f"mean of {samples}"):
        modules[name].load_state_dict(plain.state_dict(), strict=False)
        off = (modules[name](x) - modules[base](x)).float().abs().mean().item()
        if not off < 0.2:  # the noise is small: both are near the plain layer
            raise AssertionError(
                f"{name}: expected outputs near {base}'s, off by {off:.3f} on average"
            )
    run = timing.forward if what == "forward" else functools.partial(timing.training_step, dy=dy)
    runs = {name: run(module, x) for name, module in modules.items()}
    timed: dict[str, dict] = {}
    names = list(runs)
    for first, second in (names[:2], names[2:]):
        pair = {first: runs[first], second: runs[second]}
        timed |= in_turns(check, pair, first, 0.35, peaks=what == "step")
    return {"variants": timed}


def averaging(check: Check) -> Rows:
    shapes = [(16, 24, 16)] if check.rehearsal else [(8192, 4096, 4096), (4096, 1024, 1024)]
    return [
        (
            f"{activation} {what} {m}x{k}x{n}",
            functools.partial(averaging_row, check, activation, what, m, k, n),
        )
        for (m, k, n), activation, what in itertools.product(
            shapes, ("relu", "gelu", "silu"), ("forward", "step")
        )
    ]
