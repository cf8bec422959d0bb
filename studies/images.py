"""Fashion-MNIST, a small CNN: is it the allocation of the noise or its amount; and the paper's own
column.

    python studies/images.py              writes out/studies/images/{summary.json,table.md}
    python studies/images.py --strengths  prints the strengths of training under perturbation
    python studies/images.py --quick      one seed, few steps: does it run?

Allocation: the recipe's learned variances against the same from the start (frozen), the same
shuffled among a layer's features, the same rescaled to the total of the fixed ones, and one fixed
sigma for each layer; beside noise at the input, Mixup, CutMix and Cutout. On 1,000 and 5,000
images, trained clean.

The paper's column: clean test accuracy after training under Gaussian noise or FGSM, with the
paper's baselines. The strengths are the least ones that cost plain training 18 points, as in its
table. About half an hour of one core; Fashion-MNIST as Debian's dataset-fashion-mnist has it.
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
from tasks import TASKS, Split, Task, split
from torch import Tensor, nn
from training import M, evaluate, kept, optimiser, prepare

import dipkernels as dip
from dipkernels.nn.numbering import dip_layers

FAMILY = ("learned", "frozen", "shuffled", "rescaled")
NOISY: dict[str, dict[str, Any]] = {
    "learned": {},
    "fixed": {"fixed": True},
    "input noise": {"fixed": True, "where": "input"},
}
AUGMENTED = ("plain", "Cutout", "Mixup", "CutMix")
METHODS = (*AUGMENTED, "input noise", "fixed", *FAMILY)
SIZES = {"1000": (1000, 20), "5000": (5000, 8)}  # images, epochs
BATCH = 50
# --strengths: in training, sigma of Gaussian noise and eps of FGSM
TRAININGS: dict[str, float] = {"clean": 0.0, "Gaussian": 1.7, "FGSM": 0.17}
DROP, STRENGTH_SEED = 18.0, 100  # the paper's ViT-Base loses 24 (Gaussian) and 19 (FGSM)
SCORES = ("clean", "pgd", "noise")


def bench(size: str) -> Task:
    images, epochs = SIZES[size]
    task = TASKS["fashion CNN"]
    return Task(task.load, task.net, images, epochs, BATCH, task.eps, task.noise, image=True)


# ---- augmentations: x [B, 1, 28, 28], y [B] -> x, other labels, share of the own ones ------------


def augment(
    method: str, x: Tensor, y: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, float]:
    """Cutout: a square of half the side becomes 0. Mixup: Beta(0.2, 0.2). CutMix: Beta(1, 1)."""
    other = torch.randperm(len(x), generator=generator)
    side = x.shape[-1]
    if method == "Cutout":
        x = x.clone()
        for image in x:
            box(image, side // 2, generator).zero_()
        return x, y, 1.0
    if method == "Mixup":
        share = beta(0.2, generator)
        return share * x + (1 - share) * x[other], y[other], share
    if method == "CutMix":
        share = torch.rand((), generator=generator).item()
        mixed = x.clone()
        cut = box(mixed, round(side * (1 - share) ** 0.5), generator, of=x[other])
        return mixed, y[other], 1 - cut.shape[-1] * cut.shape[-2] / side**2
    return x, y, 1.0


def box(image: Tensor, size: int, generator: torch.Generator, of: Tensor | None = None) -> Tensor:
    """A square of this side around a random pixel, cut at the border; filled from `of`."""
    side = image.shape[-1]
    row, column = torch.randint(side, (2,), generator=generator).tolist()
    rows = slice(max(row - size // 2, 0), min(row - size // 2 + size, side))
    columns = slice(max(column - size // 2, 0), min(column - size // 2 + size, side))
    if of is not None:
        image[..., rows, columns] = of[..., rows, columns]
    return image[..., rows, columns]


def beta(a: float, generator: torch.Generator) -> float:
    """One draw of Beta(a, a), by Johnk's method."""
    while True:
        u, v = (torch.rand(2, generator=generator).double() ** (1 / a)).tolist()
        if 0 < u + v <= 1:
            return u / (u + v)


