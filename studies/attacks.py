"""Attacks that count: AutoAttack, PGD with restarts, attacks through the noise, and certified
accuracy.

    python studies/attacks.py  writes out/studies/attacks/{summary.json,table.md,table*.svg}
    python studies/attacks.py --quick  digits, one seed, few steps: does it run?

All but the last two columns attack the deterministic forward. k = 8 is the prediction of eight
noisy passes, attacked by PGD on the loss averaged over fresh draws in every step (expectation over
the noise). Certified: noise at the input alone, `dip.certify`; what it says of an L2 ball of
radius r holds for any attack. Needs torchattacks (requirements-studies.txt): AutoAttack
is its APGD-CE, APGD-T, FAB-T and Square.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import parts
import torch
import torch.nn.functional as F
from tables import by_case, cell, compared, markdown
from tasks import TASKS, split
from torch import Tensor, nn
from training import train
from vision_setup import attacked

import dipkernels as dip

CASES = {"digits MLP": (0.05, 0.1, 0.15), "fashion MLP": (0.025, 0.05, 0.1)}
METHODS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "default": {},
    "fixed 1": {"ratio": 1.0, "fixed": True},
    "input fixed 1": {"ratio": 1.0, "fixed": True, "where": "input"},
}
RADII = (0.1, 0.25, 0.5, 1.0)  # L2
EXAMPLES = 300


def correct(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(-1) == y


def pgd(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, draws: int = 0) -> Tensor:
    """One start; with draws > 0 the gradient is the mean over that many noisy passes, fresh in
    every step."""

    def loss(moved: Tensor) -> Tensor:
        if not draws:
            return F.cross_entropy(model(moved), y)
        with noisy(model):
            out = dip.trajectories(model, moved, m=draws)
        return F.nll_loss(out.softmax(-1).mean(0).log(), y)

    start = x + eps * (2 * torch.rand_like(x) - 1)
    return attacked(loss, x, eps, start, steps, 2.5 * eps / steps)


@contextlib.contextmanager
def noisy(model: nn.Module) -> Iterator[None]:
    """Training mode, in which the noise is on; the bench's networks have no dropout or
    BatchNorm."""
    model.train()
    try:
        yield
    finally:
        model.eval()


def auto_attack(model: nn.Module, x: Tensor, y: Tensor, eps: float, seed: int) -> Tensor:
    import torchattacks

    side = int(x.shape[1] ** 0.5)  # it wants images

    images = nn.Sequential(nn.Flatten(), model).eval()
    attack = torchattacks.AutoAttack(images, eps=eps, n_classes=10, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return attack(x.unflatten(1, (1, side, side)), y).flatten(1)


def part(key: dict[str, Any]) -> dict[str, Any]:
    task, seed, quick = TASKS[key["task"]], key["seed"], key["quick"]
    data = split(task, seed)
    model = train(task, data, seed, key["options"], {"epochs": 3} if quick else {})
    count = 50 if quick else EXAMPLES
    x, y = data.x_test[:count], data.y_test[:count]
    middle = key["strengths"][len(key["strengths"]) // 2]
    steps, restarts = (5, 2) if quick else (50, 5)
    result: dict[str, Any] = {"clean": 100 * correct(model, x, y).double().mean().item()}
    torch.manual_seed(2000 + seed)
    for eps in key["strengths"]:
        safe = correct(model, x, y)
        for _ in range(restarts):
            safe &= correct(model, pgd(model, x, y, eps, steps), y)
        result[f"PGD-50 x 5, {eps}"] = 100 * safe.double().mean().item()
        if eps == middle and not quick:
            safe &= correct(model, auto_attack(model, x, y, eps, seed), y)
            result[f"AutoAttack, {eps}"] = 100 * safe.double().mean().item()
    if key["options"] is not None:
        hit = pgd(model, x, y, middle, steps if quick else 20, draws=8)
        for name, inputs in (("k = 8, clean", x), (f"k = 8, PGD through noise, {middle}", hit)):
            guess = dip.predict(model, inputs, k=8).argmax(-1)
            result[name] = 100 * (guess == y).double().mean().item()
    if (key["options"] or {}).get("where") == "input":
        with dip.fixed_noise(key=seed):
            found = dip.certify(model, x, k=100 if quick else 1000)
        for radius in RADII:
            result[f"certified, L2 {radius}"] = 100 * found.accuracy(y, radius)
    return result


def study(task: str, out: Path, seeds: int, quick: bool, workers: int) -> dict[str, Any]:
    keys = [
        {
            "task": task,
            "method": m,
            "seed": s,
            "options": o,
            "strengths": CASES[task],
            "quick": quick,
        }
        for m, o in METHODS.items()
        for s in range(seeds)
    ]
    results = parts.run(part, keys, out, workers)
    (runs,) = by_case((task, r["method"], r["seed"], r) for r in results).values()
    names = (name for by_seed in runs.values() for name in by_seed[0] if name not in keys[0])
    return compared(runs, dict.fromkeys(names, (1, 1)), {"plain": 1})


def table(results: dict[str, Any]) -> str:
    tables = []
    for task, rows in results.items():
        scores = dict.fromkeys(score for row in rows.values() for score in row)
        lines = [
            [
                score,
                *(
                    cell(row, score, "plain", method == "plain") if score in row else "-"
                    for method, row in rows.items()
                ),
            ]
            for score in scores
        ]
        tables.append(f"{task}\n\n" + markdown(["", *rows], lines))
    return "\n\n".join(tables)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = parts.command_line(__doc__, "attacks", 3, "digits, one seed, few steps")
    parser.add_argument("--tasks", nargs="+", choices=CASES, default=list(CASES), metavar="TASK")
    args = parser.parse_args(arguments)
    if args.quick:
        args.tasks, args.seeds = ["digits MLP"], 1
    results = {
        task: study(task, args.out, args.seeds, args.quick, args.workers) for task in args.tasks
    }
    text = table(results)
    parts.write(args, results, text, "In brackets: minus plain, paired")
    return results


if __name__ == "__main__":
    main()
