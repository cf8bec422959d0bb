"""Digits: MLP, ResNet and ViT, DIP against six baselines, under attack and corruption, with
ablations.

    python studies/vision.py  everything, about 35 minutes of one core; goes on where it was stopped
    python studies/vision.py --archs MLP  one network, and its own tables
    python studies/vision.py --figures  figures alone, from docs/results/vision.json
    python studies/vision.py --quick  does it run? into out/vision

scikit-learn's digits (8x8 scans): 500 images to train on, drawn anew by every seed from the first
900; 400 to validate; the other 897, which nothing is chosen on, for the figures. Every method has
four settings to choose from, compared by the mean over all conditions on validation images.
Accuracy, attacks and corruptions: on the deterministic forward (Algorithm 3). Every run is stored
in out/vision as it ends; the report writes the tables of docs/results.md, and vision_*.svg and a
summary of the runs, vision.json, into docs/results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import results_page
import torch
import torch.nn.functional as F
import vision_methods as methods
from results_page import (
    FOLDER,
    Store,
    cell,
    chosen_runs,
    chosen_text,
    command_line,
    draw_curve,
    environment_line,
    figures,
    run,
    search_table,
    set_up,
    sigmas,
    summarise,
    table,
)
from tables import report
from torch import Tensor, nn
from vision_methods import METHODS, SEVERAL, TRAININGS
from vision_setup import (
    CORRUPTIONS,
    FGSM_STRENGTHS,
    NETWORKS,
    PGD_STRENGTHS,
    PLACEMENTS,
    fgsm,
    pgd,
    split,
)

import dipkernels as dip
import dipkernels.diagnostics
from dipkernels.nn.numbering import dip_layers

EPOCHS = {"MLP": 60, "ResNet": 50, "ViT": 50}
M = {"MLP": 4, "ResNet": 2, "ViT": 2}
SEEDS = {"MLP": 5, "ResNet": 3, "ViT": 3}
TUNE_SEEDS = {"MLP": (100, 101), "ResNet": (100,), "ViT": (100,)}
BATCH = {"MLP": 50, "ResNet": 100, "ViT": 100}
ABLATION_SEEDS = 3
ATTACKED = 400  # images that FGSM and PGD attack, the first of those evaluated
COLUMNS = (
    ("clean", "0"),
    ("FGSM", "0.1"),
    ("PGD", "0.1"),
    ("noise", "0.3"),
    ("blur", "0.7"),
    ("contrast", "0.6"),
    ("translation", "1"),
)
HEADS = [kind if kind == "clean" else f"{kind} {strength}" for kind, strength in COLUMNS]
SMOOTH_SEEDS, SMOOTH_IMAGES, SMOOTH_K = 3, 100, 16

# ---- one run -------------------------------------------------------------------------------------


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return percent_right(model(x), y)


def percent_right(out: Tensor, y: Tensor) -> float:
    return round(100 * (out.argmax(-1) == y).double().mean().item(), 3)


def evaluate(model: nn.Module, x: Tensor, y: Tensor, pgd_steps: int) -> dict[str, dict[str, float]]:
    """Accuracy in % by condition and strength, on the deterministic forward; every model sees the
    same noise."""
    torch.manual_seed(2000)
    ax, ay = x[:ATTACKED], y[:ATTACKED]
    scores = {
        "clean": {"0": accuracy(model, x, y)},
        "FGSM": {str(eps): accuracy(model, fgsm(model, ax, ay, eps), ay) for eps in FGSM_STRENGTHS},
        "PGD": {
            str(eps): accuracy(model, pgd(model, ax, ay, eps, pgd_steps), ay)
            for eps in PGD_STRENGTHS
        },
    }
    for kind, (corrupt, strengths) in CORRUPTIONS.items():
        scores[kind] = {str(s): accuracy(model, corrupt(x, s), y) for s in strengths}
    return scores


def overall(scores: dict) -> float:
    """The mean over the conditions of the tables: what settings are chosen by."""
    return statistics.fmean(scores[kind][strength] for kind, strength in COLUMNS)


KS = (1, 2, 4, 8, 16, 32, 50)


def accuracy_by_k(model: nn.Module, x: Tensor, y: Tensor, pgd_steps: int) -> dict[str, dict]:
    """Algorithm 3 (k = 0) and Algorithm 2, the mean over the first k of 50 passes: accuracy in %,
    processor time."""
    torch.manual_seed(3000)
    noisy, moved = CORRUPTIONS["noise"][0](x, 0.3), CORRUPTIONS["translation"][0](x, 1)
    attacked = pgd(model, x[:ATTACKED], y[:ATTACKED], 0.1, pgd_steps)
    rows: dict[str, dict[str, float]] = {str(k): {} for k in (0, *KS)}
    for name, images in {
        "clean": x,
        "noise 0.3": noisy,
        "translation 1": moved,
        "PGD 0.1": attacked,
    }.items():
        labels = y[: len(images)]
        plain, plain_ms = timed(
            lambda images=images: dip.predict(model, images, k=0, average="logits"), repeats=5
        )
        right = percent_right(plain, labels)
        rows["0"] |= {f"{name}, probs": right, f"{name}, logits": right, f"{name}, time": 1.0}
        logits, probs, ms = 0, 0, 0.0
        for k in range(1, max(KS) + 1):
            one, one_ms = timed(
                lambda images=images: dip.predict(model, images, k=1, average="logits")
            )
            logits, probs, ms = logits + one, probs + one.softmax(-1), ms + one_ms
            if k in KS:
                rows[str(k)] |= {
                    f"{name}, probs": percent_right(probs, labels),
                    f"{name}, logits": percent_right(logits, labels),
                    f"{name}, time": round(ms / plain_ms, 2),
                }
    return rows


def timed(call, repeats: int = 1) -> tuple[Tensor, float]:
    """What it returns, and the median of its processor milliseconds."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        out = call()
        times.append(1e3 * (time.process_time() - start))
    return out, statistics.median(times)


