"""The DIP layers of a model, and their streams.  docs/maths.md, section 3."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Iterable
from typing import TypeVar

from torch import nn

from .. import worlds
from ..noise import contexts
from .layer import MAX_LAYERS, DIPLayer
from .sharing import Share, adopt
from .wrappers import plain_names

Model = TypeVar("Model", bound=nn.Module)


def require_module(model: object, or_function: bool = False) -> None:
    """Raise TypeError for what is no module, nor a function where one will do."""
    if isinstance(model, nn.Module) or (
        or_function and callable(model) and not isinstance(model, type)
    ):
        return
    kind = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
    raise TypeError(
        f"model: expected a torch.nn.Module{' or a function' * or_function}, got {kind}"
    )


def dip_layers(model: nn.Module) -> dict[str, DIPLayer]:
    """Every DIP layer of the model by its first name, each once, in the model's order."""
    require_module(model)
    return {name: module for name, module in model.named_modules() if isinstance(module, DIPLayer)}


def named_layers(model: nn.Module) -> dict[str, DIPLayer]:
    """`dip_layers` by the names that patterns and tables have: without those of wrappers."""
    require_module(model)
    return {name: m for name, m in plain_names(model).items() if isinstance(m, DIPLayer)}


def need_layers(model: nn.Module) -> dict[str, DIPLayer]:
    """`named_layers`. Raises ValueError where there are none."""
    layers = named_layers(model)
    if not layers:
        raise ValueError("model: expected DIP layers, found none; convert it first")
    return layers


def number_layers(model: Model) -> Model:
    """Number the model's DIP layers 0, 1, 2, ... in the model's order: layer i then takes stream i
    under fixed_noise.

    `convert` calls this. Call it yourself for a model built by hand: otherwise its noise depends on
    what was built before it. Call it too for a model joined from models that were converted apart,
    or from deep-copied layers: otherwise they have the same noise (docs/guides/reproducibility.md).
    Layers that share one draw have one number. If the one that owns their variance has left the
    model, the next one owns it.

    Args:
        model: Any module.

    Returns:
        The model.

    Raises:
        ValueError: It has more than 65536 DIP layers.

    Examples:
        >>> model = nn.Sequential(dip.DIPLinear(4, 8), nn.ReLU(), dip.DIPLinear(8, 2))
        >>> [layer.number for layer in dip.number_layers(model) if isinstance(layer, dip.DIPLinear)]
        [0, 1]

    Source: the noise contract, docs/maths.md, section 3.
    """
    layers = dip_layers(model)
    if len(layers) > MAX_LAYERS:
        raise ValueError(f"model: expected at most {MAX_LAYERS} DIP layers, got {len(layers)}")
    adopt(layers)
    numbers: dict[DIPLayer | Share, int] = {}
    counted_in = uuid.uuid4().hex
    for layer in layers.values():
        layer.set_number(numbers.setdefault(layer.share or layer, len(numbers)), counted_in)
    ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    model._ddp_params_and_buffers_to_ignore = sorted({*ignored, *own_buffers(layers)})  # type: ignore[assignment]
    return model


def own_buffers(layers: Iterable[str]) -> set[str]:
    """The buffers of layers of these names: the same on every rank, and DDP would broadcast them
    before each pass."""
    return {
        f"{name}.variance.{part}".lstrip(".") for name in layers for part in ("log_prior", "pull")
    }


def warn_of_equal_numbers(model: nn.Module) -> None:
    """Warn under fixed_noise where layers of the model have one number, and so one noise, without
    sharing it."""
    if contexts.KEY is None or worlds.tracing():
        return
    owners: dict[int, tuple[str, Share | None]] = {}
    for name, layer in named_layers(model).items():
        first, share = owners.setdefault(layer.number, (name, layer.share))
        if first != name and (share is None or share is not layer.share):
            warnings.warn(
                f"dipkernels: the layers {first!r} and {name!r} have one number ({layer.number}), "
                "so fixed_noise gives them the same noise; call dip.number_layers(model) on the "
                "whole model",
                stacklevel=3,
            )
            return
