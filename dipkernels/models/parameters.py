"""A model's variances: for an optimiser, and out of a model and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import real
from ..nn.inputs import undense
from ..nn.layer import DIPLayer
from ..nn.numbering import named_layers, need_layers
from ..nn.sharing import orphans
from ..nn.variance import TENSORS, Variance, require_finite_values
from ..nn.wrappers import plain_names, without_wrappers
from ..ops import dtensor
from .check import require_finite


def param_groups(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float | None = None,
    variance_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Three groups for an optimiser: weights, decayed; biases and norms; variances, with their own
    learning rate.

    Args:
        model: Any module.
        lr: Learning rate of weights, biases and norms, >= 0.
        weight_decay: For parameters of two dimensions or more, >= 0. None: the optimiser's own
            default (AdamW's is 0.01). The other two groups have none.
        variance_lr: Learning rate of every log_variance, 10 * lr by default: Adam at 1e-3 needs
            thousands of steps to move one by 2.

    Returns:
        A list of dicts, each with a "name". Each parameter that requires a gradient appears once.
        An empty group is left out.

    Raises:
        TypeError: Something other than a model or a number.
        ValueError: A bad value, a variance_lr without a DIP layer, a model without parameters, or
            with a variance of a layer that has left it.

    Examples:
        >>> model = dip.convert(nn.Sequential(nn.Linear(4, 2)))
        >>> groups = dip.param_groups(model, lr=1e-3, weight_decay=0.05)
        >>> [(group["name"], group["lr"], group["weight_decay"]) for group in groups]
        [('weights', 0.001, 0.05), ('biases', 0.001, 0.0), ('variances', 0.01, 0.0)]
        >>> optimizer = torch.optim.AdamW(groups)
    """
    lr = real("lr", lr, least=0)
    if weight_decay is not None:
        weight_decay = real("weight_decay", weight_decay, least=0)
    if variance_lr is not None:
        variance_lr = real("variance_lr", variance_lr, least=0)
    _require_owners({n: m for n, m in named_layers(model).items() if m.log_variance.requires_grad})
    variances = {id(p) for m in model.modules() if isinstance(m, Variance) for p in m.parameters()}
    # torchrl's losses keep parameters outside of their layers, and stack those of several networks
    copied = (p for name, p in model.named_parameters() if name.endswith("variance.log_variance"))
    variances.update(map(id, copied))
    if variance_lr is not None and not variances:
        raise ValueError("variance_lr: given for a model without DIP layers; convert it first")
    if variance_lr is None:
        variance_lr = 10 * lr
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    groups: list[dict[str, Any]] = [
        {"name": "weights", "params": [], "lr": lr, **decay},
        {"name": "biases", "params": [], "lr": lr, "weight_decay": 0.0},
        {"name": "variances", "params": [], "lr": variance_lr, "weight_decay": 0.0},
    ]
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = 2 if id(parameter) in variances else 0 if parameter.ndim >= 2 else 1
            groups[kind]["params"].append(parameter)
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("model: expected parameters that require gradients, found none")
    return groups


