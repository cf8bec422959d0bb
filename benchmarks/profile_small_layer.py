"""Where a small DIP layer's microseconds go:

    python benchmarks/profile_small_layer.py

Each part of DIPLinear's forward and backward pass is called alone, in loops that take turns, and
timed to the microsecond; a profiler would distort figures of this size. Then the parts' sum stands
beside what the whole layer costs over nn.Linear, and beside the floor: nn.Linear behind an
autograd.Function that copies its input and returns a stored gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import machine
import peers
import report
import timing
import torch
from overhead import SMALL, text_of
from torch import Tensor
from tqdm import tqdm

import dipkernels as dip
from dipkernels import worlds
from dipkernels.noise import seeds
from dipkernels.ops import registry
from dipkernels.ops.draw import Draw
from dipkernels.ops.perturb import perturb, perturb_bwd

DRAW = Draw(log_variance=True)
BUDGET_S = 10.0  # of timing for each of three parts


class _Pass(torch.autograd.Function):
    """Returns what it was given: an autograd.Function's own cost."""

    @staticmethod
    def forward(ctx, x, log_variance, seed, where, out):
        ctx.save_for_backward(log_variance, seed)
        ctx.where, ctx.dsigma, ctx.x_dtype = where, torch.empty_like(log_variance), x.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx, du):
        _ = ctx.saved_tensors
        return du, ctx.dsigma, None, None, None


def parts(
    layer: dip.DIPLinear, x: Tensor
) -> dict[str, tuple[str, Callable[[], object], str | None]]:
    """name: (pass, call, what to subtract from it). The names in brackets serve subtraction
    only."""
    plain_x, sigma = x.detach(), layer.log_variance.detach()
    seed = torch.tensor([peers.KEY, 0])
    du = torch.randn_like(plain_x)
    raw_p, raw_q = registry.kernel("perturb", "cpu"), registry.kernel("perturb_bwd", "cpu")

    def backward_of(make: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], None]:
        def run() -> None:
            for leaf in leaves:
                leaf.grad = None
            make().backward(du)

        return run

    def layer_without_kernels() -> Tensor:
        # DIPLinear.forward and dip_linear with P, the draw and the product left out.
        if not layer.noisy():
            return plain_x
        layer._log_variance()
        layer.draw(plain_x)
        worlds.tracing()
        worlds.autocast_dtype(plain_x)
        return plain_x

    leaves = [x, layer.log_variance]
    view = lambda: x.view_as(x)  # noqa: E731
    empty = lambda: _Pass.apply(x, layer.log_variance, seed, DRAW, None)  # noqa: E731
    return {
        "(nothing)": ("", lambda: None, None),
        "layer and dip_linear in Python": ("forward", layer_without_kernels, "(nothing)"),
        "draw: seeds.draw, one torch.randint": (
            "forward",
            lambda: seeds.draw(layer._stream, plain_x),
            "(nothing)",
        ),
        "op P: dispatcher and kernel": (
            "forward",
            lambda: raw_p(plain_x, sigma, seed, *DRAW, None),
            "(nothing)",
        ),
        "op P: checks in Python": (
            "forward",
            lambda: perturb(plain_x, sigma, seed, DRAW, None),
            "op P: dispatcher and kernel",
        ),
        "(view)": ("", view, None),
        "autograd.Function: apply": (
            "forward",
            empty,
            "(view)",
        ),
        "(view backward)": ("", backward_of(view, [x]), None),
        "autograd.Function: apply and backward": (
            "both",
            backward_of(empty, leaves),
            "(view backward)",
        ),
        "op Q: dispatcher and kernel": (
            "backward",
            lambda: raw_q(du, sigma, seed, *DRAW),
            "(nothing)",
        ),
        "op Q: its wrapper in Python": (
            "backward",
            lambda: perturb_bwd(du, sigma, seed, DRAW),
            "op Q: dispatcher and kernel",
        ),
    }


def measure(quick: bool) -> tuple[list[list], list[list]]:
    """Rows of the breakdown, and of whole layers: text, and the figure in microseconds."""
    device = torch.device("cpu")
    plain, x, dy = peers.inputs_of(SMALL, torch.float32, device)
    modules = {name: peers.build(name, plain) for name in ("linear", "dip", "floor", "eager")}
    for name, module in modules.items():
        peers.check_linear(name, module, plain, x, dy)
    limits = {"budget_s": BUDGET_S, "rounds": (15, 400)}
    if quick:
        limits = {"budget_s": 0.01, "rounds": (2, 2), "at_least_s": 1e-5}

    found = parts(modules["dip"], x)
    calls = {name: call for name, (_, call, _) in found.items()}
    with tqdm(total=3, unit="part", dynamic_ncols=True, disable=quick) as bar:
        timed = timing.interleave(calls, "(nothing)", device, always=tuple(calls), **limits)
        bar.update()
        wholes = []
        for what, make in timing.passes(x, dy).items():
            steps = {name: make(module) for name, module in modules.items()}
            over = timing.interleave(steps, "linear", device, always=tuple(steps), **limits)
            bar.update()
            for name, figures in over.items():
                low, high = figures["over_base_quartiles_s"]
                spread = "" if name == "linear" else f"{1e6 * low:.1f} .. {1e6 * high:.1f}"
                base = 1e6 * figures["seconds"]
                wholes.append([name, what, f"{base:.1f}", 1e6 * figures["over_base_s"], spread])
    us = {name: 1e6 * figures["seconds"] for name, figures in timed.items()}
    rows = []
    for name, (which, _, minus) in found.items():
        if not name.startswith("("):
            rows.append([name, which, us[name] - (us[minus] if minus else 0.0)])
    both = next(row for row in rows if row[1] == "both")
    applied = next(row for row in rows if row[0] == "autograd.Function: apply")
    both[0], both[1], both[2] = (
        "autograd.Function: backward, with AccumulateGrad",
        "backward",
        both[2] - applied[2],
    )
    return rows, wholes


def main(arguments: list[str] | None = None) -> list[list]:
    parser = report.command_line(__doc__, "small-layer")
    args = parser.parse_args(arguments)
    report.refuse_part(parser, args)
    torch.set_num_threads(args.threads)
    found = machine.describe("cpu")
    rows, wholes = measure(args.quick)
    sums = {
        which: sum(row[2] for row in rows if row[1] == which) for which in ("forward", "backward")
    }
    measured = next(row[3] for row in wholes if row[0] == "dip" and row[1] == "forward + backward")
    listed = [[name, which, f"{value:.2f}"] for name, which, value in rows]
    listed += [["sum", which, f"{value:.2f}"] for which, value in sums.items()]
    listed += [
        ["the layer over nn.Linear, less that sum", "both", f"{measured - sum(sums.values()):.2f}"]
    ]
    text = "\n\n".join(
        [
            f"DIPLinear float32 {text_of(SMALL)}. {machine.sentence(found)}."
            " `python benchmarks/profile_small_layer.py`",
            report.table(
                ["layer", "", "us", "over nn.Linear, us", "quartiles"],
                [[*row[:3], f"{row[3]:.1f}", row[4]] for row in wholes],
            ),
            report.table(["part of the DIP layer that nn.Linear has not", "pass", "us"], listed),
        ]
    )
    report.publish("small-layer", {"machine": found, "layers": wholes, "parts": rows}, text, args)
    return rows


if __name__ == "__main__":
    machine.restart_in_place()
    main()
