"""The cost of averaging behind an activation here: python benchmarks/averaging.py [--rows 4096] [--rounds 9]

"analytic" over act(nn.Linear), and "mean" with S = 8 over eager's eight calls; forward + backward, interleaved, round
by round, in one process: the median of the per-round ratios and its quartiles. Checks each result first.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch
import torch.nn.functional as F

from dipkernels import functional
from dipkernels.row_blocks import ACTIVATIONS

SEED, S = torch.tensor([5, 1]), 8


def ratios(ours, theirs, rounds: int) -> str:
    pairs = []
    for _ in range(rounds + 1):
        times = []
        for run in (ours, theirs):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        pairs.append(times[0] / times[1])
    low, median, high = statistics.quantiles(pairs[1:], n=4)
    return f"{median:.2f}  ({low:.2f} .. {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--skip-mean", action="store_true")
    args = parser.parse_args()
    m, k, n = args.rows, 1024, 1024
    print(
        f"{m} x {k} x {n}, torch {torch.__version__}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"
    )
    for dtype in (torch.float32, torch.bfloat16):
        x, dy = torch.randn(m, k).to(dtype).requires_grad_(), torch.randn(m, n).to(dtype)
        weight = (torch.randn(n, k) / 32).to(dtype).requires_grad_()
        bias = torch.randn(n).to(dtype).requires_grad_()
        sigma = torch.full((k,), 0.1).requires_grad_()
        tensors = (x, weight, bias, sigma)

        def eager(act, sigma=sigma, x=x, weight=weight, bias=bias, dtype=dtype):
            draws = ((sigma * torch.randn(x.shape)).to(dtype) for _ in range(S))
            return sum(act(F.linear(x + noise, weight, bias)) for noise in draws) / S

        for name, act in ACTIVATIONS.items():
            how = {"activation": name, "estimator": "analytic"}
            analytic = lambda: functional.dip_linear(*tensors, SEED, **how)  # noqa: B023, E731
            with torch.no_grad():  # noise of sigma 0.1 moves an activation by v f'' / 2 at most
                assert (analytic() - act(F.linear(x, weight, bias))).abs().max() < 0.1
            plain = lambda: act(F.linear(x, weight, bias))  # noqa: B023, E731
            cost = ratios(lambda: analytic().backward(dy), lambda: plain().backward(dy), args.rounds)  # noqa: B023
            print(f"{str(dtype)[6:]:9} analytic {name:10} over act(nn.Linear): {cost}", flush=True)
        for name in () if args.skip_mean else ("relu", "gelu"):
            how = {"activation": name, "estimator": "mean", "num_samples": S}
            mean = lambda: functional.dip_linear(*tensors, SEED, **how)  # noqa: B023, E731
            act = ACTIVATIONS[name]
            with torch.no_grad():
                assert (mean() - eager(act)).abs().mean() < 0.1
            cost = ratios(lambda: mean().backward(dy), lambda: eager(act).backward(dy), args.rounds)  # noqa: B023
            print(f"{str(dtype)[6:]:9} mean S = {S} {name:7} over eager's {S} calls:  {cost}", flush=True)


if __name__ == "__main__":
    main()
