"""The spread of each layer's input, and how many values of an example the first layer sees and how
alike they are, measured on batches."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm

from .. import worlds
from ..nn import inputs
from ..nn.layer import DIPLayer, has_own_forward
from ..nn.numbering import need_layers
from ..ops import dtensor
from .convertible import feature_dim_of
from .marks import noised_where_made
from .probe import input_of, watch

# values of an example below which it is measured how many of them are independent
FEW = 64
# values that are copied to float64 at once
PART = 2**18
# spread over size below which a layer's input says nothing of what it will be like in training
STILL = 1e-3
# spread over the layer's root mean square one below which a feature counts as hardly varying
SMALL = 0.01
# power iterations, as many as torch's newer spectral_norm makes at its start
ITERATIONS = 15


class _Moments:
    """Count, mean and scatter of rows, in float64, merged batch by batch. The scatter is each
    column's sum of squared deviations, or the whole matrix."""

    def __init__(self, whole: bool = False) -> None:
        self.whole = whole
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.scatter: Tensor | float = 0.0

    def add(self, rows: Tensor) -> None:
        # in parts: of a convolution's whole input three copies in float64 would be made
        for part in rows.split(max(1, PART // max(1, rows.shape[1]))) if len(rows) else ():
            self._add(part.double())

    def _add(self, rows: Tensor) -> None:
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

    def spread(self) -> Tensor:
        """Each column's standard deviation, [K], on the CPU."""
        assert isinstance(self.scatter, Tensor)  # something was added
        return (self.scatter / self.count).sqrt().cpu()

    def hardly_varies(self) -> bool:
        """Whether the spread is less than STILL of the size, both root mean squares over columns,
        and not 0."""
        assert isinstance(self.mean, Tensor)  # something was added
        spread, mean = self.spread().square().sum().item(), self.mean.square().sum().item()
        return 0 < spread < STILL**2 * (spread + mean)


class Examples:
    """How many values an example has at a layer's input, and how many of them are independent.

    An image has channels x height x width values, a sequence length x features, a row of a table
    its features. Of FEW values or more all count as independent.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, _Moments] = {}  # by how many values an example has
        self._count = self._total = 0

    def add(self, x: Tensor, dim: int) -> None:
        """More of them, [B, ...] with the features along dim, or one without a batch."""
        alone = x.ndim == 1 or dim % x.ndim == 0
        rows = (x[None] if alone else x).flatten(1)
        moments = self._sizes.setdefault(rows.shape[1], _Moments(whole=True))
        if rows.shape[1] < FEW:
            moments.add(rows)
        self._count += len(rows)
        self._total += rows.numel()

    def share(self) -> float:
        """How far an example's other values make up for the noise in one, from 0 to 1; from
        studies/defaults.py and held_back.py.

        How many are independent is the participation ratio (tr C)^2 / tr C^2 of their covariance C,
        by unbiased estimates of both (for normal values), because few examples are alike by chance.
        All are, where the examples are of several sizes or too few.
        """
        values = independent = self._total / self._count
        (moments, *others) = self._sizes.values()
        n = moments.count - 1
        if not others and n >= 2 and isinstance(moments.scatter, Tensor):
            covariance = moments.scatter / n
            trace, square = covariance.trace().item() ** 2, covariance.square().sum().item()
            square = (square - trace / n) * n * n / ((n - 1) * (n + 2))
            trace = trace - 2 / n * square
            if min(trace, square) > 0:
                independent = min(values, trace / square)
        return min(1.0, values / FEW * values / max(1.0, independent))


@contextlib.contextmanager
def _statistics_of_the_batch(model: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm and InstanceNorm that have seen no batch take each batch's own statistics,
    as in training, and keep none. Their running ones are still 0 and 1, by which they would
    normalise nothing."""
    fresh = [
        (m, m._buffers["running_mean"], m._buffers["running_var"])
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._NormBase) and _has_seen_nothing(m)
    ]
    for module, *_ in fresh:
        module.track_running_stats = False
        module._buffers.update(running_mean=None, running_var=None)
    try:
        yield
    finally:
        for module, mean, variance in fresh:
            module.track_running_stats = True
            module._buffers.update(running_mean=mean, running_var=variance)


def _has_seen_nothing(norm: nn.Module) -> bool:
    mean, variance = norm._buffers.get("running_mean"), norm._buffers.get("running_var")
    if mean is None or variance is None or nn.parameter.is_lazy(mean) or mean.is_meta:
        return False
    return bool((mean == 0).all() and (variance == 1).all())


@contextlib.contextmanager
def _spectral_norms(model: nn.Module) -> Iterator[None]:
    """Inside, torch.nn.utils.spectral_norm knows its norms, which it finds while it trains: it
    starts from random vectors, by which weights are tens of times too large."""
    hooks = [
        (hook, module)
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, SpectralNorm)
    ]
    vectors = [m.get_buffer(f"{hook.name}_{part}") for hook, m in hooks for part in "uv"]
    kept = [vector.clone() for vector in vectors]
    try:
        for hook, module in hooks:
            for _ in range(ITERATIONS):
                hook.compute_weight(module, do_power_iteration=True)
        yield
    finally:
        for vector, before in zip(vectors, kept):
            vector.copy_(before)


