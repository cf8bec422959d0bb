"""Which classes of modules `convert` converts, and what each becomes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..nn.attention import DIPMultiheadAttention, DIPOutProjection, in_projections
from ..nn.conv import DIPConv1d, DIPConv2d, DIPConv3d
from ..nn.layer import DIPLayer
from ..nn.linear import DIPLinear
from ..nn.twin import Wrapper, first_parameter, made_type, twin_type

Types = tuple[type[nn.Module], ...]  # some of TWINS
Names = Mapping[nn.Module, list[str]]  # every module of a model, in its order, with all its names
TWINS: dict[type[nn.Module], type[Any]] = {  # DIPLayers, and DIPMultiheadAttention
    twin.plain_type: twin
    for twin in (DIPLinear, DIPConv1d, DIPConv2d, DIPConv3d, DIPMultiheadAttention)
}
OUT_PROJECTION = DIPOutProjection.plain_type
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# parts of the names, with their Python modules, of the classes of quantised layers and weights
_QUANTISED = re.compile(
    r"quantiz|quanto|quantlinear|\.qat|bitsandbytes|torchao|awq|gptq|hqq|eetq|finegrained_fp8",
    re.IGNORECASE,
)
# what a converted module has beside what its class defines
_SET = {"variance", "num_samples", "keep", "plain_type", "made_of"}
SCRIPTED = "scripted: convert the model before scripting it"


def counts_as(module: nn.Module) -> type[nn.Module] | None:
    """The one of `types` under which this module is converted, or None."""
    kind = type(module)
    if kind in TWINS:
        return kind
    if kind is OUT_PROJECTION or _is_half_dip(module):
        return nn.MultiheadAttention
    if is_conv1d_type(kind):
        return nn.Linear
    if is_adapter(module):
        return _stands_for(base_layer(module)) if first_parameter(kind) else None
    if isinstance(module, nn.Linear) and kind.__module__.startswith("torchao."):
        # for training in float8 or with fake quantisation: their forward takes the input alone
        return nn.Linear
    return _computes_as(kind)


def _computes_as(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The layer's class whose forward a subclass keeps, as one that only starts its weight in its
    own way does."""
    code = ("forward", "_conv_forward", "__call__")
    for base in (nn.Linear, *_CONVOLUTIONS):
        if issubclass(kind, base) and all(
            getattr(kind, name, None) is getattr(base, name, None) for name in code
        ):
            return base
    return None


def is_candidate(module: nn.Module, types: Types) -> bool:
    """Whether it is no DIP layer, and is or counts as one of `types`."""
    dip = isinstance(module, (DIPLayer, DIPMultiheadAttention)) and not _is_half_dip(module)
    return not dip and (isinstance(module, types) or counts_as(module) in types)


def _is_half_dip(module: nn.Module) -> bool:
    """Whether it is an attention that noises its out-projection's input alone, as one does whose
    own input a producer noised."""
    whole = type(module) is DIPMultiheadAttention
    return whole and not in_projections(module).keys() & module._modules.keys()


def is_conv1d_type(kind: type | None) -> bool:
    """transformers' Conv1D, a linear layer whose weight is transposed."""
    known = ("transformers.pytorch_utils", "Conv1D")
    return kind is not None and (kind.__module__, kind.__name__) == known


def of_peft(module: nn.Module, name: str) -> bool:
    """Whether it is of this class of PEFT's, which is not imported for the question."""
    return any(
        c.__name__ == name and c.__module__.startswith("peft.") for c in type(module).__mro__
    )


def put_away(module: nn.Module) -> nn.Module | None:
    """What this wrapper of PEFT's holds and never calls, because it trains and calls copies."""
    wraps = of_peft(module, "ModulesToSaveWrapper")
    return module.get_submodule("original_module") if wraps else None


def is_adapter(module: nn.Module) -> bool:
    """Whether PEFT made it around another layer: what its forward computes is one function of its
    input."""
    return of_peft(module, "BaseTunerLayer") and hasattr(module, "base_layer")


def base_layer(module: Any) -> Any:
    """The layer inside adapters, however many; a module that is none itself."""
    return module.get_base_layer() if is_adapter(module) else module


def _stands_for(base: nn.Module) -> type[nn.Module] | None:
    """What an adapter around this layer is converted as: its input has the features of the
    base's."""
    kind = _plain_type(base)
    if isinstance(base, nn.Linear) or is_conv1d_type(kind):
        return nn.Linear
    if is_quantised(kind) and isinstance(getattr(base, "in_features", None), int):
        return nn.Linear
    return next((c for c in _CONVOLUTIONS if isinstance(base, c)), None)


def _plain_type(layer: Any) -> Any:
    """Its class, of a DIP layer (that an adapter was put around) the one it was converted from."""
    return layer.plain_type if isinstance(layer, DIPLayer) else type(layer)


