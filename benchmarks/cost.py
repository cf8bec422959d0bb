"""What trajectories cost and what they buy:

    python benchmarks/cost.py [--docs]

Training with m = 1, 2, 4, 8 trajectories and prediction with k = 0, 1, 4, 16, 50 noisy passes, on
scikit-learn's handwritten digits, for an MLP and a small vision transformer: time (interleaved,
over the plain network's), memory, FLOPs, and accuracy against the plain network at equal steps and
at equal time. Equal time means that the plain network trains for as many more steps as the measured
ratio of a step allows. Under four minutes on two quiet cores.
"""

from __future__ import annotations

import copy
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import figures
import machine
import networks
import report
import timing
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import dipkernels as dip

sys.path += [str(machine.ROOT / name) for name in ("examples", "studies")]
from digits import BATCH, load
from vision_setup import pgd

SEEDS = 3
TRAJECTORIES, QUICK_TRAJECTORIES = (1, 2, 4, 8), (1, 4)
SAMPLES, QUICK_SAMPLES = (0, 1, 4, 16, 50), (0, 4)
PREDICT_M = 4  # the training whose network predicts with k samples
SIGMA = 0.3  # of pixels and features of about 1
ALPHA = 0.1  # with beta = ALPHA * SIGMA^2: the penalty's optimum is the start
NOISE, PGD = 0.5, 0.1  # of the two harder test sets


class Tokens(nn.Module):
    """The digits' 64 pixels as an image, for the transformer."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, x: Tensor) -> Tensor:
        return self.vit(x.view(-1, 1, 8, 8))


@dataclass(frozen=True)
class Study:
    name: str
    make: Callable[[], nn.Module]
    steps: int
    learning_rate: float


STUDIES = (
    Study("MLP 64-256-256-10", lambda: networks.mlp(64, 256, 256, 10), 1000, 1e-3),
    Study(
        "ViT, 17 tokens, 2 blocks of 32",
        lambda: Tokens(networks.ViT(8, 2, 32, 2, 4, 10, channels=1)),
        250,
        3e-3,
    ),
)


# ---- training ------------------------------------------------------------------------------------


def build(study: Study, m: int, seed: int) -> nn.Module:
    """The same initial weights for every m; m = 0 is the plain network."""
    torch.manual_seed(seed)
    model = study.make()
    return dip.convert(model, init_variance=SIGMA**2) if m else model


def stepper(study: Study, model: nn.Module, m: int) -> Callable[[Tensor, Tensor], None]:
    optimizer = torch.optim.AdamW(
        dip.param_groups(model, lr=study.learning_rate, weight_decay=0.01)
    )

    def step(x: Tensor, y: Tensor) -> None:
        if m:
            out = dip.trajectories(model, x, m=m)
            loss = dip.objective(out, y, F.cross_entropy, model, alpha=ALPHA, beta=ALPHA * SIGMA**2)
        else:
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def train(
    study: Study, m: int, seed: int, stops: list[int], x: Tensor, y: Tensor, bar: tqdm
) -> list[nn.Module]:
    """The network after each of `stops` steps, ascending; the learning rate is constant, so one run
    has them all."""
    model = build(study, m, seed).train()
    step = stepper(study, model, m)
    torch.manual_seed(1000 + seed)
    order = iter(())
    found, done = [], 0
    for stop in stops:
        while done < stop:
            batch = next(order, None)
            if batch is None:
                order = iter(torch.randperm(len(x)).split(BATCH))
                continue
            step(x[batch], y[batch])
            done += 1
            bar.update()
        found.append(copy.deepcopy(model).eval())
    return found


# ---- what a step and a prediction cost -----------------------------------------------------------


def flops_of(call: Callable[[], object]) -> int:
    """Of matrix products, convolutions and attention, forward and backward; drawing noise is not
    among them."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def _costs(calls: dict[str, Callable[[], object]], base: str, quick: bool) -> dict[str, dict]:
    device = torch.device("cpu")
    limits = (
        {"budget_s": 0.02, "rounds": (2, 2), "at_least_s": 1e-4}
        if quick
        else {"budget_s": 5, "rounds": (9, 100)}
    )
    timed = timing.interleave(calls, base, device, always=tuple(calls), **limits)
    for name, call in calls.items():
        timed[name]["peak_bytes"] = timing.peak_bytes(call, device)
        timed[name]["flops"] = flops_of(call)
    return timed