def measure_smoothness(config: dict) -> dict[str, dict[str, float]]:
    """Train as the config says; means over test images, of the deterministic network (k = 0) and of
    the mean predictor.

    The local Lipschitz constant of the logits and of the probabilities, and the top |eigenvalue| of
    the loss's Hessian.
    """
    data = split(config["seed"])
    model, seconds = methods.train(config, *data["train"])
    x, y = (part[:SMOOTH_IMAGES] for part in data[config["split"]])
    result: dict = {"train_cpu_seconds": round(seconds, 2)}
    for k in (0, SMOOTH_K) if dip_layers(model) else (0,):
        flags = {"k": k, "iterations": 30, "tolerance": 1e-2}

        def loss(out: Tensor, k: int = k) -> Tensor:
            return (
                F.nll_loss(out.log(), y, reduction="none")
                if k
                else F.cross_entropy(out, y, reduction="none")
            )

        average = "probs" if k else "logits"
        values = {
            "Lipschitz, logits": dip.diagnostics.lipschitz(model, x, **flags),
            "Lipschitz, probabilities": dip.diagnostics.lipschitz(
                model, x, average="probs", **flags
            ),
            "Hessian of the loss": dip.diagnostics.smoothness(
                model, x, loss, average=average, **flags
            ),
        }
        result[str(k)] = {name: round(value.mean().item(), 4) for name, value in values.items()}
    return result


# ---- the parts -----------------------------------------------------------------------------------


