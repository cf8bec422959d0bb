"""What `convert` and `apply` leave with a model and its modules, in their __dict__, for a later
conversion, `check` and saving."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
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
# in that of a layer whose input is noised where it is made: known in a part of the model too
_READS_NOISE = "_dip_reads_noise"
CONFIG = "_dip_config"  # in that of a model that a DIPConfig was applied to: the config
# in that of a model of PEFT: {adapter: its variances} of those that are not active
WAITING = "_dip_waiting"


def remember(
    model: nn.Module,
    noised: Mapping[nn.Module, nn.Module | None],
    moved: Iterable[nn.Module],
    plan: ProducerPlan | None,
) -> None:
    """Leave the names of its DIP layers with the model and with their parents, by which `check`
    misses the replaced; and what `noised_where_made` is to find: what it found before, and the
    layers and plan of this conversion."""
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
    for module in modules.values():
        module.__dict__.pop(_READS_NOISE, None)
    for module in (*noised, *moved):
        if not isinstance(module, DIPLayer):  # noised at its input too, because `before` names it
            base_layer(module).__dict__[_READS_NOISE] = True
    if plan is not None:
        producers = {*noised.values()} - {None}
        earlier = getattr(vars(root).get(PLAN), "moved", ())
        kept = [row for row in earlier if modules.get(row.producer) in producers]
        root.__dict__[PLAN] = dataclasses.replace(plan, moved=(*kept, *plan.moved))
        root.__dict__[KNOWN] = frozenset(modules)


def forget(model: nn.Module) -> None:
    for module in model.modules():
        for key in (CONVERTED, PLAN, KNOWN, _READS_NOISE, CONFIG, WAITING):
            module.__dict__.pop(key, None)


def noises_outputs(model: nn.Module) -> bool:
    """Whether a module in it noises what other layers read."""
    return any(getattr(module, "noises_output", False) for module in model.modules())


def new_beside_producers(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """The names of those that came after a conversion with place="producer", of which nobody knows
    whether they read what a producer noises."""
    found: dict[str, None] = {}
    for prefix, root in plain_names(model).items() if noises_outputs(model) else ():
        inside = prefix and f"{prefix}."
        for name in layers if KNOWN in vars(root) else ():
            if name.startswith(inside) and name.removeprefix(inside) not in vars(root)[KNOWN]:
                found[name] = None
    return [*found]


def noised_where_made(model: nn.Module) -> dict[nn.Module, nn.Module | None]:
    """The layers, and the adapters around layers, whose input is noised where it is made, each with
    the module that does so; None for one that is not known, as outside of the model.

    By the mark that a layer keeps under any name; and by the plan, for the layer that took the
    place of one reads that noise, and where the producer was replaced none does.
    """
    found: dict[nn.Module, nn.Module | None] = {
        m: None for m in model.modules() if _READS_NOISE in vars(base_layer(m))
    }
    for root in reversed([m for m in model.modules() if PLAN in vars(m)]):  # the innermost first
        modules = plain_names(root)
        for row in vars(root)[PLAN].moved:
            producer = modules.get(row.producer)
            noises = getattr(producer, "noises_output", False)
            for reader in (modules[name] for name in row.layers if name in modules):
                first = next((m for m in reader.modules() if is_candidate(m, (*TWINS,))), reader)
                found.pop(first, None)
                if noises and not isinstance(first, DIPLayer):
                    found[first] = producer
    return found
