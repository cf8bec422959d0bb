"""Which norm or activation a module computes, found on numbers."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.norm import DIPLayerNorm, DIPRMSNorm, NormProducer
from ..ops.activations import ACTIVATIONS
from ..worlds import is_dtensor
from .probe import untouched

_NORMS: dict[type[nn.Module], type[Any]] = {nn.LayerNorm: DIPLayerNorm, nn.RMSNorm: DIPRMSNorm}
_OVER_THE_LAST = "it is a norm over the last dimension, and its layers read it along another"
_EPS_NAMES = ("eps", "variance_epsilon", "epsilon", "norm_eps")


def may_produce(module: nn.Module) -> bool:
    """By the look of it: a norm, or a leaf without weights. What it computes is looked at where a
    layer reads it."""
    if isinstance(module, (torch.jit.ScriptModule, nn.Sequential)):  # its children make it
        return False
    if "Norm" in type(module).__name__ or isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return True
    return next(chain(module.parameters(), module.buffers(), module.children()), None) is None


def _takes_one_input(module: nn.Module) -> bool:
    return len(inspect.signature(type(module).forward).parameters) == 2


@torch.inference_mode(False)  # in which there are no slopes
@torch.no_grad()
def activation_kind(module: nn.Module) -> str | None:
    """Which of ACTIVATIONS the module computes, found on numbers; None for none of them."""
    if list(module.parameters()) or not _takes_one_input(module):
        return None
    numbers, known = _known_activations()
    x = torch.tensor(numbers, dtype=torch.float64, device="cpu").view(6, 11, 11)
    for training in (True, False):
        try:
            with untouched(module):
                y, slope = _with_slope(module.train(training), x)
        except Exception:  # whatever a class that takes other input raises
            return None
        if not isinstance(y, Tensor) or y.shape != x.shape:
            return None
        got = _values_and_slopes(x, y, slope)
        close = [
            kind
            for kind, want in known.items()
            if torch.allclose(got, got.new_tensor(want), rtol=1e-5, atol=1e-6)
        ]
        if len(close) != 1:
            return None
    return close[0]


@functools.cache
def _known_activations() -> tuple[list[float], dict[str, list[float]]]:
    """Numbers, and what each of ACTIVATIONS is there. Lists: a tensor would be of the first call's
    modes."""
    near = torch.linspace(-6, 6, 121, dtype=torch.float64, device="cpu")
    x = torch.cat([near, *(near * 10.0**power for power in (1, 2, 4, 8, 16))])  # where some clip
    return x.tolist(), {
        kind: _values_and_slopes(x, *_with_slope(act, x)).tolist()
        for kind, act in ACTIVATIONS.items()
    }


def _values_and_slopes(x: Tensor, y: Tensor, slope: Tensor) -> Tensor:
    return torch.cat([y.double().flatten(), slope[x != 0]])  # relu has no slope at 0


@torch.enable_grad()
def _with_slope(
    act: Callable[[Tensor], Any], x: Tensor, along: Tensor | float = 1.0
) -> tuple[Any, Tensor]:
    """act(x), and what autograd has for the slope of its sum with weights `along`: a class may have
    a backward of its own."""
    leaf = x.clone().requires_grad_()
    y = act(leaf.clone())
    (slope,) = torch.autograd.grad((y * along).sum(), leaf)
    return y.detach(), slope


def _eps_name(module: nn.Module) -> str | None:
    """Where a norm has its eps: an attribute, or that of a norm of torch's inside, whose weight it
    has itself."""
    within = [
        f"{name}.eps"
        for name, child in module.named_children()
        if type(child) in _NORMS and not has_hooks(child) and isinstance(child.eps, float)
    ]
    own = [name for name in _EPS_NAMES if isinstance(getattr(module, name, None), float)]
    return next(iter(own + within), None)


def has_hooks(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


@torch.no_grad()
def norm_form(module: Any, features: int, dim: int) -> tuple[type[Any], dict[str, Any]] | str:
    """What the DIP class of a norm over dimension `dim` is made of, or why there is none.

    What another package's class computes is found on numbers, with weights of their own. features:
    of what it makes, where it has no weights.
    """
    kind = type(module)
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and len(module.normalized_shape) != 1:
        return f"it is a norm over several dimensions, {tuple(module.normalized_shape)}"
    parameters = dict(module.named_parameters())
    if any(is_dtensor(p) for p in parameters.values()):
        return "its weights are DTensors: convert first, then parallelise"
    if kind in _NORMS:
        return _OVER_THE_LAST if dim != -1 else (_NORMS[kind], {})
    none = (
        f"{kind.__module__}.{kind.__name__} is not a LayerNorm, RMSNorm or activation that the "
        "kernels know"
    )
    weight_name = next(iter(parameters.keys() - {"bias"}), "weight")  # "gamma", "g"
    weight, eps_name = parameters.get(weight_name), _eps_name(module)
    if (
        not _takes_one_input(module)
        or (weight is not None and weight.ndim != 1)
        or parameters.keys() - {weight_name, "bias"}
        or list(module.buffers())
    ):
        return none
    k = features if weight is None else len(weight)
    facts: dict[str, Any] = {"weight_name": weight_name, "eps_name": eps_name}
    if eps_name is None:  # F.normalize's, under which it takes no length: 1e-12
        eps, small = 1e-24 / max(1, k), 1e-9  # of an input that feels any other eps
        facts |= {"eps_name": "length_eps", "length_eps": eps}
    else:
        eps = operator.attrgetter(eps_name)(module)
        small = eps**0.5
    # not the meta device, where weights wait for their values: these numbers take their place
    devices = [p.device for p in parameters.values() if not p.is_meta]
    device = devices[0] if devices else torch.device("cpu")
    numbers = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(k, generator=numbers, device="cpu").to(device) for name in parameters
    }
    # two of every dimension beside, which a norm over some of those too would feel
    shape = (3, *[2] * max(1, -1 - dim), k)
    scales = torch.tensor([1.0, small, 30.0], device="cpu").view(3, *[1] * (len(shape) - 1))
    x = (scales * (torch.randn(shape, generator=numbers, device="cpu") + 0.5)).to(device)
    x = x.movedim(-1, 1).contiguous().movedim(1, -1)  # in memory the features are not the last
    scales = scales.to(device)

    def its(x: Tensor) -> Any:
        y = torch.func.functional_call(module, tensors, (x.movedim(-1, dim),))
        return y.movedim(dim, -1)

    along = torch.randn(shape, generator=numbers, device="cpu").to(device)
    got = []
    try:
        for training in (True, False):
            with untouched(module):
                module.train(training)
                got.append(_with_slope(its, x, along))
    except Exception:
        got = []
    if k != features:  # one weight for all features, or those of a group
        got = []
    for form, offset in (("layer", 0.0), ("rms", 0.0), ("rms", 1.0), ("layer", 1.0)):
        scale = None if weight is None else tensors[weight_name].double() + offset
        plain = functools.partial(
            F.layer_norm if form == "layer" else F.rms_norm,
            normalized_shape=(k,),
            weight=scale,
            eps=eps,
        )
        want, slope = _with_slope(plain, x.double(), along)
        want = want + tensors.get("bias", torch.zeros(k, device=device))
        if got and all(
            y.shape == want.shape
            and torch.allclose(y.double(), want, rtol=1e-4, atol=1e-4)
            and torch.allclose(scales * own.double(), scales * slope, rtol=1e-3, atol=1e-3)
            for y, own in got
        ):
            like_input = all(y.stride() == x.stride() for y, _ in got)
            facts |= {"kind": form, "offset": offset, "like_input": like_input}
            return NormProducer, facts
    return none if dim == -1 or isinstance(norm_form(module, k, -1), str) else _OVER_THE_LAST
