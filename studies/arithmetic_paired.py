"""The small Llama on chains of sums, with enough paired seeds to decide, or to say that they do
not: token NLL as well as exact match.

    python studies/arithmetic_paired.py          writes
    out/studies/arithmetic_paired/{summary.json,table.md,table*.svg}
    python studies/arithmetic_paired.py --quick  a tiny model, two seeds: does it run?

The task, methods and settings of arithmetic.py's stage "scratch" (the ones that its search chose),
on a Llama of half the width; one trajectory. Beside them the recipe with nothing set (ratio 0.1, as
`calibrate` chooses for tokens), and with more noise (ratios 1 and 0.3). Each seed gives all methods
the same weights and batches. NLL: nats per token of the right solution. Two minutes of one core for
each seed.
"""

from __future__ import annotations

import random
import statistics
from typing import Any

import arithmetic
import arithmetic_setup as task
import parts
import torch
from tables import by_case, compared, markdown
from torch import nn

import dipkernels as dip
from dipkernels.training.objective import KL

STAGE = "scratch"
METHODS: dict[str, dict[str, Any]] = {
    "plain": {"method": "plain"},
    "NEFTune": {"method": "NEFTune", "strength": 2.0},
    "fixed variance": {"method": "fixed variance", "sigma": 0.05},
    "DIP": {"method": "DIP", "sigma": 0.05, "alpha": 0.01},
    "DIP, kl 0.2": {"method": "DIP", "sigma": 0.05, "kl": 0.2},
    "recipe": {"method": "recipe", "kl": KL},
    "recipe, ratio 1": {"method": "recipe", "ratio": 1.0, "kl": KL},
    "recipe, ratio 0.3": {"method": "recipe", "ratio": 0.3, "kl": KL},
}
LR, BATCH, TESTED = 2e-3, 64, 200
# Which way is better, and a table's digits
SCORES = {
    "exact match": (1, 1),
    "exact match, longer": (1, 1),
    "nll": (-1, 3),
    "nll, longer": (-1, 3),
}


@torch.no_grad()
def token_nll(model: nn.Module, problems: list[task.Problem]) -> float:
    """Nats per token of the solutions, teacher-forced."""
    model.eval()
    return model(**task.batch_of(problems, random.Random(0))).loss.item()


def part(key: dict[str, Any]) -> dict[str, Any]:
    config = {"stage": STAGE, "seed": key["seed"], "lr": LR, **key["size"], **key["options"]}
    operators = arithmetic.OPERATORS[STAGE]
    data = task.batches(key["seed"], config["steps"], BATCH, arithmetic.LENGTHS[STAGE], operators)
    model = arithmetic.build(config, None)
    if config["method"] == "recipe":
        dip.convert(model)
        dip.calibrate(model, data[:8], ratio=config.get("ratio"))
    arithmetic.train(model, config, data)
    found: dict[str, list[float]] = {score: [] for score in SCORES}
    for steps in arithmetic.TESTED[STAGE]:
        problems = task.problems(0, TESTED, steps, operators, "test")
        longer = ", longer" if steps > max(arithmetic.LENGTHS[STAGE]) else ""
        found["exact match" + longer].append(task.exact_match(model, problems)["answer"])
        found["nll" + longer].append(token_nll(model, problems))
    return {score: statistics.fmean(values) for score, values in found.items()}


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    (runs,) = by_case(("", r["name"], r["seed"], r) for r in results).values()
    return compared(runs, SCORES, {"plain": 1})


def table(rows: dict[str, Any]) -> str:
    lines = []
    for method, row in rows.items():
        cells = [
            f"{row[score]['text']} (sd {row[score]['sd']:.{digits}f})"
            if method == "plain"
            else row[score]["plain"]["text"]
            for score, (_, digits) in SCORES.items()
        ]
        lines.append([method, *cells])
    return markdown(["minus plain", *SCORES], lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    quick = "a tiny model, two seeds, two steps"
    args = parts.command_line(__doc__, "arithmetic_paired", 8, quick).parse_args(arguments)
    size = {"dim": 128, "depth": arithmetic.DEPTH, "steps": arithmetic.STEPS[STAGE]}
    if args.quick:
        args.seeds, size = 2, {"dim": 32, "depth": 1, "steps": 2}
    keys = [
        {"name": name, "options": options, "size": size, "seed": seed}
        for seed in range(args.seeds)
        for name, options in METHODS.items()
    ]
    rows = summarise(parts.run(part, keys, args.out, args.workers))
    text = table(rows)
    parts.write(args, rows, text, "Paired")
    return rows


if __name__ == "__main__":
    main()