def is_quantised(kind: type) -> bool:
    return bool(_QUANTISED.search(f"{kind.__module__}.{kind.__name__}"))


def twin_of(module: nn.Module) -> type[Any]:
    """The DIP class that a module of one of `types` becomes."""
    kind = type(module)
    if kind is OUT_PROJECTION:
        return DIPOutProjection
    if kind in TWINS:
        return TWINS[kind]
    if kind is DIPMultiheadAttention:
        return kind
    if (base := _computes_as(kind)) is not None:
        return made_type(TWINS[base], kind)
    package = kind.__module__.split(".")[2].capitalize() if is_adapter(module) else ""
    known = package.lower() in kind.__name__.lower()
    return twin_type(kind, feature_dim_of(module), f"DIP{'' if known else package}{kind.__name__}")


def twin_before(kind: type[nn.Module], dim: int) -> type[Any]:
    """The class that a module of this class becomes with noise before it, along dimension dim."""
    known = TWINS.get(kind)
    return known if known is not None and known.feature_dim == dim else twin_type(kind, dim)


def has_plain_type(layer: nn.Module) -> bool:
    """Whether the class itself says what the layer is without noise; its subclasses may compute
    something else."""
    return "plain_type" in vars(type(layer))


def features_of(module: Any) -> int:
    """The number of input features, or channels, of a module of one of `types`."""
    layer = base_layer(module)
    own = ("nx",) if is_conv1d_type(_plain_type(layer)) else ()
    names = (*own, "in_channels", "in_features", "embed_dim")
    return int(next(getattr(layer, name) for name in names if hasattr(layer, name)))


def feature_dim_of(module: nn.Module) -> int:
    """Where the features of a module's input are, as far as its class says: a convolution's
    channels, or the last."""
    layer = base_layer(module)
    return -1 - len(layer.kernel_size) if isinstance(layer, nn.modules.conv._ConvNd) else -1


# ---- what prevents that --------------------------------------------------------------------------

# why the forward of the class would not run, by who set another
REPLACED = {
    "accelerate": "accelerate dispatched it, and its hook calls the plain forward: convert before "
    "dispatching, or call accelerate.hooks.remove_hook_from_submodules(model), then convert, then "
    "accelerate.dispatch_model again",
    "transformers": "a tp_plan of transformers replaced its forward: load the model without one, "
    "convert, then dip.parallelize_module(model, mesh, plan)",
    "somebody": "its forward was replaced on the object, so a DIP layer's forward would not run",
}


def forward_set_by(module: nn.Module) -> str:
    """Who set a forward of its own on the object: "accelerate", "transformers" or "somebody"; ""
    where it has none but the class's, as accelerate leaves behind."""
    own = vars(module).get("forward")
    if own is not None and hasattr(module, "_hf_hook"):
        return "accelerate"
    if own is None or getattr(own, "__func__", None) is type(module).forward:
        return ""
    return "transformers" if getattr(module, "_is_hooked", False) else "somebody"


def names_taken(module: nn.Module, twin: type[Any], facts: Iterable[str] = ()) -> list[str]:
    """What the module has of its own, itself or by its class, under a name that its DIP class would
    read: one that a class of this package defines before the plain one, or one of the facts that
    the DIP class is made with."""
    package = __name__.partition(".")[0]
    ours = [
        kind
        for kind in twin.__mro__
        if kind.__module__.partition(".")[0] == package and "made_of" not in vars(kind)
    ]
    names = _SET.union(facts, *map(vars, ours)) - {"reset_parameters", "__prepare_scriptable__"}
    own = {*vars(module), *module._parameters, *module._buffers, *module._modules}
    own.update(n for n in names if hasattr(type(module), n))  # a property is not asked: it may fail
    return sorted(n for n in names & own if not hasattr(nn.Module, n))


def no_twin(module: nn.Module) -> str | None:
    """Why the projection cannot be put before a module of this class, or None."""
    kind = type(module)
    if isinstance(module, (DIPLayer, DIPMultiheadAttention)):
        return "a DIP layer already"
    if isinstance(base_layer(module), nn.MultiheadAttention):
        return "it takes three inputs, which convert noises by itself (types)"
    if isinstance(module, torch.jit.ScriptModule):
        return SCRIPTED
    if replaced := REPLACED.get(forward_set_by(module)):
        return replaced
    if isinstance(module, nn.Sequential) and kind.forward is nn.Sequential.forward:
        return (
            "its forward calls every child in turn, and would call the variance: name its first "
            "module"
        )
    if first_parameter(kind) is None:
        return "its forward takes no first argument"
    if taken := names_taken(module, Wrapper):
        return f"it has {taken} of its own, names that a DIP layer uses"
    return None
