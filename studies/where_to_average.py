"""Where to average: over trajectories, inside each layer, or in closed form? On handwritten digits.

    python studies/where_to_average.py
        # writes out/where_to_average/{summary.json,table.md,table*.svg}
    python studies/where_to_average.py --quick  one seed, a few epochs: does it run?

An MLP 64-256-256-10 (sigma = 0.3 before every linear layer) and a small vision transformer (sigma =
0.1), 500 images for training and 400 for testing; sigma is fixed, so that only the estimator
differs. Trainings:

    plain         no noise
    one draw      m = 1
    trajectories  m = 4 noisy passes in one, the loss averaged over them (Algorithm 1)
    layer means   every activation averaged over 4 draws inside its layer; linear layers draw with
    sigma / 2 analytic      every activation replaced by its expectation; nothing is drawn

at equal steps, and at equal time: everyone gets the processor time that trajectories took.
Predictions of each network: plain (Algorithm 3), sampled (Algorithm 2, k = 16) and analytic. PGD
attacks the plain forward pass.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import parts
import results_page
import torch
import torch.nn.functional as F
from tables import report
from torch import Tensor, nn

import dipkernels as dip

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from digits import BATCH, load, pgd

S = 4
NUM_TEST = 400
METHODS = ("plain", "one draw", "trajectories", "layer means", "analytic")
NETWORKS = {"MLP": (0.3, 120), "ViT": (0.1, 40)}  # sigma, epochs
COLUMNS = (
    "clean, plain",
    "clean, sampled",
    "clean, analytic",
    "noise 0.3, plain",
    "noise 0.3, sampled",
    "noise 0.3, analytic",
    "PGD 0.1, plain",
)

# ---- networks ------------------------------------------------------------------------------------


def linear(
    fan_in: int, fan_out: int, method: str, sigma: float, activation: str | None = None
) -> dip.DIPLinear:
    estimator = {"layer means": "mean", "analytic": "analytic"}.get(method, "sample")
    samples = S if method == "layer means" else 1
    layer = dip.DIPLinear(
        fan_in,
        fan_out,
        init_variance=sigma**2,
        num_samples=samples,
        activation=activation,
        estimator=estimator,
    )
    layer.log_variance.requires_grad_(False)
    return layer


def mlp(method: str, sigma: float) -> nn.Module:
    return nn.Sequential(
        linear(64, 256, method, sigma, "relu"),
        linear(256, 256, method, sigma, "relu"),
        linear(256, 10, method, sigma),
    )


class Block(nn.Module):
    """x + attention(LayerNorm(x)), then x + MLP(LayerNorm(x)); every linear layer noised."""

    def __init__(self, dim: int, heads: int, method: str, sigma: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = linear(dim, 3 * dim, method, sigma), linear(dim, dim, method, sigma)
        self.up, self.down = (
            linear(dim, 4 * dim, method, sigma, "gelu"),
            linear(4 * dim, dim, method, sigma),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(self.up(self.norm2(x)))


class ViT(nn.Module):
    """8 x 8 images as 16 patches of 2 x 2, two blocks of 32 features, the tokens' mean to 10
    classes."""

    def __init__(self, method: str, sigma: float, dim: int = 32) -> None:
        super().__init__()
        self.embed = linear(4, dim, method, sigma)
        self.position = nn.Parameter(0.02 * torch.randn(16, dim))
        self.blocks = nn.Sequential(*(Block(dim, 4, method, sigma) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(dim), linear(dim, 10, method, sigma)

    def forward(self, x: Tensor) -> Tensor:
        patches = x.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        return self.head(self.norm(self.blocks(self.embed(patches) + self.position)).mean(1))


def build(network: str, method: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)  # the same initial weights for every method
    return dip.number_layers((mlp if network == "MLP" else ViT)(method, NETWORKS[network][0]))


# ---- training ------------------------------------------------------------------------------------


def train(
    network: str,
    method: str,
    seed: int,
    x: Tensor,
    y: Tensor,
    epochs: int,
    seconds: float | None = None,
):
    """(model, epochs run, processor seconds): that many epochs, or as many as start within
    `seconds`."""
    model = build(network, method, seed)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.01
    )
    torch.manual_seed(1000 + seed)
    start, done = time.process_time(), 0
    while done < epochs if seconds is None else time.process_time() - start < seconds:
        for batch in torch.randperm(len(x)).split(BATCH):
            if method == "trajectories":
                loss = dip.objective(
                    dip.trajectories(model, x[batch], m=S), y[batch], F.cross_entropy
                )
            elif method == "plain":
                with dip.noise_off():
                    loss = F.cross_entropy(model(x[batch]), y[batch])
            else:
                loss = F.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        done += 1
    return model.eval(), done, time.process_time() - start


def evaluate(model: nn.Module, x: Tensor, y: Tensor, seed: int, pgd_steps: int) -> dict[str, float]:
    torch.manual_seed(2000 + seed)  # the same noise and starting points for every method
    accuracy = lambda out: 100 * (out.argmax(-1) == y).float().mean().item()  # noqa: E731
    found = {}
    for name, data in (("clean", x), ("noise 0.3", x + 0.3 * torch.randn_like(x))):
        found[f"{name}, plain"] = accuracy(dip.predict(model, data, k=0))
        found[f"{name}, sampled"] = accuracy(dip.predict(model, data, k=16, chunk=4))
        found[f"{name}, analytic"] = accuracy(dip.predict(model, data, method="analytic"))
    found["PGD 0.1, plain"] = accuracy(model(pgd(model, x, y, 0.1, pgd_steps)).detach())
    return found


# ---- output --------------------------------------------------------------------------------------


def of(runs: list[dict], *wanted: str) -> list[dict]:
    """Those of a network, a budget and a method."""
    return [r for r in runs if (r["network"], r["budget"], r["method"]) == wanted]


def table(runs: list[dict], network: str, budget: str) -> str:
    rows = []
    for method in METHODS:
        own = of(runs, network, budget, method)
        epochs, seconds = (statistics.fmean(r[name] for r in own) for name in ("epochs", "seconds"))
        cells = (results_page.cell([r["accuracy"][c] for r in own]) for c in COLUMNS)
        rows.append([method, f"{epochs:.0f}", f"{seconds:.1f}", *cells])
    return report.table([f"{network}, {budget}", "epochs", "seconds", *COLUMNS], rows)


def part(key: dict[str, Any]) -> dict[str, Any]:
    """All trainings of one network and seed: equal time is that of trajectories beside them."""
    network, seed, factor = key["network"], key["seed"], key["epochs"]
    x_train, y_train, x_test, y_test = load(seed)
    x_test, y_test = x_test[:NUM_TEST], y_test[:NUM_TEST]
    epochs, seconds, runs = max(1, round(factor * NETWORKS[network][1])), None, []
    for budget in ("equal steps", "equal time"):
        for method in sorted(METHODS, key=lambda name: name != "trajectories"):
            limit = seconds if budget == "equal time" else None
            model, done, took = train(network, method, seed, x_train, y_train, epochs, limit)
            if method == "trajectories" and seconds is None:
                seconds = took
            accuracy = evaluate(model, x_test, y_test, seed, key["pgd_steps"])
            where = {"network": network, "budget": budget, "method": method, "seed": seed}
            runs.append({**where, "epochs": done, "seconds": took, "accuracy": accuracy})
    return {"runs": runs}


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = parts.command_line(__doc__, "where_to_average", 3, "one seed, a few epochs")
    parser.set_defaults(out=Path("out/where_to_average"))
    factor = report.at_least(0.01)
    parser.add_argument("--epochs", type=factor, default=1.0, help="factor on their number (1)")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    args = parser.parse_args(arguments)
    if args.quick:
        args.seeds, args.epochs = 1, 0.02
    torch.set_num_threads(1)  # processor time is then the time of the work
    keys = [
        {
            "network": network,
            "seed": seed,
            "epochs": args.epochs,
            "pgd_steps": 3 if args.quick else 20,
        }
        for network, seed in itertools.product(args.networks, range(args.seeds))
    ]
    results = parts.run(part, keys, args.out, args.workers)
    runs = [run for found in results for run in found["runs"]]
    text = "\n\n".join(
        table(runs, network, budget)
        for network, budget in itertools.product(args.networks, ("equal steps", "equal time"))
    )
    said = "Test accuracy, %, and seconds of one core"
    parts.write(args, runs, text, said, spread="mean ± standard deviation")
    return runs


if __name__ == "__main__":
    main()
