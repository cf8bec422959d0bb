"""Wrong labels and doubt: accuracy, NLL and calibration after training with 0, 20 and 40 % of the
labels drawn anew, and whether a network knows classes that it never saw.

    python studies/uncertainty.py
        # writes out/studies/uncertainty/{summary.json,table.md,uncertainty.png}
    python studies/uncertainty.py --quick  one task, two seeds, few epochs: does it run?

The last class of each task is left out of training; AUROC says how well the largest probability
tells its examples from the others'. Everything is scored on right labels. k = 16: the mean
probabilities of sixteen noisy passes of the same network. About fifteen minutes of one core.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import parts
import torch
import torch.nn.functional as F
from tables import interval, markdown, signed, verdict
from tasks import TASKS, Split, split
from torch import Tensor
from training import train

import dipkernels as dip

CASES = ("digits MLP", "classes 20", "cover")
SHARES = (0.0, 0.2, 0.4)
METHODS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "label smoothing 0.1": {"smoothing": 0.1},
    "default": {},
    "fixed 1": {"ratio": 1.0, "fixed": True},
}
DRAWS = 16
SCORES = ("accuracy", "nll", "ece", "auroc")
BETTER = {"accuracy": 1, "nll": -1, "ece": -1, "auroc": 1}


def without_last_class(data: Split) -> tuple[Split, Tensor]:
    """The split without its last class, and the test inputs of that class."""
    last = data.y.max()
    train, test = data.y != last, data.y_test != last
    return Split(data.x[train], data.y[train], data.x_test[test], data.y_test[test]), data.x_test[
        ~test
    ]


def mislabelled(data: Split, share: float, seed: int) -> Split:
    """With this share of the training labels drawn anew from all classes."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(len(data.y), generator=generator) < share
    anew = torch.randint(int(data.y.max()) + 1, data.y.shape, generator=generator)
    return Split(data.x, torch.where(drawn, anew, data.y), data.x_test, data.y_test)


def calibration_error(probs: Tensor, y: Tensor, bins: int = 15) -> float:
    """Expected calibration error: |accuracy - confidence| over equal bins of confidence, weighted
    by their counts; in %."""
    confidence, guess = probs.max(-1)
    right = (guess == y).double()
    place = (confidence * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, right - confidence.double())
    return 100 * (gaps.abs().sum() / len(y)).item()


def auroc(known: Tensor, unknown: Tensor) -> float:
    """How often a known example has the larger score, ties by half; in %."""
    pairs = known[:, None] - unknown[None]
    return 100 * ((pairs > 0).double() + 0.5 * (pairs == 0).double()).mean().item()


def part(key: dict[str, Any]) -> dict[str, Any]:
    task, seed, method, settings = TASKS[key["task"]], key["seed"], key["options"], key["settings"]
    data, unknown = without_last_class(split(task, seed))
    if method is not None and "smoothing" in method:
        method, settings = None, {**settings, **method}
    model = train(task, mislabelled(data, key["share"], seed), seed, method, settings)
    torch.manual_seed(3000 + seed)
    return {
        f"k = {k}": scores(
            dip.predict(model, data.x_test, k=k), data.y_test, dip.predict(model, unknown, k=k)
        )
        for k in ((0,) if method is None else (0, DRAWS))
    }


def scores(probs: Tensor, y: Tensor, doubt: Tensor) -> dict[str, float]:
    return {
        "accuracy": 100 * (probs.argmax(-1) == y).double().mean().item(),
        "nll": F.nll_loss(probs.clamp(min=1e-12).log(), y).item(),
        "ece": calibration_error(probs, y),
        "auroc": auroc(probs.max(-1).values, doubt.max(-1).values),
    }


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    runs = {
        (r["task"], r["share"], r["method"], r["seed"]): r["k = 0"] | {"seed": r["seed"]}
        for r in results
    }
    for r in results:
        if r["method"] == "default":
            runs[r["task"], r["share"], f"default, k = {DRAWS}", r["seed"]] = r[f"k = {DRAWS}"] | {
                "seed": r["seed"]
            }
    rows: dict[str, Any] = {}
    for task, share, method, _ in runs:
        each = [r for k, r in runs.items() if k[:3] == (task, share, method)]
        row: dict[str, Any] = {}
        for score in SCORES:
            difference = [r[score] - runs[task, share, "plain", r["seed"]][score] for r in each]
            mean, half = interval(difference)
            row[score] = {
                "mean": statistics.fmean(r[score] for r in each),
                "minus_plain": mean,
                "half_width": half,
                "verdict": verdict([BETTER[score] * d for d in difference]),
                "text": signed(difference, digits=2 if score == "nll" else 1),
            }
        rows.setdefault(f"{task}, {100 * share:.0f} %", {})[method] = row
    return rows


def table(rows: dict[str, Any]) -> str:
    lines = []
    for case, methods in rows.items():
        for method, row in methods.items():
            plain = [
                f"{row[s]['mean']:.2f}" if s == "nll" else f"{row[s]['mean']:.1f}" for s in SCORES
            ]
            lines.append(
                [case, method, *(plain if method == "plain" else [row[s]["text"] for s in SCORES])]
            )
    return markdown(["task, labels drawn anew", "method", *SCORES], lines)


def plot(rows: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(case.rsplit(", ", 1)[0] for case in rows))
    figure = Figure(figsize=(12, 2.6 * len(tasks)), layout="constrained")
    axes = figure.subplots(len(tasks), len(SCORES), squeeze=False)
    for line, task in zip(axes, tasks, strict=True):
        shares = [
            float(case.rsplit(", ", 1)[1].split()[0])
            for case in rows
            if case.startswith(f"{task}, ")
        ]
        for axis, score in zip(line, SCORES, strict=True):
            for method in next(iter(rows.values())):
                values = [
                    m[method][score]["mean"]
                    for case, m in rows.items()
                    if case.startswith(f"{task}, ")
                ]
                axis.plot(shares, values, "o-", markersize=4, label=method)
            axis.set(title=f"{task}: {score}", xlabel="labels drawn anew, %")
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/studies/uncertainty"))
    parser.add_argument("--tasks", nargs="+", choices=CASES, default=list(CASES), metavar="TASK")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1, help="processes (1)")
    parser.add_argument("--quick", action="store_true", help="one task, two seeds, few epochs")
    args = parser.parse_args(arguments)
    settings: dict[str, Any] = {}
    if args.quick:
        args.tasks, args.seeds, settings = ["classes 20"], 2, {"epochs": 3}
    keys = [
        {
            "task": t,
            "share": share,
            "method": name,
            "seed": seed,
            "options": options,
            "settings": settings,
        }
        for seed in range(args.seeds)
        for t in args.tasks
        for share in SHARES
        for name, options in METHODS.items()
    ]
    rows = summarise(parts.run(part, keys, args.out, args.workers))
    text = table(rows)
    parts.write(args.out, rows, text)
    plot(rows, args.out / "uncertainty.png")
    print(
        f"\nDifferences to plain, paired over {args.seeds} seeds, 95 %; ?: undecided. Wrote "
        f"{args.out}"
    )
    return rows


if __name__ == "__main__":
    main()
