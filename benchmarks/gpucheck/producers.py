"""Noise in what makes a layer's input: the modules beside f alone and f then P, and training steps
of whole models with place="producer"."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import models
import networks
import peers
import timing
import torch
from networks import Network
from torch import Tensor, nn

import dipkernels as dip
from dipkernels.nn.activation import Activation, GatedActivation
from gpucheck.child import Check, Rows
from gpucheck.kernels import half, in_turns, per_call
from gpucheck.layers import prepare

# By name: f, and f with noise behind it, over K features.
MODULES: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module]]] = {
    "layer norm": (nn.LayerNorm, dip.DIPLayerNorm),
    "RMS norm": (nn.RMSNorm, dip.DIPRMSNorm),
    "gelu": (lambda k: Activation(k, "gelu", -1), lambda k: dip.DIPActivation(k, "gelu")),
    "gated silu": (GatedActivation, dip.DIPGatedActivation),
}


class ThenP(nn.Module):
    """f, then P: what a fused producer replaces."""

    def __init__(self, f: nn.Module, k: int) -> None:
        super().__init__()
        self.f, self.noise = f, dip.DIPInput(k)

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.noise(self.f(*tensors))


class ThenRandn(ThenP):
    """f, then the eager expression."""

    def forward(self, *tensors: Tensor) -> Tensor:
        y = self.f(*tensors)
        return y + torch.exp(self.noise.log_variance / 2).to(y.dtype) * torch.randn_like(y)


def check_fused(module: nn.Module, tensors: Sequence[Tensor], dy: Tensor) -> None:
    """u and every gradient under one key, of the kernels that run here and of the reference."""
    leaves = [*tensors, *module.parameters()]

    def run() -> list[Tensor]:
        with dip.fixed_noise(peers.KEY):
            u = module(*tensors)
        return [u, *torch.autograd.grad(u, leaves, dy)]

    got = run()
    with dip.backend("reference"):
        want = run()
    limit = 5 * peers.tolerance(dy.dtype)
    for name, a, b in zip(["u", *(f"gradient {i}" for i in range(len(leaves)))], got, want):
        off = float((a.double() - b.double()).norm() / b.double().norm())
        if not off <= limit:
            raise AssertionError(
                f"{type(module).__name__}: expected {name} within {limit:g} of the reference "
                f"(relative norm), got {off:.2e}"
            )


class Case:
    """One f in its forms, checked, and inputs that L2 does not hold."""

    def __init__(self, check: Check, form: str, m: int, k: int) -> None:
        prepare(check)
        plain, noised = MODULES[form]
        count = timing.sets_beyond_cache(2 * m * k, check.device, most=4)
        options = {"device": check.device, "dtype": half(check)}
        self.xs = [
            [
                torch.randn(m, k, **options, requires_grad=True)
                for _ in range(2 if form.startswith("gated") else 1)
            ]
            for _ in range(count)
        ]
        self.dy = torch.randn(m, k, **options)
        self.modules = {
            "f": plain(k),
            "fused": noised(k),
            "f, P": ThenP(plain(k), k),
            "f, x + sigma * randn": ThenRandn(plain(k), k),
        }
        for module in self.modules.values():
            module.to(check.device, half(check)).train()
        check_fused(self.modules["fused"], self.xs[0], self.dy)

    def call(self, name: str, what: str, device: torch.device) -> Callable[[], object]:
        """All sets in a row."""
        module = self.modules[name]

        def forward(tensors: Sequence[Tensor]) -> object:
            with torch.no_grad():
                return module(*tensors)

        def step(tensors: Sequence[Tensor]) -> object:
            leaves = [*tensors, *module.parameters()]
            return timing.backward_step(lambda: module(*tensors), self.dy, leaves)()

        return timing.captured(forward if what == "forward" else step, self.xs, device=device)


case = functools.lru_cache(maxsize=1)(Case)


def producer_row(check: Check, form: str, what: str, m: int, k: int) -> dict:
    """Over f then P; as CUDA graphs, so that launches cost little."""
    given = case(check, form, m, k)
    calls = {name: given.call(name, what, check.device) for name in given.modules}
    timed = in_turns(check, calls, "f, P", 0.3)
    return {
        "form": form,
        "what": what,
        "m": m,
        "k": k,
        "dtype": str(half(check)),
        "base": "f, P",
        "variants": per_call(timed, len(given.xs)),
    }


def producers(check: Check) -> Rows:
    shapes = [(9, 24)] if check.rehearsal else [(8192, 4096), (4096, 1024)]
    return [
        (f"{form} {what} {m}x{k}", functools.partial(producer_row, check, form, what, m, k))
        for (m, k), form, what in itertools.product(shapes, MODULES, ("forward", "step"))
    ]


# ---- whole models --------------------------------------------------------------------------------


def model_row(check: Check, network: Network, compiled: bool) -> dict:
    """Forward, loss, backward and AdamW over the plain model's; the noise at the layers and at the
    producers."""
    prepare(check)
    plain, x, target = models.inputs_of(network, half(check), check.device)
    names = ("linear", "dip", "dip, producer")
    built = {name: models.build(name, plain, x) for name in names}
    peers.check_converted(built["dip, producer"], x[:1])
    steps = {
        name: models.step_of(peers.compiled_in_place(model) if compiled else model, x, target)
        for name, model in built.items()
    }
    timed = in_turns(check, steps, "linear", 2.5, peaks=True)
    what = "step, compiled" if compiled else "step"
    return {"what": what, "model": str(network), "base": "linear", "variants": timed}


def whole_models(check: Check) -> Rows:
    """A block of a language model, compiled too, and a vision transformer, whose block the section
    block compiles."""
    networks_of = {n.name: n for n in networks.MODELS["quick" if check.rehearsal else "cuda"]}
    llama, vit = networks_of["Llama-block"], networks_of["ViT" if check.rehearsal else "ViT-Small"]
    return [
        (llama.name, functools.partial(model_row, check, llama, False)),
        (f"{llama.name}, compiled", functools.partial(model_row, check, llama, True)),
        (vit.name, functools.partial(model_row, check, vit, False)),
    ]
