"""Handwritten digits: an MLP against the same MLP with DIP layers: accuracy, robustness, time of a
step.

    python examples/digits.py  under two minutes; writes out/digits/{results.json,robustness.png}
    python examples/digits.py --quick  one seed, a few epochs

scikit-learn's digits (8x8 scans, pixels scaled to 0 .. 1), 500 for training, the rest for testing;
an MLP 64-256-256-10. plain: ordinary training. dip: the recommended recipe, everything by default
(convert, calibrate, objective, param_groups), m = 4 trajectories. fixed sigma: the same start,
frozen. input noise: frozen too, and at the network's input alone. PGD attacks the deterministic
forward (L-infinity, pixels kept in 0 .. 1).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import dipkernels as dip

M = 4
NUM_TRAIN = 500
BATCH = 100
VARIANTS = ("plain", "fixed sigma", "input noise", "dip")
# Colours that colour-blind readers tell apart, and a marker and a dash for each; the widest line
# lies below the others.
LOOKS = {
    "plain": {"color": "black", "marker": "x", "linestyle": ":"},
    "fixed sigma": {"color": "#009e73", "marker": "D", "linestyle": "--"},
    "input noise": {"color": "#0a83c4", "marker": "s"},
    "dip": {"color": "#d55e00", "marker": "o", "linewidth": 4, "zorder": 1.5},
}
PGD_STRENGTHS = (0.05, 0.1, 0.15, 0.2)
NOISE_STRENGTHS = (0.15, 0.3, 0.5, 0.7)
TABLE = (("clean", "0"), ("pgd", "0.1"), ("pgd", "0.15"), ("noise", "0.3"), ("noise", "0.5"))


def load(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_train [500, 64], y_train, x_test [1297, 64], y_test; another split for each seed."""
    digits = load_digits()
    x = torch.tensor(digits.data / 16.0, dtype=torch.float32)
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[:NUM_TRAIN], order[NUM_TRAIN:]
    return x[train], y[train], x[test], y[test]


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def build(variant: str, seed: int, x: Tensor) -> nn.Module:
    torch.manual_seed(seed)
    model = mlp()  # the same initial weights for every variant
    if variant == "input noise":
        dip.convert(model, filter=lambda module, name: name == "0")
    elif variant != "plain":
        dip.convert(model)
    if variant != "plain":
        dip.calibrate(model, [x])
    for module in model.modules():
        if isinstance(module, dip.Variance) and variant != "dip":
            module.requires_grad_(False)
    return model


def train(variant: str, seed: int, epochs: int, x: Tensor, y: Tensor, bar: tqdm) -> nn.Module:
    model = build(variant, seed, x)
    optimizer = torch.optim.AdamW(dip.param_groups(model, lr=1e-3, weight_decay=0.01))
    torch.manual_seed(1000 + seed)
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(x)).split(BATCH):
            if variant == "plain":
                loss = F.cross_entropy(model(x[batch]), y[batch])
            else:
                out = dip.trajectories(model, x[batch], m=M)
                loss = dip.objective(out, y[batch], F.cross_entropy, model)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        bar.update()
    return model.eval()


# ---- evaluation: everything on the deterministic forward -----------------------------------------


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return 100 * (model(x).argmax(-1) == y).float().mean().item()


def pgd(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int = 20) -> Tensor:
    """x' = clip(x' + step * sign(dL/dx'), x - eps, x + eps), from a random start."""
    adversarial = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
    for _ in range(steps):
        adversarial.requires_grad_(True)
        (grad,) = torch.autograd.grad(F.cross_entropy(model(adversarial), y), adversarial)
        moved = adversarial.detach() + eps / 8 * grad.sign()
        adversarial = torch.minimum(torch.maximum(moved, x - eps), x + eps).clamp(0, 1)
    return adversarial


def evaluate(
    model: nn.Module, x: Tensor, y: Tensor, seed: int, pgd_steps: int = 20
) -> dict[str, dict[str, float]]:
    torch.manual_seed(2000 + seed)  # the same noise and starting points for every variant
    return {
        "clean": {"0": accuracy(model, x, y)},
        "pgd": {
            str(eps): accuracy(model, pgd(model, x, y, eps, pgd_steps), y) for eps in PGD_STRENGTHS
        },
        "noise": {str(s): accuracy(model, x + s * torch.randn_like(x), y) for s in NOISE_STRENGTHS},
    }


