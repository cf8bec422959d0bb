"""Whole models: to DIP layers and back.  docs/maths.md, section 1."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import integer, one_of
from ..distributed import replicate_variance
from ..functional import KEEPS
from ..nn.attention import DIPMultiheadAttention, in_projections
from ..nn.input import DIPInput
from ..nn.layer import DIPLayer, has_own_forward, weight_of
from ..nn.linear import DIPLinear
from ..nn.numbering import Model, dip_layers, number_layers, own_buffers
from ..nn.sharing import share_noise
from ..nn.twin import MadeTwin
from ..nn.variance import check_init_variance
from ..nn.wrappers import inmost, plain_names
from ..ops.draw import MAX_SAMPLES
from ..worlds import is_dtensor
from .choose import Choice, choose
from .convertible import (
    Names,
    base_layer,
    feature_dim_of,
    features_of,
    forward_set_by,
    has_plain_type,
    put_away,
    twin_before,
    twin_of,
)
from .loose_weights import unnoised
from .marks import forget, new_beside_producers, noises_outputs, remember
from .naming import alike, shown_together
from .patterns import Patterns, require_alike, shared_groups, value_of_each
from .place import UNREACHED, ProducerPlan, find_moves
from .probe import listed, probed
from .weight_readers import read_past

PLACES = ("input", "producer")


class DIPConversionWarning(UserWarning):
    """Names the modules that `convert` cannot give noise to, and why."""


def convert(
    model: Model,
    init_variance: float | Mapping[str, float | Tensor] = 0.01,
    *,
    types: Sequence[type[nn.Module]] | None = None,
    filter: Callable[[nn.Module, str], bool] | None = None,
    exclude: Sequence[str] = (),
    share: Sequence[Sequence[str]] = (),
    before: Sequence[str] | Mapping[str, int] = (),
    place: str = "input",
    batches: Iterable[Any] | None = None,
    num_samples: int = 1,
    keep: str = "auto",
) -> Model:
    """Turn every linear, convolution and attention layer into its DIP twin, y = Layer(x + sigma *
    z), in place.

    A layer gets another class and a child `variance`. Modules keep their identity, hooks and
    Parameters; shared modules stay shared. After an error, and after Ctrl-C, the model is as it
    was. Name patterns are those of Python's fnmatch, compared with full names: `"head"`,
    `"*.down_proj"`, `"blocks.0*"`. A name is that in the model itself, whatever has wrapped it or a
    part of it: torch.compile, checkpoint_wrapper, DDP.

    Args:
        model: Any module, also a single layer. A second call converts the layers that are still
            plain. If PEFT was put around a converted model, it moves each variance to the adapter.
        init_variance: sigma^2 at the start, > 0: a number, or {pattern: variance}, where a variance
            is a number or a tensor [features] and the first pattern that matches a layer's name
            counts. The layers of an attention are NAME.in_proj (or q_proj, k_proj, v_proj) and
            NAME.out_proj.
        types: Some of nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention; by default
            all. A subclass of a linear layer or a convolution is converted if it keeps their
            forward; other subclasses are not. transformers' Conv1D and torchao's float8 and QAT
            layers count as nn.Linear. An adapter of PEFT counts as the layer inside it, and the
            noise is at the input of the whole.
        filter: filter(module, name) returns true for a layer to convert.
        exclude: Patterns. A layer stays plain if its name, or the name of a module around it,
            matches, and `before` does not name it.
        share: Groups of patterns, such as [("q_proj", "k_proj", "v_proj")], compared with a layer's
            own name and its full name. The matching layers of one parent share one variance. While
            they get the same tensor, they also share one draw and one noised input.
        before: Patterns of any other modules to put noise before, such as ["*.experts"]; or
            {pattern: feature dimension}, if that is not the last one (of a convolution: the
            channels). Each becomes the twin of its own class, whose forward takes the input first.
            They override filter and exclude. A * matches dots: "experts.*" names all inside.
        place: "input": each layer adds noise to its own input. "producer": if only these layers
            read the output of a norm, activation or gated product, that module draws the noise in
            its own pass. The layers that read it share this noise and become plain.
            `summary(model).plan` and `producer_plan` say what moves, what stays, and why. Patterns
            of init_variance are then compared with the producer's name.
        batches: For `before` and place="producer"; the same as for `calibrate`. They are run
            without noise: in eval mode to learn the number of features, in both modes to see which
            layer reads which tensor.
        num_samples: As for DIPLinear.
        keep: As for DIPLinear. Linear layers that share a draw keep one u together in any case.

    Returns:
        The model; its DIP layers are numbered 0, 1, ... An optimiser made before this call does
        not know the variances: make a new one from `param_groups`, or add the group "variances" of
        that list.

    Raises:
        TypeError: Something other than the expected model, pattern, function or number.
        ValueError: Nothing matched, a pattern matches nothing, `before` names a module that cannot
            have noise before it, or a value is bad.
        RuntimeError: FSDP or DDP has wrapped the model: variances added after that would not be
            synchronised.

    Warns:
        DIPConversionWarning: Once. It names every module that looks like a layer or has weights of
            its own but stays without noise, and says why.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> dip.convert(model, exclude=["2"])
        Sequential(
          (0): DIPLinear(
            in_features=4, out_features=8, bias=True, init_variance=0.01
            (variance): Variance(4, init_variance=0.01)
          )
          (1): ReLU()
          (2): Linear(in_features=8, out_features=2, bias=True)
        )

    Source: arXiv 2506.04690. Which layers carry noise inside a transformer is not stated there.
    """
    one_of("place", place, PLACES)
    one_of("keep", keep, KEEPS)
    integer("num_samples", num_samples, 1, MAX_SAMPLES)
    batches = None if batches is None else listed(batches)  # before and place both run them
    choice = choose(model, types, filter, exclude, before)
    names, asked, matched = choice.names, choice.asked, choice.matched
    if batches is not None and place == "input" and not asked:
        raise ValueError(
            "batches: expected None without before=[...] or place='producer', got batches that "
            "nothing reads"
        )
    groups = _groups(choice, share)
    plan, moves = find_moves(model, choice, batches) if place == "producer" else (None, [])
    made = [move for move in moves if move.twin is not None]
    moved = {layer: move.producer for move in moves for layer in move.layers}
    staying = [m for m in matched if m not in moved]
    groups = [[m for m in group if m not in moved] for group in groups]
    groups = [group for group in groups if len(group) > 1]
    probes = {m: (names[m][0], dim) for m, dim in asked.items()}
    features, devices, again = probed(model, probes, batches, staying)
    features |= {m: features_of(m) for m in staying}
    features |= {move.producer: features_of(move.layers[0]) for move in made}
    starts = _starts(init_variance, features, names)
    of_names = {names[m][0]: start.get("") for m, start in starts.items()}
    require_alike("init_variance", of_names, [[names[m][0] for m in group] for group in groups])
    twins: dict[nn.Module, Any] = {m: twin_of(m) for m in staying}
    twins |= {m: twin_before(type(m), dim) for m, dim in asked.items()}
    twins |= {move.producer: move.twin for move in made}
    # of an attention that reads a producer the out-projection is noised all the same
    twins |= {m: DIPMultiheadAttention for m in moved if isinstance(m, nn.MultiheadAttention)}
    if plan is None:
        _warn_unwatched(new_beside_producers(model, {names[m][0]: m for m in staying}))
    elif plan.moved or noises_outputs(model):
        _warn_unreached(plan)
    _warn_of_twice([names[m][0] for m in again])
    _warn_without_noise(choice)  # some make it an error: nothing has changed yet
    devices |= {move.producer: move.device for move in made}
    bare = [m for m in staying if weight_of(m) is None]  # an adapter around a layer of HQQ
    devices |= {m: p.device for m in bare for p in [*m.parameters()][:1]}
    with unchanged_by_errors(model):
        for module, twin in twins.items():
            start, width = starts.get(module, {}), features.get(module, 0)
            _become_dip(module, twin, start, num_samples, width, devices.get(module))
            if isinstance(module, DIPLinear):
                module.keep = keep
        for move in moves:
            if move.block is not None:
                block, twin = move.block
                block.__class__ = twin
        for group in groups:
            share_noise([module for module in group if isinstance(module, DIPLayer)])
        for wrapper in names:  # that PEFT put around layers which were converted before
            if (kept := put_away(wrapper)) is not None and dip_layers(kept):
                to_plain(kept)
        number_layers(model)
        remember(model, choice.noised, moved, plan)
    return model


def producer_plan(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    types: Sequence[type[nn.Module]] | None = None,
    filter: Callable[[nn.Module, str], bool] | None = None,
    exclude: Sequence[str] = (),
) -> ProducerPlan:
    """Say what convert(model, place="producer", batches=batches) would move, what it would leave,
    and why. This changes nothing.

    A layer's projection moves into the module that makes its input under two conditions. The module
    is a norm over the last dimension or the channels, an activation, or the product in a block
    down(act(gate(x)) * up(x)). And nothing reads its output except layers to convert. This is
    watched on the batches, in training and in eval mode without noise, through views, copies and
    casts.

    Args:
        model: Any module that is not converted yet, or in part.
        batches: As for `calibrate`; two examples or more if BatchNorm needs them. They are run
            twice.
        types, filter, exclude: As for `convert`. An excluded norm or activation stays as it is.

    Returns:
        The plan, which prints.

    Raises:
        ValueError: There is nothing to convert, no batch, or what `convert` refuses.

    Examples:
        >>> model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 2))
        >>> print(dip.producer_plan(model, [torch.randn(4, 8)]))
        plan: 2 of 2 projections move into 2 module(s) that make their input
          moved  0 (LayerNorm) -> 1
          moved  2 (GELU) -> 3
    """
    return find_moves(model, choose(model, types, filter, exclude), batches)[0]


def to_plain(model: nn.Module) -> nn.Module:
    """Turn every DIP layer back into the plain one, y = Layer(x), in place: the reverse of
    `convert`.

    Parameters keep their identity, and the state dict is the plain network's. The learned variances
    are lost. A DIPInput becomes nn.Identity.

    Args:
        model: Any module with DIP layers.

    Returns:
        The model; nn.Identity() for a model that is a DIPInput itself.

    Raises:
        ValueError: There is no DIP layer, or one that has no plain twin.

    Examples:
        >>> model = dip.convert(nn.Sequential(nn.Linear(4, 2)))
        >>> dip.to_plain(model)
        Sequential(
          (0): Linear(in_features=4, out_features=2, bias=True)
        )

    Source: arXiv 2506.04690, Algorithm 3 (prediction by the plain network).
    """
    layers = dip_layers(model)
    if not layers:
        raise ValueError("model: expected a DIP layer to turn back, found none")
    faults: dict[str, list[str]] = {}
    for name, module in plain_names(model).items():
        if (fault := _stays_dip(module)) is not None:
            faults.setdefault(fault, []).append(name)
    if faults:
        fault, at_fault = next(iter(faults.items()))
        raise ValueError(fault.format(at_fault))
    if _is_noise_alone(inmost(model)):
        return nn.Identity()
    with unchanged_by_errors(model):
        ignored = {*vars(model).pop("_ddp_params_and_buffers_to_ignore", ())} - own_buffers(layers)
        if ignored:
            model._ddp_params_and_buffers_to_ignore = sorted(ignored)  # type: ignore[assignment]
        for module in list(model.modules()):
            if isinstance(module, DIPMultiheadAttention):
                module.to_plain_in_place()
            elif isinstance(module, MadeTwin) and not isinstance(module, DIPLayer):
                # a block of a gated product, or a model of PEFT that carried its variances
                module.__class__ = module.plain_type  # type: ignore[assignment]
            elif isinstance(module, DIPLayer) and not _is_noise_alone(module):
                _become_plain(module)
            for name, child in module._modules.items():
                if child is not None and _is_noise_alone(inmost(child)):  # what wraps it goes too
                    module._modules[name] = nn.Identity()
        forget(model)
    return model


@contextlib.contextmanager
def unchanged_by_errors(model: nn.Module) -> Iterator[None]:
    """After an error inside, or Ctrl-C, every module of the model has its class, attributes, parts
    and hooks of before. What its tensors hold stays as it is."""
    before = []
    for module in model.modules():
        own = vars(module)
        dicts = [own, *(value for value in own.values() if isinstance(value, dict))]
        before.append((module, type(module), [(d, dict(d)) for d in dicts]))
    try:
        yield
    except BaseException:
        for module, kind, states in before:
            module.__class__ = kind
            for now, then in states:
                now.clear()
                now.update(then)
        raise


# ---- what becomes what, and with which variance --------------------------------------------------


def _groups(choice: Choice, share: Sequence[Sequence[str]]) -> list[list[nn.Module]]:
    """The layers that are to share their noise: those of one parent that one group of patterns
    matches."""
    layers = [m for m in choice.matched if not isinstance(m, nn.MultiheadAttention)]
    matched = {m: choice.names[m][0] for m in layers}
    groups: list[list[nn.Module]] = []
    for group_patterns in shared_groups(share):
        patterns = Patterns("share", group_patterns)
        by_parent: dict[str, list[nn.Module]] = {}
        for module, name in matched.items():
            parent, _, own = name.rpartition(".")
            if patterns.all(own, name):
                by_parent.setdefault(parent, []).append(module)
        patterns.require_used(matched.values(), "a layer still to be converted")
        groups += [group for group in by_parent.values() if len(group) > 1]
    taken: set[nn.Module] = set()
    for group in groups:
        if twice := [matched[m] for m in group if m in taken]:
            raise ValueError(f"share: expected each layer in one group, got {twice[0]!r} in two")
        taken.update(group)
        features = {matched[m]: (features_of(m), feature_dim_of(m)) for m in group}
        if len(set(features.values())) > 1:
            raise ValueError(
                f"share: expected layers with the same number of input features, got {features}"
            )
    if share and not groups:
        raise ValueError(
            f"share: expected two layers of one parent in a group, got none for {list(share)}"
        )
    return groups


def _starts(
    init_variance: float | Mapping[str, float | Tensor],
    features: Mapping[nn.Module, int],
    names: Names,
) -> dict[nn.Module, dict[str, Any]]:
    """The initial variance of each module that has features, under ""; of an attention, one for
    each of its layers by name."""
    widths = {
        module: {part: width for part, (width, _) in in_projections(module).items()}
        if isinstance(module, nn.MultiheadAttention)
        else {"": number}
        for module, number in features.items()
    }
    full = {
        (m, part): f"{names[m][0]}.{part}".strip(".") for m, own in widths.items() for part in own
    }
    found = value_of_each("init_variance", init_variance, full.values(), "a layer to convert")
    return {
        m: {part: check_init_variance(found[full[m, part]], width) for part, width in own.items()}
        for m, own in widths.items()
    }


def _become_dip(
    module: Any,
    twin: type[Any],
    start: dict[str, Any],
    num_samples: int,
    features: int,
    device: torch.device | None,
) -> None:
    module.__class__ = twin
    module.__dict__.pop("forward", None)  # the plain class's
    if twin is DIPMultiheadAttention:
        module._set_up(start, num_samples)
        return
    module._set_up(features, start[""], num_samples, device)
    base = base_layer(module)
    if base is not module and isinstance(base, DIPLayer):
        # PEFT was put around a DIP layer and froze it: the noise moves to where base layer and
        # adapter both read.
        module.variance, module.num_samples = base.variance, base.num_samples
        module.variance.requires_grad_(True)
        _become_plain(base)
    module.variance.train(module.training)
    if is_dtensor(weight := weight_of(module)):  # the plain layer was parallelised already
        replicate_variance(module.variance, weight.device_mesh)


# ---- what stays without noise --------------------------------------------------------------------


def _warn_unreached(plan: ProducerPlan) -> None:
    """Of layers that no batch entered nobody knows what they read."""
    unreached = [name for row in plan.left if row.reason == UNREACHED for name in row.layers]
    if unreached:
        warnings.warn(
            f"convert: the batches do not reach {len(unreached)} layer(s), which keep a projection "
            f"of their own: {', '.join(unreached)}. A layer that reads what a module of the plan "
            "makes would get noise twice. Give batches that reach every layer, or name these in "
            "exclude=[...]. If what is around one reads its weight without calling it, it draws "
            "no noise: before=[...] noises the input of that",
            DIPConversionWarning,
            stacklevel=3,
        )


def _warn_unwatched(layers: list[str]) -> None:
    """Of layers that came after the producers nobody has watched what they read."""
    if layers:
        warnings.warn(
            f"convert: {len(layers)} layer(s) that the model got after place='producer' draw noise "
            f"of their own: {', '.join(layers)}. One that reads what a module of that plan noises "
            "gets noise twice. place='producer' with batches that reach these layers sees it; or "
            "name these in exclude=[...]",
            DIPConversionWarning,
            stacklevel=3,
        )


def _warn_of_twice(layers: list[str]) -> None:
    if layers:
        warnings.warn(
            f"convert: {len(layers)} module(s) would get noise twice: {', '.join(layers)}. What "
            "they read is the input of a module around them that before=[...] noises: name them in "
            "exclude=[...], and not in before",
            DIPConversionWarning,
            stacklevel=3,
        )


def _warn_without_noise(choice: Choice) -> None:
    """Name what looks like a layer, or holds weights of its own, and was not converted."""
    names, asked = choice.names, choice.asked
    # Noise before a module is before the children too that it reads and never calls.
    answered: set[nn.Module] = set()
    for whole in asked:
        kind: Any = type(whole)
        past = read_past(kind)
        answered |= {child for name, child in whole.named_children() if name in past}
    refused = {m: reason for m, reason in choice.reasons.items() if m not in answered}
    unwanted = names.keys() - choice.wanted
    quiet = {*choice.matched, *asked, *choice.reasons, *unwanted}
    found = alike(refused, names) | unnoised(names, quiet, choice.blocks)
    if found:
        text = (
            f"convert: {sum(map(len, found))} module(s) stay without noise. To end this warning, "
            "name them in exclude=[...]:\n"
        )
        lines = [f"  {shown_together(ms, names)}: {reason}" for ms, reason in found.items()]
        warnings.warn(text + "\n".join(lines), DIPConversionWarning, stacklevel=3)


# ---- back ----------------------------------------------------------------------------------------


def _stays_dip(module: nn.Module) -> str | None:
    """Why this module cannot be turned back: an error with a place for names."""
    if not isinstance(module, (DIPLayer, DIPMultiheadAttention)):
        return None
    mere = isinstance(module, DIPInput) and not has_own_forward(module)
    if not mere and not has_plain_type(module):
        return (
            "model: expected DIP layers that convert knows, got subclasses of them: {}; if they "
            "are parametrised (weight_norm), call "
            "torch.nn.utils.parametrize.remove_parametrizations first; in a class of your own set "
            "plain_type = the class that computes the same without noise"
        )
    if forward_set_by(module) == "accelerate":
        return (
            "model: expected one that accelerate has not dispatched, got hooks that call the DIP "
            "forward at {}: call accelerate.hooks.remove_hook_from_submodules(model), then "
            "to_plain, then accelerate.dispatch_model again"
        )
    if forward_set_by(module):
        return (
            "model: expected layers with their class's forward, got one set on the object, which "
            "may call the DIP forward, at {}: delete it (del layer.forward), then to_plain"
        )
    if isinstance(module, DIPLinear) and module.activation:
        return (
            "model: expected layers that an nn.Linear can stand for, got {} with an activation "
            "inside; give it a module of its own behind the layer"
        )
    return None


def _is_noise_alone(module: nn.Module) -> bool:
    """Whether nothing is left of it without noise."""
    return isinstance(module, DIPInput) and not has_plain_type(module)


def _become_plain(module: Any) -> None:
    del module.variance, module.num_samples
    own = module.__dict__.get("forward")
    # the DIP class's, as accelerate leaves behind
    if getattr(own, "__func__", None) is type(module).forward:
        del module.forward
    for name in ("share", "keep", "_number", "_stream", "_counted_in"):
        module.__dict__.pop(name, None)
    module.__class__ = module.plain_type
