"""Parts of a study: each result is one JSON file, so that a stopped study goes on where it was; and
the search for a setting by them."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import plots
from tables import SCORES, report
from tqdm import tqdm

from dipkernels.models.calibrate import DEEP
from dipkernels.models.spreads import FEW
from dipkernels.training.objective import KL

# A part is of these defaults of the package: with others it is another part.
DEFAULTS = {"kl": KL, "few": FEW, "deep": DEEP}


def run(
    part: Callable[[dict[str, Any]], dict[str, Any]],
    keys: Iterable[dict[str, Any]],
    out: Path,
    workers: int = 1,
) -> list[dict[str, Any]]:
    """part(key) for every key, or what an earlier run left under out/parts; in the keys' order.

    Args:
        part: a module-level function; its result must be JSON.
        keys: JSON too: what a part depends on, beside the package's defaults.
        out: the study's folder.
        workers: processes, each with one thread.

    Returns:
        {**key, **part(key)} for every key.
    """
    keys = list(keys)
    files = [out / "parts" / f"{name_of(key)}.json" for key in keys]
    missing = {file: key for file, key in zip(files, keys, strict=True) if not file.exists()}
    with tqdm(
        total=len(keys), initial=len(keys) - len(missing), unit="part", dynamic_ncols=True
    ) as bar:
        if workers > 1 and len(missing) > 1:
            with ProcessPoolExecutor(workers, initializer=_one_thread) as pool:
                jobs = {pool.submit(part, key): (file, key) for file, key in missing.items()}
                for job in as_completed(jobs):
                    file, key = jobs[job]
                    save(file, {**key, **job.result()})
                    bar.update()
        else:
            for file, key in missing.items():
                bar.set_description(
                    " ".join(value for value in key.values() if isinstance(value, str))
                )
                save(file, {**key, **part(key)})
                bar.update()
    return [json.loads(file.read_text()) for file in files]


def total(result: dict[str, Any]) -> float:
    """What a search maximises: clean, attacked and noisy score weigh alike."""
    return sum(result[name] for name in SCORES)


def chosen(
    part: Callable[[dict[str, Any]], dict[str, Any]],
    case: dict[str, Any],
    search: dict[str, list[dict[str, Any]]],
    out: Path,
    workers: int,
    seeds: int = 2,
    score: Callable[[dict[str, Any]], float] = total,
) -> dict[str, dict[str, Any]]:
    """Of each method the setting of the largest mean score over seeds that the test does not use,
    by part({**case, "method", "stage": "search", "seed", "options"})."""
    keys = [
        {**case, "method": method, "stage": "search", "seed": 100 + seed, "options": options}
        for method, settings in search.items()
        for options in settings
        for seed in range(seeds)
    ]
    scores: dict[str, dict[str, float]] = {}
    for result in run(part, keys, out, workers):
        by_setting = scores.setdefault(result["method"], {})
        name = json.dumps(result["options"])
        by_setting[name] = by_setting.get(name, 0.0) + score(result)
    return {method: json.loads(max(s, key=lambda name: s[name])) for method, s in scores.items()}


def tested(
    part: Callable[[dict[str, Any]], dict[str, Any]],
    case: dict[str, Any],
    settings: dict[str, dict[str, Any] | None],
    out: Path,
    workers: int,
    seeds: int,
) -> list[dict[str, Any]]:
    """The parts of every method with its setting, seed by seed, so that a stopped study has whole
    seeds."""
    keys = [
        {**case, "method": method, "stage": "test", "seed": seed, "options": options}
        for seed in range(seeds)
        for method, options in settings.items()
    ]
    return run(part, keys, out, workers)


count = report.at_least(1)  # a flag's number of seeds or processes


def command_line(doc: str, name: str, seeds: int, quick: str) -> argparse.ArgumentParser:
    """The options that studies share: --out, --seeds, --workers and --quick."""
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/studies") / name)
    parser.add_argument("--seeds", type=count, default=seeds)
    parser.add_argument("--workers", type=count, default=1, help="processes (1)")
    parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def write(
    args: argparse.Namespace,
    summary: Any,
    table: str,
    said: str,
    *,
    spread: str = "95 %; ?: undecided",
    names: tuple[str, ...] = ("",),
) -> None:
    """Write a study's result into its folder, as summary.json, table.md and its tables drawn, and
    print the table.

    said: how its differences read, before the number of seeds that they are paired over. names: of
    the numbers of a cell that has several.
    """
    plots.draw(table, args.out, names)
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (args.out / "table.md").write_text(table + "\n")
    over = f"over {args.seeds} seed(s), {spread}. Wrote {args.out}"
    print(f"{table}\n\n{said} {over}")


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def name_of(key: dict[str, Any]) -> str:
    whole = {"defaults": DEFAULTS, **key}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:20]


def save(file: Path, value: Any) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(value) + "\n")
    part.replace(file)
