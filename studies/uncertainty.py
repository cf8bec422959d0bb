"""Wrong labels and doubt: accuracy, NLL and calibration after training with 0, 20 and 40 % of the
labels drawn anew, and whether a network knows classes that it never saw.

    python studies/uncertainty.py
        # writes out/studies/uncertainty/{summary.json,table.md,table*.svg}
    python studies/uncertainty.py --quick  one task and share, two seeds, few epochs: does it run?

Each method takes one of six settings for each task and share: the one of the least NLL on the last
quarter of the training data, on the labels at hand, wrong ones too, as nobody has the right ones.
Plain training has nothing to choose; "recipe" has nothing set. The last class of each task is left
out of training; AUROC says how well the largest probability tells its examples from the others'.
The test is on right labels. k = 16: the mean probabilities of sixteen noisy passes of the same
network. Twelve minutes of one core.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import parts
import torch
import torch.nn.functional as F
from features import SEARCH as TABLES
from parts import chosen, tested
from tables import by_case, compared, markdown, named
from tasks import TASKS, Split, split, validation
from torch import Tensor
from training import train

import dipkernels as dip

CASES = ("digits MLP", "classes 20", "cover")
SHARES = (0.0, 0.2, 0.4)
SEARCH: dict[str, list[dict[str, Any]]] = {
    "label smoothing": [{"smoothing": share} for share in (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)],
    "fixed": TABLES["isotropic"],
    "learned": TABLES["learned"],
}
DRAWS = 16
# Which way is better, and a table's digits
SCORES = {"accuracy": (1, 1), "nll": (-1, 2), "ece": (-1, 1), "auroc": (1, 1)}


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
    task, seed, options = TASKS[key["task"]], key["seed"], key["options"]
    settings = {"epochs": key["epochs"] or task.epochs}
    data, unknown = without_last_class(split(task, seed))
    data = mislabelled(data, key["share"], seed)
    if key["stage"] == "search":
        task, data = validation(task, data)
    if options is not None and "smoothing" in options:
        options, settings = None, settings | options
    model = train(task, data, seed, options, settings)
    torch.manual_seed(3000 + seed)
    if key["stage"] == "search":
        return {"nll": nll(dip.predict(model, data.x_test, k=0), data.y_test)}
    return {
        f"k = {k}": scores(
            dip.predict(model, data.x_test, k=k), data.y_test, dip.predict(model, unknown, k=k)
        )
        for k in ((0,) if options is None else (0, DRAWS))
    }


def nll(probs: Tensor, y: Tensor) -> float:
    return F.nll_loss(probs.clamp(min=1e-12).log(), y).item()


def scores(probs: Tensor, y: Tensor, doubt: Tensor) -> dict[str, float]:
    return {
        "accuracy": 100 * (probs.argmax(-1) == y).double().mean().item(),
        "nll": nll(probs, y),
        "ece": calibration_error(probs, y),
        "auroc": auroc(probs.max(-1).values, doubt.max(-1).values),
    }


def study(case: dict[str, Any], out: Path, workers: int, seeds: int) -> list[dict[str, Any]]:
    best = chosen(part, case, SEARCH, out, workers, score=lambda result: -result["nll"])
    return tested(part, case, {"plain": None, **best, "recipe": {}}, out, workers, seeds)


def case_of(result: dict[str, Any]) -> str:
    return f"{result['task']}, {100 * result['share']:.0f} %"


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """By case and method: means, and paired differences to plain and to learned."""
    settings = {(case_of(r), r["method"]): r["options"] for r in results}
    found = []
    for r in results:
        found.append((case_of(r), r["method"], r["seed"], r["k = 0"]))
        if r["method"] == "learned":
            many = f"k = {DRAWS}"
            found.append((case_of(r), f"learned, {many}", r["seed"], r[many]))
    rows: dict[str, Any] = {}
    for case, methods in by_case(found).items():
        rows[case] = compared(methods, SCORES, {"plain": 1, "learned": -1})
        for method, row in rows[case].items():
            row["options"] = settings.get((case, method))
    return rows


def table(rows: dict[str, Any]) -> str:
    lines = []
    for case, methods in rows.items():
        for method, row in methods.items():
            cells = [(row[s] if method == "plain" else row[s]["plain"])["text"] for s in SCORES]
            own = method.startswith("learned")
            against = "-" if own else row["accuracy"]["learned"]["text"]
            setting = "" if row["options"] is None else named(row["options"]) or "nothing set"
            lines.append([case, method, *cells, against, setting])
    heads = [*SCORES, "accuracy, learned minus it", "chosen"]
    return markdown(["task, labels drawn anew", "method", *heads], lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    quick = "one task and share, few epochs"
    args = parts.command_line(__doc__, "uncertainty", 5, quick).parse_args(arguments)
    tasks, epochs, shares = CASES, 0, SHARES
    if args.quick:
        tasks, args.seeds, epochs, shares = ("classes 20",), 2, 3, SHARES[-1:]
    cases = [{"task": t, "share": s, "epochs": epochs} for t in tasks for s in shares]
    found = [study(case, args.out, args.workers, args.seeds) for case in cases]
    rows = summarise([result for results in found for result in results])
    text = table(rows)
    parts.write(args, rows, text, "Differences to plain, paired")
    return rows


if __name__ == "__main__":
    main()
