"""Choose ratio and kl on validation data: successive halving within a stated budget."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from ..arguments import described, integer, real
from ..reports import new_figure
from .objective import KL

RATIOS = (0.3, 0.6, 1.0, 1.5)
WEIGHTS = (0.1, KL, 1.0)


@dataclass(frozen=True)
class Trial:
    """One training run: its settings, what it might spend, and its two scores on validation
    data."""

    ratio: float
    kl: float
    budget: int
    clean: float
    robust: float


@dataclass(frozen=True)
class Tuned:
    """What `tune` found: the settings to use and every trial; prints as a table.

    Attributes:
        ratio: For `calibrate`.
        kl: For `objective`.
        trials: Every run: its ratio, kl, budget, clean and robust score.
        tolerance: What `tune` was given.
    """

    ratio: float
    kl: float
    trials: tuple[Trial, ...]
    tolerance: float

    def __str__(self) -> str:
        lines = [f"{'ratio':>6}  {'kl':>6}  {'budget':>7}  {'clean':>8}  {'robust':>8}"]
        for t in self.trials:
            chosen = "  <- chosen" if t is self.best else ""
            lines.append(
                f"{t.ratio:6g}  {t.kl:6g}  {t.budget:7d}  {t.clean:8.4g}  {t.robust:8.4g}{chosen}"
            )
        return "\n".join(lines)

    @property
    def best(self) -> Trial:
        """The chosen trial, at the largest budget."""
        last = [t for t in self.trials if t.budget == self.trials[-1].budget]
        return ranked(last, self.tolerance)[0]

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Robust against clean score, one point for each trial, larger for a larger budget: the
        matplotlib Figure, written where there is a path."""
        figure, axis = new_figure(6, 4.5)
        largest = max(t.budget for t in self.trials)
        points = [(t.clean, t.robust, 20 + 80 * t.budget / largest, t.ratio) for t in self.trials]
        figure.colorbar(axis.scatter(*zip(*points)), label="ratio")
        for t in self.trials:
            if t.budget == largest:
                at = (t.clean, t.robust)
                axis.annotate(f"kl {t.kl:g}", at, (4, 4), textcoords="offset points", fontsize=8)
        chosen = (self.best.clean, self.best.robust)
        axis.scatter(*chosen, 200, facecolors="none", edgecolors="red", label="chosen")
        axis.set(xlabel="clean score on validation data", ylabel="robust score on validation data")
        axis.grid(alpha=0.3)
        axis.legend()
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure


def tune(
    run: Callable[[float, float, int], Mapping[str, float | Tensor]],
    budget: int,
    *,
    ratios: float | Iterable[float] = RATIOS,
    kls: float | Iterable[float] = WEIGHTS,
    tolerance: float = 0.01,
    progress: bool = True,
) -> Tuned:
    """Choose calibrate's ratio and objective's kl: all pairs run for a short time, the better half
    for twice as long, and so on.

    Among pairs whose clean score is within `tolerance` of the best one's, the higher robust score
    is better. Pairs that cost more clean score come after them, the cleanest first.

    Args:
        run: run(ratio, kl, budget) trains a fresh model for that many units, say epochs, and
            returns the mapping {"clean": ..., "robust": ...} of scores on validation data, where
            higher is better (accuracy as it is, and under an attack or noise). The same seed for
            all pairs compares them best. An error in it ends `tune`, and the trials before are
            lost. If they take hours, let it write each result to a file, and look there first.
        budget: Units in all, at least one for each pair and round.
        ratios: Values for `calibrate`, > 0, or one.
        kls: Values for `objective`, >= 0, or one.
        tolerance: >= 0, clean score that may be given up, in run's units (0.01 is a point of
            accuracies in 0 .. 1).
        progress: Whether to show a progress bar, if tqdm is installed.

    Returns:
        A Tuned: `.ratio`, `.kl`, `.trials`; it prints as a table, and `.plot(path)` draws the
            trade.

    Raises:
        ValueError: Bad values, a budget too small, or scores that are missing or not finite.

    Examples:
        >>> def run(ratio, kl, budget):
        ...     return {"clean": 0.9, "robust": 0.5 + 0.1 * ratio - 0.01 * kl}
        >>> found = dip.tune(run, budget=6, ratios=(0.3, 1.0), kls=(0.2,), progress=False)
        >>> found.ratio, found.kl
        (1.0, 0.2)
    """
    if not callable(run):
        raise TypeError(f"run: expected a function of (ratio, kl, budget), got {described(run)}")
    ratios, kls = _listed(ratios), _listed(kls)
    pairs = list(itertools.product(ratios, kls))
    if not pairs:
        raise ValueError(f"ratios, kls: expected some of each, got {ratios} and {kls}")
    pairs = [(float(real("ratios", r, above=0)), float(real("kls", w, least=0))) for r, w in pairs]
    tolerance = real("tolerance", tolerance, least=0)
    rounds = plan(len(pairs), integer("budget", budget))
    trials: list[Trial] = []
    with _bar(sum(count * units for count, units in rounds), progress) as bar:
        for count, units in rounds:
            now = []
            for ratio, kl in pairs[:count]:
                now.append(Trial(ratio, kl, units, **_scores(run(ratio, kl, units))))
                bar.update(units)
            trials += now
            pairs = [(t.ratio, t.kl) for t in ranked(now, tolerance)]
    ratio, kl = pairs[0]
    return Tuned(ratio, kl, tuple(trials), tolerance)


def _listed(values: Any) -> list[Any]:
    """The values, of one number a list of one."""
    try:
        return [values] if isinstance(values, str) else list(values)
    except TypeError:
        return [values]


def plan(pairs: int, budget: int) -> list[tuple[int, int]]:
    """(pairs, units for each) of every round: half the pairs and twice the units from one to the
    next."""
    counts = [pairs]
    while counts[-1] > 2:
        counts.append(-(-counts[-1] // 2))
    cost = sum(count * 2**i for i, count in enumerate(counts))
    if budget < cost:
        raise ValueError(f"budget: expected at least {cost} units for {pairs} pairs, got {budget}")
    return [(count, budget // cost * 2**i) for i, count in enumerate(counts)]


def ranked(trials: Sequence[Trial], tolerance: float) -> list[Trial]:
    """Best first."""
    floor = max(t.clean for t in trials) - tolerance
    fine = sorted((t for t in trials if t.clean >= floor), key=lambda t: -t.robust)
    return fine + sorted((t for t in trials if t.clean < floor), key=lambda t: -t.clean)


def _scores(result: Mapping[str, float | Tensor]) -> dict[str, float]:
    try:
        scores = {name: float(result[name]) for name in ("clean", "robust")}
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f'run: expected a mapping {{"clean": ..., "robust": ...}}, got {result!r}'
        ) from None
    if not all(math.isfinite(value) for value in scores.values()):
        raise ValueError(f"run: expected finite scores, got {scores}")
    return scores


def _bar(total: int, progress: bool) -> Any:
    if progress:
        with contextlib.suppress(ImportError):
            from tqdm.auto import tqdm

            return tqdm(total=total, desc="tune", dynamic_ncols=True)
    return contextlib.nullcontext(SimpleNamespace(update=lambda units: None))
