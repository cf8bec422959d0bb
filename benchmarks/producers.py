"""What noise costs in the norm, activation or gated product that makes a layer's input:

    python benchmarks/producers.py [--docs]

Each fused operation beside torch's f alone, P alone, f then P, and the compiled expression: all
take turns in one process, and the figures are medians of the ratios to the fused one within a
round. Results are checked against the reference first.

    --quick             tiny shapes: does it run?
    --shapes 4096x1024  others, rows x features; --dtypes float32 bfloat16; --only layer silu
    --clock processor   one thread, and the time that it ran, for a machine that is never quiet
"""

from __future__ import annotations

import copy
import time

import machine
import peers
import report
import timing
import torch
import torch.nn.functional as F
from torch import Tensor

import dipkernels as dip
from dipkernels import functional, producers
from dipkernels.ops.activations import ACTIVATIONS

SHAPES = [(4096, 1024), (2048, 768), (256, 1024)]
QUICK_SHAPES = [(9, 64)]
KINDS = ("layer", "rms", *ACTIVATIONS, "gated silu", "gated gelu")
EPS = 1e-5
BUDGET_S = 1.0  # for each table row
VARIANTS = ("f", "P", "f, P", "f, P, compiled")


class Producer:
    """One f with its inputs: plain, noised by P behind it, and fused."""

    def __init__(
        self, kind: str, dtype: torch.dtype, shape: tuple[int, int], device: torch.device
    ) -> None:
        self.kind, k = kind, shape[1]
        count = 2 if kind.startswith("gated") else 1
        columns = {"layer": 2, "rms": 1}.get(kind, 0)
        self.x = [
            torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(count)
        ]
        self.columns = [
            torch.rand(k, device=device).to(dtype).requires_grad_() for _ in range(columns)
        ]
        self.log_variance = torch.full((k,), -6.0, device=device, requires_grad=True)
        self.seed = torch.tensor([peers.KEY, 3], device=device)

    def plain(self) -> Tensor:
        if self.kind == "layer":
            return F.layer_norm(self.x[0], self.x[0].shape[1:], *self.columns, EPS)
        if self.kind == "rms":
            return F.rms_norm(self.x[0], self.x[0].shape[1:], *self.columns, EPS)
        if len(self.x) == 2:
            return ACTIVATIONS[self.kind.split()[1]](self.x[0]) * self.x[1]
        return ACTIVATIONS[self.kind](self.x[0])

    def noised(self, y: Tensor) -> Tensor:
        return functional.perturb(y, self.log_variance, self.seed, log_variance=True)

    def expression(self) -> Tensor:
        """What torch.compile is given: its own random numbers, f and noise in one kernel."""
        y = self.plain()
        return y + torch.exp(self.log_variance / 2).to(y.dtype) * torch.randn_like(y)

    def fused(self) -> Tensor:
        noise = (self.log_variance, self.seed)
        if self.kind in ("layer", "rms"):
            bias = self.columns[1] if self.kind == "layer" else None
            return producers.norm(
                self.x[0], self.columns[0], bias, *noise, kind=self.kind, eps=EPS, log_variance=True
            )
        if len(self.x) == 2:
            return producers.gate(*self.x, *noise, kind=self.kind.split()[1], log_variance=True)
        return producers.activate(self.x[0], *noise, kind=self.kind, log_variance=True)

    def check(self) -> None:
        """u and every gradient, against float64: f by torch, the noise by the reference."""
        wide = copy.copy(self)
        wide.x, wide.columns = (
            [t.detach().double().requires_grad_() for t in ts] for ts in (self.x, self.columns)
        )
        wide.log_variance = self.log_variance.detach().double().requires_grad_()
        with dip.backend("reference"):
            u = wide.noised(wide.plain())
            du = torch.randn_like(u).to(self.x[0].dtype)
            want = u.detach(), *torch.autograd.grad(u, wide.leaves(), du.double())
        u = self.fused()
        got = u.detach(), *torch.autograd.grad(u, self.leaves(), du)
        limit = peers.tolerance(self.x[0].dtype)
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            what = f"{self.kind}: {f'gradient {i - 1}' if i else 'u'}"
            peers.require(what, peers.distance(a, b), limit)

    def leaves(self) -> list[Tensor]:
        return [*self.x, *self.columns, self.log_variance]