class Study(results_page.Study):
    """One network."""

    def __init__(self, arch: str, args: argparse.Namespace) -> None:
        folder = args.out / f"vision_{arch.lower()}"
        seeds = range(1 if args.quick else SEEDS[arch])
        super().__init__(arch, folder, args.quick, methods.search(arch), TUNE_SEEDS[arch], seeds)
        self.smooth_store = Store(args.out / f"vision_smoothness_{arch.lower()}")
        self.epochs = 1 if args.quick else EPOCHS[arch]
        self.pgd_steps = 2 if args.quick else 10
        self.trainings = TRAININGS[: 1 if args.quick else None]
        self.smooth_methods = METHODS[: 2 if args.quick else None]
        self.changes = ABLATIONS[arch][: 2 if args.quick else None]
        self.rates, self.alphas = ((0.01,), (0.1,)) if args.quick else NEEDS[arch]

    def config(self, method: str, setting: dict, seed: int, part: str, **changes) -> dict:
        name, epochs = method.split(",")[0], self.epochs
        if method == "plain, equal time":
            epochs = max(1, round(epochs * self.time_ratio()))
        shared = {"arch": self.name, "batch": BATCH[self.name], "training": "clean"}
        shared |= {"method": name, "epochs": epochs, "m": M[self.name] if name in SEVERAL else 1}
        config = shared | setting | {"seed": seed, "split": part} | changes
        return {key: value for key, value in config.items() if DEFAULTS.get(key) != value}

    def time_ratio(self) -> float:
        def make() -> float:
            rounds = 5 if self.quick else 40
            return methods.time_ratio(self.name, M[self.name], BATCH[self.name], rounds)

        return self.store.value("DIP step over plain step", make)

    def measure(self, config: dict) -> dict:
        """Train as the config says, evaluate on its split."""
        data = split(config["seed"])
        model, seconds = methods.train(config, *data["train"])
        x, y = data[config["split"]]
        scores = evaluate(model, x, y, self.pgd_steps)
        result = {"scores": scores, "train_cpu_seconds": round(seconds, 2)}
        if config["method"] == "DIP":
            result["sigma"] = sigmas(model)
            if config["split"] == "test" and config == self.config(
                "DIP", self.chosen("DIP"), config["seed"], "test"
            ):
                result["k"] = accuracy_by_k(model, x, y, self.pgd_steps)
        return result

    def score(self, result: dict) -> float:
        return overall(result["scores"])

    def run(self) -> None:
        super().run()
        self.needs()
        self.ablations()
        self.smoothness()

    def main(self) -> None:
        for training in self.trainings:
            for method in METHODS:
                self.test(method, training=training)

    def needs(self) -> dict[tuple, dict]:
        """What DIP needs, on validation images: variance learning rate against alpha."""
        setting = self.chosen("DIP") | {"sigma": NEEDS_SIGMA[self.name]}
        return {
            (rate, alpha): self.result(
                self.config("DIP", setting, 100, "val", variance_lr=rate, alpha=alpha)
            )
            for rate in self.rates
            for alpha in self.alphas
        }

    def ablations(self) -> list[tuple[str, list[dict]]]:
        """One change at a time to the chosen DIP setting."""
        rows = [("DIP as chosen", self.test("DIP", ABLATION_SEEDS))]
        rows += [(f"baseline: {name}", self.test(name, ABLATION_SEEDS)) for name in BASELINES]
        return rows + [
            (label, self.test("DIP", ABLATION_SEEDS, **changes)) for label, changes in self.changes
        ]

    def smoothness(self) -> dict[str, list[dict]]:
        """Every method's smoothness, trained clean; models are not kept, so these are trained
        again."""
        results: dict[str, list[dict]] = {}
        for method in self.smooth_methods:
            for seed in self.seeds[:SMOOTH_SEEDS]:
                self.bar.set_description(f"{self.name}: smoothness, {method}, seed {seed}")
                config = self.config(method, self.chosen(method), seed, "test")
                run = self.smooth_store.run(
                    config, lambda config=config: measure_smoothness(config)
                )
                results.setdefault(method, []).append(run["result"])
                self.bar.update()
        return results

    def __len__(self) -> int:
        main = len(self.trainings) * len(METHODS) * len(self.seeds)
        needs = len(self.rates) * len(self.alphas)
        changed = (1 + len(BASELINES) + len(self.changes)) * len(self.seeds[:ABLATION_SEEDS])
        smooth = len(self.smooth_methods) * len(self.seeds[:SMOOTH_SEEDS])
        return self.num_tune() + main + needs + changed + smooth


