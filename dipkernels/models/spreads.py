"""The spread of each layer's input, how many values of an example it has and how alike they are,
measured on batches."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..nn.inputs import undense
from ..nn.numbering import need_layers
from .probe import input_of, watch

# values of an example below which it is measured how many of them are independent
FEW = 64


class Measured(NamedTuple):
    """Of a layer's input: each feature's standard deviation, [K]; how many values an example has
    there, and how many of them are independent.

    An image has channels x height x width values, a sequence length x features, a row of a table
    its features. Of FEW values or more all count as independent.
    """

    spread: Tensor
    values: float
    independent: float


class _Moments:
    """Count, mean and scatter of rows, in float64, merged batch by batch. The scatter is each
    column's sum of squared deviations, or the whole matrix."""

    def __init__(self, whole: bool = False) -> None:
        self.whole = whole
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.scatter: Tensor | float = 0.0

    def add(self, rows: Tensor) -> None:
        if len(rows) == 0:
            return
        rows = rows.double()
        mean, total = rows.mean(0), self.count + len(rows)
        delta = mean - self.mean
        self.scatter = (
            self.scatter
            + self._squared(rows - mean)
            + self._squared(delta[None]) * (self.count * len(rows) / total)
        )
        self.mean = self.mean + delta * (len(rows) / total)
        self.count = total

    def _squared(self, rows: Tensor) -> Tensor:
        return rows.T @ rows if self.whole else rows.square().sum(0)


class _Inputs:
    """What reaches one layer."""

    def __init__(self) -> None:
        self.features = _Moments()
        self.sizes: dict[int, _Moments] = {}  # by how many values an example has
        self.examples = self.values = 0

    def add(self, x: Tensor, dim: int) -> None:
        x = x.detach()
        features = x.movedim(dim, -1).flatten(0, -2) if x.ndim > 1 else x[None]
        if len(features) == 0:
            return
        self.features.add(features)
        alone = x.ndim == 1 or dim % x.ndim == 0  # without a batch
        rows = x[None].flatten(1) if alone else x.flatten(1)
        examples = self.sizes.setdefault(rows.shape[1], _Moments(whole=True))
        if rows.shape[1] < FEW:
            examples.add(rows)
        self.examples += len(rows)
        self.values += rows.numel()

    def measured(self) -> Measured:
        assert isinstance(self.features.scatter, Tensor)  # something was added
        spread = (self.features.scatter / self.features.count).sqrt().cpu()
        values = self.values / self.examples
        of_one_size = next(iter(self.sizes.values())) if len(self.sizes) == 1 else _Moments()
        return Measured(spread, values, max(1.0, min(values, _independent(of_one_size))))


def _independent(examples: _Moments) -> float:
    """Of how many independent values an example is made: the participation ratio
    (tr C)^2 / tr C^2 of the covariance C of its values; infinity where that is not known.

    Unbiased estimates of both (for normal values) stand for them, because few examples are alike by
    chance.
    """
    n = examples.count - 1
    if n < 2 or not isinstance(examples.scatter, Tensor):
        return math.inf
    covariance = examples.scatter / n
    trace, square = covariance.trace().item() ** 2, covariance.square().sum().item()
    square = (square - trace / n) * n * n / ((n - 1) * (n + 2))
    trace = trace - 2 / n * square
    return trace / square if min(trace, square) > 0 else math.inf


def measured_spreads(model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
    """The spread of every DIP layer's input features over the batches; left in each layer's
    variance.spread too."""
    return {name: found.spread for name, found in measured_inputs(model, batches).items()}


@torch.no_grad()
def measured_inputs(model: nn.Module, batches: Iterable[Any]) -> dict[str, Measured]:
    """What the batches look like at every DIP layer's input, in the order in which they first reach
    the layers; the spread is left in each layer's variance.spread too."""
    layers = need_layers(model)
    seen = {name: _Inputs() for name in layers}
    name_of = {layer: name for name, layer in layers.items()}

    reached: dict[str, None] = {}  # in the order of the first calls

    def observe(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name, x = name_of[layer], input_of(layer, args, kwargs)
        if (kind := undense(x)) is not None:
            raise TypeError(
                f"batches: expected dense tensors, got {kind} at the layer {name or '(root)'!r}"
            )
        reached.setdefault(name)
        seen[name].add(x, layer.feature_dim)

    watch(model, layers.values(), observe, batches)
    unreached = [name or "(root)" for name in layers if seen[name].examples == 0]
    if unreached:
        raise ValueError(f"batches: expected to reach every DIP layer, none reached {unreached}")
    found = {name: seen[name].measured() for name in reached}
    infinite = [
        name or "(root)" for name, each in found.items() if not bool(each.spread.isfinite().all())
    ]
    if infinite:
        raise ValueError(f"batches: expected finite inputs, got NaN or infinity at {infinite}")
    for name, layer in layers.items():
        layer.variance.spread = found[name].spread
    return found