def rows_of(
    producer: Producer, budget_s: float, rounds: tuple[int, int], clock: str = "wall"
) -> list[dict]:
    """Forward, and forward with backward."""
    compiled = torch.compile(producer.expression, backend=peers.compile_backend, dynamic=False)
    stand_in = producer.x[0].detach().clone().requires_grad_()
    calls = {
        "f": producer.plain,
        "P": lambda: producer.noised(stand_in),
        "f, P": lambda: producer.noised(producer.plain()),
        "f, P, compiled": compiled,
        "fused": producer.fused,
    }
    du = torch.randn_like(stand_in)
    leaves = {name: producer.leaves() for name in calls}
    leaves["f"], leaves["P"] = leaves["f"][:-1], [stand_in, producer.log_variance]
    options = dict(budget_s=budget_s, rounds=rounds, always=tuple(calls), clock=clock)
    with torch.no_grad():
        forward = timing.interleave(calls, "fused", stand_in.device, **options)
    steps = {name: timing.backward_step(call, du, leaves[name]) for name, call in calls.items()}
    step = timing.interleave(steps, "fused", stand_in.device, **options)
    peers.forget_compiled()
    rows = []
    for what, timed in (("forward", forward), ("forward + backward", step)):
        rows.append({"what": what, "fused_s": timed["fused"]["seconds"], **timed})
        for figures in timed.values():
            figures.pop("seconds", None)  # the ratio times the fused one's
    return rows


def cells(row: dict) -> list[str]:
    """Milliseconds of the fused one; its time over that of f, P, f then P, compiled; and over the
    slower of f and P."""
    over = {name: 1 / row[name]["ratio"] for name in VARIANTS if "ratio" in row[name]}
    shown = [f"{over[name]:.2f}" if name in over else "-" for name in VARIANTS]
    return [f"{row['fused_s'] * 1e3:.3f}", *shown, f"{min(over['f'], over['P']):.2f}"]


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = report.command_line(__doc__, "producers")
    parser.add_argument("--shapes", nargs="+")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--clock", default="wall", choices=timing.CLOCKS)
    options = parser.parse_args(arguments)
    report.refuse_part(parser, options, "shapes", "dtypes", "only")
    torch.set_num_threads(options.threads if options.clock == "wall" else 1)
    device = torch.device("cpu")
    shapes = [tuple(map(int, text.split("x"))) for text in options.shapes or []] or SHAPES
    budget, rounds = (0.02, (2, 2)) if options.quick else (BUDGET_S, (9, 200))
    found, start = machine.describe(device), time.perf_counter()
    rows, lines = [], []
    for dtype in options.dtypes:
        for shape in QUICK_SHAPES if options.quick else shapes:
            for kind in options.only:
                producer = Producer(kind, getattr(torch, dtype), shape, device)
                producer.check()
                for row in rows_of(producer, budget, rounds, options.clock):
                    row = {"dtype": dtype, "shape": "x".join(map(str, shape)), "kind": kind, **row}
                    rows.append(row)
                    lines.append([dtype, row["shape"], kind, row["what"], *cells(row)])
    heads = [
        "",
        "",
        "f",
        "",
        "fused, ms",
        *(f"over {name}" for name in VARIANTS),
        "over the slower of f, P",
    ]
    took = time.perf_counter() - start
    text = (
        f"{machine.sentence(found)}. `python benchmarks/producers.py`, {took:.0f} s: the fused "
        f"one's {options.clock} time, and that over the others'.\n\n{report.table(heads, lines)}"
    )
    report.publish("producers", {"machine": found, "seconds": took, "rows": rows}, text, options)
    return rows


if __name__ == "__main__":
    machine.restart_in_place()
    main()