def training_costs(
    study: Study, trajectories: tuple[int, ...], x: Tensor, y: Tensor, quick: bool
) -> dict[str, dict]:
    calls = {}
    for m in (0, *trajectories):
        step = stepper(study, build(study, m, 0).train(), m)
        calls[f"m = {m}" if m else "plain"] = lambda step=step: step(x, y)
    return _costs(calls, "plain", quick)


def outputs(model: nn.Module, x: Tensor, k: int) -> Tensor:
    """Log-probabilities; k = 0 is the plain forward pass."""
    with torch.no_grad():
        if k == 0:
            return F.log_softmax(model(x), -1)
        return dip.predict(model, x, k=k, average="probs").clamp_min(1e-12).log()


def prediction_costs(
    study: Study, samples: tuple[int, ...], x: Tensor, quick: bool
) -> dict[str, dict]:
    plain, noisy = build(study, 0, 0).eval(), build(study, 1, 0).eval()
    calls = {"plain": lambda: outputs(plain, x, 0)}
    calls |= {f"k = {k}": lambda k=k: outputs(noisy, x, k) for k in samples}
    return _costs(calls, "plain", quick)


# ---- what it buys --------------------------------------------------------------------------------


def score(
    model: nn.Module, x: Tensor, y: Tensor, k: int, seed: int, pgd_steps: int
) -> dict[str, float]:
    """Accuracy in percent: clean, under input noise, under attack (half of the test set); and the
    clean NLL."""
    torch.manual_seed(2000 + seed)
    noisy, half = x + NOISE * torch.randn_like(x), len(x) // 2
    adversarial = pgd(model, x[:half], y[:half], PGD, pgd_steps)
    clean = outputs(model, x, k)

    def accuracy(log_probabilities: Tensor, target: Tensor) -> float:
        return 100 * (log_probabilities.argmax(-1) == target).float().mean().item()

    return {
        "clean": accuracy(clean, y),
        "noise": accuracy(outputs(model, noisy, k), y),
        "pgd": accuracy(outputs(model, adversarial, k), y[:half]),
        "nll": F.nll_loss(clean, y).item(),
    }


def study_record(study: Study, seeds: int, quick: bool, bar: tqdm) -> dict:
    steps = 4 if quick else study.steps
    pgd_steps, num_test = (1, 64) if quick else (10, None)
    trajectories = QUICK_TRAJECTORIES if quick else TRAJECTORIES
    samples = QUICK_SAMPLES if quick else SAMPLES
    x_train, y_train, x_test, _ = load(0)
    bar.set_description(f"{study.name}: cost")
    record = {
        "name": study.name,
        "steps": steps,
        "training": training_costs(study, trajectories, x_train[:BATCH], y_train[:BATCH], quick),
        "prediction": prediction_costs(study, samples, x_test[:BATCH], quick),
    }
    ratios = [record["training"][f"m = {m}"]["ratio"] for m in trajectories]
    if quick:  # two rounds tell nothing
        ratios = [float(m) for m in trajectories]
    # Where the plain network stops: after the same steps, and after as long as each m takes.
    stops = [steps, *(max(1, round(steps * ratio)) for ratio in ratios)]
    bar.total = bar.n + seeds * (max(stops) + steps * len(trajectories))
    bar.refresh()
    scores: dict[str, list[dict]] = {}
    for seed in range(seeds):
        x_train, y_train, x_test, y_test = load(seed)
        x_test, y_test = x_test[:num_test], y_test[:num_test]
        bar.set_description(f"{study.name}: seed {seed}")
        ascending = sorted(set(stops))
        plain = dict(
            zip(ascending, train(study, 0, seed, ascending, x_train, y_train, bar), strict=True)
        )
        plain_scores = {
            stop: score(model, x_test, y_test, 0, seed, pgd_steps) for stop, model in plain.items()
        }
        scores.setdefault("plain", []).append(plain_scores[steps])
        for m, stop in zip(trajectories, stops[1:], strict=True):
            scores.setdefault(f"plain, the time of m = {m}", []).append(plain_scores[stop])
            (model,) = train(study, m, seed, [steps], x_train, y_train, bar)
            scores.setdefault(f"m = {m}", []).append(
                score(model, x_test, y_test, 0, seed, pgd_steps)
            )
            if m == PREDICT_M:
                for k in samples:
                    scores.setdefault(f"k = {k}", []).append(
                        score(model, x_test, y_test, k, seed, pgd_steps)
                    )
    return record | {
        "trajectories": trajectories,
        "samples": samples,
        "stops": stops,
        "scores": scores,
    }


