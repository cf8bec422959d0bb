"""Choices inside the kernels, each setting timed against today's form in the same rounds, so that a
run decides: docs/measured_gpu_expectation.md says what each may gain.

To add one: a function that gives a context for each setting, today's form first, and its line in
SWITCHES.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import peers
import timing
import torch
from torch import Tensor, nn

from dipkernels import backends, library
from gpucheck.child import Check, Rows
from gpucheck.kernels import half, in_turns, per_call
from gpucheck.layers import prepare

Settings = dict[str, Callable[[], contextlib.AbstractContextManager]]

# Largest first
SHAPES = [(8192, 8192, 8192), (8192, 4096, 4096), (4096, 1024, 1024)]


@dataclass(frozen=True)
class Switch:
    name: str
    settings: Callable[[], Settings]
    how: tuple[str, ...] = ("calls", "graph")
    shapes: int = 3  # of SHAPES, the smallest


# Bits of dip_set_cuda_forms in csrc/perturb_op.cpp.
P_FROM_END, SUMS_FROM_END, ONE_LAUNCH = 1, 2, 4


@contextlib.contextmanager
def forms(bits: int) -> Iterator[None]:
    """CUDA's kernels in this form inside. A captured graph keeps what it was captured with."""
    if not library.load().cuda_archs:
        yield
        return
    functions = library.c_functions(library.load().path)
    before = functions.dip_cuda_forms()
    functions.dip_set_cuda_forms(bits)
    try:
        yield
    finally:
        functions.dip_set_cuda_forms(before)


def walk() -> Settings:
    """P's rows from the last on, the default; all from the first; all from the last."""
    named = {
        "P from the end": P_FROM_END,
        "from the start": 0,
        "from the end": P_FROM_END | SUMS_FROM_END,
    }
    return {name: functools.partial(forms, bits) for name, bits in named.items()}


def column_sum() -> Settings:
    """Q's partial sums added up by a second launch, the default, or by the last block."""
    named = {"two launches": P_FROM_END, "last block": P_FROM_END | ONE_LAUNCH}
    return {name: functools.partial(forms, bits) for name, bits in named.items()}


def compiled_keep() -> Settings:
    """What keep="auto" keeps under torch.compile: x, today's form, or u."""
    return {f"keep {keep}": functools.partial(backends.compiled_keep, keep) for keep in ("x", "u")}


def autocast_keep() -> Settings:
    """The same of float32 data under autocast, where "bytes" is u."""
    keeps = ("x", "bytes")
    return {f"keep by {keep}": functools.partial(backends.compiled_keep, keep) for keep in keeps}


class Autocast(nn.Module):
    """A module in mixed precision."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.module(x)


SWITCHES = (
    Switch("walk", walk),
    Switch("column sum", column_sum),
    Switch("compiled keep", compiled_keep, ("compiled",), shapes=2),
    Switch("compiled keep", autocast_keep, ("compiled, autocast",), shapes=2),
)


def switch_row(check: Check, switch: Switch, how: str, m: int, k: int, n: int) -> dict:
    """The training step over nn.Linear and over today's form: called, replayed as a CUDA graph, or
    compiled and called, under autocast too."""
    prepare(check)
    autocast, compiled = how.endswith("autocast"), how.startswith("compiled")
    options = {"device": check.device, "dtype": torch.float32 if autocast else half(check)}
    plain = nn.Linear(k, n, **options)
    dy = torch.randn(m, n, device=check.device, dtype=torch.bfloat16 if autocast else half(check))
    count = timing.sets_beyond_cache(2 * m * k, check.device, most=4)
    xs = [torch.randn(m, k, **options, requires_grad=True) for _ in range(count)]

    def step_of(module: nn.Module) -> Callable[[], object]:
        module = Autocast(module) if autocast else module
        if compiled:
            module = torch.compile(module, fullgraph=True, backend=peers.compile_backend)
        steps = [timing.training_step(module, x, dy) for x in xs]
        if how == "graph":
            return timing.captured(lambda step: step(), steps, device=check.device)
        return timing.rotate(lambda step: step(), steps)

    layer = peers.build("dip", plain)
    variants: dict = {"linear": step_of(peers.build("linear", plain))}
    settings = switch.settings()
    for name, context in settings.items():
        with context():  # a graph keeps what it was captured with
            call = step_of(layer)
            if compiled:  # traced here, for the setting is read while torch.compile traces
                call()
        variants[name] = timing.Within(context, call)
    today = next(iter(settings))
    # what is kept is memory too
    timed = in_turns(check, variants, today, 0.6, peaks=compiled)
    return {"variants": per_call(timed, count) if how == "graph" else timed}


def switches(check: Check) -> Rows:
    shapes = [(32, 16, 24)] if check.rehearsal else SHAPES
    return [
        (
            f"{switch.name} {how} {m}x{k}x{n}",
            functools.partial(switch_row, check, switch, how, m, k, n),
        )
        for switch in SWITCHES
        for how in switch.how
        for m, k, n in shapes[-switch.shapes :]
    ]
