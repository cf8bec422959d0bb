"""The methods that studies/vision.py compares: how each builds its model and takes a training
step."""

from __future__ import annotations

import time
from collections.abc import Callable

import results_page
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vision_setup import NETWORKS, fgsm, layers_to_noise, noise

import dipkernels as dip

LEARNING_RATES = {"MLP": (1e-3, 3e-3), "ResNet": (3e-3, 1e-2), "ViT": (3e-3, 1e-2)}


def search(arch: str) -> dict[str, list[dict]]:
    """The same small search for every method: four settings, compared on validation images.

    Plain training searches the learning rate and weight decay that all the others then take.
    """
    return {
        "plain": [
            {"lr": lr, "weight_decay": decay}
            for lr in LEARNING_RATES[arch]
            for decay in (0.01, 0.3)
        ],
        "input noise": [{"sigma": sigma} for sigma in (0.1, 0.2, 0.4, 0.8)],
        "fixed variance": [{"sigma": sigma} for sigma in (0.15, 0.3, 0.5, 0.8)],
        "GaussianDropout": [{"rate": rate} for rate in (0.05, 0.15, 0.3, 0.6)],
        "SAM": [{"rho": rho} for rho in (0.05, 0.2, 0.5, 1.0)],
        "DIP": [
            {"sigma": sigma, "alpha": alpha}
            for sigma, alpha in ((0.3, 0.0), (0.3, 0.1), (0.5, 0.1), (0.8, 0.1))
        ],
    }


METHODS = (
    "plain",
    "plain, equal time",
    "input noise",
    "fixed variance",
    "GaussianDropout",
    "SAM",
    "DIP",
)
# these take m trajectories per example
SEVERAL = (
    "input noise",
    "fixed variance",
    "GaussianDropout",
    "DIP",
)
TRAININGS = ("clean", "Gaussian", "FGSM")
TRAIN_NOISE, TRAIN_EPS = 0.2, 0.1  # of training under Gaussian noise and under FGSM


class GaussianDropout:
    """u = x * (1 + sqrt(rate / (1 - rate)) z) on the input of the named layers, in training mode;
    until removed."""

    def __init__(self, model: nn.Module, names: list[str], rate: float) -> None:
        self.scale = (rate / (1 - rate)) ** 0.5
        self.handles = [model.get_submodule(name).register_forward_pre_hook(self) for name in names]

    def __call__(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        x = args[0]
        return (
            (torch.addcmul(x, x, torch.randn_like(x), value=self.scale),)
            if module.training
            else None
        )

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def build(config: dict) -> tuple[nn.Module, GaussianDropout | None]:
    """The network with the same initial weights for every method, and the hooks of
    GaussianDropout."""
    torch.manual_seed(config["seed"])
    model, method, hooks = NETWORKS[config["arch"]](), config["method"], None
    names = layers_to_noise(model, config.get("placement", "every layer"))
    if method in ("fixed variance", "DIP"):
        dip.convert(
            model, init_variance=config["sigma"] ** 2, filter=lambda module, name: name in names
        )
        for module in model.modules():
            if isinstance(module, dip.Variance):
                module.requires_grad_(method == "DIP")
    elif method == "input noise":
        model = nn.Sequential(dip.DIPInput(1, dim=1, init_variance=config["sigma"] ** 2), model)
        model[0].requires_grad_(False)
    elif method == "GaussianDropout":
        hooks = GaussianDropout(model, names, config["rate"])
    return model, hooks


def perturbed(model: nn.Module, x: Tensor, y: Tensor, training: str) -> Tensor:
    """The training images as this kind of training shows them; FGSM attacks the deterministic
    forward."""
    if training == "Gaussian":
        return noise(x, TRAIN_NOISE)
    if training == "FGSM":
        model.eval()
        x = fgsm(model, x, y, TRAIN_EPS)
        model.train()
    return x


def loss_of(model: nn.Module, x: Tensor, y: Tensor, config: dict) -> Tensor:
    # a function: baselines have no DIP layers
    out = dip.trajectories(model.__call__, x, m=config["m"])
    if config["method"] != "DIP":
        return dip.objective(out, y, F.cross_entropy)
    alpha, spread = config["alpha"], config["sigma"] ** 2 * config.get("beta_factor", 1.0)
    terms = {"alpha": alpha, "beta": alpha * spread, "lambda_s": config.get("lambda_s", 0.0)}
    return dip.objective(out, y, F.cross_entropy, model, kl=0.0, **terms)


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, config: dict
) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss_of(model, x, y, config).backward()
    if config["method"] == "SAM":
        ascend_and_return(model, config["rho"], lambda: loss_of(model, x, y, config))
    optimizer.step()


def ascend_and_return(model: nn.Module, rho: float, loss: Callable[[], Tensor]) -> None:
    """SAM: leave the gradient at w + rho g / |g| in .grad, with the weights back at w."""
    params = [p for p in model.parameters() if p.grad is not None]
    norm = torch.stack([p.grad.norm() for p in params]).norm()
    moves = [p.grad * (rho / (norm + 1e-12)) for p in params]
    with torch.no_grad():
        torch._foreach_add_(params, moves)
    model.zero_grad(set_to_none=True)
    loss().backward()
    with torch.no_grad():
        torch._foreach_sub_(params, moves)


def make_optimizer(model: nn.Module, config: dict) -> torch.optim.Optimizer:
    variance_lr = config.get("variance_lr")
    rates = {"weight_decay": config["weight_decay"], "variance_lr": variance_lr}
    groups = dip.param_groups(model, config["lr"], **rates)
    return torch.optim.AdamW(groups, fused=True)


def train(config: dict, x: Tensor, y: Tensor) -> tuple[nn.Module, float]:
    """The trained model in eval mode, and the processor seconds that its training took. Cosine
    decay to zero."""
    model, hooks = build(config)
    optimizer = make_optimizer(model, config)
    batches = -(-len(x) // config["batch"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config["epochs"] * batches)
    torch.manual_seed(1000 + config["seed"])
    start = time.process_time()
    model.train()
    for _ in range(config["epochs"]):
        for idx in torch.randperm(len(x)).split(config["batch"]):
            step(
                model,
                optimizer,
                perturbed(model, x[idx], y[idx], config["training"]),
                y[idx],
                config,
            )
            schedule.step()
    seconds = time.process_time() - start
    if hooks:
        hooks.remove()
    settle_batch_norm(model, x, y, config["training"])
    return model.eval(), seconds


def settle_batch_norm(model: nn.Module, x: Tensor, y: Tensor, training: str) -> None:
    """Take BatchNorm's statistics anew without the layers' noise, as prediction sees the
    activations."""
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        shown = [
            perturbed(model, x[idx], y[idx], training) for idx in torch.arange(len(x)).split(100)
        ]
        with dip.noise_off():
            torch.optim.swa_utils.update_bn(shown, model)


def time_ratio(arch: str, m: int, batch: int, rounds: int) -> float:
    """Processor time of a DIP step with m trajectories over that of a plain step."""
    shared = {"arch": arch, "seed": 0, "lr": 1e-3, "weight_decay": 0.01}
    configs = [
        shared | {"method": "plain", "m": 1},
        shared | {"method": "DIP", "m": m, "sigma": 0.3, "alpha": 0.1},
    ]
    x, y = torch.rand(batch, 1, 8, 8), torch.randint(10, (batch,))

    def stepper(config: dict) -> Callable[[], None]:
        model, _ = build(config)
        optimizer = make_optimizer(model, config)
        return lambda: step(model, optimizer, x, y, config)

    return results_page.time_ratio(*map(stepper, configs), rounds)
