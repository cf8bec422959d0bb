"""Whole models: to DIP layers and back, their variances, parameter groups, calibration.  docs/maths.md, section 1."""

from __future__ import annotations

import contextlib
import fnmatch
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import seeds, tensor_parallel
from .attention import DIPMultiheadAttention, DIPOutProjection
from .layers import (
    MAX_LAYERS,
    DIPConv1d,
    DIPConv2d,
    DIPConv3d,
    DIPInput,
    DIPLayer,
    DIPLinear,
    Variance,
    check_init_variance,
    dip_layers,
    number_layers,
    share_noise,
    twin_type,
)

_TWINS: dict[type[nn.Module], type[Any]] = {  # DIPLayers, and DIPMultiheadAttention
    twin.plain_type: twin for twin in (DIPLinear, DIPConv1d, DIPConv2d, DIPConv3d, DIPMultiheadAttention)
}
_OUT_PROJECTION = DIPOutProjection.plain_type
# PEFT's LoRA classes whose forward takes one input first, and what they stand for; the rest is named in a warning.
_LORA = {
    "Linear": nn.Linear,
    "Linear4bit": nn.Linear,
    "Linear8bitLt": nn.Linear,
    "Conv1d": nn.Conv1d,
    "Conv2d": nn.Conv2d,
    "Conv3d": nn.Conv3d,
}


# Where quantised layers and weights are defined: parts of the names of their Python modules.
_QUANTISED = ("quantiz", "quanto", ".qat", "bitsandbytes", "torchao", "awq", "gptq", "hqq", "eetq", "finegrained_fp8")


class DIPConversionWarning(UserWarning):
    """Names the modules that `convert` cannot give noise to, and why."""


# ---- convert -------------------------------------------------------------------------------------------------------


def convert(
    model: nn.Module,
    init_variance: float = 0.01,
    *,
    types: Sequence[type[nn.Module]] = tuple(_TWINS),
    filter: Callable[[nn.Module, str], bool] | None = None,
    exclude: Sequence[str] = (),
    share: Sequence[Sequence[str]] = (),
    num_samples: int = 1,
    keep: str = "auto",
) -> nn.Module:
    """Turn every linear, convolution and attention layer into its DIP twin, y = Layer(x + sigma * z), in place.

    model: any module, itself a layer or not. Its modules keep their identity, hooks and Parameter objects, and shared
    ones stay shared: a layer's class changes, and it gains a child `variance`, float32, on its weight's device.
    init_variance: sigma^2 to start from, > 0. types: some of nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.MultiheadAttention; only modules of exactly these types. transformers' Conv1D counts as nn.Linear, and so does
    PEFT's LoRA layer of one, noised at the input of the whole, so that base layer and adapter read the same u.
    filter: called as filter(module, name), true for a layer to convert. exclude: name patterns (fnmatch: "head",
    "*.down_proj", "blocks.0*"); a layer is left out when its name or that of a module around it matches. An attention's
    out_proj is a layer of its own in both; it is converted only with its attention.
    share: groups of name patterns, such as [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]: layers of one
    parent that match (by their own name or the full one) share one variance, one draw and one u while they are handed
    the same tensor; a layer handed another one draws for itself.
    num_samples, keep: as DIPLinear's; keep applies to linear layers.
    Returns the model, its DIP layers numbered 0, 1, ... An optimiser made before conversion does not know the
    variances: make it afterwards, from `param_groups`, or give it that list's group "variances" by add_param_group.
    Converting again adds what is not a DIP layer yet. On PEFT over a converted model it moves each variance to the LoRA
    layer around it.
    Warns (DIPConversionWarning) once, naming every module that it cannot honour: subclasses of these types, quantised,
    parametrised, lazy, sparse and scripted ones, a replaced `forward`, LoRA on attention or on bare parameters.
    Raises ValueError when nothing matched, when an exclude or share pattern matches no module, or for bad values;
    RuntimeError for a model that FSDP or DDP has wrapped: variances added after that would not be synchronised.
    Source: arXiv 2506.04690; which layers carry noise inside a transformer is not stated there, so `filter` and
    `exclude` choose.
    """
    types = tuple(types)
    if not types or not all(t in _TWINS for t in types):
        raise ValueError(f"types: expected some of {[t.__name__ for t in _TWINS]}, got {types!r}")
    init_variance = float(check_init_variance(init_variance, 1))
    if keep not in DIPLinear._KEEPS:
        raise ValueError(f"keep: expected one of {DIPLinear._KEEPS}, got {keep!r}")
    _refuse_wrapped(model)
    names = _names(model)
    excluded = _excluded(names, exclude)
    wanted = {
        module: every_name[0]
        for module, every_name in names.items()
        if module not in excluded
        and (filter is None or not _is_candidate(module, types) or filter(module, every_name[0]))
    }
    cannot = {module: reason for module, reason in _cannot(names, types).items() if module in wanted}
    matched = _matched(names, wanted, cannot, types)
    if not matched:
        raise ValueError(_nothing_matched(model, types, cannot))
    count = sum(1 if type(m) is not nn.MultiheadAttention or m._qkv_same_embed_dim else 3 for m in matched)
    if count + len(dip_layers(model)) > MAX_LAYERS:
        raise ValueError(f"model: expected at most {MAX_LAYERS} DIP layers, got {count} to convert")
    groups = _groups({m: wanted[m] for m in matched if not isinstance(m, nn.MultiheadAttention)}, share)
    for module in matched:
        _become_dip(module, init_variance, num_samples, keep)
    for group in groups:
        share_noise([module for module in group if isinstance(module, DIPLayer)])
    number_layers(model)
    if cannot:
        reported = [
            f"  {wanted[m] or 'the model itself'} ({type(m).__name__}): {reason}" for m, reason in cannot.items()
        ]
        text = f"convert: {len(reported)} module(s) stay without noise (exclude=[...] says so and ends this warning):\n"
        warnings.warn(text + "\n".join(reported), DIPConversionWarning, stacklevel=2)
    return model


