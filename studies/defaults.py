"""Where the defaults of calibrate, objective and param_groups come from: a bench of seventeen small
tasks.

    python studies/defaults.py  writes out/studies/defaults/{summary.json,table.md,ratio_*.svg}
    python studies/defaults.py --figures
        # the figures of docs/, from docs/results/ratio.json and docs/results_defaults.md
    python studies/defaults.py --quick  two small tasks, one seed: does it run?

Each method trains the same weights on the same batches as plain training does, and all is scored
on the plain forward: clean accuracy, PGD and input noise at strengths that hurt plain training a
lot. Stopped, it goes on where it was.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import parts
import plots
from tables import SCORES, by_case, compared, figures, markdown, points, rows_of
from tasks import TASKS
from training import keys, scored

DOCS = Path(__file__).resolve().parents[1] / "docs"
FIXED = (0.15, 0.3, 0.6, 1.0, 1.5)
METHODS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "default": {},
    "start 0.3": {"start": 0.3},
    **{f"fixed {ratio:g}": {"ratio": ratio, "fixed": True} for ratio in FIXED},
    "kl 0": {"kl": 0.0},
    "kl 1": {"kl": 1.0},
}
SETTINGS: dict[str, dict[str, Any]] = {"AdamW": {}, "SGD": {"optimiser": "SGD", "lr": 0.05}}
EVERYWHERE = ("plain", "default", "start 0.3", "fixed 1")
# By AdamW, on six of the tasks, also:
MORE = ("fixed 0.3", "kl 0", "kl 1")
WITH_MORE = ("digits MLP", "breast_cancer", "classes 20", "classes 60", "cover", "friedman")


def part(key: dict[str, Any]) -> dict[str, Any]:
    return scored(TASKS[key["task"]], key)


def methods_of(task: str, training: str) -> tuple[str, ...]:
    """As the table of docs/ has them."""
    return (*EVERYWHERE, *MORE) if task in WITH_MORE and training == "AdamW" else EVERYWHERE


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Per task, training and method: means, and the paired differences to plain."""
    found = ((f"{r['task']}, {r['training']}", r["method"], r["seed"], r) for r in results)
    rows: dict[str, Any] = {}
    for name, methods in by_case(found).items():
        rows[name] = compared(methods, dict.fromkeys(SCORES, (1, 1)), {"plain": 1})
        for method, by_seed in methods.items():
            first = next(iter(by_seed.values()))
            rows[name][method] |= {"kept": first["kept"], "seeds": len(by_seed)}
    return rows


def table(rows: dict[str, Any], methods: list[str]) -> str:
    """One line for each task and method: plain's scores, the others' differences to them."""
    lines = []
    for case, by_method in rows.items():
        for method in methods:
            if method in by_method:
                row = by_method[method]
                cells = [(row[s] if method == "plain" else row[s]["plain"])["text"] for s in SCORES]
                lines.append([case, method, *cells, " ".join(f"{k:.2f}" for k in row["kept"][:4])])
    return markdown(["task", "method", *SCORES, "sigma kept"], lines)


# The tasks of a figure, for readers who do not know their names in studies/tasks.py.
TITLES = {
    "fashion MLP": "Fashion MLP",
    "fashion CNN": "Fashion CNN",
    "breast_cancer": "breast cancer",
    "classes 20": "20 features,\nsome matter",
    "classes 60": "60 features,\n6 matter",
    "quantiles": "8 features,\nall matter",
    "cover": "covertype-\nlike table",
    "topics": "word vectors",
    "friedman": "Friedman\nregression",
    "diabetes": "diabetes\nregression",
}


def title_of(task: str) -> str:
    return TITLES.get(task, task).replace("-\n", "-").replace("\n", " ")


def plot_ratio(rows: dict[str, Any], folder: Path) -> None:
    """Score against the ratio of a fixed sigma, beside the recipe and plain training: one SVG for
    each task."""
    cases = {
        case: m
        for case, m in rows.items()
        if {"default", *(f"fixed {r:g}" for r in FIXED)} <= set(m)
    }
    for case, methods in cases.items():
        with figures.style():
            figure, axes = figures.panels(height=4.0)
            axis = axes[0, 0]
            for score, color, marker in zip(SCORES, figures.ORDER, "os^"):
                means = [methods[f"fixed {ratio:g}"][score]["mean"] for ratio in FIXED]
                axis.plot(
                    FIXED, means, "-", marker=marker, color=color, label=f"{score}: fixed sigma"
                )
                for method, dash, name in (("default", "--", "recipe"), ("plain", ":", "plain")):
                    axis.axhline(
                        methods[method][score]["mean"],
                        color=color,
                        ls=dash,
                        label=f"{score}: {name}",
                    )
            axis.set(
                xscale="log",
                xlabel="fixed sigma / spread of the input",
                title=f"{title_of(case.partition(',')[0])}: score, %",
            )
            axis.set_xticks(FIXED, [f"{ratio:g}" for ratio in FIXED])
            axis.minorticks_off()
            figures.legend(figure, axis)
            figures.save(figure, folder / f"ratio_{case.split()[0].strip(',')}.svg")


def plot_gains(table: str, folder: Path) -> None:
    """What the recipe and a fixed sigma gain over plain training by AdamW, from the table that this
    study prints."""
    gains: dict[str, dict[str, list[str]]] = {}
    for case, method, *scores in (row for row in rows_of(table) if row[0].endswith(", AdamW")):
        gains.setdefault(case.removesuffix(", AdamW"), {})[method] = scores
    gains = {task: each for task, each in gains.items() if {"default", "fixed 1"} <= each.keys()}
    words = {"clean": "on clean data", "pgd": "under attack (PGD)"}
    for number, score in enumerate(words):
        found = {
            label: {TITLES.get(t, t): points(each[method][number])[0] for t, each in gains.items()}
            for method, label in (("default", "the recipe"), ("fixed 1", "the same sigma, fixed"))
        }
        plots.by_task(
            folder / f"gains_{score}.svg",
            found,
            [figures.LINES[name][:2] for name in ("DIP", "fixed variance")],
            height=1.2 + 0.42 * len(gains),
            title=f"points gained {words[score]}",
            label="points; bars: 95 % interval",
            limits=(-33, 50),
        )


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = parts.command_line(__doc__, "defaults", 3, "two small tasks, one seed, few methods")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[], metavar="METHOD")
    parser.add_argument(
        "--trainings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="TRAINING"
    )
    parser.add_argument(
        "--figures", action="store_true", help="no more than docs/assets, from what docs/ has"
    )
    args = parser.parse_args(arguments)
    if args.figures:
        plot_ratio(json.loads((DOCS / "results" / "ratio.json").read_text()), DOCS / "assets")
        plot_gains((DOCS / "results_defaults.md").read_text(encoding="utf-8"), DOCS / "assets")
        return {}
    if args.quick:
        args.tasks, args.methods, args.seeds = (
            ["iris", "diabetes"],
            ["plain", "default", "fixed 1"],
            1,
        )
    methods = list(dict.fromkeys(["plain", *args.methods])) if args.methods else []
    cases = [
        (task, training, method)
        for task in args.tasks
        for training in args.trainings
        for method in methods or methods_of(task, training)
    ]
    asked = keys(cases, args.seeds, METHODS, SETTINGS)
    rows = summarise(parts.run(part, asked, args.out, args.workers))
    text = table(rows, list(METHODS))
    plot_ratio(rows, args.out)
    parts.write(args, rows, text, "Differences to plain, paired")
    return rows


if __name__ == "__main__":
    main()