# ---- tables --------------------------------------------------------------------------------------


def _mean(runs: list[dict], key: str) -> str:
    values = [run[key] for run in runs]
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    digits = 3 if key == "nll" else 1
    return f"{statistics.fmean(values):.{digits}f}" + (
        "" if math.isnan(spread) else f" ± {spread:.{digits}f}"
    )


def _cost_cells(cost: dict, base: dict) -> list[str]:
    return [
        report.duration(cost["seconds"]),
        report.ratio(cost, spread=True),
        f"{cost['flops'] / base['flops']:.2f}",
        f"{cost['peak_bytes'] / base['peak_bytes']:.2f}",
    ]


def training_table(record: dict) -> str:
    scores, costs = record["scores"], record["training"]
    lines = []
    for name, cost in costs.items():
        cells = [_mean(scores[name], key) for key in ("clean", "noise", "pgd")]
        if name == "plain":
            lines.append([name, *_cost_cells(cost, costs["plain"]), *cells, "", "", ""])
            continue
        longer = [
            _mean(scores[f"plain, the time of {name}"], key) for key in ("clean", "noise", "pgd")
        ]
        lines.append([name, *_cost_cells(cost, costs["plain"]), *cells, *longer])
    heads = [
        "training",
        "a step",
        "over plain",
        "FLOPs",
        "peak memory",
        "clean",
        f"noise {NOISE}",
        f"PGD {PGD}",
    ]
    return report.table([*heads, "plain, equal time: clean", f"noise {NOISE}", f"PGD {PGD}"], lines)


def prediction_table(record: dict) -> str:
    scores, costs = record["scores"], record["prediction"]
    lines = []
    for name, cost in costs.items():
        cells = [_mean(scores[name], key) for key in ("clean", "nll", "noise", "pgd")]
        lines.append([name, *_cost_cells(cost, costs["plain"]), *cells])
    heads = [f"prediction, {BATCH} examples", "time", "over plain", "FLOPs", "peak memory"]
    return report.table([*heads, "clean", "NLL", f"noise {NOISE}", f"PGD {PGD}"], lines)


def text(record: dict) -> str:
    parts = [
        f"{machine.sentence(record['machine'])}. `python benchmarks/cost.py`, "
        f"{record['seconds']:.0f} s; accuracy in"
        f" percent, mean ± standard deviation over {record['seeds']} seed(s); ratios: median and "
        "quartiles of rounds in"
        " which all take turns."
    ]
    for study in record["studies"]:
        parts += [
            f"### {study['name']}, {study['steps']} steps of {BATCH} examples",
            training_table(study),
            f"The network of m = {PREDICT_M}, predicting (plain: the plain network at equal "
            "steps):",
            prediction_table(study),
        ]
    return "\n\n".join(parts)


def plot(record: dict, path: Path) -> list[Path]:
    """Three SVGs beside `path`: the cost of a training step over m, of a prediction over k, and
    what training buys.

    Returns their paths: PATH_training.svg, PATH_prediction.svg, PATH_buys.svg.
    """
    drawn = {
        "training": lambda axis: _plot_costs(
            axis, record, "training", "m", "trajectories m in a training step"
        ),
        "prediction": lambda axis: _plot_costs(
            axis, record, "prediction", "k", "noisy passes k in a prediction"
        ),
        "buys": lambda axis: _plot_bought(axis, record),
    }
    paths = []
    for name, draw in drawn.items():
        with figures.style():
            figure, axes = figures.panels(height=5.4)
            draw(axes[0, 0])
            columns, length = (1, 3.0) if name == "buys" else (2, 4.5)
            figures.legend(figure, axes[0, 0], columns=columns, length=length)
            paths.append(path.with_name(f"{path.stem}_{name}.svg"))
            figures.save(figure, paths[-1])
    return paths