def _refuse_wrapped(model: nn.Module) -> None:
    for name, module in model.named_modules():
        kinds = {c.__name__ for c in type(module).__mro__ if c.__module__.startswith("torch.")}
        wrapper = kinds & {"FSDPModule", "FullyShardedDataParallel", "DistributedDataParallel"}
        if wrapper:
            raise RuntimeError(
                f"model: expected one that is not yet wrapped, got {wrapper.pop()} at {name or 'the root'!r}, which "
                "would not synchronise variances added now; convert first, then shard or wrap"
            )


def _matched(
    names: dict[nn.Module, list[str]],
    wanted: dict[nn.Module, str],
    cannot: dict[nn.Module, str],
    types: tuple[type[nn.Module], ...],
) -> list[nn.Module]:
    """The layers to convert. What is inside a LoRA layer goes with it, and an out_proj with its attention."""
    blocks = {name for module in names if _blocks(module, types) for name in names[module]}
    matched = [m for m in wanted if _counts_as(m) in types and m not in cannot and not _is_inside(names[m], blocks)]
    spare = {
        m for wrapper in names if _keeps_original(wrapper) for m in wrapper.get_submodule("original_module").modules()
    }
    matched = [m for m in matched if m not in spare]
    owners: set[nn.Module] = {m.out_proj for m in names if isinstance(m, DIPMultiheadAttention)}
    owners |= {m.out_proj for m in matched if type(m) is nn.MultiheadAttention}
    return [m for m in matched if type(m) is not _OUT_PROJECTION or m in owners]


