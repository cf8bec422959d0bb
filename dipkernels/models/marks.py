"""What `convert` and `apply` leave with a model and its modules, in their __dict__, for a later
conversion, `check` and saving."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from ..nn.layer import DIPLayer
from ..nn.wrappers import plain_names
from .convertible import TWINS, base_layer, is_candidate

if TYPE_CHECKING:
    from .place import ProducerPlan

# in the __dict__ of a model that was converted, of all its DIP layers the names; and in that of
# each parent of its own
CONVERTED = "_dip_converted"
PLAN = "_dip_plan"  # in that of one that was converted with place="producer": the plan
KNOWN = "_dip_known"  # beside it: the names of all modules that there were
_PRODUCERS = "_dip_producers"  # in that of a converted model: what noises the input of its readers
# in that of every module that was there when the model was converted: whether it is a producer
SEEN = "_dip_seen"
# in that of a layer whose input is noised where it is made: what does so, or None where a part was
# converted that has it not. Names move where a list of modules loses one; objects do not.
_READS_NOISE = "_dip_reads_noise"
CONFIG = "_dip_config"  # in that of a model that a DIPConfig was applied to: the config
# in that of a model of PEFT: {adapter: its variances} of those that are not active
WAITING = "_dip_waiting"


def remember(
    model: nn.Module,
    noised: Mapping[nn.Module, nn.Module | None],
    moved: Mapping[nn.Module, nn.Module],
    plan: ProducerPlan | None,
) -> None:
    """Leave the names of its DIP layers with the model and with their parents, by which `check`
    misses the replaced; and what `noised_where_made` is to find: what it found before, and the
    layers, each with its producer, and plan of this conversion."""
    modules = plain_names(model)
    layers = tuple(name for name, module in modules.items() if isinstance(module, DIPLayer))
    inside: dict[str, list[str]] = {}
    for name in layers:
        parent, _, own = name.rpartition(".")
        inside.setdefault(parent, []).append(own)
    for parent, children in inside.items():
        modules[parent].__dict__[CONVERTED] = tuple(children)
    root = modules[""]
    root.__dict__[CONVERTED] = layers
    reads = {**noised, **moved}
    # one that `before` names is noised at its input too
    plain = {base_layer(m): made for m, made in reads.items() if not isinstance(m, DIPLayer)}
    producers = {*reads.values()}
    # not of an adapter's base layer, which is to be missed where it takes the place of the whole
    within = {part for name in layers for part in [*modules[name].modules()][1:]}
    for module in model.modules():
        seen = vars(module).pop(SEEN, False)
        if module not in within:
            module.__dict__[SEEN] = seen or module in producers
        before = module.__dict__.pop(_READS_NOISE, None)
        if module in plain:
            module.__dict__[_READS_NOISE] = plain[module] or before
    root.__dict__[_PRODUCERS] = tuple({made: None for made in reads.values() if made is not None})
    if plan is not None:
        still = {*noised.values()} - {None}
        earlier = getattr(vars(root).get(PLAN), "moved", ())
        kept = [row for row in earlier if modules.get(row.producer) in still]
        root.__dict__[PLAN] = dataclasses.replace(plan, moved=(*kept, *plan.moved))
        root.__dict__[KNOWN] = frozenset(modules)


def forget(model: nn.Module) -> None:
    for module in model.modules():
        for key in (CONVERTED, PLAN, KNOWN, _PRODUCERS, SEEN, _READS_NOISE, CONFIG, WAITING):
            module.__dict__.pop(key, None)


def noises_outputs(model: nn.Module) -> bool:
    """Whether a module in it noises what other layers read."""
    return any(getattr(module, "noises_output", False) for module in model.modules())


def new_beside_producers(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[str]:
    """The names of those that came after a conversion with place="producer", of which nobody knows
    whether they read what a producer noises: beside one that was taken out of its model too."""
    found: dict[str, None] = {}
    watched: set[nn.Module] = set()
    for prefix, root in plain_names(model).items() if noises_outputs(model) else ():
        if KNOWN not in vars(root):
            continue
        inside = prefix and f"{prefix}."
        for name in layers:
            if name.startswith(inside) and name.removeprefix(inside) not in vars(root)[KNOWN]:
                found[name] = None
        watched.update(root.modules())
    alone = (m for m in model.modules() if m not in watched and vars(m).get(SEEN))
    if any(getattr(module, "noises_output", False) for module in alone):
        found |= {n: None for n, m in layers.items() if m not in watched and SEEN not in vars(m)}
    return [*found]


def _readers(model: nn.Module) -> tuple[dict[nn.Module, nn.Module | None], list[nn.Module]]:
    """The layers whose input is noised where it is made, as `noised_where_made`; and those that
    were such layers, and what noised their input has left the model or draws no more.

    By the mark that a layer keeps under any name; and by the plan, for the layer or producer that
    took the place of one.
    """
    found: dict[nn.Module, nn.Module | None] = {}
    left: list[nn.Module] = []
    inside = dict.fromkeys(model.modules())
    known = {made for m in inside for made in vars(m).get(_PRODUCERS, ())}
    for module in inside:
        made = vars(base_layer(module)).get(_READS_NOISE, module)
        if made is module or isinstance(module, DIPLayer):
            continue
        if made in inside and getattr(made, "noises_output", False):
            found[module] = made
        elif made in inside or made in known:
            left.append(module)
        else:
            found[module] = None
    for root in reversed([m for m in inside if PLAN in vars(m)]):  # the innermost first
        modules = plain_names(root)
        for row in vars(root)[PLAN].moved:
            producer = modules.get(row.producer)
            if not getattr(producer, "noises_output", False):
                continue
            for reader in (modules[name] for name in row.layers if name in modules):
                first = next((m for m in reader.modules() if is_candidate(m, (*TWINS,))), reader)
                is_new = SEEN not in vars(first) and first not in found
                if (is_new or first in left) and not isinstance(first, DIPLayer):
                    found[first] = producer
    return found, [module for module in left if module not in found]


def noised_where_made(model: nn.Module) -> dict[nn.Module, nn.Module | None]:
    """The layers, and the adapters around layers, whose input is noised where it is made, each with
    the module that does so; None for one that is not known, as outside of the model."""
    return _readers(model)[0]


def left_by_producers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers, by name, that draw no noise and read none, for what noised their input has left
    the model or draws no more."""
    left = _readers(model)[1]
    return {name: m for name, m in plain_names(model).items() if m in left}
