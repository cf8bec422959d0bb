"""The cost of averaging behind an activation here:

    python benchmarks/averaging.py [--rounds 9] [--docs]

"analytic" over act(nn.Linear); and "mean" of 2 and 8 draws against the loop over them that a user
writes. Interleaved, round by round, in one process: the median of the per-round ratios and its
quartiles, and the bytes kept for backward and the most that tensors take at once, over those of
act(DIPLinear) with one draw. Checks each result first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import machine
import report
import timing
import torch
import torch.nn.functional as F
from torch import Tensor

from dipkernels import functional
from dipkernels.ops.activations import ACTIVATIONS

Call = Callable[[], Tensor]
SEED, S, M, K, N = torch.tensor([5, 1]), 8, 4096, 1024, 1024
# Rows x K x N and draws where the products take nearly all of the time: "mean" alone, of GELU.
WIDE = [(2048, 768, 3072, 2), (2048, 768, 3072, S), (1024, 4096, 4096, 2), (1024, 4096, 4096, S)]


def compare(
    over: Call, under: Call, dy: Tensor, leaves: Sequence[Tensor], rounds: int
) -> list[str]:
    """Time of `over` over that of `under`, forward and forward + backward: median [quartiles]."""
    cells = []
    for make in (lambda call: call, lambda call: timing.backward_step(call, dy, leaves)):
        calls = {"over": make(over), "under": make(under)}
        limits = {
            "budget_s": 0.0,
            "rounds": (rounds, rounds),
            "at_least_s": 0.0,
            "always": ("over",),
        }
        cells.append(
            report.ratio(
                timing.interleave(calls, "under", dy.device, **limits)["over"], spread=True
            )
        )
    return cells


def measure(
    m: int, k: int, n: int, s: int, activations: dict, rounds: int, dtypes, skip: str | None = None
) -> tuple[list, list]:
    """Rows of the two tables."""
    analytic_rows, mean_rows = [], []
    for dtype in dtypes:
        x = torch.randn(m, k).to(dtype).requires_grad_()
        # as small as those of a mean loss: a tail times one must be no subnormal number
        dy = (torch.randn(m, n) / (m * n)).to(dtype)
        weight = (torch.randn(n, k) / k**0.5).to(dtype).requires_grad_()
        bias = torch.randn(n).to(dtype).requires_grad_()
        sigma = torch.full((k,), 0.1).requires_grad_()
        tensors, name = (x, weight, bias, sigma), str(dtype).removeprefix("torch.")

        def eager(act, x=x, weight=weight, bias=bias, sigma=sigma, dtype=dtype):
            total = 0
            for _ in range(s):
                total = total + act(
                    F.linear(x + sigma.to(dtype) * torch.randn_like(x), weight, bias)
                )
            return total / s

        for activation, act in () if skip == "analytic" else activations.items():
            how = {"activation": activation, "estimator": "analytic"}
            analytic = lambda: functional.dip_linear(*tensors, SEED, **how)  # noqa: B023, E731
            plain = lambda: act(F.linear(x, weight, bias))  # noqa: B023, E731
            with torch.no_grad():  # noise of sigma 0.1 moves an activation by v f'' / 2 at most
                assert (analytic() - plain()).abs().max() < 0.1
            analytic_rows.append([name, activation, *compare(analytic, plain, dy, tensors, rounds)])
            print(*analytic_rows[-1], flush=True)
        for activation, act in () if skip == "mean" else activations.items():
            how = {"activation": activation, "estimator": "mean", "num_samples": s}
            mean = lambda: functional.dip_linear(*tensors, SEED, **how)  # noqa: B023, E731
            one = lambda: act(functional.dip_linear(*tensors, SEED, keep="u"))  # noqa: B023, E731
            loop = lambda: eager(act)  # noqa: B023, E731
            with torch.no_grad():
                assert (mean() - loop()).abs().mean() < 0.1
            kept = [timing.saved_bytes(run, [weight, bias, sigma]) for run in (mean, one, loop)]
            peaks = [
                timing.peak_bytes(timing.backward_step(run, dy, tensors), dy.device)
                for run in (mean, one, loop)
            ]
            row = [
                f"{m} x {k} x {n}",
                str(s),
                name,
                activation,
                *compare(loop, mean, dy, tensors, rounds),
            ]
            mean_rows.append([*row, *(f"{a[i] / a[1]:.2f}" for a in (kept, peaks) for i in (0, 2))])
            print(*mean_rows[-1], flush=True)
    return analytic_rows, mean_rows


def main(arguments: list[str] | None = None) -> tuple[list, list]:
    parser = report.command_line(__doc__, "averaging")
    parser.add_argument("--rounds", type=report.at_least(2), default=9, help="at least 2 (9)")
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16")
    )
    parser.add_argument(
        "--activations", nargs="+", default=list(ACTIVATIONS), choices=list(ACTIVATIONS)
    )
    parser.add_argument("--skip", choices=("analytic", "mean"), help="leave one of the two out")
    args = parser.parse_args(arguments)
    rows_each = 16 if args.quick else M
    if args.quick:
        args.rounds = 2
    chosen = {name: ACTIVATIONS[name] for name in args.activations}
    report.refuse_part(parser, args, "skip", "activations", "dtypes", part=args.rounds < 5)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    found, start = machine.describe("cpu"), time.perf_counter()
    dtypes = [getattr(torch, name) for name in args.dtypes]
    rows = measure(rows_each, K, N, S, chosen, args.rounds, dtypes, args.skip)
    gelu = {"gelu": ACTIVATIONS["gelu"]}
    for shape in () if args.quick or args.skip == "mean" else WIDE:
        rows[1].extend(measure(*shape, gelu, args.rounds, dtypes, "analytic")[1])
    took = time.perf_counter() - start
    text = "\n\n".join(
        [
            f"Sigma 0.1. {machine.sentence(found)}. `python "
            f"benchmarks/averaging.py`, {args.rounds} rounds, {took:.0f} s.",
            f'"analytic", {rows_each} x {K} x {N}: time over act(nn.Linear).',
            report.table(["", "activation", "forward", "forward + backward"], rows[0]),
            '"mean": time of the loop over S draws over its time; and bytes, kept for backward and '
            "at the peak, over those of act(DIPLinear) with one draw.",
            report.table(
                [
                    "rows x K x N",
                    "S",
                    "",
                    "activation",
                    "forward",
                    "forward + backward",
                    "bytes",
                    "of the loop",
                    "peak",
                    "of the loop",
                ],
                rows[1],
            ),
        ]
    )
    run = {"machine": found, "seconds": took, "analytic": rows[0], "mean": rows[1]}
    report.publish("averaging", run | {"quick": args.rounds < 5}, text, args)
    return rows


if __name__ == "__main__":
    machine.restart_in_place()
    main()