def _groups(matched: dict[nn.Module, str], share: Sequence[Sequence[str]]) -> list[list[nn.Module]]:
    """The layers that are to share their noise: those of one parent that one group of patterns matches."""
    groups, taken = [], {}
    for patterns in share:
        if isinstance(patterns, str) or len(patterns) < 2:
            raise ValueError(f"share: expected groups of two or more name patterns, got {patterns!r}")
        by_parent: dict[str, list[nn.Module]] = {}
        used = set()
        for module, name in matched.items():
            parent, _, own = name.rpartition(".")
            hits = {p for p in patterns if fnmatch.fnmatchcase(own, p) or fnmatch.fnmatchcase(name, p)}
            used |= hits
            if hits:
                by_parent.setdefault(parent, []).append(module)
        unused = [p for p in patterns if p not in used]
        if unused:
            raise ValueError(f"share: expected patterns that match a layer to convert, got {unused} that match none")
        for group in (group for group in by_parent.values() if len(group) > 1):
            for module in group:
                if module in taken:
                    raise ValueError(f"share: expected each layer in one group, got {matched[module]!r} in two")
                taken[module] = group
            features = {matched[m]: (_features(m), _twin(m).feature_dim) for m in group}
            if len(set(features.values())) > 1:
                raise ValueError(f"share: expected layers of one number of input features, got {features}")
            groups.append(group)
    if share and not groups:
        raise ValueError(f"share: expected two layers of one parent in a group, got none for {list(share)}")
    return groups


def _names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module once, in order, with all the names that lead to it."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def _excluded(names: dict[nn.Module, list[str]], exclude: Sequence[str]) -> set[nn.Module]:
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    used, excluded = set(), set()
    for module, every_name in names.items():
        for name in every_name:
            hits = {p for p in patterns for a in _around(name)[1:] if fnmatch.fnmatchcase(a, p)}
            used |= hits
            if hits:
                excluded.add(module)
    unused = [p for p in patterns if p not in used]
    if unused:
        raise ValueError(f"exclude: expected patterns that match a module's name, got {unused} that match none")
    return excluded


def _is_candidate(module: nn.Module, types: tuple[type[nn.Module], ...]) -> bool:
    if isinstance(module, (DIPLayer, DIPMultiheadAttention)):
        return False
    return isinstance(module, types) or _counts_as(module) in types


def _counts_as(module: nn.Module) -> type[nn.Module] | None:
    """The one of `types` under which this module is converted, or None."""
    kind = type(module)
    if kind in _TWINS:
        return kind
    if kind is _OUT_PROJECTION:
        return nn.MultiheadAttention
    if _is_conv1d(module):
        return nn.Linear
    if _is_lora(module) and kind.__module__.startswith("peft."):
        return _LORA.get(kind.__name__)
    return None


def _keeps_original(module: nn.Module) -> bool:
    """Whether PEFT trains copies of a module here (modules_to_save), so that the original is not called."""
    return type(module).__name__ == "ModulesToSaveWrapper" and type(module).__module__.startswith("peft.")


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, a linear layer whose weight is transposed."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def _twin(module: nn.Module) -> type[Any]:
    kind = type(module)
    if kind is _OUT_PROJECTION:
        return DIPOutProjection
    stands_for = _counts_as(module)
    if _is_lora(module) and stands_for is not None:
        return twin_type(kind, _TWINS[stands_for].feature_dim, f"DIPLora{kind.__name__}")
    return _TWINS.get(kind) or twin_type(kind)


def _features(module: Any) -> int:
    name = "nx" if _is_conv1d(module) else "in_channels" if hasattr(module, "in_channels") else "in_features"
    return int(getattr(module, name))


def _cannot(names: dict[nn.Module, list[str]], types: tuple[type[nn.Module], ...]) -> dict[nn.Module, str]:
    """The modules that would look converted and draw no noise, or the wrong noise, each with the reason."""
    cannot = {module: reason for module in names if (reason := _reason(module, types))}
    blocks = {name for m in names if _blocks(m, types) for name in names[m]}
    return {m: reason for m, reason in cannot.items() if not _is_inside(names[m], blocks)}


def _blocks(module: nn.Module, types: tuple[type[nn.Module], ...]) -> bool:
    """Whether no layer inside may be converted by itself."""
    if isinstance(module, torch.jit.ScriptModule) or _is_lora(module):
        return True
    return isinstance(module, nn.MultiheadAttention) and nn.MultiheadAttention in types and bool(_reason(module, types))