BASELINES = ("plain", "plain, equal time", "fixed variance")  # beside the ablations
DEFAULTS = {
    "placement": "every layer",
    "beta_factor": 1.0,
    "lambda_s": 0.0,
}  # left out of a stored configuration
# variance_lr (the learning rate of the weights, and 10 times it, the default), alpha
NEEDS = {
    "MLP": ((0.001, 0.01, 0.1), (0.0, 0.01, 0.1, 1.0)),
    "ResNet": ((0.003, 0.03), (0.1, 1.0, 10.0)),
    "ViT": ((0.01, 0.1), (0.1, 1.0, 10.0)),
}
NEEDS_SIGMA = {"MLP": 0.5, "ResNet": 0.3, "ViT": 0.3}
ABLATIONS: dict[str, list[tuple[str, dict]]] = {
    "MLP": [
        *((f"alpha {alpha}", {"alpha": alpha}) for alpha in (0.0, 0.001, 0.01, 0.1, 1.0)),
        *((f"beta / alpha x {factor}", {"beta_factor": factor}) for factor in (0.25, 4.0)),
        *((f"lambda_s {weight}", {"lambda_s": weight}) for weight in (0.0, 0.001, 0.01, 0.1)),
        *((f"m {m}, lambda_s 0", {"m": m}) for m in (1, 2, 4, 8)),
    ],
    "ResNet": [
        *((f"alpha {alpha}", {"alpha": alpha}) for alpha in (0.0, 0.1, 1.0, 10.0)),
        ("variance_lr 0.003", {"variance_lr": 0.003}),
    ],
    "ViT": [
        *((f"noise at: {placement}", {"placement": placement}) for placement in PLACEMENTS),
        *((f"alpha {alpha}", {"alpha": alpha}) for alpha in (0.0, 0.1, 1.0, 10.0)),
        ("variance_lr 0.01", {"variance_lr": 0.01}),
    ],
}

# ---- tables and figures --------------------------------------------------------------------------


def scores_row(label: str, results: list[dict], extra: list[str]) -> list[str]:
    cells = [cell([r["scores"][kind][strength] for r in results]) for kind, strength in COLUMNS]
    return [label, *cells, cell([overall(r["scores"]) for r in results]), *extra]


def seconds(results: list[dict]) -> str:
    return f"{statistics.fmean(r['train_cpu_seconds'] for r in results):.1f}"


def main_table(study: Study) -> str:
    rows = []
    for training in study.trainings:
        results = {method: study.test(method, training=training) for method in METHODS}
        best = max(
            METHODS,
            key=lambda method: statistics.fmean(overall(r["scores"]) for r in results[method]),
        )
        for method in METHODS:
            row = scores_row(method, results[method], [seconds(results[method])])
            row[-2] = f"**{row[-2]}**" if method == best else row[-2]
            rows.append([training, *row])
    text = table(["trained", "method", *HEADS, "mean", "CPU s"], rows)
    return (
        f"{len(study.seeds)} seed(s), mean ± standard deviation; the best mean of each training in "
        f"bold. Chosen on validation images: {chosen_text(study.store)}. {M[study.name]} "
        f"trajectories for the methods with noise; a DIP step costs {study.time_ratio()} plain "
        "steps, which plain "
        f"training at equal time gets in epochs.\n\n{text}\n\n{environment_line(study.store.runs)}"
    )


def averages_table(studies: list[Study]) -> str:
    """The paper's summary: the average over the three ways of training."""
    heads = ["method"]
    columns = []
    for study in studies:
        heads += [f"{study.name}, clean", f"{study.name}, all conditions"]
        for score in (lambda s: s["clean"]["0"], overall):
            columns.append(
                {
                    method: [
                        statistics.fmean(
                            score(study.test(method, training=t)[i]["scores"])
                            for t in study.trainings
                        )
                        for i in range(len(study.seeds))
                    ]
                    for method in METHODS
                }
            )
    best = [
        max(METHODS, key=lambda name, c=column: statistics.fmean(c[name])) for column in columns
    ]
    rows = [
        [
            name,
            *(
                f"**{cell(c[name])}**" if name == b else cell(c[name])
                for c, b in zip(columns, best)
            ),
        ]
        for name in METHODS
    ]
    return table(heads, rows)


