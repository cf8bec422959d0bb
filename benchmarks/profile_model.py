"""Where a training step of a whole model spends its time, plain beside DIP, operation by operation:

    python benchmarks/profile_model.py [--only ViT-S] [--dtype float32] [--rounds 10] [--docs]

Each operation's own time in torch's profiler, one thread. An operation is taken by its place in the
step, and of each place the least over the rounds: what others do on the machine hits now one, now
another. "host" is the time between operations: Python, and autograd's own.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable

import machine
import models
import report
import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

VARIANTS = models.VARIANTS[:3]
HOST = "host, between operations"


def own_times(events: list) -> list[list]:
    """[name, nanoseconds of its own] of every operation of the profiler's, in the order of their
    starts, and the gaps between the outermost."""
    spans = sorted(
        (e.start_ns(), -e.duration_ns(), e.name())
        for e in events
        if not e.name().startswith(("[memory", "Profiler"))
    )
    found: list[list] = []
    open_spans: list[tuple[int, int]] = []  # where each ends, its place in found
    last = None
    for start, minus_duration, name in spans:
        duration = -minus_duration
        while open_spans and open_spans[-1][0] <= start:
            open_spans.pop()
        if open_spans:
            found[open_spans[-1][1]][1] -= duration
        else:
            if last is not None:
                found.append([HOST, max(0, start - last)])
            last = start + duration
        open_spans.append((start + duration, len(found)))
        found.append([name, duration])
    return found


def least(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, dict[str, list]]:
    """[milliseconds, calls] in one step of each operation of each variant."""
    best: dict[str, list[list]] = {}
    for _ in tqdm(range(rounds), unit="round", dynamic_ncols=True):
        for name, step in steps.items():
            step()
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                step()
            taken = own_times(profiler.profiler.kineto_results.events())
            kept = best.setdefault(name, taken)
            if [op for op, _ in kept] == [op for op, _ in taken]:
                best[name] = [[op, min(a, b)] for (op, a), (_, b) in zip(kept, taken, strict=True)]
    totals: dict[str, dict[str, list]] = {}
    for name, operations in best.items():
        of = totals.setdefault(name, defaultdict(lambda: [0.0, 0]))
        for op, nanoseconds in operations:
            of[op][0] += nanoseconds / 1e6
            of[op][1] += 1
    return totals


def table(totals: dict[str, dict[str, list]], rows: int) -> str:
    """The operations whose time differs most from the plain step's."""
    operations = {op for of in totals.values() for op in of}

    def over_plain(op: str) -> float:
        return max(abs(totals[v][op][0] - totals["linear"][op][0]) for v in VARIANTS)

    lines = [
        [op, *(f"{of[op][0]:.2f} ({of[op][1]})" for of in totals.values())]
        for op in sorted(operations, key=over_plain, reverse=True)[:rows]
    ]
    whole = [f"{sum(time for time, _ in of.values()):.1f}" for of in totals.values()]
    return report.table(["ms (calls)", "plain", *VARIANTS[1:]], [*lines, ["all", *whole]])


def main(arguments: list[str] | None = None) -> dict[str, dict[str, list]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="ViT-S", help="the first model whose name holds this")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--rows", type=int, default=16, help="of the table (16)")
    parser.add_argument("--quick", action="store_true", help="a small model")
    parser.add_argument("--docs", action="store_true", help="write the table into the documents")
    args = parser.parse_args(arguments)
    cases = [c for c in (models.QUICK if args.quick else models.CASES) if args.only in c.name]
    if not cases:
        parser.error(f"--only: expected a part of a model's name, got {args.only!r}")
    report.refuse_part(parser, args, part=args.rounds < 5)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    case, found = cases[0], machine.describe("cpu")
    plain, x, target = models.inputs_of(case, getattr(torch, args.dtype))
    totals = least(
        {name: models.step_of(models.build(name, plain, x), x, target) for name in VARIANTS},
        args.rounds,
    )
    text = (
        f"{case.name}, batch {case.shape[0]}, {args.dtype}. {machine.sentence(found)}. `python "
        f"benchmarks/profile_model.py`, {args.rounds} rounds.\n\n{table(totals, args.rows)}"
    )
    print(text)
    if args.docs:
        report.fill(report.page_of(found), "profile-model", text)
    return totals


if __name__ == "__main__":
    machine.restart_in_place()
    main()