# ---- the time of a training step -----------------------------------------------------------------


class EagerNoiseLinear(nn.Linear):
    """The one-liner that a DIP layer replaces."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features)
        self.log_variance = nn.Parameter(torch.full((plain.in_features,), 0.01).log())

    def forward(self, x: Tensor) -> Tensor:
        noise = (self.log_variance / 2).exp() * torch.randn_like(x)
        return F.linear(x + noise, self.weight, self.bias)


def eager_mlp() -> nn.Module:
    return nn.Sequential(
        *(EagerNoiseLinear(layer) if isinstance(layer, nn.Linear) else layer for layer in mlp())
    )


def stepper(model: nn.Module, m: int, x: Tensor, y: Tensor):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step() -> None:
        # a function: EagerNoiseLinear is no DIP layer
        out = dip.trajectories(model.__call__, x, m=m)
        loss = dip.objective(out, y, F.cross_entropy)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def step_overhead(x: Tensor, y: Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """Each training step over the plain one, timed in turn, round by round: the median ratio and
    its quartiles."""
    steps = {
        "plain, m = 1": stepper(mlp(), 1, x, y),
        "eager noise, m = 1": stepper(eager_mlp(), 1, x, y),
        "dip, m = 1": stepper(dip.convert(mlp()), 1, x, y),
        f"plain on {M} copies": stepper(mlp(), M, x, y),
        f"eager noise, m = {M}": stepper(eager_mlp(), M, x, y),
        f"dip, m = {M}": stepper(dip.convert(mlp()), M, x, y),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_idx in range(rounds + 5):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if round_idx >= 5:
                times[name].append(time.perf_counter() - start)
    base = times["plain, m = 1"]
    table = {}
    for name, values in times.items():
        ratios = [t / b for t, b in zip(values, base, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        ms = 1e3 * statistics.median(values)
        table[name] = {"ms": ms, "ratio": median, "q1": low, "q3": high}
    return table


# ---- output --------------------------------------------------------------------------------------


def mean_std(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def accuracy_table(results: dict[str, list[dict]]) -> str:
    names = {"clean": "clean", "pgd": "PGD eps ", "noise": "noise "}
    heads = [names[kind] + (strength if kind != "clean" else "") for kind, strength in TABLE]
    lines = ["  ".join([f"{'training':14}", *(f"{head:>12}" for head in heads)])]
    for variant, runs in results.items():
        cells = [mean_std([run[kind][strength] for run in runs]) for kind, strength in TABLE]
        shown = [f"{mean:6.1f} ± {std:3.1f}" for mean, std in cells]
        lines.append("  ".join([f"{variant:14}", *shown]))
    return "\n".join(lines)


def overhead_table(overhead: dict[str, dict[str, float]]) -> str:
    lines = [f"{'training step':20}  {'ms':>6}  {'over plain':>10}  quartiles"]
    for name, row in overhead.items():
        lines.append(
            f"{name:20}  {row['ms']:6.2f}  {row['ratio']:10.2f}  {row['q1']:.2f} .. {row['q3']:.2f}"
        )
    return "\n".join(lines)


def in_words(results: dict[str, list[dict]], overhead: dict[str, dict[str, float]]) -> list[str]:
    """What the tables show, in three lines."""

    def score(variant: str, kind: str, strength: str) -> float:
        return mean_std([run[kind][strength] for run in results[variant]])[0]

    attacked = {variant: score(variant, "pgd", "0.1") for variant in VARIANTS}
    clean = {variant: score(variant, "clean", "0") for variant in VARIANTS}
    gain, change = attacked["dip"] - attacked["plain"], clean["dip"] - clean["plain"]
    others = [f"{name} {attacked[name]:.0f}" for name in ("fixed sigma", "input noise")]
    ahead = [name for name in ("fixed sigma", "input noise") if attacked[name] > attacked["dip"]]
    verdict = f"ahead here: {' and '.join(ahead)}" if ahead else "the recipe is ahead"
    name = f"dip, m = {M}"
    return [
        f"1. Under attack (PGD 0.1) plain training gets {attacked['plain']:.0f} of 100 digits "
        f"right, the DIP recipe {attacked['dip']:.0f} ({gain:+.0f}); on clean digits "
        f"{clean['plain']:.1f} and {clean['dip']:.1f} ({change:+.1f}).",
        f"2. Simpler noise, under the same attack: {', '.join(others)}; {verdict}. DIP finds the "
        "amount of noise by itself.",
        f"3. A training step with m = {M} took {overhead[name]['ratio']:.1f} times the plain "
        "step, of a network so small that noise costs most; in eval mode the network is the "
        "plain one, and costs what that costs.",
    ]


def plot(results: dict[str, list[dict]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, kind, label in zip(
        axes, ("pgd", "noise"), ("PGD strength (L-infinity)", "input noise (sigma)"), strict=True
    ):
        for variant, runs in results.items():
            strengths = [0.0, *(float(s) for s in runs[0][kind])]
            points = [mean_std([run["clean"]["0"] for run in runs])]
            points += [mean_std([run[kind][s] for run in runs]) for s in runs[0][kind]]
            means, stds = zip(*points, strict=True)
            axis.errorbar(strengths, means, yerr=stds, capsize=3, label=variant, **LOOKS[variant])
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy, % (deterministic forward)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), handlelength=3)
    figure.suptitle(
        f"MLP 64-256-256-10, {NUM_TRAIN} digits, {len(runs)} seed(s), mean ± standard deviation"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add, kept = parser.add_argument, Path("out/digits")
    add("--seeds", type=int, default=3, help="number of seeds (3)")
    add("--epochs", type=int, help="epochs of training (200; 3 with --quick)")
    add("--out", type=Path, default=kept, help="folder for results.json and robustness.png")
    add(
        "--threads", type=int, default=1, help="threads: layers this small gain nothing by more (1)"
    )
    add("--quick", action="store_true", help="one seed, a few epochs: does it run?")
    args = parser.parse_args(arguments)
    seeds = 1 if args.quick else args.seeds
    epochs = args.epochs if args.epochs is not None else 3 if args.quick else 200
    if seeds < 1 or epochs < 1 or args.threads < 1:
        parser.error("--seeds, --epochs and --threads: expected at least 1")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out: expected a folder, got the file {args.out}")

    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    results: dict[str, list[dict]] = {variant: [] for variant in VARIANTS}
    with tqdm(total=seeds * epochs * len(VARIANTS), unit="epoch", dynamic_ncols=True) as bar:
        for seed in range(seeds):
            x_train, y_train, x_test, y_test = load(seed)
            for variant in VARIANTS:
                bar.set_description(f"seed {seed}, {variant}")
                model = train(variant, seed, epochs, x_train, y_train, bar)
                run = evaluate(model, x_test, y_test, seed, pgd_steps=3 if args.quick else 20)
                if variant != "plain":
                    run["sigma"] = {row.name: row.sigma_mean for row in dip.summary(model)}
                results[variant].append(run)
    x_train, y_train, *_ = load(0)
    overhead = step_overhead(x_train[:BATCH], y_train[:BATCH], rounds=10 if args.quick else 200)

    args.out.mkdir(parents=True, exist_ok=True)
    report = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seeds": seeds,
        "epochs": epochs,
        "accuracy": results,
        "step_overhead": overhead,
        "seconds": round(time.perf_counter() - start, 1),
    }
    (args.out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(results, args.out / "robustness.png")

    print(
        f"\nTest accuracy, %, on the deterministic forward; mean ± standard deviation over {seeds} "
        "seed(s)"
    )
    print(accuracy_table(results))
    sigmas, starts = results["dip"][-1]["sigma"], results["fixed sigma"][-1]["sigma"]
    print(
        "\nlearned sigma of dip, last seed, and where it started: "
        + ", ".join(f"layer {n} {s:.3f} ({starts[n]:.3f})" for n, s in sigmas.items())
    )
    print(
        f"\nOne training step, batch {BATCH}, {report['threads']} threads; median of the ratios to "
        "the plain step"
    )
    print(overhead_table(overhead))
    print(
        f"\n{report['seconds']} s; wrote {args.out / 'results.json'} and "
        f"{args.out / 'robustness.png'}"
    )
    if args.quick:
        print("\nA quick run trains too little to show anything: run it without --quick.")
    else:
        print("\nWhat this shows:\n" + "\n".join(in_words(results, overhead)))
    return report


if __name__ == "__main__":
    main()
