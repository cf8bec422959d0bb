"""Paired comparisons: the mean difference over seeds with its interval, "undecided" where that
holds zero."""

from __future__ import annotations

import math
import re
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import figures  # noqa: F401  for the other files here, as the next but one
import machine  # noqa: F401
import report
import timing  # noqa: F401

markdown = report.table
SCORES = ("clean", "pgd", "noise")  # of training.evaluate, all of them better if more


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of the 95 % interval of paired differences, Student's; infinite for fewer
    than two."""
    mean, n = statistics.fmean(differences), len(differences)
    if n < 2:
        return mean, math.inf
    return mean, stats.t.ppf(0.975, n - 1) * statistics.stdev(differences) / math.sqrt(n)


def verdict(differences: Sequence[float]) -> str:
    """ "better", "worse" or "undecided": whether the interval lies above, below or around zero."""
    mean, half = interval(differences)
    return "better" if mean - half > 0 else "worse" if mean + half < 0 else "undecided"


def signed(differences: Sequence[float], digits: int = 1) -> str:
    """+1.2 ± 0.8, with a mark where undecided."""
    mean, half = interval(differences)
    mark = " ?" if verdict(differences) == "undecided" else ""
    return (
        f"{mean:+.{digits}f} ± {half:.{digits}f}{mark}"
        if math.isfinite(half)
        else f"{mean:+.{digits}f}"
    )


def by_case(
    found: Iterable[tuple[str, str, int, Mapping[str, float]]],
) -> dict[str, dict[str, dict[int, Mapping[str, float]]]]:
    """{case: {method: {seed: scores}}} of (case, method, seed, scores)."""
    runs: dict[str, dict[str, dict[int, Mapping[str, float]]]] = {}
    for case, method, seed, scores in found:
        runs.setdefault(case, {}).setdefault(method, {})[seed] = scores
    return runs


def compared(
    runs: Mapping[str, Mapping[int, Mapping[str, float]]],
    scores: Mapping[str, tuple[int, int]],
    bases: Mapping[str, int],
) -> dict[str, Any]:
    """Of each method the mean scores, and their paired differences to some of the methods.

    Args:
        runs: {method: {seed: {score: value}}}; what has no such score is left out.
        scores: {score: (1 if more is better, -1 if less, digits)}.
        bases: {method: 1 for the others minus it, -1 for it minus them}; what has not run is left
            out.
    """

    def has(method: str, score: str) -> bool:
        return any(score in run for run in runs.get(method, {}).values())

    rows: dict[str, Any] = {}
    for method, by_seed in runs.items():
        row = rows.setdefault(method, {})
        for score, (better, digits) in scores.items():
            if not has(method, score):
                continue
            values = [run[score] for run in by_seed.values()]
            mean, sd = statistics.fmean(values), statistics.stdev(values) if values[1:] else 0.0
            row[score] = {"mean": mean, "sd": sd, "text": f"{mean:.{digits}f}"}
            for base in (each for each in bases if has(each, score)):
                pairs = [
                    bases[base] * (run[score] - runs[base][seed][score])
                    for seed, run in by_seed.items()
                ]
                mean, half = interval(pairs)
                row[score][base] = {
                    "mean": mean,
                    "half_width": half if len(pairs) > 1 else None,
                    "verdict": verdict([better * each for each in pairs]),
                    "text": signed(pairs, digits),
                }
    return rows


def cell(row: Mapping[str, Any], score: str, base: str, bare: bool) -> str:
    """A mean, and in brackets the difference to the base, where there is one and it is not bare."""
    bare = bare or base not in row[score]
    return row[score]["text"] + ("" if bare else f" ({row[score][base]['text']})")


_NUMBER = re.compile(r"([-+]?\d+(?:\.\d+)?)(?: ± (\d+(?:\.\d+)?))? ?\??(?: \(.*\))?")
Point = tuple[float, float]  # a mean, and half of its interval


def points(cell: str) -> list[Point]:
    """The numbers of "+1.2 ± 0.8 ?", "80.9 (...)" or "+1.2 / +3.4?"; none of any other text."""
    found = [_NUMBER.fullmatch(part.strip("* ")) for part in cell.split(" / ")]
    return [(float(m[1]), float(m[2] or 0)) for m in found if m] if all(found) else []


def rows_of(text: str) -> list[list[str]]:
    """The rows of every table in a text, heads included."""
    lines = (line for line in text.splitlines() if line.startswith("| "))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def named(options: dict[str, Any]) -> str:
    """A setting as a table has it: its numbers."""
    numbers = {key: v for key, v in options.items() if not isinstance(v, (bool, str))}
    return ", ".join(
        f"{key.removeprefix('variance_').replace('_', ' ')} {v:g}" for key, v in numbers.items()
    )
