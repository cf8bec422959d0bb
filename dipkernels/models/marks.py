"""What `convert` and `apply` leave with a model and its modules, in their __dict__, for a later
conversion, `check` and saving."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..nn.numbering import dip_layers
from .wrappers import plain_names

# in the __dict__ of a model that was converted: the names of its DIP layers
_CONVERTED = "_dip_converted"
PLAN = "_dip_plan"  # in that of one that was converted with place="producer": the plan
# in that of a layer whose input is noised where it is made: the name of what makes it
NOISED_BY = "_dip_noised_by"
CONFIG = "_dip_config"  # in that of a model that a DIPConfig was applied to: the config
# in that of a model of PEFT: {adapter: its variances} of those that are not active
WAITING = "_dip_waiting"


def remember(model: nn.Module) -> None:
    """Leave the names of its DIP layers with the model and with their parents, by which `check`
    misses the replaced."""
    layers = tuple(dip_layers(model))
    inside: dict[str, list[str]] = {}
    for name in layers:
        parent, _, own = name.rpartition(".")
        inside.setdefault(parent, []).append(own)
    for parent, children in inside.items():
        model.get_submodule(parent).__dict__[_CONVERTED] = tuple(children)
    model.__dict__[_CONVERTED] = layers


def forget(model: nn.Module) -> None:
    for module in model.modules():
        for key in (_CONVERTED, PLAN, NOISED_BY, CONFIG, WAITING):
            module.__dict__.pop(key, None)


def readers_of(model: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """The layers whose input a module noises where it makes it, by that module."""
    found: dict[nn.Module, nn.Module] = {}
    for root in reversed([m for m in model.modules() if PLAN in vars(m)]):  # the innermost first
        modules = plain_names(root)
        for module in modules.values():
            name = vars(module).get(NOISED_BY)
            if name is not None and name in modules:
                found.setdefault(module, modules[name])
    readers: dict[nn.Module, list[nn.Module]] = {}
    for module, producer in found.items():
        readers.setdefault(producer, []).append(module)
    return readers


def remembered(model: nn.Module) -> Iterator[tuple[nn.Module, str, tuple[str, ...]]]:
    """(the module that was converted, its own name, the names in it of its layers) of every
    one."""
    for name, module in model.named_modules():
        if _CONVERTED in vars(module):
            yield module, name, vars(module)[_CONVERTED]