def variances(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every log_variance, its prior and its pull, by their names in the state dict.

    It holds what an adapter checkpoint leaves out.

    Args:
        model: Any module with DIP layers. If torch.compile, DDP or the like has wrapped it, the
            names are the plain model's. A variance that layers share appears once, under the first
            one's name.

    Returns:
        {name: float32 tensor [K] on the CPU}, for torch.save or safetensors.

    Raises:
        ValueError: There are no DIP layers, a variance is NaN or infinite, or it belongs to a layer
            that has left the model.

    Examples:
        >>> model = dip.convert(nn.Sequential(nn.Linear(4, 2)))
        >>> list(dip.variances(model))
        ['0.variance.log_variance', '0.variance.log_prior', '0.variance.pull']
    """
    layers = need_layers(model)
    require_finite(layers)
    _require_owners(layers)
    found = {}
    for name, (m, part) in variance_tensors(model).items():
        values = m.detached() if part == "log_variance" else dtensor.full(getattr(m, part))
        found[name] = values.cpu().clone()
    return found


def _require_owners(layers: Mapping[str, DIPLayer]) -> None:
    """Raise ValueError where the variance of a layer is a parameter of none of these."""
    if left := orphans(layers):
        raise ValueError(
            f"model: expected the variances of all its DIP layers, got {list(left)} that share one "
            "of a layer that has left the model; call dip.number_layers(model)"
        )


@torch.no_grad()
def load_variances(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set every log_variance, prior and pull to what `variances` gave; nothing is changed unless
    names and shapes all agree.

    Args:
        model: With the same DIP layers, wrapped (torch.compile, DDP) or not.
        state: {name: [K], finite}. If it lacks a prior or a pull, as a state of an older release
            does, the model keeps its own.

    Raises:
        TypeError: The state is no mapping, or holds what is no dense tensor.
        ValueError: A name is missing or unknown, a value has another shape, a variance is not
            finite, or a pull is negative.

    Examples:
        >>> old = dip.convert(nn.Sequential(nn.Linear(4, 2)), 0.04)
        >>> new = dip.convert(nn.Sequential(nn.Linear(4, 2)), 0.01)
        >>> dip.load_variances(new, dip.variances(old))
        >>> torch.equal(new[0].log_variance, old[0].log_variance)
        True
    """
    need_layers(model)
    own = variance_tensors(model)
    if not isinstance(state, Mapping):
        raise TypeError(
            f"state: expected a mapping, which variances gives, got {type(state).__name__}"
        )
    state = {without_wrappers(name, own): values for name, values in state.items()}
    missing = [n for n in own if n not in state and n.endswith(".log_variance")]
    unknown = [n for n in state if n not in own]
    if missing or unknown:
        raise ValueError(
            f"state: expected the variances of this model, got none for {missing} and unknown "
            f"{unknown}"
        )
    if others := {n: kind for n, values in state.items() if (kind := _no_values(values))}:
        raise TypeError(f"state: expected dense floating tensors with values, got {others}")
    shapes = {n: (tuple(values.shape), (own[n][0].num_features,)) for n, values in state.items()}
    other = {n: (given, expected) for n, (given, expected) in shapes.items() if given != expected}
    if other:
        raise ValueError(
            f"state: expected the shapes of this model's variances, got (given, expected) {other}"
        )
    require_finite_values("state", state)
    if away := [n for n, v in state.items() if n.endswith("pull") and bool((v < 0).any())]:
        raise ValueError(
            f"state: expected pulls >= 0, with which the KL term pulls to the prior, got negative "
            f"ones in {away}; change what ends in log_variance alone, and leave out the rest"
        )
    check_settable({n: m for n, (m, part) in own.items() if part == "log_variance"})
    for name, values in state.items():
        m, part = own[name]
        if part == "log_variance":
            set_named(name, m, values)
        else:
            buffer = getattr(m, part)
            buffer.copy_(dtensor.laid_out_as(values, buffer))


def _no_values(values: object) -> str | None:
    """What this is where it is no dense floating tensor with values; None where it is one."""
    if (kind := undense(values)) is not None or not isinstance(values, Tensor):
        return kind
    if values.is_meta:
        return "a tensor on the meta device"
    return None if values.is_floating_point() else str(values.dtype)


def variance_tensors(model: nn.Module) -> dict[str, tuple[Variance, str]]:
    """What every Variance keeps, by its name in the state dict of the plain model: whose it is, and
    which."""
    return {
        f"{name}.{part}": (m, part)
        for name, m in plain_names(model).items()
        if isinstance(m, Variance)
        for part in TENSORS
    }


def check_settable(variances: Mapping[str, Variance]) -> None:
    """Raise ValueError naming the variances that cannot be set, and why."""
    reasons = {
        name: reason for name, m in variances.items() if (reason := m.cannot_set()) is not None
    }
    if reasons:
        listed = "; ".join(f"{name} is {reason}" for name, reason in reasons.items())
        raise ValueError(f"model: expected variances that can be set, got {listed}")


def set_named(name: str, variance: Variance, values: Tensor) -> None:
    try:
        variance.set_log_variance(values)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: {error}") from error
