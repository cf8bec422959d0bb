"""How firmly do the variances of a deep network have to be held? The pull of each layer at 4 / L of
the KL term, L the number of layers, as `calibrate` sets it, against sqrt(4 / L) and 1.

    python studies/depth.py          writes out/studies/depth/{summary.json,table.md,table*.svg}
    python studies/depth.py --quick  a short training of the smaller network: does it run?

Digits: an MLP of nine layers and a ViT of four blocks, AdamW, the scores of defaults.py. Six
minutes of one core.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import parts
from defaults import summarise, table
from tasks import TASKS, ViT, mlp
from training import keys, scored

DEEP = {
    "MLP, 9 layers": dataclasses.replace(TASKS["digits MLP"], net=mlp(64, *[128] * 8, 10)),
    "ViT, 4 blocks": dataclasses.replace(TASKS["digits ViT"], net=functools.partial(ViT, blocks=4)),
}
METHODS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "4 / L": {},
    "sqrt(4 / L)": {"depth": 0.5},
    "1": {"depth": 0.0},
}


def part(key: dict[str, Any]) -> dict[str, Any]:
    return scored(DEEP[key["task"]], key)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = parts.command_line(__doc__, "depth", 2, "a short training of the MLP")
    args = parser.parse_args(arguments)
    args.seeds = 1 if args.quick else args.seeds
    tasks = list(DEEP)[: 1 if args.quick else None]
    cases = [(task, "AdamW", method) for task in tasks for method in METHODS]
    asked = keys(cases, args.seeds, METHODS, {"AdamW": {"epochs": 2} if args.quick else {}})
    rows = summarise(parts.run(part, asked, args.out, args.workers))
    text = table(rows, list(METHODS))
    parts.write(args, rows, text, "Differences to plain, paired")
    return rows


if __name__ == "__main__":
    main()