# ---- training ------------------------------------------------------------------------------------


def perturbed(
    model: nn.Module, x: Tensor, y: Tensor, training: str, strength: float, g: torch.Generator
) -> Tensor:
    """What training under perturbation shows; FGSM attacks the deterministic forward."""
    if training == "Gaussian":
        return x + strength * torch.randn(x.shape, generator=g)
    if training == "FGSM":
        model.eval()
        x = x.clone().requires_grad_(True)
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
        model.train()
        return (x.detach() + strength * grad.sign()).clamp(0, 1)
    return x


def train(
    task: Task,
    data: Split,
    seed: int,
    method: str,
    options: dict[str, Any] | None,
    training: str,
    strength: float,
) -> nn.Module:
    """Weights and batches are the same for all methods of a seed."""
    torch.manual_seed(seed)
    model = task.net()
    if options is not None:
        prepare(model, data.x[:512], options)
    learns = options is not None and not options.get("fixed")
    optimizer = optimiser(model, {})
    order, own = (torch.Generator().manual_seed(1000 * k + seed) for k in (1, 2))
    torch.manual_seed(1000 + seed)
    for _ in range(task.epochs):
        model.train()
        for batch in torch.randperm(len(data.x), generator=order).split(task.batch):
            x, y = data.x[batch], data.y[batch]
            x = perturbed(model, x, y, training, strength, own)
            x, other, share = augment(method, x, y, own)
            out = model(x)[None] if options is None else dip.trajectories(model, x, m=M)
            loss = share * dip.objective(out, y, F.cross_entropy, model if learns else None)
            if share < 1:
                loss = loss + (1 - share) * dip.objective(out, other, F.cross_entropy)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


def profile(model: nn.Module, kind: str, seed: int) -> dict[str, Tensor]:
    """The learned log-variances: as they are, shuffled, or with the priors' total variance, each of
    a layer."""
    g, found = torch.Generator().manual_seed(seed), {}
    for name, layer in dip_layers(model).items():
        v, prior = layer.log_variance.detach(), layer.variance.log_prior
        if kind == "shuffled":
            v = v[torch.randperm(len(v), generator=g)]
        if kind == "rescaled":
            v = v + prior.logsumexp(0) - v.logsumexp(0)
        found[name] = v.clone()
    return found


def part(key: dict[str, Any]) -> dict[str, Any]:
    """Scores by method: of one, or of the learned variances and all that take their place."""
    task, seed = bench(key["size"]), key["seed"]
    if key["epochs"]:
        task = Task(**{**vars(task), "epochs": key["epochs"]})
    data, how = split(task, seed), (key["training"], key["strength"])
    method, scores = key["method"], {}
    model = train(task, data, seed, method, NOISY.get(method), *how)
    scores[method] = evaluate(task, data, model, seed) | {"kept": kept(model)}
    if method == "learned" and how[0] == "clean":
        for kind in FAMILY[1:]:
            options = {"fixed": True, "variances": profile(model, kind, seed)}
            other = train(task, data, seed, kind, options, *how)
            scores[kind] = evaluate(task, data, other, seed) | {"kept": kept(other)}
    return {"scores": scores}


def strengths() -> dict[str, float]:
    """The least ones, on a grid, with which plain training loses DROP points on clean images."""
    task = bench("1000")
    data = split(task, STRENGTH_SEED)

    def clean(training: str, strength: float) -> float:
        model = train(task, data, STRENGTH_SEED, "plain", None, training, strength)
        return evaluate(task, data, model, STRENGTH_SEED)["clean"]

    plain, found = clean("clean", 0.0), {"clean": 0.0}
    for training, strength in (("Gaussian", 0.5), ("FGSM", 0.05)):
        while (score := clean(training, strength)) > plain - DROP and strength < 8:
            print(f"{training} {strength:.3g}: {score:.1f}, clean training {plain:.1f}", flush=True)
            strength *= 1.5
        found[training] = float(f"{strength:.2g}")
    return found