def _short(study: dict) -> str:
    return study["name"].split()[0].strip(",")


def _plot_costs(axis: Any, record: dict, kind: str, letter: str, label: str) -> None:
    numbers = record["studies"][0]["trajectories" if kind == "training" else "samples"]
    # The first lies below and is wider, so that it shows where the second hides it.
    looks = zip(figures.ORDER, "os", ((3.0, 7), (1.3, 4)))
    for (color, marker, (width, size)), study in zip(looks, record["studies"]):
        costs = study[kind]
        for key, dash, what in (
            ("ratio", "-", "time"),
            ("peak_bytes", "--", "memory"),
            ("flops", ":", "FLOPs"),
        ):
            base = 1 if key == "ratio" else costs["plain"][key]
            heights = [costs[f"{letter} = {n}"][key] / base for n in numbers]
            axis.plot(
                range(len(numbers)),
                heights,
                dash,
                marker=marker,
                color=color,
                linewidth=width,
                markersize=size,
                label=f"{_short(study)}: {what}",
            )
    axis.axhline(1, color=figures.FOREGROUND, linewidth=1)
    axis.set(
        xlabel=label,
        title=f"a {kind} step, over the plain one"
        if kind == "training"
        else "a prediction, over the plain one",
        yscale="log",
    )
    axis.set_xticks(range(len(numbers)), [str(n) for n in numbers])
    ticks = [1, 2, 4, 8] if kind == "training" else [1, 4, 16, 64]
    axis.set_yticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()


def _plot_bought(axis: Any, record: dict) -> None:
    for color, marker, study in zip(figures.ORDER, "os", record["studies"]):
        trajectories = study["trajectories"]
        times = [study["training"][f"m = {m}"]["ratio"] for m in trajectories]
        listed = ", ".join(map(str, trajectories))
        for names, dash, label in (
            ([f"m = {m}" for m in trajectories], "-", f"{_short(study)}: DIP, m = {listed}"),
            (
                [f"plain, the time of m = {m}" for m in trajectories],
                ":",
                f"{_short(study)}: plain, trained as long",
            ),
        ):
            heights = [
                statistics.fmean(run["pgd"] for run in study["scores"][name]) for name in names
            ]
            axis.plot(times, heights, dash, marker=marker, color=color, label=label)
    axis.set(
        xlabel="time of training over the plain network's",
        title=f"accuracy under attack (PGD {PGD}), %",
        ylim=(0, 100),
    )


def main(arguments: list[str] | None = None) -> dict:
    parser = report.command_line(__doc__, "cost")
    parser.add_argument(
        "--from", dest="source", type=report.stored_run, help="report a run instead of measuring"
    )
    args = parser.parse_args(arguments)
    report.refuse_part(parser, args)
    if args.source:
        record = report.load(args.source, "cost")
    else:
        torch.set_num_threads(args.threads)
        start = time.perf_counter()
        seeds = 1 if args.quick else SEEDS
        record = {
            "machine": machine.describe("cpu"),
            "seeds": seeds,
            "quick": args.quick,
            "studies": [],
        }
        with tqdm(unit="step", dynamic_ncols=True) as bar:
            for study in STUDIES:
                record["studies"].append(study_record(study, seeds, args.quick, bar))
        record["seconds"] = time.perf_counter() - start
    print(text(record))
    if not args.source:
        path = report.store("cost", record, args.out)
        drawn = plot(record, path)
        print(f"\nwrote {path} and {', '.join(each.name for each in drawn)} beside it")
    if args.docs:
        docs = machine.ROOT / "docs"
        report.fill(docs / "cost.md", "cost", text(record))
        plot(record, docs / "cost")
    return record


if __name__ == "__main__":
    machine.restart_in_place()
    main()
