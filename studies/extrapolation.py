"""Beyond the training data: engression's own simulators y = g(x + noise), squared loss and energy
score, plain and DIP.

    python studies/extrapolation.py
        # writes out/studies/extrapolation/{summary.json,table.md,table*.svg}
    python studies/extrapolation.py --quick  one function, two seeds, few steps: does it run?

Trained on x up to 2, scored on 2 .. 4 (outside) and below 2 (inside): root mean square distance of
the predicted median and mean to the true ones. Each method takes one of six settings for each
function, by its own loss on a quarter of the training data, so inside: of the squared one's
predicted mean, or the energy score of its draws. "ratio 1" is the guide's setting, not tuned.
engression's own estimator (requirements-studies.txt) has the settings of its documentation and
five around them. About half an hour of one core.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import parts
import torch
import torch.nn.functional as F
from parts import chosen, tested
from tables import by_case, cell, compared, markdown, named
from tasks import mlp
from torch import Tensor, nn
from training import optimiser, prepare

import dipkernels as dip
from dipkernels.training.objective import KL

CASES = {
    "softplus": -2.0,
    "square": 0.0,
    "cubic": -2.0,
    "log": 0.0,
}  # the lower end of the training data
UPPER, OUTSIDE = 2.0, 4.0
COUNT, STEPS, BATCH, M, DRAWS = 1000, 1500, 200, 4, 200
NOISE: list[dict[str, Any]] = [
    {},
    {"ratio": 1.0},
    {"ratio": 1.0, "kl": 0.0},
    {"ratio": 1.0, "variance_rate": 3.0},
    {"where": "input", "kl": 0.0},
    {"where": "input", "ratio": 1.0},
]
SEARCH: dict[str, list[dict[str, Any]]] = {
    "plain, squared": [{"weight_decay": w} for w in (0.0, 0.01, 0.1, 0.3, 1.0, 3.0)],
    "DIP, squared": NOISE,
    "DIP, energy": NOISE,
    "engression": [
        {"lr": 0.01},
        {"lr": 0.001},
        {"num_epochs": 1000},
        {"noise_dim": 20},
        {"hidden_dim": 200},
        {"num_layer": 3},
    ],
}
UNTUNED = {"DIP, energy, ratio 1": {"ratio": 1.0}}
# Less is better; a table's digits
SCORES = dict.fromkeys(("median outside", "mean outside", "median inside"), (-1, 2))


def fitted(x: Tensor, y: Tensor, method: str, options: dict[str, Any], steps: int) -> nn.Module:
    """An MLP of two hidden layers of 100, standardised outside of it."""
    model = mlp(1, 100, 100, 1)()
    if method.startswith("DIP"):
        prepare(model, x, options)
    optimizer = optimiser(model, options)
    for _ in range(steps):
        batch = torch.randint(len(x), (BATCH,))
        if not method.startswith("DIP"):
            loss = F.mse_loss(model(x[batch]), y[batch])
        else:
            out = dip.trajectories(model, x[batch], m=M)
            if "energy" in method:
                loss = dip.energy_score(out, y[batch])
                loss = loss + dip.kl_penalty(model, options.get("kl", KL))
            else:
                loss = dip.objective(out, y[batch], F.mse_loss, model, kl=options.get("kl"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def sampler(
    x: Tensor, y: Tensor, method: str, options: dict[str, Any], steps: int
) -> Callable[[Tensor], Tensor]:
    """Fits, and gives what draws [k, B] at any x; of plain training its only prediction."""
    if method == "engression":
        from engression import engression

        given = {"lr": 0.01, "num_epochs": 500, "batch_size": len(x), **options}
        given["num_epochs"] = max(1, given["num_epochs"] * steps // STEPS)
        package = engression(x, y, verbose=False, **given)
        return lambda at: package.sample(at, DRAWS)[:, 0].T
    centre, scale, mean, std = x.mean(), x.std(), y.mean(), y.std()
    model = fitted((x - centre) / scale, (y - mean) / std, method, options, steps)
    k = DRAWS if method.startswith("DIP") else 0
    return lambda at: (
        dip.predict(model, (at - centre) / scale, k=k, average=None)[..., 0] * std + mean
    )


def part(key: dict[str, Any]) -> dict[str, Any]:
    from engression.data.simulator import preanm_simulator

    function, seed = key["function"], key["seed"]
    low, how = CASES[function], (key["method"], key["options"], key["steps"])
    torch.manual_seed(seed)
    x, y = preanm_simulator(function, COUNT, low, UPPER)
    if key["stage"] == "search":
        torch.manual_seed(1000 + seed)
        cut = COUNT * 3 // 4
        drawn = sampler(x[:cut], y[:cut], *how)(x[cut:])[..., None]
        if "squared" in key["method"]:
            return {"loss": F.mse_loss(drawn.mean(0), y[cut:]).item()}
        return {"loss": dip.energy_score(drawn, y[cut:]).item()}
    truth = {
        name: preanm_simulator(function, 40, *ends, train=False)
        for name, ends in {"inside": (low, UPPER), "outside": (UPPER, OUTSIDE)}.items()
    }
    torch.manual_seed(1000 + seed)
    draw, result = sampler(x, y, *how), {}
    for name, (at, median, mean) in truth.items():
        drawn = draw(at)
        for which, (found, true) in {
            "median": (drawn.median(0).values, median),
            "mean": (drawn.mean(0), mean),
        }.items():
            result[f"{which} {name}"] = (found - true[:, 0]).square().mean().sqrt().item()
    return result


def study(case: dict[str, Any], out: Path, workers: int, seeds: int) -> list[dict[str, Any]]:
    best = chosen(part, case, SEARCH, out, workers, score=lambda result: -result["loss"])
    return tested(part, case, best | UNTUNED, out, workers, seeds)


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """By function and method: means, and paired differences to plain and to DIP's energy score."""
    runs = by_case((r["function"], r["method"], r["seed"], r) for r in results)
    bases = {"plain, squared": 1, "DIP, energy": -1}
    rows = {function: compared(methods, SCORES, bases) for function, methods in runs.items()}
    for r in results:
        rows[r["function"]][r["method"]]["options"] = r["options"]
    return rows


def table(rows: dict[str, Any]) -> str:
    lines = []
    for function, methods in rows.items():
        for method, row in methods.items():
            plain, own = method == "plain, squared", method == "DIP, energy"
            cells = [cell(row, s, "plain, squared", plain) for s in SCORES]
            against = "-" if own else row["median outside"]["DIP, energy"]["text"]
            place = "at the input" if row["options"].get("where") == "input" else ""
            setting = ", ".join(filter(None, (place, named(row["options"])))) or "nothing set"
            lines.append([function, method, *cells, against, setting])
    heads = [*SCORES, "median outside, DIP, energy minus it", "chosen"]
    return markdown(["g", "method", *heads], lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    quick = "one function, two seeds, few steps"
    args = parts.command_line(__doc__, "extrapolation", 8, quick).parse_args(arguments)
    functions, steps = list(CASES), STEPS
    if args.quick:
        functions, args.seeds, steps = ["softplus"], 2, 20
    cases = [{"function": g, "steps": steps} for g in functions]
    found = [study(case, args.out, args.workers, args.seeds) for case in cases]
    rows = summarise([result for results in found for result in results])
    text = table(rows)
    parts.write(args, rows, text, "In brackets: minus plain, paired")
    return rows


if __name__ == "__main__":
    main()