def _is_lora(module: nn.Module) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")


def _is_inside(every_name: list[str], blocks: set[str]) -> bool:
    return any(around in blocks for name in every_name if name for around in _around(name)[:-1])


def _around(name: str) -> list[str]:
    """The names of the modules from the root's (empty) to this one: a.b gives "", "a", "a.b"."""
    parts = name.split(".") if name else []
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]


def _reason(module: nn.Module, types: tuple[type[nn.Module], ...]) -> str | None:
    kind = type(module)
    if isinstance(module, DIPLayer):
        return None
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted: convert the model before scripting it"
    if _is_lora(module):
        if getattr(module.base_layer, "share", None) is not None:
            return "a LoRA layer over one whose noise is shared: convert after PEFT, with share"
        if "Embedding" in kind.__name__ or _counts_as(module) is not None:
            return None
        return "a LoRA layer of a kind whose input convert does not know: put a DIPInput before the whole of it"
    of_a_kind = any(t.__name__ in kind.__name__ for t in types) and "Packed" not in kind.__name__
    where = f"{kind.__module__}.{kind.__name__}".lower()
    if of_a_kind and kind is not _OUT_PROJECTION and any(part in where for part in (*_QUANTISED, "quantlinear")):
        return "quantised: convert the model before quantising it"
    if not _is_candidate(module, types) and not (kind is _OUT_PROJECTION and nn.Linear in types):
        return None
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "lazy: run one batch through the model, then convert"
    if kind is _OUT_PROJECTION and nn.MultiheadAttention not in types:
        return "nn.MultiheadAttention uses its weight without calling it: add nn.MultiheadAttention to types"
    if nn.utils.parametrize.is_parametrized(module):
        return "parametrised: its weight is computed, so convert it after remove_parametrizations"
    if _counts_as(module) is None:
        base = next(t.__name__ for t in types if isinstance(module, t))
        return f"a subclass of nn.{base}, whose forward may be its own"
    if "forward" in vars(module):
        return "its forward was replaced on the object, so that a DIP layer's would not run"
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.layout is not torch.strided:
        return f"its weight is sparse ({weight.layout})"
    data = getattr(weight, "data", None)
    if data is not None and any(part in type(data).__module__.lower() for part in _QUANTISED):
        return f"quantised: its weight is a {type(data).__name__}; convert the model before quantising it"
    return None


def _nothing_matched(model: nn.Module, types: tuple[type[nn.Module], ...], cannot: dict[nn.Module, str]) -> str:
    wanted = " or ".join(f"nn.{t.__name__}" for t in types)
    text = f"model: expected a {wanted} to convert, found none that types, filter and exclude let through"
    already = len(dip_layers(model))
    if already:
        text += f"; {already} layer(s) are DIP layers already"
    if cannot:
        text += f"; {len(cannot)} module(s) cannot be converted: " + ", ".join(
            f"{type(m).__name__} ({reason})" for m, reason in list(cannot.items())[:5]
        )
    return text


def _become_dip(module: Any, init_variance: float, num_samples: int, keep: str) -> None:
    plain, twin = type(module), _twin(module)
    features = 0 if twin is DIPMultiheadAttention else _features(module)
    module.__class__ = twin
    try:
        if twin is DIPMultiheadAttention:
            module._set_up(init_variance, num_samples)
            return
        keep = keep if isinstance(module, DIPLinear) else "auto"
        module._set_up(features, init_variance, num_samples, keep, module.weight.device)
    except Exception:
        module.__class__ = plain
        raise
    if _is_lora(module) and isinstance(module.base_layer, DIPLayer):
        # PEFT was put around a DIP layer and froze it: the noise moves to where base layer and adapter both read.
        module.variance, module.num_samples = module.base_layer.variance, module.base_layer.num_samples
        module.variance.requires_grad_(True)
        _become_plain(module.base_layer)
    module.variance.train(module.training)