# ---- tables --------------------------------------------------------------------------------------


def keys(sizes: list[str], trainings: list[str], seeds: int, epochs: int) -> list[dict[str, Any]]:
    return [
        {
            "size": size,
            "training": training,
            "strength": TRAININGS[training],
            "method": method,
            "seed": seed,
            "epochs": epochs,
        }
        for training in trainings
        for size in sizes
        if training == "clean" or size == "1000"
        for seed in range(seeds)
        for method in METHODS
        if method not in FAMILY[1:]
    ]


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """By training, size and method: means, and paired differences to plain and to learned."""
    runs: dict[tuple[str, str], dict[str, dict[int, dict[str, float]]]] = {}
    for r in results:
        for method, scores in r["scores"].items():
            case = runs.setdefault((r["training"], r["size"]), {})
            case.setdefault(method, {})[r["seed"]] = scores
    rows: dict[str, Any] = {}
    for (training, size), by_method in runs.items():
        for method in METHODS:
            if method not in by_method:
                continue
            row: dict[str, Any] = {}
            for score in SCORES:
                of = {m: {s: v[score] for s, v in seeds.items()} for m, seeds in by_method.items()}
                row[score] = {"mean": statistics.fmean(of[method].values())}
                for name, sign in (("plain", 1), ("learned", -1)):
                    pairs = [sign * (of[method][s] - of[name][s]) for s in of[method]]
                    mean, half = interval(pairs)
                    row[score][name] = {
                        "mean": mean,
                        "half_width": half if len(pairs) > 1 else None,
                        "verdict": verdict(pairs),
                        "text": signed(pairs),
                    }
            rows.setdefault(f"{training}, {size}", {})[method] = row
    return rows


def report(rows: dict[str, Any]) -> str:
    texts = []
    for case, methods in rows.items():
        if not case.startswith("clean"):
            continue
        lines = [
            [
                method,
                *(
                    f"{row[s]['mean']:.1f}"
                    + ("" if method == "learned" else f" ({row[s]['learned']['text']})")
                    for s in SCORES
                ),
            ]
            for method, row in methods.items()
        ]
        heads = [f"{case.split(', ')[1]} images", *(f"{s} (learned minus it)" for s in SCORES)]
        texts.append(markdown(heads, lines))
    columns = [case for case in rows if case.endswith(", 1000")]
    lines = [
        [
            method,
            *(
                f"{rows[c][method]['clean']['mean']:.1f}"
                + ("" if method == "plain" else f" ({rows[c][method]['clean']['plain']['text']})")
                for c in columns
            ),
        ]
        for method in METHODS
        if all(method in rows[c] for c in columns)
    ]
    heads = [f"trained {c.split(', ')[0]}, {TRAININGS[c.split(', ')[0]]:g}" for c in columns]
    return "\n\n".join([*texts, markdown(["clean test accuracy (minus plain)", *heads], lines)])


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/studies/images"))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--trainings", nargs="+", choices=TRAININGS, default=list(TRAININGS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="processes (1)")
    parser.add_argument("--strengths", action="store_true", help="print the strengths, no more")
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch, 1,000 images")
    args = parser.parse_args(arguments)
    if args.strengths:
        print(strengths())
        return {}
    epochs = 0
    if args.quick:
        args.sizes, args.trainings, args.seeds, epochs = ["1000"], ["clean"], 1, 1
    asked = keys(args.sizes, args.trainings, args.seeds, epochs)
    rows = summarise(parts.run(part, asked, args.out, args.workers))
    text = report(rows)
    parts.write(args.out, rows, text)
    print(f"\nPaired over {args.seeds} seed(s), 95 %; ?: undecided. Wrote {args.out}")
    return rows


if __name__ == "__main__":
    main()
