"""Beyond the training data: engression's own simulators y = g(x + noise), squared loss and energy
score, plain and DIP.

    python studies/extrapolation.py
        # writes out/studies/extrapolation/{summary.json,table.md,extrapolation.png}
    python studies/extrapolation.py --quick  one function, two seeds, few steps: does it run?

Trained on x up to 2, scored on 2 .. 4 (outside) and below 2 (inside): root mean square distance of
the predicted median and mean to the true ones. Needs engression (requirements-studies.txt),
whose own estimator with the settings of its documentation is the reference. About twenty minutes
of one core.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import parts
import torch
import torch.nn.functional as F
from tables import interval, markdown, signed, verdict
from tasks import mlp
from torch import Tensor, nn

import dipkernels as dip

CASES = {
    "softplus": -2.0,
    "square": 0.0,
    "cubic": -2.0,
    "log": 0.0,
}  # the lower end of the training data
UPPER, OUTSIDE = 2.0, 4.0
COUNT, STEPS, BATCH, M, DRAWS = 1000, 1500, 200, 4, 200
METHODS: dict[str, dict[str, Any]] = {
    "plain, squared": {},
    "DIP, squared": {"dip": True},
    "DIP, energy": {"dip": True, "energy": True},
    "DIP, energy, ratio 1": {"dip": True, "energy": True, "ratio": 1.0},
    "DIP at the input, energy, kl 0": {"dip": True, "energy": True, "kl": 0.0, "input": True},
    "engression": {"package": True},
}
SCORES = ("median outside", "mean outside", "median inside")


def fitted(x: Tensor, y: Tensor, options: dict[str, Any], steps: int) -> nn.Module:
    """An MLP of two hidden layers of 100, standardised outside of it."""
    model = mlp(1, 100, 100, 1)()
    if "dip" in options:
        dip.convert(
            model, filter=(lambda module, name: name == "0") if "input" in options else None
        )
        dip.calibrate(model, [x], ratio=options.get("ratio"))
    optimizer = torch.optim.AdamW(dip.param_groups(model, lr=1e-3))
    kl = {"kl": options["kl"]} if "kl" in options else {}
    for _ in range(steps):
        batch = torch.randint(len(x), (BATCH,))
        if "dip" not in options:
            loss = F.mse_loss(model(x[batch]), y[batch])
        else:
            out = dip.trajectories(model, x[batch], m=M)
            if "energy" in options:
                loss = dip.energy_score(out, y[batch]) + dip.kl_penalty(model, **kl)
            else:
                loss = dip.objective(out, y[batch], F.mse_loss, model, **kl)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def part(key: dict[str, Any]) -> dict[str, Any]:
    from engression import engression
    from engression.data.simulator import preanm_simulator

    seed, options, steps = key["seed"], key["options"], key["steps"]
    torch.manual_seed(seed)
    x, y = preanm_simulator(key["function"], COUNT, CASES[key["function"]], UPPER)
    truth = {
        name: preanm_simulator(key["function"], 40, low, high, train=False)
        for name, (low, high) in {
            "inside": (CASES[key["function"]], UPPER),
            "outside": (UPPER, OUTSIDE),
        }.items()
    }
    torch.manual_seed(1000 + seed)
    if "package" in options:
        model = engression(
            x, y, lr=0.01, num_epochs=max(1, 500 * steps // STEPS), batch_size=COUNT, verbose=False
        )
        drawn = {name: model.sample(at, DRAWS)[:, 0].T for name, (at, _, _) in truth.items()}
    else:
        centre, scale, mean, std = x.mean(), x.std(), y.mean(), y.std()
        model = fitted((x - centre) / scale, (y - mean) / std, options, steps)
        k = DRAWS if "dip" in options else 0
        drawn = {
            name: dip.predict(model, (at - centre) / scale, k=k, average=None)[..., 0] * std + mean
            for name, (at, _, _) in truth.items()
        }
    result = {}
    for name, (_, median, mean) in truth.items():
        result[f"median {name}"] = (
            (drawn[name].median(0).values - median[:, 0]).square().mean().sqrt().item()
        )
        result[f"mean {name}"] = (drawn[name].mean(0) - mean[:, 0]).square().mean().sqrt().item()
    return result


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    runs = {(r["function"], r["method"], r["seed"]): r for r in results}
    rows: dict[str, Any] = {}
    for function, method, _ in runs:
        each = [r for k, r in runs.items() if k[:2] == (function, method)]
        row: dict[str, Any] = {}
        for score in SCORES:
            difference = [
                r[score] - runs[function, "plain, squared", r["seed"]][score] for r in each
            ]
            mean, half = interval(difference)
            row[score] = {
                "mean": statistics.fmean(r[score] for r in each),
                "minus_plain": mean,
                "half_width": half,
                "verdict": verdict([-d for d in difference]),
                "text": signed(difference, 2),
            }
        rows.setdefault(function, {})[method] = row
    return rows


def table(rows: dict[str, Any]) -> str:
    lines = []
    for function, methods in rows.items():
        for method, row in methods.items():
            bare = method == "plain, squared"
            cells = [
                f"{row[s]['mean']:.2f}" + ("" if bare else f" ({row[s]['text']})") for s in SCORES
            ]
            lines.append([function, method, *cells])
    return markdown(["g", "method", *SCORES], lines)


def plot(rows: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, score in zip(axes, SCORES, strict=False):
        for i, (function, methods) in enumerate(rows.items()):
            places = [n + 0.12 * (i - len(rows) / 2) for n in range(len(methods))]
            axis.plot([row[score]["mean"] for row in methods.values()], places, "o", label=function)
        axis.set_yticks(range(len(METHODS)), list(METHODS))
        axis.set(xscale="log", xlabel=f"distance to the true {score}")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/studies/extrapolation"))
    parser.add_argument("--functions", nargs="+", choices=CASES, default=list(CASES), metavar="G")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1, help="processes (1)")
    parser.add_argument("--quick", action="store_true", help="one function, two seeds, few steps")
    args = parser.parse_args(arguments)
    if args.quick:
        args.functions, args.seeds = ["softplus"], 2
    keys = [
        {
            "function": g,
            "method": method,
            "seed": seed,
            "options": options,
            "steps": 20 if args.quick else STEPS,
        }
        for seed in range(args.seeds)
        for g in args.functions
        for method, options in METHODS.items()
    ]
    rows = summarise(parts.run(part, keys, args.out, args.workers))
    text = table(rows)
    parts.write(args.out, rows, text)
    plot(rows, args.out / "extrapolation.png")
    print(
        f"\nIn brackets: minus plain, paired over {args.seeds} seeds, 95 %; ?: undecided. Wrote "
        f"{args.out}"
    )
    return rows


if __name__ == "__main__":
    main()