# ---- to_plain ------------------------------------------------------------------------------------------------------


def to_plain(model: nn.Module) -> nn.Module:
    """Turn every DIP layer back into the plain one, y = Layer(x), in place: the reverse of `convert`.

    model: any module. Parameters keep their identity and the state dict is the plain network's; the learned variances
    are gone. A DIPInput becomes nn.Identity.
    Returns the model (nn.Identity() for a model that is a DIPInput itself). Raises ValueError when there is no DIP
    layer.
    Source: arXiv 2506.04690, Algorithm 3 (prediction by the plain network).
    """
    layers = dip_layers(model)
    if not layers:
        raise ValueError("model: expected a DIP layer to turn back, found none")
    attentions = {name: m for name, m in model.named_modules() if isinstance(m, DIPMultiheadAttention)}
    unknown = [
        name
        for name, m in {**layers, **attentions}.items()
        if "plain_type" not in vars(type(m)) and not isinstance(m, DIPInput)
    ]
    if unknown:
        raise ValueError(f"model: expected DIP layers that convert knows, got subclasses of them: {unknown}")
    activated = [name for name, m in layers.items() if getattr(m, "activation", None) and isinstance(m, DIPLinear)]
    if activated:
        raise ValueError(
            f"model: expected layers that an nn.Linear can stand for, got {activated} with an activation inside; "
            "give it a module of its own behind the layer"
        )
    streams = {f"{name}.stream".lstrip(".") for name in layers}
    others = [name for name in vars(model).pop("_ddp_params_and_buffers_to_ignore", ()) if name not in streams]
    if others:
        model._ddp_params_and_buffers_to_ignore = others  # type: ignore[assignment]
    for attention in attentions.values():
        attention.to_plain_in_place()
    for layer in layers.values():
        if not isinstance(layer, DIPInput):
            _become_plain(layer)
    if isinstance(model, DIPInput):
        return nn.Identity()
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, DIPInput):
                parent._modules[name] = nn.Identity()
    return model


def _become_plain(module: Any) -> None:
    del module.variance, module.stream, module.num_samples, module.keep, module.number
    module.__dict__.pop("share", None)
    module.__class__ = module.plain_type


# ---- parameters ----------------------------------------------------------------------------------------------------


def param_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, variance_lr: float | None = None
) -> list[dict[str, Any]]:
    """Three groups for an optimiser: weights, decayed; biases and norms; variances, with their own learning rate.

    model: any module. lr: > 0. weight_decay: >= 0, for parameters of two dimensions or more. variance_lr: of every
    log_variance, 10 * lr by default: Adam at 1e-3 needs thousands of steps to move a log_variance by 2.
    Returns a list of dicts, each with a "name"; parameters that require no gradient are left out, each other appears
    once, and an empty group is left out. Raises ValueError for bad values, a variance_lr without a DIP layer, or a
    model without parameters.
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("variance_lr", variance_lr)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: expected a number >= 0, got {value!r}")
    variances = {id(p) for m in model.modules() if isinstance(m, Variance) for p in m.parameters()}
    if variance_lr is not None and not variances:
        raise ValueError("variance_lr: given for a model without DIP layers; convert it first")
    groups: list[dict[str, Any]] = [
        {"name": "weights", "params": [], "lr": lr, "weight_decay": weight_decay},
        {"name": "biases", "params": [], "lr": lr, "weight_decay": 0.0},
        {"name": "variances", "params": [], "lr": 10 * lr if variance_lr is None else variance_lr, "weight_decay": 0.0},
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
    """A copy of every log_variance, by its name in the model's state dict: what an adapter checkpoint leaves out.

    model: any module with DIP layers. A variance that layers share appears once, under the first one's name.
    Returns float32 tensors [K] on the CPU, fit for torch.save and safetensors. Raises ValueError without DIP layers.
    """
    _need_layers(model)
    return {
        f"{name}.log_variance": tensor_parallel.full(m.log_variance.detach()).cpu().clone()
        for name, m in model.named_modules()
        if isinstance(m, Variance)
    }


@torch.no_grad()
def load_variances(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set every log_variance to what `variances` gave; nothing is changed unless names and shapes all agree.

    model: with the same DIP layers. state: name -> [K]. Raises ValueError naming what is missing, unknown, or of
    another shape.
    """
    _need_layers(model)
    own = {f"{name}.log_variance": m.log_variance for name, m in model.named_modules() if isinstance(m, Variance)}
    missing, unknown = [n for n in own if n not in state], [n for n in state if n not in own]
    if missing or unknown:
        raise ValueError(f"state: expected the variances of this model, got none for {missing} and unknown {unknown}")
    other = {n: (tuple(state[n].shape), tuple(p.shape)) for n, p in own.items() if state[n].shape != p.shape}
    if other:
        raise ValueError(f"state: expected the shapes of this model's variances, got (given, expected) {other}")
    for name, parameter in own.items():
        parameter.copy_(tensor_parallel.laid_out_as(state[name], parameter))


