"""The model that torch.compile, DDP and other wrappers hold, and the names in it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

_INNER = {  # the child by which a wrapper holds the model
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "AveragedModel": "module",
    "DeepSpeedEngine": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "ActivationWrapper": "_checkpoint_wrapped_module",  # checkpoint_wrapper, offload_wrapper
    "_FabricModule": "_forward_module",
}
_AGAIN = "_original_module"  # of a _FabricModule: the same model, without what is around it there


def _inner(module: nn.Module) -> str | None:
    """The child by which a wrapper holds the model; None for any other module."""
    kinds = (c.__name__ for c in type(module).__mro__)
    inner = next((_INNER[name] for name in kinds if name in _INNER), None)
    return inner if inner in getattr(module, "_modules", ()) else None  # not a namesake


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that wrappers, however many, hold. Fabric's stays: it casts what the model gets."""
    inner = _inner(model)
    if inner is None or inner == "_forward_module":
        return model
    return unwrapped(getattr(model, inner))


def inmost(model: nn.Module) -> nn.Module:
    """What all wrappers around it hold, Fabric's too: what the name "" stands for."""
    inner = _inner(model)
    return model if inner is None else inmost(getattr(model, inner))


def plain_names(model: nn.Module, remove_duplicate: bool = True) -> dict[str, nn.Module]:
    """Every module by its name in the model that torch.compile, DDP and other wrappers hold.

    remove_duplicate: As for named_modules, by the first name alone.
    """
    plain = {"": ""}
    inner: dict[str, str | None] = {}
    modules = {}
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):
        if name:
            parent, _, own = name.rpartition(".")
            dropped = inner[parent] is not None and own in (inner[parent], _AGAIN)
            plain[name] = plain[parent] if dropped else f"{plain[parent]}.{own}".lstrip(".")
        inner[name] = _inner(module)
        modules[plain[name]] = module
    return modules


def without_wrappers(name: str, known: Mapping[str, object]) -> str:
    """A name from a wrapped model's state dict as the plain model has it."""
    if name in known:
        return name
    dropped = set(_INNER.values()) - {"module"}
    name = ".".join(part for part in name.split(".") if part not in dropped)
    within = ".".join(part for part in name.split(".") if part != "module")  # of wrapped parts
    forms = (name, name.removeprefix("module."), within)
    return next((form for form in forms if form in known), name)
