"""What DIP layers are compared with, as modules, and the checks that come before any time.

linear               nn.Linear, or the network as it is: the limit
dip                  DIPLinear, or the network after dip.convert
eager                Layer(x + sigma * torch.randn_like(x)), written out
eager, compiled      torch.compile of that
dropout              nn.Dropout and then the layer: what people pay today
reparameterization   bayesian-torch: Gaussian weights, one draw per pass. Another model
flipout              bayesian-torch: Gaussian weights, decorrelated by signs. Another model
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dipkernels as dip
from dipkernels import reference
from dipkernels.ops.draw import Draw

VARIANCE = 0.01
SIGMA = VARIANCE**0.5
DROPOUT = 0.1
KEY = 20250604
PLAIN = "linear"
NAMES = ("linear", "dip", "eager", "eager, compiled", "dropout", "reparameterization", "flipout")
COMPILED = ("linear, compiled", "dip, compiled")  # beside NAMES, where a whole block is compiled
INSTALL_BAYESIAN = "pip install --no-deps bayesian-torch==0.5.0"

compile_backend = "inductor"  # quick runs set "eager": does it trace?


@dataclass(frozen=True)
class Missing:
    """A peer that cannot run here, and why: it is listed, not dropped."""

    name: str
    reason: str


# ---- layers --------------------------------------------------------------------------------------


def inputs_of(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[nn.Linear, Tensor, Tensor]:
    """Of a shape M x K x N: nn.Linear, a batch for it, and a gradient of its output."""
    m, k, n = shape
    torch.manual_seed(0)
    plain = nn.Linear(k, n, device=device, dtype=dtype)
    x = torch.randn(m, k, device=device, dtype=dtype, requires_grad=True)
    return plain, x, torch.randn(m, n, device=device, dtype=dtype)


class EagerNoise(nn.Module):
    """The expression that a DIP layer replaces: layer(x + sigma * randn), sigma learned per
    feature."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        features = layer.weight.shape[1]
        self.shape = (features,) if isinstance(layer, nn.Linear) else (features, 1, 1)
        self.log_variance = nn.Parameter(
            torch.full((features,), VARIANCE, device=layer.weight.device).log()
        )

    def forward(self, x: Tensor) -> Tensor:
        sigma = torch.exp(self.log_variance / 2).to(x.dtype).view(self.shape)
        return self.layer(x + sigma * torch.randn_like(x))


class _StoredGradient(torch.autograd.Function):
    """u = x copied; the gradient of sigma is a stored tensor: all of a noise layer but its
    arithmetic."""

    @staticmethod
    def forward(ctx, x, log_variance, seed, stored):
        ctx.save_for_backward(log_variance, seed)
        ctx.stored = stored
        return x.clone()

    @staticmethod
    def backward(ctx, du):
        _ = ctx.saved_tensors
        return du, ctx.stored, None, None


class Floor(nn.Linear):
    """nn.Linear behind a Python autograd.Function that computes nothing: what any such layer costs
    in eager mode."""

    def __init__(self, linear: nn.Linear) -> None:
        where = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        super().__init__(linear.in_features, linear.out_features, **where)
        self.load_state_dict(linear.state_dict())
        self.log_variance = nn.Parameter(
            torch.zeros(linear.in_features, device=linear.weight.device)
        )
        self.register_buffer("stored", torch.zeros_like(self.log_variance), persistent=False)
        self.register_buffer(
            "seed", torch.zeros(2, dtype=torch.int64, device=linear.weight.device), persistent=False
        )

    def forward(self, x: Tensor) -> Tensor:
        u = _StoredGradient.apply(x, self.log_variance, self.seed, self.stored)
        return F.linear(u, self.weight, self.bias)


# ---- whole models --------------------------------------------------------------------------------


