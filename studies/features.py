"""Irrelevant and unequal features: learned variances against isotropic, per-feature, frozen,
shuffled and levelled ones.

    python studies/features.py  writes out/studies/features/{summary.json,table.md,learned_*.svg}
    python studies/features.py --figures  the figures of docs/, from docs/results_defaults.md
    python studies/features.py --quick  one small task, two seeds: does it run?

Every method has the same number of settings to choose from, tried on validation data that is no
part of training or test. frozen, shuffled and levelled train anew with fixed variances that take
the learned ones' place: as they are, shuffled among a layer's features, or their geometric mean.
A quarter of an hour of one core.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import parts
import plots
import torch
from defaults import DOCS, TITLES
from parts import chosen, tested
from tables import SCORES, Point, by_case, compared, figures, markdown, named, points, rows_of
from tasks import TASKS, split, validation
from torch import nn
from training import evaluate, train

from dipkernels.nn.numbering import dip_layers

CASES = ("breast_cancer", "wine", "diabetes", "friedman", "classes 60", "classes 20")
# Six settings for each method; plain has nothing to choose. learned: the recipe, and another ratio,
# kl or learning rate of the variances (10 times the weights' by default).
SEARCH: dict[str, list[dict[str, Any]]] = {
    "learned": [
        {"ratio": 0.6},
        {},
        {"kl": 0.1},
        {"kl": 1.0},
        {"variance_rate": 3.0},
        {"variance_rate": 30.0},
    ],
    "isotropic": [{"ratio": r, "fixed": True} for r in (0.15, 0.3, 0.6, 0.8, 1.0, 1.5)],
    "per feature": [
        {"ratio": r, "fixed": True, "per": "feature"} for r in (0.15, 0.3, 0.6, 0.8, 1.0, 1.5)
    ],
}
PROFILES = ("frozen", "shuffled", "levelled")  # of the chosen learned setting
# In the figures, with what tells them apart; plain lies too far off.
SHOWN = {
    "isotropic": "one sigma for a layer",
    "per feature": "in proportion to each feature",
    "shuffled": "the learned ones, shuffled",
    "levelled": "their mean",
}


def profile_of(model: nn.Module, kind: str, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    learned = {
        name: layer.log_variance.detach().clone() for name, layer in dip_layers(model).items()
    }
    if kind == "shuffled":
        return {name: v[torch.randperm(len(v), generator=generator)] for name, v in learned.items()}
    return (
        {name: v.mean().expand_as(v) for name, v in learned.items()}
        if kind == "levelled"
        else learned
    )


def part(key: dict[str, Any]) -> dict[str, Any]:
    task, seed, method = TASKS[key["task"]], key["seed"], key["method"]
    data = split(task, seed)
    if key["stage"] == "search":
        task, data = validation(task, data)
    options = key["options"]
    model = train(task, data, seed, options, {})
    if method in PROFILES:
        fixed = {**options, "fixed": True, "variances": profile_of(model, method, seed)}
        model = train(task, data, seed, fixed, {})
    return evaluate(task, data, model, seed)


def study(task: str, out: Path, workers: int, seeds: int) -> dict[str, Any]:
    best = chosen(part, {"task": task}, SEARCH, out, workers)
    settings = {"plain": None, **best, **dict.fromkeys(PROFILES, best["learned"])}
    results = tested(part, {"task": task}, settings, out, workers, seeds)
    (runs,) = by_case((task, r["method"], r["seed"], r) for r in results).values()
    rows = compared(runs, dict.fromkeys(SCORES, (1, 1)), {"learned": -1})
    return {method: {"options": settings[method], **row} for method, row in rows.items()}


def table(results: dict[str, Any]) -> str:
    lines = []
    for task, rows in results.items():
        for method, row in rows.items():
            cells = [
                f"{row[s]['text']} ({'-' if method == 'learned' else row[s]['learned']['text']})"
                for s in SCORES
            ]
            lines.append([task, method, *cells, named(row["options"] or {})])
    return markdown(
        ["task", "method", *(f"{s} (learned minus it)" for s in SCORES), "chosen"], lines
    )


def plot(text: str, folder: Path) -> None:
    """Learned minus the fixed variances, from the table that this study prints: an SVG of each
    score."""
    cells = {
        (task, method): scores
        for task, method, *scores in rows_of(text)
        if task in TASKS and method in SHOWN
    }
    tasks = list(dict.fromkeys(task for task, _ in cells))
    words = {"clean": "clean data", "pgd": "under attack (PGD)"}
    for number, score in enumerate(words):
        found: dict[str, dict[str, Point]] = {label: {} for label in SHOWN.values()}
        for (task, method), scores in cells.items():
            _, _, difference = scores[number].partition("(")
            (point,) = points(difference.removesuffix(")"))
            found[SHOWN[method]][TITLES.get(task, task)] = point
        plots.by_task(
            folder / f"learned_{score}.svg",
            found,
            zip(figures.ORDER, "oDs^"),
            height=1.6 + 0.62 * len(tasks),
            title=f"learned sigma, {words[score]}",
            label="points above fixed ones; 95 %",
            limits=(-15.5, 31),
        )


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = parts.command_line(__doc__, "features", 8, "one small task, two seeds")
    parser.add_argument(
        "--figures", action="store_true", help="no more than docs/assets, from what docs/ has"
    )
    args = parser.parse_args(arguments)
    if args.figures:
        plot((DOCS / "results_defaults.md").read_text(encoding="utf-8"), DOCS / "assets")
        return {}
    tasks = CASES
    if args.quick:
        tasks, args.seeds = ("wine",), 2
    results = {task: study(task, args.out, args.workers, args.seeds) for task in tasks}
    text = table(results)
    plot(text, args.out)
    parts.write(args, results, text, "Paired")
    return results


if __name__ == "__main__":
    main()
