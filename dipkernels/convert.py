"""Whole models: to DIP layers and back, their variances, parameter groups, calibration.  docs/maths.md, section 1."""

from __future__ import annotations

import contextlib
import fnmatch
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import seeds
from .layers import (
    MAX_LAYERS,
    DIPConv2d,
    DIPInput,
    DIPLayer,
    DIPLinear,
    Variance,
    check_init_variance,
    dip_layers,
    number_layers,
)

_TWINS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: DIPLinear, nn.Conv2d: DIPConv2d}
_PLAIN = {twin: plain for plain, twin in _TWINS.items()}


class DIPConversionWarning(UserWarning):
    """Names the modules that `convert` cannot give noise to, and why."""


# ---- convert -------------------------------------------------------------------------------------------------------


def convert(
    model: nn.Module,
    init_variance: float = 0.01,
    *,
    types: Sequence[type[nn.Module]] = (nn.Linear, nn.Conv2d),
    filter: Callable[[nn.Module, str], bool] | None = None,
    exclude: Sequence[str] = (),
    num_samples: int = 1,
    keep: str = "auto",
) -> nn.Module:
    """Turn every nn.Linear and nn.Conv2d of the model into its DIP twin, y = Layer(x + sigma * z), in place.

    model: any module, itself a layer or not. Its modules keep their identity, hooks and Parameter objects, and shared
    ones stay shared: a layer's class changes, and it gains a child `variance`, float32, on its weight's device.
    init_variance: sigma^2 to start from, > 0. types: nn.Linear, nn.Conv2d or both; only modules of exactly these types.
    filter: called as filter(module, name), true for a layer to convert. exclude: name patterns (fnmatch: "head",
    "*.down_proj", "blocks.0*"); a layer is left out when its name or that of a module around it matches.
    num_samples, keep: as DIPLinear's; keep applies to linear layers.
    Returns the model, its DIP layers numbered 0, 1, ... An optimiser made before conversion does not know the
    variances: make it afterwards, from `param_groups`.
    Warns (DIPConversionWarning) once, naming every module that it cannot honour: subclasses of these types, quantised,
    lazy, sparse and scripted ones, a replaced `forward`, nn.MultiheadAttention's projections, PEFT's LoRA layers.
    Raises ValueError when nothing matched, when an exclude pattern matches no module, or for bad values.
    Source: arXiv 2506.04690; which layers carry noise inside a transformer is not stated there, so `filter` and
    `exclude` choose.
    """
    types = tuple(types)
    if not types or not all(t in _TWINS for t in types):
        raise ValueError(f"types: expected some of {[t.__name__ for t in _TWINS]}, got {types!r}")
    init_variance = float(check_init_variance(init_variance, 1))
    if keep not in DIPLinear._KEEPS:
        raise ValueError(f"keep: expected one of {DIPLinear._KEEPS}, got {keep!r}")
    names = _names(model)
    excluded = _excluded(names, exclude)
    wanted = {
        module: every_name[0]
        for module, every_name in names.items()
        if module not in excluded
        and (filter is None or not _is_candidate(module, types) or filter(module, every_name[0]))
    }
    cannot = {module: reason for module, reason in _cannot(names, types).items() if module in wanted}
    blocks = {name for module in cannot if _blocks(module) for name in names[module]}
    matched = [m for m in wanted if type(m) in types and m not in cannot and not _is_inside(names[m], blocks)]
    if not matched:
        raise ValueError(_nothing_matched(model, types, cannot))
    if len(matched) + len(dip_layers(model)) > MAX_LAYERS:
        raise ValueError(f"model: expected at most {MAX_LAYERS} DIP layers, got {len(matched)} to convert")
    for module in matched:
        _become_dip(module, init_variance, num_samples, keep)
    number_layers(model)
    if cannot:
        reported = [
            f"  {wanted[m] or 'the model itself'} ({type(m).__name__}): {reason}" for m, reason in cannot.items()
        ]
        text = f"convert: {len(reported)} module(s) stay without noise (exclude=[...] says so and ends this warning):\n"
        warnings.warn(text + "\n".join(reported), DIPConversionWarning, stacklevel=2)
    return model


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
    return isinstance(module, types) and not isinstance(module, DIPLayer)


def _cannot(names: dict[nn.Module, list[str]], types: tuple[type[nn.Module], ...]) -> dict[nn.Module, str]:
    """The modules that would look converted and draw no noise, or the wrong noise, each with the reason."""
    cannot = {module: reason for module in names if (reason := _reason(module, types))}
    blocks = {name for m in cannot if _blocks(m) for name in names[m]}
    return {m: reason for m, reason in cannot.items() if not _is_inside(names[m], blocks)}


