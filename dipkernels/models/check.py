"""Whether every layer that was converted draws noise and learns: `check`, for a training loop's
first step."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.layer import DIPLayer, weight_of
from ..nn.numbering import dip_layers, named_layers, need_layers
from ..nn.sharing import orphans
from ..nn.variance import require_finite_values
from ..nn.wrappers import plain_names, unwrapped
from ..noise import contexts
from ..ops.dtensor import full
from .convertible import put_away
from .marks import CONVERTED, PLAN, SEEN, left_by_producers
from .patterns import around as around_name
from .probe import around, eager, leaves, run_batch, untouched

_NO_PRODUCER = (
    "what noised its input has left the model or draws no more, so it has no noise: convert again"
)
_ORPHAN = (
    "it shares the variance of a layer that has left the model, so no state dict and no optimiser "
    "has it: call dip.number_layers(model), which gives it back"
)


@dataclasses.dataclass
class Report:
    """What `check` found; prints as a list.

    Attributes:
        faults: {name: reason} of the layers that draw no noise, or whose variance gets no gradient.
        frozen: The names of the layers whose variance requires no gradient: fixed on purpose, or by
            a tool that freezes every parameter it does not know.
        checked: The number of DIP layers looked at.
    """

    faults: dict[str, str] = dataclasses.field(default_factory=dict)
    frozen: list[str] = dataclasses.field(default_factory=list)
    checked: int = 0

    def __bool__(self) -> bool:
        """Whether there is no fault."""
        return not self.faults

    def __str__(self) -> str:
        lines = [
            f"check: {len(self.faults)} of {self.checked} DIP layer(s) at fault"
            + ":" * bool(self.faults)
        ]
        lines += [
            f"  {name or 'the model itself'}: {reason}" for name, reason in self.faults.items()
        ]
        if self.frozen:
            lines.append(
                f"  {len(self.frozen)} variance(s) require no gradient and stay as they are: "
                f"{self.frozen}"
            )
        return "\n".join(lines)


def check(model: nn.Module, batch: Any = None, *, strict: bool = True) -> Report:
    """Name every converted layer that draws no noise, or whose variance does not learn, and the
    likely reason.

    There are two ways to call it. `check(model)`, after the first backward pass and before
    zero_grad, looks at the gradients. `check(model, batch)` runs a training step of its own on the
    batch and sees which layers are called. Both find layers that were replaced after `convert`
    (quantisation-aware training, a new head), layers that are called only in eval mode, and weights
    that are read without calling their layer (fused losses). A KL term in the loss gives every
    variance a gradient. Then only `check(model, batch)` finds such reads of frozen weights, and of
    weights with very small gradients (an attention's queries and keys at its start).

    Args:
        model: A model with DIP layers, wrapped or not. For `check(model, batch)` it must not be
            sharded by FSDP.
        batch: A tensor; a mapping, passed as keywords; or a list or tuple, passed as positional
            arguments if the model takes so many, otherwise only its first element. It needs labels
            if the model computes its own loss. The step changes no gradient, buffer or random
            state, and no parameter but those that forward itself writes (MoCo's key encoder).
        strict: Raise if there is a fault. Otherwise return the report.

    Returns:
        A `Report`, which prints, and is true if there is no fault.

    Raises:
        ValueError: There is a fault and strict is true (the report is the message), a variance is
            not finite, the model has no DIP layers and never had, or no gradients to look at.
        RuntimeError: A batch is given for a model that FSDP has sharded.

    Examples:
        >>> plain, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(8, 4)
        >>> model = dip.convert(plain)
        >>> model(x).sum().backward()
        >>> print(dip.check(model))
        check: 0 of 2 DIP layer(s) at fault
    """
    layers = named_layers(model)
    replaced = _replaced(model)
    if not replaced:
        need_layers(model)
    require_finite(layers)
    frozen = [name for name, layer in layers.items() if not _learned(layer)]
    report = Report(dict(replaced), frozen, len(layers) + len(replaced))
    if layers:
        faults = _by_gradients(model, layers) if batch is None else _by_a_step(model, layers, batch)
        report.faults |= faults | dict.fromkeys(orphans(layers), _ORPHAN)
    if strict and not report:
        raise ValueError(str(report))
    return report


def require_finite(layers: Mapping[str, DIPLayer]) -> None:
    """Raise ValueError naming the layers whose variance or its logarithm is NaN or infinite; those
    are passed over whose values are not at hand. A collective where it is sharded."""
    found = {
        name or "(root)": full(values.detach())
        for name, layer in layers.items()
        if not layer.variance.lack(values := layer.log_variance)
    }
    require_finite_values("model", found)


def _learned(layer: DIPLayer) -> list[nn.Parameter]:
    """The parameters of its variance, unless they are frozen."""
    return [p for p in layer.variance.parameters() if p.requires_grad]


# ---- replaced after conversion -------------------------------------------------------------------

_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _replaced(model: nn.Module) -> dict[str, str]:
    """The layers that were DIP layers once and are none now.

    Not those that have other names since then (an insertion into a Sequential), nor what was taken
    out of a list of modules, or replaced by what has no weights (nn.Identity): nothing runs there
    without noise. But the readers of a producer that was replaced or taken out do.
    """
    found = {}
    left = dict.fromkeys(left_by_producers(model), _NO_PRODUCER)
    modules = plain_names(model, remove_duplicate=False)
    for prefix, root in plain_names(model).items():
        names = vars(root).get(CONVERTED, ())
        full_names = {f"{prefix}.{name}".strip("."): name for name in names}
        lost = [name for name in full_names if not isinstance(modules.get(name), DIPLayer)]
        if not lost:
            continue
        # a parent remembers its own children alone, the model every layer
        depth = max(name.count(".") for name in names)
        renamed = sum(name.count(".") <= depth for name in named_layers(root)) >= len(names)
        plan = vars(root).get(PLAN)
        readers = {} if plan is None else {row.producer: row.layers for row in plan.moved}
        for full_name in lost:
            name, module = full_names[full_name], modules.get(full_name)
            if module is None:
                if not (renamed or _taken_out(modules, full_name)):
                    found[full_name] = "is gone since it was converted"
                continue
            if SEEN in vars(module):  # which has this name since a list lost another
                continue
            kind = f"{type(module).__module__}.{type(module).__name__}"
            if any(isinstance(inner, DIPLayer) for inner in module.modules()):
                called = (kept := put_away(module)) is not None and not dip_layers(kept)
                if not (called or isinstance(module, _LISTS)):
                    found[full_name] = (
                        f"was put inside a {kind} since it was converted: convert again"
                    )
            elif not (renamed or (name not in readers and not module.state_dict())):
                found[full_name] = (
                    f"was replaced since it was converted, by a {kind} without noise: convert again"
                )
                for reader in readers.get(name, ()):
                    left.pop(f"{prefix}.{reader}".strip("."), None)
    return found | left


def _taken_out(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Whether the innermost module of this name that is still there is a list of modules."""
    last = [outer for outer in around_name(name) if outer in modules][-1]
    return isinstance(modules[last], _LISTS)


# ---- by the gradients that are there -------------------------------------------------------------

_CANCELS = (
    ", or the loss reads derivatives of its output alone (forces, a gradient penalty), in which "
    "the noise of a last layer cancels, and with relu that of every layer"
)


def _by_gradients(model: nn.Module, layers: dict[str, DIPLayer]) -> dict[str, str]:
    if all(p.grad is None for p in model.parameters()):
        raise ValueError(
            "model: expected gradients to look at, got none: call check(model) after backward() "
            "and before zero_grad(), or, where a tool keeps them to itself (DeepSpeed's ZeRO), "
            "check(model, batch)"
        )
    for layer in layers.values():
        if not layer.log_variance.is_meta:  # as of what accelerate has offloaded
            layer.variance.require_values(layer.log_variance)
    faults = {}
    for name, layer in layers.items():
        slopes = [p.grad for p in _learned(layer)]
        if not slopes:
            continue
        weight = weight_of(layer)
        slope = weight.grad if isinstance(weight, Tensor) and weight.is_leaf else None
        if all(each is None for each in slopes):
            faults[name] = "its variance got no gradient: " + _why_none(layer, slope is not None)
        elif not _learns_from_the_loss(layer, slope):
            called = not isinstance(weight, Tensor) or slope is not None
            if _nonzero(slope) and _nonzero(weight):
                faults[name] = (
                    "its variance got a gradient of zeros, or the KL term's alone, and its weight "
                    "got the loss's: it ran without noise (noise_off, or an eval mode inside the "
                    "step), or its weight is read without calling the layer (a fused "
                    f"loss){_CANCELS}"
                )
            elif not called and weight.requires_grad and weight.is_leaf:
                faults[name] = "its variance got no gradient of the loss: " + _why_none(
                    layer, False
                )
    return faults


def _learns_from_the_loss(layer: DIPLayer, slope: Tensor | None) -> bool:
    """Whether its variance's gradient is more than zeros, and more than the KL term's, which every
    variance gets: pull * (lambda / gamma - 1), times one number for all its features. True where
    rounding would hide the difference.

    slope: the gradient of its weight.
    """
    own = layer.variance
    if not isinstance(own._parameters.get("log_variance"), Tensor):  # a parametrisation's
        return any(_nonzero(p.grad) for p in own.parameters())
    if own.log_variance.grad is None or not _nonzero(own.log_variance.grad):
        return False
    grad, value, prior, pull = (
        full(t.detach()).double()
        for t in (own.log_variance.grad, own.log_variance, own.log_prior, own.pull)
    )
    ratio = value - prior
    kl = pull * ratio.expm1()
    if grad.numel() < 2 or not kl.any():
        return True
    scale = (grad @ kl) / (kl @ kl)
    # of float32, in which exp(ratio) - 1 is a difference; 3e-7 was the most that was seen
    rounding = 5e-7 * scale.abs() * pull * (ratio.exp() + 1)
    if ((grad - scale * kl).abs() > rounding).any() or (grad.abs() <= rounding).all():
        return True
    # The loss's part is often a twentieth of weight times slope, and much less beside little
    # noise. An attention's is very small at its start.
    weight = weight_of(layer)
    if slope is None or not _nonzero(slope) or not _nonzero(weight):
        return False
    size = full(slope.detach()).abs().max() * full(weight.detach()).abs().max()
    return bool(size <= 1000 * rounding.max())


def _why_none(layer: DIPLayer, learns: bool) -> str:
    if not layer.training:
        return "the layer is in eval mode, where it draws nothing"
    if learns:
        return (
            "its weight got one, so the weight is read without calling the layer (a fused loss, a "
            f"functional form), or it was called in eval mode only{_CANCELS}"
        )
    return (
        "it was not called in training (an expert without examples, LayerDrop), or what it "
        f"returned does not reach the loss{_CANCELS}"
    )


def _nonzero(values: Tensor | None) -> bool:
    return values is not None and bool(full(values.detach()).any())


# ---- by a training step on a batch ---------------------------------------------------------------


def _by_a_step(model: nn.Module, layers: dict[str, DIPLayer], batch: Any) -> dict[str, str]:
    kinds = {c.__name__ for m in model.modules() for c in type(m).__mro__}
    if kinds & {"FSDPModule", "FullyShardedDataParallel"}:
        raise RuntimeError(
            "model: expected one that FSDP has not sharded; check(model, batch) before sharding "
            "it, or check(model) after a backward pass"
        )
    called: dict[DIPLayer, list[bool]] = {layer: [] for layer in layers.values()}

    def observe(layer: Any, args: Any, kwargs: Any) -> None:
        called[layer].append(layer.noisy())

    with contextlib.ExitStack() as watched, untouched(model), eager(), torch.enable_grad():
        for layer in layers.values():
            watched.enter_context(around(layer, observe))
        if not model.training:
            model.train()
        # a wrapper would wait for a backward pass
        reached = _reached(_call(unwrapped(model), batch))
    faults = {}
    for name, layer in layers.items():
        learned = _learned(layer)
        if not called[layer]:
            faults[name] = (
                "it was not called: its weight is read past it, or eval mode alone calls it, or "
                "nothing does (an expert that this batch does not reach, LayerDrop)"
            )
        elif not any(called[layer]):
            why = "inside noise_off" if contexts.MODE == "off" else "in eval mode"
            faults[name] = f"it was called and drew nothing: it is {why}"
        elif any(p.is_meta for p in learned):
            faults[name] = (
                "it drew noise, and accelerate has offloaded it: what is offloaded gets no "
                "gradient, so neither its weight nor its variance learns"
            )
        elif reached is not None and learned and not any(id(p) in reached for p in learned):
            faults[name] = (
                "it drew noise, and what it returned does not reach the model's loss or outputs"
                + _CANCELS
            )
    return faults


def _call(model: nn.Module, batch: Any) -> Any:
    """The model on the batch; all of a list or tuple where it takes so many, else the first."""
    if isinstance(batch, (list, tuple)) and batch:
        try:
            inspect.signature(model.forward).bind(*batch)
        except TypeError:
            return run_batch(model, batch)
        return model(*batch)
    return run_batch(model, batch)


def _opened(leaf: object) -> bool:
    """Whether an object's contents may reach a loss: the mean in a policy's distribution."""
    return not isinstance(leaf, (Tensor, nn.Module, ModuleType))


def _reached(out: Any) -> set[int] | None:
    """The ids of the parameters that the loss, or where there is none any output, depends on; None
    where a reentrant checkpoint hides them, whose inside is in no graph yet."""
    loss = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
    ends = [loss] if isinstance(loss, Tensor) else leaves(out, _opened)
    nodes: list[Any] = [t.grad_fn for t in ends if isinstance(t, Tensor)]
    seen: set[Any] = set()
    found: set[int] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "CheckpointFunction" in node.name():
            return None
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        nodes += [before for before, _ in node.next_functions]
    return found
