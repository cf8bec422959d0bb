"""What the studies of docs/results.md share on paper: environment, mean and spread, stored runs,
tables of a page, summaries."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parts import name_of, save
from tables import figures, machine, timing
from torch import nn
from tqdm import tqdm

import dipkernels as dip
from dipkernels.nn.numbering import dip_layers

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results.md"
FOLDER = ROOT / "docs" / "results"


def command_line(doc: str, name: str, quick: str) -> argparse.ArgumentParser:
    """The options that the studies of the page share."""
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("out") / name, help=f"folder of the runs (out/{name})")
    add("--page", type=Path, help="page of the tables (docs/results.md; in --out if quick)")
    add("--quick", action="store_true", help=f"{quick}: does it run? writes into --out alone")
    add("--figures", action="store_true", help=f"figures alone, from docs/results/{name}.json")
    return parser


def set_up(args: argparse.Namespace) -> None:
    """The page and the folder that the options ask for."""
    args.page = args.page or (args.out / "results.md" if args.quick else PAGE)
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.page.exists():
        shutil.copyfile(PAGE, args.page)
    torch.set_num_threads(1)  # the networks are small


def run(
    studies: Sequence[Study],
    args: argparse.Namespace,
    write: Callable[[Sequence[Study], Path, Path], None],
) -> None:
    """Every run that is not stored yet; then write(studies, page, folder) the report."""
    with tqdm(total=sum(map(len, studies)), unit="run", dynamic_ncols=True) as bar:
        for study in studies:
            study.bar = bar
            study.run()
            study.bar = tqdm(disable=True)
    folder = FOLDER if args.page == PAGE else args.out
    write(studies, args.page, folder)
    print(f"wrote {args.page} and {folder}")


def setting_text(setting: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in sorted(setting.items()))


def environment() -> dict[str, str | int]:
    """Machine, versions and date: what every stored figure carries."""
    found = machine.describe("cpu")
    return {
        "machine": f"{found['cpu']}, {found['cores']} cores, {found['threads']} thread(s) used",
        "python": found["python"],
        "torch": found["torch"],
        "numpy": np.__version__,
        "dipkernels": dip.__version__,
        "date": found["date"][:10],
    }


def environment_line(runs: Sequence[dict]) -> str:
    """Under which environments the runs of a table were made, how many they are, and how long they
    took."""
    lines = {
        ", ".join(f"{key} {value}" for key, value in run["environment"].items()) for run in runs
    }
    told = "; ".join(sorted(line.replace("machine ", "") for line in lines))
    seconds = sum(run["result"]["train_cpu_seconds"] for run in runs)
    return f"{told}; {len(runs)} runs, {seconds:.0f} s of training."


def chosen_text(store: Store) -> str:
    """The setting that the search chose for each method."""
    chosen = sorted(store.values["chosen"].items())
    return "; ".join(f"{name} {setting_text(setting)}" for name, setting in chosen)


def search_table(head: Sequence[str], stores: dict[str, Store], mark: str = "") -> str:
    """Every setting with its score, of each store and method a row; mark: around the best one's."""
    rows = []
    for name, store in stores.items():
        for method, trials in sorted(store.values["search"].items()):
            best = max(score for score, _ in trials)
            marks = [mark if score == best else "" for score, _ in trials]
            cells = (
                f"{setting_text(setting)}: {each}{score:.1f}{each}"
                for each, (score, setting) in zip(marks, trials)
            )
            rows.append([name, method, "; ".join(cells)])
    return table(head, rows)


def sigmas(model: nn.Module) -> dict[str, list[float]]:
    """Learned sigma by layer: minimum, quartiles, maximum over its features."""
    points = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    return {
        name.removeprefix("base_model.model."): [
            round(q, 4) for q in torch.quantile(layer.variance.sigma, points).tolist()
        ]
        for name, layer in dip_layers(model).items()
    }


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1); 0 for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def cell(values: Sequence[float], digits: int = 1) -> str:
    mean, std = mean_std(values)
    return f"{mean:.{digits}f} ± {std:.{digits}f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