def _blocks(module: nn.Module) -> bool:
    """Whether no layer inside may be converted either."""
    return isinstance(module, torch.jit.ScriptModule) or _is_lora(module)


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
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted: convert the model before scripting it"
    if nn.Linear in types and _is_lora(module):
        return "a LoRA layer, whose parts share one input: put a DIPInput before the whole of it"
    if nn.Linear in types and kind.__module__.startswith("transformers.") and kind.__name__ == "Conv1D":
        return "a linear layer of its own with the weight transposed: replace it by nn.Linear"
    of_a_kind = any(t.__name__ in kind.__name__ for t in types) and "Packed" not in kind.__name__
    if of_a_kind and any(part in kind.__module__ for part in (".quantized", ".qat", "bitsandbytes")):
        return "quantised: convert the model before quantising it"
    if not _is_candidate(module, types):
        return None
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "lazy: run one batch through the model, then convert"
    if kind.__name__ == "NonDynamicallyQuantizableLinear":
        how = "nn.MultiheadAttention uses its weight, and in_proj_weight, without calling it"
        return f"{how}: put a DIPInput before the attention"
    if kind not in types:
        base = next(t.__name__ for t in types if isinstance(module, t))
        return f"a subclass of nn.{base}, whose forward may be its own"
    if "forward" in vars(module):
        return "its forward was replaced on the object, so that a DIP layer's would not run"
    if module.weight.layout is not torch.strided:
        return f"its weight is sparse ({module.weight.layout})"
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


def _become_dip(module: nn.Module, init_variance: float, num_samples: int, keep: str) -> None:
    twin = _TWINS[type(module)]
    features = module.in_features if twin is DIPLinear else module.in_channels
    module.__class__ = twin
    try:
        module._set_up(
            features, init_variance, num_samples, keep if twin is DIPLinear else "auto", module.weight.device
        )
    except Exception:
        module.__class__ = _PLAIN[twin]
        raise
    module.variance.train(module.training)


# ---- to_plain ------------------------------------------------------------------------------------------------------


def to_plain(model: nn.Module) -> nn.Module:
    """Turn every DIP layer back into nn.Linear or nn.Conv2d, y = Layer(x), in place: the reverse of `convert`.

    model: any module. Parameters keep their identity and the state dict is the plain network's; the learned variances
    are gone. A DIPInput becomes nn.Identity.
    Returns the model (nn.Identity() for a model that is a DIPInput itself). Raises ValueError when there is no DIP
    layer.
    Source: arXiv 2506.04690, Algorithm 3 (prediction by the plain network).
    """
    layers = dip_layers(model)
    if not layers:
        raise ValueError("model: expected a DIP layer to turn back, found none")
    unknown = [name for name, m in layers.items() if type(m) not in _PLAIN and not isinstance(m, DIPInput)]
    if unknown:
        raise ValueError(f"model: expected DIPLinear, DIPConv2d and DIPInput, got subclasses of them: {unknown}")
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


def _become_plain(module: nn.Module) -> None:
    del module.variance, module.stream, module.num_samples, module.keep, module.number
    module.__class__ = _PLAIN[type(module)]


# ---- parameters ----------------------------------------------------------------------------------------------------


def param_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, variance_lr: float | None = None
) -> list[dict[str, object]]:
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
    groups = [
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


class Summary(list):
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


def summary(model: nn.Module, batches: Iterable | None = None) -> Summary:
    """One row for each DIP layer: features, sigma min / mean / max, share = mean over features of sigma_j / spread_j.

    model: any module with DIP layers. batches: as `calibrate`'s, to measure the spread (standard deviation) of each
    layer's input features; without it the share uses the spread measured last, and is None where there is none.
    Features whose spread is below a hundredth of the layer's root mean square spread are left out of the share.
    Returns a Summary, a list of Row that prints as a table. Raises ValueError without DIP layers, and as `calibrate`.
    """
    layers = _need_layers(model)
    if batches is not None:
        _measure(model, batches)
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
def calibrate(model: nn.Module, batches: Iterable, ratio: float = 0.1, floor: float = 0.01) -> Summary:
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
    spreads = _measure(model, batches)
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
        self.count, self.mean, self.squares = 0, 0.0, 0.0

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
        return (self.squares / self.count).sqrt().cpu()


@torch.no_grad()
def _measure(model: nn.Module, batches: Iterable) -> dict[str, Tensor]:
    """The spread of every DIP layer's input features over the batches; left in each layer's variance.spread too."""
    layers = _need_layers(model)
    moments = {name: _Moments() for name in layers}
    handles = []
    for name, layer in layers.items():
        dim = -3 if isinstance(layer, DIPConv2d) else getattr(layer, "dim", -1)

        def observe(module, args, kwargs, moments=moments[name], dim=dim):
            moments.add(args[0] if args else kwargs["input"], dim)

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
def eval_mode(model: nn.Module):
    """The model in eval mode inside; every module's own mode restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _eager(model: nn.Module):
    """Hooks added after torch.compile are not seen by the compiled code."""
    compiled = any(
        type(m).__name__ == "OptimizedModule" or getattr(m, "_compiled_call_impl", None) is not None
        for m in model.modules()
    )
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