# ---- summary and calibrate -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One DIP layer: sigma (not variance) over its features; share = mean of sigma / the input's spread, or None."""

    name: str
    type: str
    features: int
    sigma_min: float
    sigma_mean: float
    sigma_max: float
    share: float | None
    number: int


class Summary(list[Row]):
    """A list of Row that prints as a table."""

    def __str__(self) -> str:
        width = max([len("layer"), *(len(row.name or "(root)") for row in self)])
        lines = [
            f"{'layer':{width}}  {'type':9}  {'number':>6}  {'features':>8}  "
            f"{'sigma min':>9}  {'mean':>9}  {'max':>9}  {'share':>7}"
        ]
        for row in self:
            share = "-" if row.share is None else f"{row.share:.1%}"
            lines.append(
                f"{row.name or '(root)':{width}}  {row.type:9}  {row.number:6}  {row.features:8}  "
                f"{row.sigma_min:9.4g}  {row.sigma_mean:9.4g}  {row.sigma_max:9.4g}  {share:>7}"
            )
        return "\n".join(lines)


def summary(model: nn.Module, batches: Iterable[Any] | None = None) -> Summary:
    """One row for each DIP layer: features, sigma min / mean / max, share = mean over features of sigma_j / spread_j.

    model: any module with DIP layers. batches: as `calibrate`'s, to measure the spread (standard deviation) of each
    layer's input features; without it the share uses the spread measured last, and is None where there is none.
    Features whose spread is below a hundredth of the layer's root mean square spread are left out of the share.
    Returns a Summary, a list of Row that prints as a table. Raises ValueError without DIP layers, and as `calibrate`.
    """
    layers = _need_layers(model)
    if batches is not None:
        measured_spreads(model, batches)
    rows = Summary()
    for name, layer in layers.items():
        sigma, spread, share = layer.variance.sigma.double().cpu(), layer.variance.spread, None
        if spread is not None:
            varies = spread > 0.01 * spread.square().mean().sqrt()
            share = (sigma / spread)[varies].mean().item() if bool(varies.any()) else None
        low, mean, high = (f(sigma).item() for f in (torch.min, torch.mean, torch.max)) if len(sigma) else (0.0,) * 3
        rows.append(Row(name, type(layer).__name__, len(sigma), low, mean, high, share, layer.number))
    return rows


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Any], ratio: float = 0.1, floor: float = 0.01) -> Summary:
    """Set each variance from real activations: lambda_j = (ratio * standard deviation of input feature j)^2.

    model: any module with DIP layers; run in eval mode without noise, each module's mode is restored. batches: an
    iterable of a tensor, a mapping (passed as keywords), or a list or tuple whose first element is the input; on the
    model's device. ratio: > 0, sigma over spread. floor: > 0; a feature that hardly varies (a blank pixel) counts as
    having a spread of floor times the root mean square spread of its layer.
    Returns the `summary`. Raises ValueError for bad values, no batches, a DIP layer that no batch reached, an input
    that is constant or not finite (naming the layer). Source: this project's choice; the paper does not state how
    lambda starts.
    """
    for name, value in (("ratio", ratio), ("floor", floor)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}: expected a finite number > 0, got {value!r}")
    layers = _need_layers(model)
    spreads = measured_spreads(model, batches)
    levels = {name: spread.square().mean().sqrt() for name, spread in spreads.items()}
    constant = [name or "(root)" for name, level in levels.items() if not level > 0]
    if constant:
        raise ValueError(f"batches: expected inputs that vary, got constant ones at {constant}")
    for name, layer in layers.items():
        sigma = ratio * spreads[name].clamp(min=floor * levels[name].item())
        layer.variance.log_variance.copy_(2 * sigma.log())
    return summary(model)


