"""Train one network of the bench by a method and score it: clean, under PGD, under input noise; all
on the plain forward."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from tasks import Split, Task, split
from torch import Tensor, nn
from vision_setup import attacked

import dipkernels as dip
from dipkernels.models.calibrate import DEEP
from dipkernels.nn.numbering import dip_layers

M = 4


def loss_of(task: Task) -> Callable[[Tensor, Tensor], Tensor]:
    return F.mse_loss if task.regression else F.cross_entropy


def prepare(model: nn.Module, x: Tensor, method: dict[str, Any]) -> nn.Module:
    """Give the model the method's noise. An empty method is the recipe as it stands, all by
    default."""
    if method.get("where") == "input":
        first = next(
            name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))
        )
        dip.convert(model, filter=lambda module, name: name == first)
    else:
        dip.convert(model)
    # fixed noise starts at the whole spread
    ratio = method.get("ratio", 1.0 if method.get("fixed") else None)
    dip.calibrate(model, [x], ratio, per=method.get("per", "layer"), start=method.get("start"))
    if "depth" in method:  # the pull by another power of 4 / L
        layers = dip_layers(model)
        for layer in layers.values():
            layer.variance.pull.mul_(min(1.0, DEEP / len(layers)) ** (method["depth"] - 1))
    for name, values in method.get("variances", {}).items():
        dip_layers(model)[name].log_variance.data.copy_(values)
    if method.get("fixed"):
        for layer in dip_layers(model).values():
            layer.log_variance.requires_grad_(False)
    return model


def optimiser(model: nn.Module, settings: dict[str, Any]) -> torch.optim.Optimizer:
    lr, name = settings.get("lr", 1e-3), settings.get("optimiser", "AdamW")
    rate = settings.get("variance_rate")
    learns = rate is not None and bool(dip_layers(model))
    groups = dip.param_groups(
        model,
        lr=lr,
        weight_decay=settings.get("weight_decay", 0.01),
        variance_lr=rate * lr if learns else None,
    )
    return torch.optim.SGD(groups, momentum=0.9) if name == "SGD" else torch.optim.AdamW(groups)


def cosine(optimizer: torch.optim.Optimizer, epochs: int) -> torch.optim.lr_scheduler.LambdaLR:
    """From the rate to 0 over the epochs."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda epoch: (1 + math.cos(math.pi * epoch / epochs)) / 2
    )


def train(
    task: Task, data: Split, seed: int, method: dict[str, Any] | None, settings: dict[str, Any]
) -> nn.Module:
    """method None is plain training; weights, batches and steps are the same for every method of a
    seed."""
    torch.manual_seed(seed)
    model, loss_fn = task.net(), loss_of(task)
    if "smoothing" in settings:
        loss_fn = functools.partial(F.cross_entropy, label_smoothing=settings["smoothing"])
    if method is not None:
        prepare(model, data.x[:512], method)
    optimizer = optimiser(model, {**settings, **(method or {})})
    epochs = settings.get("epochs", task.epochs) * settings.get("times", 1)
    schedule = cosine(optimizer, epochs) if settings.get("schedule") == "cosine" else None

    def loss(x: Tensor, y: Tensor) -> Tensor:
        if method is None:
            return loss_fn(model(x), y)
        out = dip.trajectories(model, x, m=M)
        return dip.objective(out, y, loss_fn, model, kl=method.get("kl"))

    return fit(model, data, task.batch, epochs, seed, optimizer, loss, schedule)


def fit(
    model: nn.Module,
    data: Split,
    batch: int,
    epochs: int,
    seed: int,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Tensor, Tensor], Tensor],
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> nn.Module:
    """Minimise loss(x, y) over batches whose order is the seed's; the schedule steps by epochs."""
    order = torch.Generator().manual_seed(1000 + seed)
    torch.manual_seed(1000 + seed)
    for _ in range(epochs):
        model.train()
        for chosen in torch.randperm(len(data.x), generator=order).split(batch):
            value = loss(data.x[chosen], data.y[chosen])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        if schedule is not None:
            schedule.step()
    return model.eval().requires_grad_(False)


# ---- scores --------------------------------------------------------------------------------------


def score(task: Task, data: Split, model: nn.Module, x: Tensor) -> float:
    """Accuracy in %, or for a regression 100 times the share of variance explained."""
    with torch.no_grad():
        out = model(x)
    if task.regression:
        spread = (data.y_test - data.y.mean()).square().mean()
        return 100 * (1 - (out - data.y_test).square().mean() / spread).item()
    return 100 * (out.argmax(-1) == data.y_test).float().mean().item()


def pgd(task: Task, data: Split, model: nn.Module, seed: int, steps: int = 10) -> Tensor:
    """L-infinity of radius task.eps on the test inputs, from a random start."""
    x, y, eps, loss_fn = data.x_test, data.y_test, task.eps, loss_of(task)
    start = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed))
    start = x + eps * (2 * start - 1)
    return attacked(lambda z: loss_fn(model(z), y), x, eps, start, steps, eps / 4, task.image)


def evaluate(task: Task, data: Split, model: nn.Module, seed: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    noisy = [
        data.x_test + task.noise * torch.randn(data.x_test.shape, generator=generator)
        for _ in range(3)
    ]
    with torch.no_grad():
        nll = loss_of(task)(model(data.x_test), data.y_test).item()
    return {
        "clean": score(task, data, model, data.x_test),
        "pgd": score(task, data, model, pgd(task, data, model, seed)),
        "noise": sum(score(task, data, model, x) for x in noisy) / len(noisy),
        "nll": nll,
    }


def kept(model: nn.Module) -> list[float]:
    """Of each layer sigma over the prior's, geometric mean over features."""
    layers = [layer.variance for layer in dip_layers(model).values()]
    return [((v.log_variance - v.log_prior).mean() / 2).exp().item() for v in layers]


def keys(
    cases: Iterable[tuple[str, str, str]],
    seeds: int,
    methods: dict[str, dict[str, Any] | None],
    settings: dict[str, dict[str, Any]],
) -> list[dict[str, Any]]:
    """The parts of every (task, training, method), seed by seed."""
    return [
        {"task": task, "training": training, "method": method, "seed": seed}
        | {"options": methods[method], "settings": settings[training]}
        for seed in range(seeds)
        for task, training, method in cases
    ]


def scored(task: Task, key: dict[str, Any]) -> dict[str, Any]:
    """A part of a study: the scores of the key's method, settings and seed, and the noise kept."""
    data, seed = split(task, key["seed"]), key["seed"]
    model = train(task, data, seed, key["options"], key["settings"])
    return evaluate(task, data, model, seed) | {"kept": kept(model)}