def median_sigmas(results: list[dict]) -> str:
    """Medians over a layer's features, mean over the results: of the first noised layer; least to
    largest of the others."""
    first, *others = (
        f"{statistics.fmean(r['sigma'][name][2] for r in results):.2f}"
        for name in results[0]["sigma"]
    )
    if not others:
        return first
    least, largest = min(others, key=float), max(others, key=float)
    return f"{first}; {least}" + (f" to {largest}" if largest != least else "")


def needs_table(studies: list[Study]) -> str:
    tables = []
    for study in studies:
        results = study.needs()
        alphas = sorted({alpha for _, alpha in results})
        rows = []
        for rate in sorted({rate for rate, _ in results}):
            cells = []
            for alpha in alphas:
                result = results[rate, alpha]
                sigma = median_sigmas([result])
                pgd = result["scores"]["PGD"]["0.1"]
                cells.append(f"{overall(result['scores']):.1f}, PGD {pgd:.0f} (sigma {sigma})")
            rows.append([f"{rate:g}", *cells])
        head = f"{study.name}, from sigma {NEEDS_SIGMA[study.name]:g}: variance_lr"
        tables.append(table([head, *(f"alpha {alpha:g}" for alpha in alphas)], rows))
    return "\n\n".join(tables)


def ablation_table(study: Study) -> str:
    rows = []
    for label, results in study.ablations():
        medians = median_sigmas(results) if "sigma" in results[0] else "-"
        rows.append(scores_row(label, results, [medians, seconds(results)]))
    return table(["change", *HEADS, "mean", "sigma: first layer; others", "CPU s"], rows)


def k_table(studies: list[Study]) -> str:
    rows = []
    for study in studies:
        results = [r["k"] for r in study.test("DIP")]
        names = [name for name in results[0]["0"] if not name.endswith("time")]
        heads = ["network", "prediction", *names, "time over Algorithm 3"]
        for k in results[0]:
            label = "Algorithm 3" if k == "0" else f"k = {k}"
            ratio = [r[k]["clean, time"] for r in results]
            rows.append(
                [
                    study.name,
                    label,
                    *(cell([r[k][name] for r in results]) for name in names),
                    cell(ratio),
                ]
            )
    return table(heads, rows)


def smoothness_table(studies: list[Study]) -> str:
    """The paper's claim beside plain and DIP, then every method."""
    claims, rows = [], []
    for study in studies:
        measured = study.smoothness()
        for measure in SMOOTH_HEADS if "DIP" in measured else ():
            plain, *dips = (
                [r[k][measure] for r in measured[method]]
                for method, k in (("plain", "0"), ("DIP", "0"), ("DIP", str(SMOOTH_K)))
            )
            lower = [
                "yes" if statistics.fmean(values) < statistics.fmean(plain) else "no"
                for values in dips
            ]
            cells = [cell(values, 2) for values in (plain, *dips)]
            claims.append([study.name, measure, "lower", *cells, " / ".join(lower)])
        for method, results in measured.items():
            for k in ("0", str(SMOOTH_K)):
                if k in results[0]:
                    name = "deterministic" if k == "0" else f"mean of {k} noisy passes"
                    cells = [
                        cell([r[k][measure] for r in results], 2) for measure in results[0]["0"]
                    ]
                    rows.append([study.name, method, name, *cells])
    heads = [
        "network",
        "measure",
        "claim",
        "plain",
        "DIP, deterministic",
        f"DIP, mean of {SMOOTH_K}",
        "lower than plain?",
    ]
    tables = [table(heads, claims)] if claims else []
    return "\n\n".join([*tables, table(["network", "method", "predictor", *SMOOTH_HEADS], rows)])


SMOOTH_HEADS = ("Lipschitz, logits", "Lipschitz, probabilities", "Hessian of the loss")


