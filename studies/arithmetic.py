"""Chains of sums with worked steps: a small Llama from scratch, then one epoch of LoRA; DIP against
six baselines.

    python studies/arithmetic.py  both stages, about half an hour; goes on where it was stopped
    python studies/arithmetic.py --stages LoRA  one of them (the other may run in another process)
    python studies/arithmetic.py --figures  figures alone, from docs/results/arithmetic.json
    python studies/arithmetic.py --quick  does it run? into out/arithmetic

Stage scratch: every method trains the same Llama (3.1 million parameters) on chains of 2 to 4 sums
modulo 5; tested by greedy generation and exact match on chains of 4, and on longer ones than it has
seen. Stage LoRA: one epoch of LoRA on what that left out, products and chains of up to 6 steps;
every method starts from the model that plain training gave. Calculations are split into training,
validation (where each method's setting is chosen) and test. Writes every run into out/arithmetic as
it ends; the report writes the tables of docs/results.md, and arithmetic_*.svg and a summary of the
runs, arithmetic.json, into docs/results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import arithmetic_setup as task
import results_page
import torch
from peft import LoraConfig, get_peft_model
from results_page import (
    FOLDER,
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
    time_ratio,
)
from tables import report
from torch import Tensor, nn
from vision_methods import GaussianDropout

import dipkernels as dip

METHODS = (
    "plain",
    "plain, equal time",
    "input noise",
    "fixed variance",
    "GaussianDropout",
    "NEFTune",
    "DIP",
)
STAGES = ("scratch", "LoRA")
SEEDS = 3
DIM, DEPTH, BATCH = 256, 4, 64
NUM_TESTED = 200  # problems of each length
LEARNING_RATES = {
    "scratch": (1e-3, 2e-3),
    "LoRA": (6e-3, 1.2e-2),
}  # the LoRA stage starts from models of the first
STEPS = {"scratch": 160, "LoRA": 60}  # of 64 problems each
LENGTHS = {"scratch": (2, 3, 4), "LoRA": (2, 3, 4, 5, 6)}
OPERATORS = {"scratch": "+-", "LoRA": "+-*"}
TESTED = {"scratch": (4, 6, 8, 10), "LoRA": (6, 8, 10, 12)}  # steps
# Two settings for every method; plain training searches the learning rate that the others then
# take.
SEARCH: dict[str, list[dict]] = {
    "input noise": [{"sigma": sigma} for sigma in (0.1, 0.3)],
    "fixed variance": [{"sigma": sigma} for sigma in (0.05, 0.15)],
    "GaussianDropout": [{"rate": rate} for rate in (0.01, 0.05)],
    "NEFTune": [{"strength": strength} for strength in (0.5, 2.0)],
    "DIP": [{"sigma": sigma, "alpha": alpha} for sigma, alpha in ((0.15, 0.0), (0.05, 0.01))],
}
VALIDATION_SEED = 100

# ---- methods -------------------------------------------------------------------------------------


class EmbeddingNoise:
    """Noise on the output of the embedding in training mode: Gaussian of sigma times its spread, or
    NEFTune's.

    NEFTune: uniform in +- strength / sqrt(tokens * features).
    """

    def __init__(self, sigma: float | None = None, strength: float | None = None) -> None:
        self.sigma, self.strength = sigma, strength

    def __call__(self, module: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
        if not module.training:
            return None
        if self.sigma is not None:
            return out + self.sigma * out.detach().std() * torch.randn_like(out)
        limit = self.strength / (out.shape[-1] * out.shape[-2]) ** 0.5
        return out + torch.empty_like(out).uniform_(-limit, limit)


def noised_layers(model: nn.Module, stage: str) -> list[str]:
    """From scratch: every nn.Linear. LoRA: the layers that carry an adapter, noised before base and
    adapter."""
    if stage == "LoRA":
        return [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def with_method(model: nn.Module, config: dict) -> nn.Module:
    method, stage = config["method"], config["stage"]
    names = noised_layers(model, stage)
    if method in ("fixed variance", "DIP"):
        with warnings.catch_warnings():
            warnings.simplefilter("error", dip.DIPConversionWarning)
            dip.convert(model, config["sigma"] ** 2, filter=lambda module, name: name in names)
        for module in model.modules():
            if isinstance(module, dip.Variance):
                module.requires_grad_(method == "DIP")
    elif method == "GaussianDropout":
        GaussianDropout(model, names, config["rate"])
    elif method in ("input noise", "NEFTune"):
        model.get_input_embeddings().register_forward_hook(
            EmbeddingNoise(config.get("sigma"), config.get("strength"))
        )
    return model


def build(config: dict, base: dict[str, Tensor] | None) -> nn.Module:
    torch.manual_seed(config["seed"])
    model = task.llama(config["dim"], config["depth"])
    if config["stage"] == "LoRA":
        model.load_state_dict(base)
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    return with_method(model, config)


def stepper(model: nn.Module, config: dict) -> tuple[torch.optim.Optimizer, Callable[[dict], None]]:
    """The optimiser, and a training step on a batch."""
    groups = dip.param_groups(model, config["lr"], weight_decay=0.01)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    alpha = config.get("alpha", 0.0)

    def step(batch: dict) -> None:
        loss = model(**batch).loss
        if alpha > 0:
            loss = loss + dip.penalty(model, alpha, beta=alpha * config["sigma"] ** 2)
        if "kl" in config:
            loss = loss + dip.kl_penalty(model, config["kl"])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    model.train()
    return optimizer, step


def train(model: nn.Module, config: dict, batches: list[dict]) -> float:
    """config["steps"] steps through the batches, cosine decay after a short rise; returns processor
    seconds."""
    optimizer, step = stepper(model, config)
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, config["steps"], pct_start=0.1)
    torch.manual_seed(1000 + config["seed"])
    start = time.process_time()
    for number in range(config["steps"]):
        step(batches[number % len(batches)])
        schedule.step()
    return time.process_time() - start


# ---- the parts -----------------------------------------------------------------------------------


class Study(results_page.Study):
    """One stage."""

    def __init__(self, stage: str, args: argparse.Namespace) -> None:
        search = {"plain": [{"lr": rate} for rate in LEARNING_RATES[stage]]} | SEARCH
        folder = args.out / f"arithmetic_{stage.lower()}"
        seeds = range(1 if args.quick else SEEDS)
        super().__init__(stage, folder, args.quick, search, (VALIDATION_SEED,), seeds)
        self.args = args
        self.size = {"dim": 32, "depth": 1} if args.quick else {"dim": DIM, "depth": DEPTH}
        self.steps = 2 if args.quick else STEPS[stage]
        self.num_tested = 10 if args.quick else NUM_TESTED

    def data(self, seed: int, steps: int) -> list[dict]:
        """One epoch of the stage; more steps than it has go through new problems."""
        return task.batches(seed, steps, BATCH, LENGTHS[self.name], OPERATORS[self.name])

    def config(self, method: str, setting: dict, seed: int, part: str) -> dict:
        steps = self.steps
        if method == "plain, equal time":
            steps = round(steps * self.time_ratio())
        name = method.split(",")[0]
        shared = {"stage": self.name, "method": name, "seed": seed, "part": part, "steps": steps}
        return shared | self.size | {"batch": BATCH, "tested": self.num_tested} | setting

    def base_of(self, seed: int) -> dict[str, Tensor]:
        """The model that plain training from scratch gave; kept beside the results that git
        ignores."""
        scratch = Study("scratch", self.args)
        config = scratch.config("plain", {"lr": LEARNING_RATES["scratch"][0]}, seed, "test")
        name = f"base_{config['dim']}x{config['depth']}_{config['steps']}_{seed}.pt"
        path = self.args.out / name
        if not path.exists():
            model = build(config, None)
            train(model, config, scratch.data(seed, config["steps"]))
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), path)
        return torch.load(path, weights_only=True)

    def measure(self, config: dict) -> dict:
        """Train as the config says; exact match on its part by number of steps."""
        data = self.data(config["seed"], config["steps"])
        model = build(config, self.base_of(config["seed"]) if self.name == "LoRA" else None)
        seconds = train(model, config, data)
        scores = {}
        for steps in TESTED[self.name]:
            operators = OPERATORS[self.name]
            chosen = task.problems(0, config["tested"], steps, operators, config["part"])
            scores[str(steps)] = task.exact_match(model, chosen)
        result = {"scores": scores, "train_cpu_seconds": round(seconds, 2)}
        result["parameters"] = sum(p.numel() for p in model.parameters())
        return result | ({"sigma": sigmas(model)} if config["method"] == "DIP" else {})

    def time_ratio(self) -> float:
        """Processor time of a DIP step over that of a plain step."""

        def make() -> float:
            (batch,) = self.data(0, 1)
            base = task.llama(**self.size).state_dict()
            shared = {"stage": self.name, "seed": 0, "lr": 1e-3, **self.size}
            steps = [
                stepper(build(config, base), config)[1]
                for config in (
                    shared | {"method": "plain"},
                    shared | {"method": "DIP", "sigma": 0.1, "alpha": 0.01},
                )
            ]
            rounds = 3 if self.quick else 15
            return time_ratio(*(lambda step=step: step(batch) for step in steps), rounds)

        return self.store.value("DIP step over plain step", make)

    def score(self, result: dict) -> float:
        return overall(result)

    def main(self) -> None:
        for method in METHODS:
            self.test(method)

    def __len__(self) -> int:
        return self.num_tune() + len(METHODS) * len(self.seeds)


def overall(result: dict) -> float:
    return round(statistics.fmean(score["answer"] for score in result["scores"].values()), 2)


# ---- tables and figures --------------------------------------------------------------------------


def main_table(study: Study) -> str:
    stage, results = study.name, {method: study.test(method) for method in METHODS}
    best = max(METHODS, key=lambda method: statistics.fmean(overall(r) for r in results[method]))
    longest = max(LENGTHS[stage])
    heads = [f"{steps} steps" + (" (longer)" if steps > longest else "") for steps in TESTED[stage]]
    rows = []
    for method, runs in results.items():
        cells = [cell([r["scores"][str(steps)]["answer"] for r in runs]) for steps in TESTED[stage]]
        mean = cell([overall(r) for r in runs])
        whole = cell([statistics.fmean(s["solution"] for s in r["scores"].values()) for r in runs])
        seconds = f"{statistics.fmean(r['train_cpu_seconds'] for r in runs):.0f}"
        rows.append([method, *cells, f"**{mean}**" if method == best else mean, whole, seconds])
    text = table(["method", *heads, "mean", "all steps right", "CPU s"], rows)
    return (
        f"Exact match of the final answer, %, {study.num_tested} problems for each length, "
        f"{len(study.seeds)} seed(s), "
        f"mean ± standard deviation; the best mean in bold. {results['plain'][0]['parameters']:,} "
        "parameters, "
        f"{study.steps} steps of {BATCH} problems. "
        f"Chosen on validation problems: {chosen_text(study.store)}. A DIP step costs "
        f"{study.time_ratio()} plain steps."
        f"\n\n{text}\n\n{environment_line(study.store.runs)}"
    )


def plots(folder: Path) -> None:
    """Exact match by length, of both stages, from the summary that docs/results keeps."""
    summary = json.loads((folder / "arithmetic.json").read_text(encoding="utf-8"))
    for stage in STAGES:
        found = chosen_runs(summary, f"arithmetic_{stage.lower()}", METHODS, "steps")
        with figures.style():
            fig, axes = figures.panels(height=4.2)
            for method, run in found.items():
                lengths = [int(length) for length in run["scores"]]
                draw_curve(
                    axes[0, 0],
                    method,
                    lengths,
                    [scores["answer"] for scores in run["scores"].values()],
                )
            axes[0, 0].axvline(
                max(LENGTHS[stage]) + 0.5,
                color=figures.GRID,
                label="longer than in training",
                zorder=1,
            )
            axes[0, 0].set(title=f"{stage}: exact match, %", xlabel="steps of the problem")
            figures.legend(fig, axes[0, 0])
            figures.save(fig, folder / f"arithmetic_{stage.lower()}.svg")


def write(studies: list[Study], page: Path, out: Path) -> None:
    """Tables, figures and summary."""
    stores = {study.name: study.store for study in studies}
    for study in studies:
        report.fill(page, f"arithmetic-{study.name.lower()}", main_table(study))
    if set(stores) == set(STAGES):
        head = ["stage", "method", "setting: mean exact match on validation problems"]
        report.fill(page, "arithmetic-search", search_table(head, stores))
        summarise(stores.values(), out / "arithmetic.json")
        plots(out)


def main(arguments: list[str] | None = None) -> None:
    parser = command_line(__doc__, "arithmetic", "one seed, a tiny model, few steps")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), help="stages (both)"
    )
    args = parser.parse_args(arguments)
    if args.figures:
        plots(FOLDER)
        return
    set_up(args)
    run([Study(stage, args) for stage in args.stages], args, write)


if __name__ == "__main__":
    main()
