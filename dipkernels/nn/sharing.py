"""One draw and one u for layers that read the same input."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import worlds
from ..noise import contexts
from .layer import DIPLayer, fresh


class _Entry(NamedTuple):
    x: Any  # a weak reference, or the tensor itself in a graph that torch.compile makes
    place: tuple[Any, ...]  # what u depends on beside x
    key: Tensor | None
    served: tuple[DIPLayer, ...]
    u: Tensor


class Share:
    """One u for the layers that read one tensor: the first to be called draws it, the others take
    it.

    A layer that gets another tensor, or the same one a second time, draws afresh. u is let go when
    every layer has had it, when x is gone, or when its gradient is there: a layer that is skipped
    (an expert, an early exit) keeps neither alive, and takes no u of a step before. Not so under
    torch.compile, where both stay until a layer of the group gets another tensor.
    """

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        # by device, for nn.DataParallel's replicas share this object, and by thread
        self._entries: dict[Any, _Entry] = {}

    def noised(self, layer: DIPLayer, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        compiling = worlds.tracing()
        version = None if compiling or x.is_inference() else x._version
        place = (version, dtype, torch.is_grad_enabled(), contexts.row0())
        caller = "compiled" if compiling else (x.device, threading.get_ident())
        entry = self._entries.get(caller)
        if (
            entry is not None
            and (entry.x if compiling else entry.x()) is x
            and entry.place == place
            and entry.key is contexts.KEY
            and layer not in entry.served
        ):
            served, u = (*entry.served, layer), entry.u
        else:
            served, u = (layer,), fresh(layer, x, dtype)
        if len(served) == self.num_layers:
            self._entries.pop(caller, None)
        else:
            held = (
                x
                if compiling
                else weakref.ref(x, lambda dead: self._drop(caller, lambda e: e.x is dead))
            )
            self._entries[caller] = _Entry(held, place, contexts.KEY, served, u)
            if len(served) == 1 and not compiling and x.grad_fn is None and u.requires_grad:
                # A model's input outlives the step: a layer that this one skips would take u in the
                # next.
                same = weakref.ref(u)
                u.register_hook(lambda slope: self._drop(caller, lambda e: e.u is same()))
        return u

    def forget(self) -> None:
        """Let go of what a pass has left to layers that it skipped; the next pass draws its own."""
        self._entries.clear()

    def _drop(self, caller: object, is_done: Callable[[_Entry], bool]) -> None:
        if (entry := self._entries.get(caller)) is not None and is_done(entry):
            del self._entries[caller]

    def __getstate__(self) -> dict[str, Any]:
        return {"num_layers": self.num_layers, "_entries": {}}


def orphans(layers: Mapping[str, DIPLayer]) -> dict[str, DIPLayer]:
    """The layers whose variance belongs to a layer that is not among these: replaced, or left in
    another model. No state dict and no optimiser of theirs has it."""
    owned = {
        id(layer._modules["variance"]) for layer in layers.values() if "variance" in layer._modules
    }
    return {name: layer for name, layer in layers.items() if id(layer.variance) not in owned}


def adopt(layers: Mapping[str, DIPLayer]) -> None:
    """Make a variance without an owner among these layers the child of the first one that has
    it."""
    while left := orphans(layers):
        layer = next(iter(left.values()))
        layer.variance = layer.__dict__.pop("variance")


def share_noise(layers: list[DIPLayer]) -> None:
    """Make these layers, in the model's order, share the first one's variance, its draw, and u.

    They are alike in features, feature dimension and num_samples. The others' variances are gone
    from the state dict, and `layer.variance` of each is the first one's.
    """
    first, share = layers[0], Share(len(layers))
    for layer in layers:
        layer.__dict__["share"] = share
        if layer is not first:
            del layer.variance
            # no child: a state dict and FSDP see one owner
            layer.__dict__["variance"] = first.variance
