"""PEFT: the variances go where the adapter goes, each adapter its own.  docs/guides/trainers.md."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from torch import Tensor, nn

from ..config import (
    VARIANCES_FILE,
    load_state,
    remember_config,
    require_config,
    save_state,
    without_prompt_encoder,
)
from ..models.convert import convert
from ..models.convertible import base_layer, is_adapter
from ..models.marks import WAITING
from ..models.parameters import load_variances, variances
from ..nn.layer import DIPLayer
from ..nn.numbering import dip_layers, named_layers
from ..nn.twin import made_type
from ..nn.wrappers import plain_names
from ..noise.contexts import noise_off

_INSIDE = "base_model.model."  # where a PeftModel has the model that it adapts

if TYPE_CHECKING:
    _Mixin = PeftModel
else:
    _Mixin = object


def keep_variances(model: nn.Module) -> nn.Module:
    """Let a converted model of PEFT carry its variances with each adapter; `dip.apply` and
    `dip.load` call this.

    Afterwards `save_pretrained` writes dip_config.json and dip.safetensors beside each adapter,
    `load_adapter` reads them, and `set_adapter` changes the variances too. A new adapter starts
    with the current variances. `merge_and_unload` and `unload` give a model whose layers have the
    noise of their adapters. The model's class becomes a subclass of the same name.

    Args:
        model: A PeftModel that `dip.apply` or `dip.load` has converted.

    Returns:
        The model.

    Raises:
        TypeError: The model is not a PeftModel.
        ValueError: It has no config.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"model: expected a PeftModel, got {type(model).__name__}")
    require_config(model)
    if not isinstance(model, _KeepsVariances):
        kind = type(model)
        model.__class__ = made_type(_KeepsVariances, kind, kind.__name__)
        start = variances(model)
        model.__dict__[WAITING] = {
            name: start for name in model.peft_config if name != model.active_adapter
        }
    return model


class _KeepsVariances(_Mixin):
    """What `keep_variances` puts before a PeftModel's own methods."""

    def save_pretrained(self, save_directory: str, *args: Any, **options: Any) -> None:
        asked = inspect.signature(super().save_pretrained).bind(save_directory, *args, **options)
        asked.apply_defaults()
        with noise_off():  # what a prompt encoder makes is computed here, in whatever mode it is
            super().save_pretrained(save_directory, *args, **options)
        if not dip_layers(self):
            return
        own, selected = variances(self), asked.arguments["selected_adapters"]
        for name in self.peft_config if selected is None else selected:
            folder = Path(save_directory) / name if name != "default" else Path(save_directory)
            # What PEFT adds by itself, as a weighted adapter, has those of the moment.
            state = self.__dict__[WAITING].get(name, own)
            save_state(require_config(self), state, folder, asked.arguments["is_main_process"])

    def load_adapter(self, model_id: Any, adapter_name: str, *args: Any, **options: Any) -> Any:
        if not dip_layers(self):
            return super().load_adapter(model_id, adapter_name, *args, **options)
        own = variances(self)
        # PEFT's file has the variances of the layers that it is around, and puts them into those
        # that are active now.
        loaded = super().load_adapter(model_id, adapter_name, *args, **options)
        own = {_around(name): values for name, values in own.items()}
        folder = Path(model_id) / (options.get("subfolder") or "")
        stored = (folder / VARIANCES_FILE).is_file()
        state = without_prompt_encoder(self, load_state(folder)) if stored else variances(self)
        active = adapter_name == self.active_adapter
        try:
            load_variances(self, state)
        except ValueError:
            active = False
            raise
        finally:
            if not active:
                load_variances(self, own)
        if not active:
            self.__dict__[WAITING][adapter_name] = state
        return loaded

    def add_adapter(self, adapter_name: str, *args: Any, **options: Any) -> None:
        super().add_adapter(adapter_name, *args, **options)
        _move_to_adapters(self)
        if dip_layers(self):
            self.__dict__[WAITING][adapter_name] = variances(self)

    def set_adapter(self, adapter_name: str, *args: Any, **options: Any) -> None:
        before = self.active_adapter
        super().set_adapter(adapter_name, *args, **options)
        self._change(before)

    def delete_adapter(self, adapter_name: str) -> None:
        before = self.active_adapter
        super().delete_adapter(adapter_name)
        self._change(before)
        self.__dict__[WAITING].pop(adapter_name, None)

    def _change(self, before: str) -> None:
        """Put the variances of the adapter that is active now in the place of those of the one
        before."""
        if self.active_adapter != before and dip_layers(self):
            waiting = self.__dict__[WAITING]
            waiting[before] = variances(self)
            # What PEFT adds by itself has those of the moment; after the last one none is active.
            if self.active_adapter in list(waiting):
                load_variances(self, waiting.pop(self.active_adapter))

    def merge_and_unload(self, *args: Any, **options: Any) -> nn.Module:
        """PEFT's, with the noise of an adapter at the layer that it is merged into; dip.to_plain
        removes it."""
        tuner: Any = self.base_model
        return _with_noise(self, lambda: tuner.merge_and_unload(*args, **options))

    def unload(self, *args: Any, **options: Any) -> nn.Module:
        """PEFT's, with the noise of an adapter at the layer that it was around; dip.to_plain
        removes it."""
        tuner: Any = self.base_model
        return _with_noise(self, lambda: tuner.unload(*args, **options))