def _replace(model: nn.Module, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """make(layer) in place of every nn.Linear and nn.Conv2d."""
    if type(model) in (nn.Linear, nn.Conv2d):
        return make(model)
    for name, child in list(model.named_children()):
        setattr(model, name, _replace(child, make))
    return model


def _bayesian(model: nn.Module, kind: str) -> nn.Module:
    """bayesian-torch's own conversion. Its layers then skip the KL divergence: that time is left
    out."""
    from bayesian_torch.layers import LinearFlipout, LinearReparameterization
    from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn

    weight = next(model.parameters())
    settings = {
        "prior_mu": 0.0,
        "prior_sigma": 1.0,
        "posterior_mu_init": 0.0,
        "posterior_rho_init": -3.0,
    }
    if isinstance(model, nn.Linear):
        layer = {"flipout": LinearFlipout, "reparameterization": LinearReparameterization}[kind]
        model = layer(model.in_features, model.out_features, bias=model.bias is not None)
        model.dnn_to_bnn_flag = True
    else:
        type_name = {"flipout": "Flipout", "reparameterization": "Reparameterization"}[kind]
        dnn_to_bnn(model, settings | {"type": type_name, "moped_enable": False, "moped_delta": 0.5})
    return model.to(weight.device, weight.dtype)


def compiled_in_place(model: nn.Module) -> nn.Module:
    """torch.compile of every module that says `compile_unit` (a repeated block is compiled once),
    else of the whole."""
    import torch._dynamo

    # otherwise it runs in eager mode and says nothing
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    units = [module for module in model.modules() if getattr(module, "compile_unit", False)] or [
        model
    ]
    for unit in units:
        unit.compile(backend=compile_backend, dynamic=False, fullgraph=True)
    return model


def build(name: str, model: nn.Module) -> nn.Module | Missing:
    """The variant `name` of a layer or model, in training mode; the model itself is left as it is.

    Raises ValueError for a name outside NAMES and COMPILED.
    """
    kind, _, compiled = name.partition(", ")
    model = copy.deepcopy(model).train()
    if kind == "dip":
        model = dip.convert(model, init_variance=VARIANCE)
    elif kind == "eager":
        model = _replace(model, EagerNoise)
    elif kind == "dropout":
        model = _replace(model, lambda layer: nn.Sequential(nn.Dropout(DROPOUT), layer))
    elif kind == "floor":
        model = Floor(model)
    elif kind in ("reparameterization", "flipout"):
        try:
            model = _bayesian(model, kind)
        except ImportError as error:
            return Missing(name, f"bayesian-torch is not installed ({error}): {INSTALL_BAYESIAN}")
    elif kind != PLAIN:
        raise ValueError(f"name: expected one of {(*NAMES, *COMPILED)}, got {name!r}")
    return compiled_in_place(model) if compiled else model


def forget_compiled() -> None:
    """Between cases, so that no case runs into torch.compile's limit of recompilations."""
    import torch._dynamo

    torch._dynamo.reset()


# ---- checks: before a time is reported -----------------------------------------------------------


def distance(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def require(what: str, off: float, limit: float) -> None:
    if not off <= limit:
        raise AssertionError(
            f"{what}: expected within {limit:g} of the reference (relative norm), got {off:.2e}"
        )


def tolerance(dtype: torch.dtype) -> float:
    """Rounding only: a wrong draw would be off by about sigma / |x| = 0.1."""
    return {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 8e-3, torch.float16: 1e-3}[
        dtype
    ]


def check_dip_linear(layer: dip.DIPLinear, x: Tensor, dy: Tensor) -> None:
    """y, dx, dW, db and the variance's gradient against dipkernels.reference, noise included, on
    these very inputs."""
    seed = torch.tensor([KEY, layer.number], device=x.device)
    draw = Draw(factor=layer.num_samples**-0.5, log_variance=True)
    sigma = layer.log_variance.detach()
    leaves = [x, layer.weight, layer.bias, layer.log_variance]
    with dip.fixed_noise(KEY):
        y = layer(x)
        dx, dweight, dbias, dlog_variance = torch.autograd.grad(y, leaves, dy)
    u = reference.perturb(x.detach(), sigma, seed, *draw, None)
    du = dy @ layer.weight.detach()
    limit = tolerance(x.dtype)
    require("y", distance(y, F.linear(u, layer.weight, layer.bias)), limit)
    require("dx", distance(dx, du), limit)
    require("dweight", distance(dweight, dy.t() @ u), limit)
    require("dbias", distance(dbias, dy.sum(0)), limit)
    require(
        "dlog_variance",
        distance(dlog_variance, reference.perturb_bwd(du, sigma, seed, *draw)),
        limit,
    )


def check_perturb(x: Tensor, sigma: Tensor, seed: Tensor) -> None:
    """P and Q against dipkernels.reference."""
    u = dip.functional.perturb(x, sigma, seed)
    require(
        "perturb",
        distance(u, reference.perturb(x, sigma, seed, *Draw(), None)),
        tolerance(x.dtype),
    )
    du, scale = x.detach(), sigma.detach().clone().requires_grad_(True)
    (got,) = torch.autograd.grad(dip.functional.perturb(du, scale, seed), scale, du)
    want = reference.perturb_bwd(du, sigma, seed, *Draw())
    require("perturb backward", distance(got, want), tolerance(torch.float32))


def check_spread(module: nn.Module, plain: nn.Linear, x: Tensor) -> None:
    """An eager noise layer's draw cannot be repeated elsewhere; its spread around nn.Linear's
    output is known."""
    noise = (module(x) - plain(x)).detach().double()
    expected = SIGMA * plain.weight.detach().double().norm(dim=1).square().mean().sqrt()
    tolerated = 0.02 + 4 / noise.numel() ** 0.5 + (0.05 if x.dtype is torch.bfloat16 else 0)
    require(
        "spread of the noise", abs(float(noise.square().mean().sqrt() / expected) - 1), tolerated
    )


def check_converted(model: nn.Module, x: Tensor) -> None:
    """A converted model under one key: compiled kernels against the reference backend, output and
    every gradient."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run() -> list[Tensor]:
        with dip.fixed_noise(KEY):
            y = model(x)
            return [
                y,
                *torch.autograd.grad(y.float().square().mean(), parameters, allow_unused=True),
            ]

    got = run()
    with dip.backend("reference"):
        want = run()
    # Through many layers, some of them normalised, rounding grows: still far below what another
    # draw would give.
    limit = 5 * tolerance(x.dtype if x.is_floating_point() else parameters[0].dtype)
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        if b is not None and float(b.detach().norm()) != 0:  # what is no number is a difference
            what, allowed = (f"gradient {index - 1}", 10 * limit) if index else ("output", limit)
            require(what, distance(a, b), allowed)


def check_linear(name: str, module: nn.Module, plain: nn.Linear, x: Tensor, dy: Tensor) -> None:
    """What can be checked of the layer `name`; raises AssertionError."""
    if name == "dip":
        check_dip_linear(module, x, dy)
    elif name.startswith("eager"):
        check_spread(module, plain, x)
    else:
        y = module(x)
        if y.shape != dy.shape or not bool(y.isfinite().all()):
            raise AssertionError(
                f"{name}: expected finite values of shape {tuple(dy.shape)}, got {tuple(y.shape)}"
            )
