"""The spread of each layer's input, and how many values of an example it has, measured on
batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..nn.numbering import need_layers
from .probe import input_of, watch


class Measured(NamedTuple):
    """Of a layer's input: each feature's standard deviation, [K], and how many values an example
    has there.

    An image has channels x height x width, a sequence length x features, a row of a table its
    features.
    """

    spread: Tensor
    values: float


class _Moments:
    """Count, mean and sum of squared deviations of each feature, in float64, merged batch by batch;
    examples and values."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0
        self.examples = self.values = 0

    def add(self, x: Tensor, dim: int) -> None:
        rows = x.detach().movedim(dim, -1).flatten(0, -2) if x.ndim > 1 else x.detach()[None]
        if len(rows) == 0:
            return
        # without a batch: one
        self.examples += x.shape[0] if x.ndim > 1 and dim % x.ndim > 0 else 1
        self.values += x.numel()
        rows = rows.double()
        mean, total = rows.mean(0), self.count + len(rows)
        delta = mean - self.mean
        self.squares = (
            self.squares
            + (rows - mean).square().sum(0)
            + delta.square() * (self.count * len(rows) / total)
        )
        self.mean = self.mean + delta * (len(rows) / total)
        self.count = total

    def measured(self) -> Measured:
        assert isinstance(self.squares, Tensor)  # something was added
        return Measured((self.squares / self.count).sqrt().cpu(), self.values / self.examples)


def measured_spreads(model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
    """The spread of every DIP layer's input features over the batches; left in each layer's
    variance.spread too."""
    return {name: found.spread for name, found in measured_inputs(model, batches).items()}


@torch.no_grad()
def measured_inputs(model: nn.Module, batches: Iterable[Any]) -> dict[str, Measured]:
    """What the batches look like at every DIP layer's input, in the order in which they first reach
    the layers; the spread is left in each layer's variance.spread too."""
    layers = need_layers(model)
    moments = {name: _Moments() for name in layers}
    name_of = {layer: name for name, layer in layers.items()}

    reached: dict[str, None] = {}  # in the order of the first calls

    def observe(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        reached.setdefault(name_of[layer])
        moments[name_of[layer]].add(input_of(layer, args, kwargs), layer.feature_dim)

    watch(model, layers.values(), observe, batches)
    unreached = [name or "(root)" for name in layers if moments[name].count == 0]
    if unreached:
        raise ValueError(f"batches: expected to reach every DIP layer, none reached {unreached}")
    found = {name: moments[name].measured() for name in reached}
    infinite = [
        name or "(root)" for name, each in found.items() if not bool(each.spread.isfinite().all())
    ]
    if infinite:
        raise ValueError(f"batches: expected finite inputs, got NaN or infinity at {infinite}")
    for name, layer in layers.items():
        layer.variance.spread = found[name].spread
    return found
