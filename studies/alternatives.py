"""What else might keep the noise useful: other amounts, a held budget, other scores, other rates of
the variances.

    python studies/alternatives.py          writes out/studies/alternatives/{summary.json,table.md,table*.svg}
    python studies/alternatives.py --quick  one small task, one seed: does it run?

The bench and the scores of defaults.py; each method changes one thing of the recipe as it was then,
with kl 0.2 and a pull of n / 32. n: the values of an example that a layer's input has. About 35
minutes of one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import parts
import plots
from defaults import SCORES, part, summarise
from tables import markdown
from tasks import TASKS

# How much noise. n: the values of an example that the first layer's input has; before a layer of
# fewer values its own. The default's pull to the prior was n / 32 at most; "pull": 1 is the whole.
AMOUNT: dict[str, dict[str, Any]] = {
    "default": {"pull": 32},
    "pull n / 16": {"pull": 16},
    "pull n / 64": {"pull": 64},
    "ratio 1": {"pull": 1},
    "sqrt(n / 16)": {"values": 16, "pull": 1},
    "ratio 0.5": {"ratio": 0.5, "pull": 1},
    "sqrt(n / 32)": {"values": 32, "pull": 1},
    "sqrt(n / 64)": {"values": 64, "pull": 1},
    "n / 32": {"values": 32, "power": 1.0, "pull": 1},
    "kl 0.05, ratio 1": {"kl": 0.05, "pull": 1},
    "kl 0.1, ratio 1": {"kl": 0.1, "pull": 1},
}
# The first eight were looked at to choose, the last two held back.
AMOUNT_CASES = (
    "iris",
    "diabetes",
    "friedman",
    "wine",
    "classes 20",
    "breast_cancer",
    "cover",
    "classes 60",
    "quantiles",
    "moons",
)
# What else to change; all with the whole pull.
CHANGES: dict[str, dict[str, Any]] = {
    name: {"pull": 1, **options}
    for name, options in {
        "budget of each layer": {"budget": "layer", "kl": 0.0},
        "budget of each layer, kl 0.2": {"budget": "layer", "kl": 0.2},
        "budget of the model": {"budget": "model", "kl": 0.0},
        "energy score": {"score": "energy"},
        "energy score, kl 0.05": {"score": "energy", "kl": 0.05},
        "NLL of the mean": {"score": "mixture"},
        "rate 1": {"variance_rate": 1.0},
        "rate 3": {"variance_rate": 3.0},
        "rate 30": {"variance_rate": 30.0},
        "constant rate": {"variance_schedule": "constant"},
    }.items()
}
CHANGES_CASES = ("digits MLP", "breast_cancer", "friedman", "classes 20", "quantiles", "moons")
METHODS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    **{name: {"kl": 0.2, **options} for name, options in {**AMOUNT, **CHANGES}.items()},
}
# The weights' rate constant, or falling to 0 by a cosine: there the variances' falls with it, or
# stays.
SETTINGS: dict[str, dict[str, Any]] = {"AdamW": {}, "AdamW, cosine": {"schedule": "cosine"}}
WITH_COSINE = ("plain", "default", "ratio 1", "constant rate")
TASKS_OF = {
    "plain": (*AMOUNT_CASES, "digits MLP"),
    "default": (*AMOUNT_CASES, "digits MLP"),
    "ratio 1": (*AMOUNT_CASES, "digits MLP"),
    **{name: AMOUNT_CASES for name in AMOUNT if name not in ("default", "ratio 1")},
    **{name: CHANGES_CASES for name in CHANGES},
}


def keys(tasks: list[str], methods: list[str], seeds: int) -> list[dict[str, Any]]:
    return [
        {
            "task": task,
            "method": method,
            "training": training,
            "seed": seed,
            "options": METHODS[method],
            "settings": settings,
        }
        for seed in range(seeds)
        for task in tasks
        for training, settings in SETTINGS.items()
        for method in methods
        if task in TASKS_OF[method]
        and (
            method in WITH_COSINE and task in CHANGES_CASES
            if settings
            else method != "constant rate"
        )
        and not (method == "NLL of the mean" and TASKS[task].regression)
    ]


def table(rows: dict[str, Any], methods: Iterable[str], cases: Iterable[str]) -> str:
    """A line for each method, a column for each case: differences to plain, clean / pgd / noise."""

    def cell(row: dict[str, Any] | None) -> str:
        marks = {"undecided": "?"}
        each = (
            [f"{row[s]['minus_plain']:+.1f}{marks.get(row[s]['verdict'], '')}" for s in SCORES]
            if row
            else ["-"]
        )
        return " / ".join(each)

    cases = [case for case in cases if case in rows]
    lines = [[method, *(cell(rows[case].get(method)) for case in cases)] for method in methods]
    return markdown(
        ["", *(case.split(", ")[0] for case in cases)],
        [line for line in lines if set(line[1:]) != {"-"}],
    )


def report(rows: dict[str, Any], methods: list[str]) -> str:
    amount = [name for name in AMOUNT if name in methods]
    changes = [name for name in ("default", "ratio 1", *CHANGES) if name in methods]
    tables = [
        table(rows, amount, [f"{task}, AdamW" for task in AMOUNT_CASES]),
        table(rows, changes, [f"{task}, AdamW" for task in CHANGES_CASES]),
        table(rows, changes, [f"{task}, AdamW, cosine" for task in CHANGES_CASES]),
    ]
    return "\n\n".join(tables)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/studies/alternatives"))
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=AMOUNT_CASES + CHANGES_CASES[:1],
        default=[*AMOUNT_CASES, CHANGES_CASES[0]],
        metavar="TASK",
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="processes (1)")
    parser.add_argument("--quick", action="store_true", help="one small task, one seed")
    args = parser.parse_args(arguments)
    if args.quick:
        args.tasks, args.seeds = ["iris"], 1
    methods = list(dict.fromkeys(["plain", *args.methods]))
    rows = summarise(parts.run(part, keys(args.tasks, methods, args.seeds), args.out, args.workers))
    text = report(rows, methods)
    parts.write(args.out, rows, text)
    plots.draw(text, args.out, SCORES)
    print(
        f"\nclean / pgd / noise minus plain, paired over {args.seeds} seed(s), 95 %; ?: undecided. "
        f"Wrote {args.out}"
    )
    return rows


if __name__ == "__main__":
    main()