def plot_curves(summary: dict, arch: str, training: str, path: Path) -> None:
    """Accuracy over the strength of each attack and corruption, every method; from the summary that
    docs/results keeps."""
    kinds = ["FGSM", "PGD", *CORRUPTIONS]
    found = chosen_runs(summary, f"vision_{arch.lower()}", METHODS, "epochs", training=training)
    with figures.style():
        fig, axes = figures.panels(3, 2, 6.6, 8.6, sharey=True)
        for axis, kind in zip(axes.flat, kinds):
            for method, run in found.items():
                by_strength = {"0": run["scores"]["clean"]["0"]} | run["scores"][kind]
                draw_curve(
                    axis, method, [float(s) for s in by_strength], list(by_strength.values())
                )
            axis.set(xlabel=f"{kind}, strength", ylim=(0, 100))
        for row in axes:
            row[0].set_ylabel("test accuracy, %")
        fig.suptitle(f"{arch}, trained {training}", fontsize=11)
        figures.legend(fig, axes[0, 0], columns=3)
        figures.save(fig, path)


def plot_sigmas(summary: dict, arch: str, path: Path) -> None:
    """Learned sigma of each layer, its median over the features and mean over seeds, beside where
    it started."""
    with figures.style():
        fig, axes = figures.panels(height=3.8)
        axis = axes[0, 0]
        for training, color, marker in zip(TRAININGS, figures.ORDER, "os^"):
            run = chosen_runs(
                summary, f"vision_{arch.lower()}", ["DIP"], "epochs", training=training
            )["DIP"]
            axis.plot(
                *zip(*enumerate(run["sigma"].values())),
                marker,
                color=color,
                label=f"trained {training}",
            )
            names = list(run["sigma"])
        start = summary["values"][f"vision_{arch.lower()}"]["chosen"]["DIP"]["sigma"]
        axis.axhline(start, color=figures.FOREGROUND, linestyle=":", label="start")
        axis.set_xticks(range(len(names)), names, rotation=90)
        axis.set(title=f"{arch}: learned sigma by layer", ylim=(0, 1.1 * start))
        figures.legend(fig, axis)
        figures.save(fig, path)


def plots(
    archs: Iterable[str], trainings: Sequence[str], folder: Path, out: Path | None = None
) -> None:
    """Every figure of these, from folder/vision.json, into `out` or the folder itself."""
    out = out or folder
    summary = json.loads((folder / "vision.json").read_text(encoding="utf-8"))
    for arch in archs:
        for training in trainings:
            plot_curves(
                summary, arch, training, out / f"vision_{arch.lower()}_{training.lower()}.svg"
            )
        if set(trainings) >= set(TRAININGS):
            plot_sigmas(summary, arch, out / f"vision_sigma_{arch.lower()}.svg")


def write(studies: list[Study], page: Path, out: Path) -> None:
    """Tables, figures and summary."""
    for study in studies:
        report.fill(page, f"vision-{study.name.lower()}", main_table(study))
        report.fill(page, f"vision-ablations-{study.name.lower()}", ablation_table(study))
    if out == FOLDER and {study.name for study in studies} != {*NETWORKS}:
        return  # the other tables and vision.json are of all networks
    report.fill(page, "vision-averages", averages_table(studies))
    head = ["network", "method", "setting: mean over the conditions on validation images"]
    stores = {study.name: study.store for study in studies}
    report.fill(page, "vision-search", search_table(head, stores, mark="**"))
    report.fill(page, "vision-k", k_table(studies))
    report.fill(page, "vision-smoothness", smoothness_table(studies))
    report.fill(page, "vision-needs", needs_table(studies))
    summarise(
        [store for study in studies for store in (study.store, study.smooth_store)],
        out / "vision.json",
    )
    for study in studies:
        plots([study.name], study.trainings, out)


def main(arguments: list[str] | None = None) -> None:
    parser = command_line(__doc__, "vision", "one seed, one epoch, few settings")
    parser.add_argument(
        "--archs", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="networks (all)"
    )
    args = parser.parse_args(arguments)
    if args.figures:
        plots(args.archs, TRAININGS, FOLDER)
        return
    set_up(args)
    run([Study(arch, args) for arch in args.archs], args, write)


if __name__ == "__main__":
    main()