@torch.no_grad()
def measured_spreads(
    model: nn.Module, batches: Iterable[Any], first: Examples | None = None
) -> dict[str, Tensor]:
    """The spread of every DIP layer's input features over the batches, in eval mode, but for
    BatchNorm that has seen no batch and for spectral_norm; left in each layer's variance.spread
    too.

    first: is given what the layer reads that the batches reach first.
    """
    layers = need_layers(model)
    shown = {layer: name or "(root)" for name, layer in layers.items()}
    # What is called with a layer's input: it itself, or the layers that read what it noises, which
    # may be a part of what it makes (one token of all). Each with the feature dimension.
    read = {m: by for m, by in noised_where_made(model).items() if isinstance(by, DIPLayer)}
    watched: dict[nn.Module, tuple[DIPLayer, int]] = {
        layer: (layer, layer.feature_dim) for layer in shown.keys() - read.values()
    }
    watched |= {m: (layer, feature_dim_of(m)) for m, layer in read.items()}
    seen: dict[DIPLayer, _Moments] = {}
    reached: dict[nn.Module, None] = {}  # in their order

    def observe(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer, dim = watched[module]
        x = input_of(module, args, kwargs)
        if (kind := inputs.undense(x)) is not None:
            raise TypeError(
                f"batches: expected dense tensors, got {kind} at the layer {shown[layer]!r}"
            )
        x = worlds.unwrapped(dtensor.full(x.detach()))
        fits = -x.ndim <= dim < x.ndim and x.shape[dim] == layer.variance.num_features
        if not fits or x.is_complex():
            inputs.explain(layer, x, layer.log_variance)
        reached.setdefault(module)
        # its levels would wrap these sums, and end before them
        with torch._C._DisableFuncTorch():
            rows = x.movedim(dim, -1).flatten(0, -2) if x.ndim > 1 else x[None]
            seen.setdefault(layer, _Moments()).add(rows)
            if first is not None and len(rows) and module is next(iter(reached)):
                first.add(x, dim)

    with _statistics_of_the_batch(model), _spectral_norms(model):
        watch(model, watched, observe, batches)
    missed = [layer for layer in shown if layer not in seen or not seen[layer].count]
    if missed:
        unreached = [shown[layer] for layer in missed]
        own = any(map(has_own_forward, missed))
        raise ValueError(
            f"batches: expected to reach every DIP layer, none reached {unreached}; give batches "
            "that do, or leave these plain, convert(exclude=...): no batch reaches what training "
            "alone calls (an auxiliary head). If what is around one reads its weight without "
            "calling it, before=[...] noises the input of that"
            + "; a forward of your own has to call super().forward in eval mode too"
            * own
        )
    found = {name: seen[layer].spread() for name, layer in layers.items()}
    infinite = [name or "(root)" for name, each in found.items() if not bool(each.isfinite().all())]
    if infinite:
        raise ValueError(f"batches: expected finite inputs, got NaN or infinity at {infinite}")
    still = [name for layer, name in shown.items() if seen[layer].hardly_varies()]
    if still:
        warnings.warn(
            f"dipkernels: the inputs of {still} vary by less than a thousandth of their size, so "
            "noise in proportion to that is hardly any. Behind a class token, or branches that "
            "start near zero (LayerScale), they vary only later: train some steps, then calibrate "
            "again. Features that lie far from zero: subtract their mean",
            stacklevel=2,
        )
    entrance, _ = watched[next(iter(reached))]
    spread = seen[entrance].spread()
    spread = spread[spread > 0]
    if (spread < SMALL * spread.square().mean().sqrt()).sum() > len(spread) / 2:
        warnings.warn(
            f"dipkernels: most features under the noise of {shown[entrance]!r} vary by less than a "
            "hundredth of the root mean square over all of them, so the noise drowns them. "
            "Standardise the columns of a table, or put a BatchNorm in front of the layer",
            stacklevel=2,
        )
    for name, layer in layers.items():
        layer.variance.spread = found[name]
    return found