class Store:
    """Results by configuration, each in a file of its own, so that an interrupted command goes on
    and processes may share the folder.

    A run is found again by its whole configuration: change a flag and it is made anew. `value` and
    `keep` are for what is not a run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def runs(self) -> list[dict]:
        found = map(_read, (self.folder / "runs").glob("*.json"))
        return sorted(found, key=lambda run: _key(run["config"]))

    @property
    def values(self) -> dict[str, Any]:
        return {file.stem: _read(file) for file in sorted((self.folder / "values").glob("*.json"))}

    def run(self, config: dict, make: Callable[[], dict]) -> dict:
        """The stored result of this configuration, or make()'s, stored."""
        file = self.folder / "runs" / f"{name_of(config)}.json"
        if not file.exists():
            save(file, {"config": config, "environment": environment(), "result": make()})
        return _read(file)

    def value(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self.values:
            self.keep(name, make())
        return self.values[name]

    def keep(self, name: str, value: Any) -> None:
        save(self.folder / "values" / f"{name}.json", value)


class Study:
    """A network's or a stage's runs: a search for each method's setting, then tests with it.

    Subclasses have config(method, setting, seed, part, **changes), measure(config), score(result),
    the mean that settings are chosen by, main(), the tests, and len(), the number of runs.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        quick: bool,
        search: dict[str, list[dict]],
        tune_seeds: Sequence[int],
        seeds: Sequence[int],
    ) -> None:
        self.name, self.store, self.quick = name, Store(folder), quick
        self.search = {m: settings[: 1 if quick else None] for m, settings in search.items()}
        self.tune_seeds, self.seeds = tune_seeds, seeds
        self.bar = tqdm(disable=True)

    def run(self) -> None:
        self.tune()
        self.main()

    def result(self, config: dict) -> dict:
        self.bar.set_description(f"{self.name}: {config['method']}, seed {config['seed']}")
        found = self.store.run(config, lambda: self.measure(config))["result"]
        self.bar.update()
        return found

    def tune(self) -> None:
        """Choose every method's setting by its score on validation data, over plain training's."""
        chosen: dict[str, dict] = {}
        trials: dict[str, list] = {}
        for method, settings in self.search.items():
            trials[method] = []
            for setting in settings:
                whole = chosen.get("plain", {}) | setting
                configs = [self.config(method, whole, seed, "val") for seed in self.tune_seeds]
                scores = [self.score(self.result(config)) for config in configs]
                trials[method].append((round(statistics.fmean(scores), 2), setting))
            chosen[method] = max(trials[method], key=lambda pair: pair[0])[1]
        self.store.keep("chosen", chosen)
        self.store.keep("search", trials)

    def chosen(self, method: str) -> dict:
        """The setting that `tune` chose, with plain training's."""
        settings = self.store.values["chosen"]
        return settings["plain"] | settings[method.split(",")[0]]

    def test(self, method: str, num_seeds: int | None = None, **changes: Any) -> list[dict]:
        """The results of all (or the first) seeds on test data, with the chosen setting, changed
        where asked."""
        setting = self.chosen(method)
        configs = [
            self.config(method, setting, s, "test", **changes) for s in self.seeds[:num_seeds]
        ]
        return list(map(self.result, configs))

    def num_tune(self) -> int:
        return len(self.tune_seeds) * sum(map(len, self.search.values()))


def time_ratio(plain: Callable[[], object], noisy: Callable[[], object], rounds: int) -> float:
    """Processor time of a DIP step over that of a plain step: median over interleaved rounds."""
    timed = timing.interleave(
        {"plain": plain, "DIP": noisy},
        "plain",
        torch.device("cpu"),
        budget_s=0.0,
        rounds=(rounds, rounds),
        at_least_s=0.0,
        always=("DIP",),
        clock="processor",
    )
    return round(timed["DIP"]["ratio"], 2)


def summarise(stores: Iterable[Store], path: Path) -> None:
    """The stored runs without their number: of each setting mean and standard deviation over seeds,
    one line each.

    What docs/results keeps; the runs stay where they were made.
    """
    groups: dict[str, list[tuple[str, dict]]] = {}
    values, environments = {}, {}
    for store in stores:
        values[store.folder.name] = store.values
        for run in store.runs:
            environments[json.dumps(run["environment"])] = run["environment"]
            setting = {name: value for name, value in run["config"].items() if name != "seed"}
            groups.setdefault(_key({"of": store.folder.name} | setting), []).append(
                (store.folder.name, run)
            )
    rows = []
    for key in sorted(groups):
        runs = [run for _, run in groups[key]]
        row = {
            "setting": json.loads(key),
            "seeds": len(runs),
            "result": _spread([run["result"] for run in runs]),
        }
        rows.append(json.dumps(row))
    head = json.dumps(
        {"environments": [environments[key] for key in sorted(environments)], "values": values}
    )
    path.write_text(f'{head[:-1]},\n"runs": [\n' + ",\n".join(rows) + "\n]}\n", encoding="utf-8")


def _spread(results: list):
    """[mean, standard deviation] of every number of results of one form; of a layer's quantiles the
    mean of the median."""
    first = results[0]
    if isinstance(first, dict):
        shared = [key for key in first if all(key in result for result in results)]
        return {key: _spread([result[key] for result in results]) for key in shared}
    if isinstance(first, list):
        return round(statistics.fmean(result[len(first) // 2] for result in results), 2)
    return [round(number, 2) for number in mean_std(results)]


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _key(config: dict) -> str:
    return json.dumps(config, sort_keys=True)


def chosen_runs(
    summary: dict, store: str, methods: Iterable[str], equal: str, **where: str
) -> dict[str, dict]:
    """{method: its result} in the summary that `summarise` wrote: the test runs with the setting
    that the search chose.

    Args:
        summary: What the file holds.
        store: Of which store, such as "vision_mlp".
        methods: Those to look for; "plain, equal time" is the plain run with the larger `equal`.
        equal: What equal time makes larger: "epochs" or "steps".
        where: Further entries of the settings, such as training="clean".

    Returns:
        The results, [mean, standard deviation] for each number.

    Raises:
        ValueError: The summary has none, or several, for a method.
    """
    values = summary["values"][store]["chosen"]
    found = {}
    for method in methods:
        name = "plain" if method.startswith("plain") else method
        wanted = {"of": store, "method": name, **where, **values["plain"], **values[name]}
        rows = [row for row in summary["runs"] if wanted.items() <= row["setting"].items()]
        rows = [
            row
            for row in rows
            if "test" in (row["setting"].get("split"), row["setting"].get("part"))
        ]
        # An ablation has the same setting and one more, or fewer seeds.
        most = max((row["seeds"] for row in rows), default=0)
        least = min((len(row["setting"]) for row in rows), default=0)
        rows = [row for row in rows if row["seeds"] == most and len(row["setting"]) == least]
        rows.sort(key=lambda row: row["setting"][equal])
        if not 1 <= len(rows) <= (2 if name == "plain" else 1):
            raise ValueError(
                f"summary: expected one run of {method!r} in {store}, {where}, got {len(rows)}"
            )
        found[method] = rows[-1 if method == "plain, equal time" else 0]["result"]
    return found


def draw_curve(axis, method: str, xs: list[float], points: list[list[float]]) -> None:
    """A method's line through its means, and a band of one standard deviation around it; points
    [mean, deviation]."""
    means, deviations = zip(*points)
    line = figures.line_of(method)
    axis.plot(xs, means, **line)
    low, high = ([m + sign * d for m, d in zip(means, deviations)] for sign in (-1, 1))
    axis.fill_between(xs, low, high, color=line["color"], alpha=0.1, linewidth=0, zorder=1)