def _move_to_adapters(model: _KeepsVariances) -> None:
    """Over a layer that had noise without an adapter: the noise goes before the whole, base layer
    and adapter."""
    inside = {n: base_layer(m) for n, m in plain_names(model).items() if is_adapter(m)}
    inside = {name: base for name, base in inside.items() if isinstance(base, DIPLayer)}
    if not inside:
        return
    shared = [name for name, base in inside.items() if base.share is not None]
    if shared:
        raise ValueError(
            f"add_adapter: expected layers that share no noise, got an adapter around {shared}; "
            "add every adapter first, then dip.apply with share"
        )
    config = require_config(model)
    convert(model, filter=lambda module, name: name in inside)
    remember_config(model, config)
    waiting = model.__dict__[WAITING]
    for adapter, state in waiting.items():
        waiting[adapter] = {_around(name): values for name, values in state.items()}


def _around(name: str) -> str:
    """The name of a variance after an adapter was put around its layer and took it."""
    return name.replace(".base_layer.variance.", ".variance.")


def _with_noise(model: PeftModel, unload: Callable[[], nn.Module]) -> nn.Module:
    """What `unload` gives, its layers noised as those of the model were."""
    if not dip_layers(model):
        return unload()
    config = require_config(model)
    kept = f".modules_to_save.{model.active_adapter}"

    def plain(name: str) -> str:
        name = name.removeprefix(_INSIDE).replace(kept, "")
        return name.replace(".token_adapter", "")  # around a head tied to trained tokens

    state: dict[str, Tensor] = {plain(name): values for name, values in variances(model).items()}
    noised = {plain(name): layer for name, layer in named_layers(model).items()}
    shared: dict[Any, list[str]] = {}
    for name, layer in noised.items():
        if layer.share is not None:
            shared.setdefault(layer.share, []).append(name)
    samples = {name: layer.num_samples for name, layer in noised.items()}
    base = unload()
    layers: dict[str, Any] = plain_names(base, remove_duplicate=False)
    lost = {name for name in noised if not isinstance(layers[name], DIPLayer)}
    if lost:
        groups = [group for group in shared.values() if lost.issuperset(group)]
        convert(base, filter=lambda module, name: name in lost, share=groups)
        for name in lost:
            layers[name].num_samples = samples[name]
    load_variances(base, state)
    remember_config(base, config)
    return base