def _need_layers(model: nn.Module) -> dict[str, DIPLayer]:
    layers = dip_layers(model)
    if not layers:
        raise ValueError("model: expected DIP layers, found none; convert it first")
    return layers


class _Moments:
    """Count, mean and sum of squared deviations of each feature, in float64, merged batch by batch."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, x: Tensor, dim: int) -> None:
        rows = x.detach().movedim(dim, -1).flatten(0, -2) if x.ndim > 1 else x.detach()[None]
        if len(rows) == 0:
            return
        rows = rows.double()
        mean, total = rows.mean(0), self.count + len(rows)
        delta = mean - self.mean
        self.squares = self.squares + (rows - mean).square().sum(0) + delta.square() * (self.count * len(rows) / total)
        self.mean = self.mean + delta * (len(rows) / total)
        self.count = total

    def spread(self) -> Tensor:
        assert isinstance(self.squares, Tensor)  # something was added
        return (self.squares / self.count).sqrt().cpu()


@torch.no_grad()
def measured_spreads(model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
    """The spread of every DIP layer's input features over the batches; left in each layer's variance.spread too."""
    layers = _need_layers(model)
    moments = {name: _Moments() for name in layers}
    handles = []
    for name, layer in layers.items():
        dim = layer.feature_dim

        def observe(
            module: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            moments: _Moments = moments[name],
            dim: int = dim,
        ) -> None:
            moments.add(args[0] if args else kwargs["input"] if "input" in kwargs else kwargs["x"], dim)

        handles.append(layer.register_forward_pre_hook(observe, with_kwargs=True))
    count = 0
    try:
        # sampling_on switches off the fast path that calls no layer; noise_off, inside it, the noise.
        with eval_mode(model), seeds.sampling_on(), seeds.noise_off(), _eager(model):
            for batch in batches:
                _run(model, batch)
                count += 1
    finally:
        for handle in handles:
            handle.remove()
    if count == 0:
        raise ValueError("batches: expected at least one batch, got none")
    unreached = [name or "(root)" for name in layers if moments[name].count == 0]
    if unreached:
        raise ValueError(f"batches: expected to reach every DIP layer, none reached {unreached}")
    spreads = {name: moments[name].spread() for name in layers}
    infinite = [name or "(root)" for name, spread in spreads.items() if not bool(spread.isfinite().all())]
    if infinite:
        raise ValueError(f"batches: expected finite inputs, got NaN or infinity at {infinite}")
    for name, layer in layers.items():
        layer.variance.spread = spreads[name]
    return spreads


def _run(model: nn.Module, batch: object) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (list, tuple)):
        if not batch:
            raise ValueError("batches: expected a list or tuple whose first element is the input, got an empty one")
        model(batch[0])
    else:
        model(batch)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode inside; every module's own mode restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _eager(model: nn.Module) -> contextlib.AbstractContextManager[object]:
    """Hooks added after torch.compile are not seen by the compiled code."""
    compiled = any(
        type(m).__name__ == "OptimizedModule" or getattr(m, "_compiled_call_impl", None) is not None
        for m in model.modules()
    )
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
