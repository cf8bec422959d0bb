"""Variances from what the layers' inputs are like."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import worlds
from ..arguments import one_of, real
from ..nn.inputs import undense
from ..nn.layer import DIPLayer
from ..nn.numbering import need_layers
from ..nn.variance import Variance
from ..ops import dtensor
from .parameters import check_settable, set_named
from .patterns import require_alike, value_of_each
from .probe import around, each_batch, input_of, leaves
from .spreads import Examples, measured_spreads
from .summary import Summary, summary

# DIP layers beyond which the sum of their pulls does not grow: studies/depth.py
DEEP = 4
# sigma over spread by default, and where the batches hold token ids: studies/arithmetic_paired.py
RATIO, TOKENS_RATIO = 1.0, 0.1
PERS = ("layer", "feature")


def _holds_tokens(batch: object) -> bool:
    if isinstance(batch, Mapping):
        if "inputs_embeds" in batch:  # tokens, looked up by the caller
            return True
        batch = batch.get("input_ids")
    elif isinstance(batch, (list, tuple)):
        batch = batch[0] if batch else None
    return isinstance(batch, Tensor) and batch.dtype in (torch.int32, torch.int64)


def _may_be_ids(x: object) -> bool:
    """Whether it is a dense integer tensor [B, T], T > 1."""
    if type(x) is not Tensor or undense(x) is not None or x.ndim < 2 or x.shape[-1] < 2:
        return False
    return x.dtype in (torch.int32, torch.int64)


def _same_ids(given: Tensor, read: Tensor) -> bool:
    """Whether an embedding read what was given, as it is or one place later, as a decoder reads its
    labels; those below 0 are none."""
    if given.untyped_storage().data_ptr() == read.untyped_storage().data_ptr():
        return True
    if given.shape[:-1] != read.shape[:-1] or given.device != read.device:
        return False
    n = min(given.shape[-1], read.shape[-1] - 1)
    given, read = given[..., :n], read[..., 1 : n + 1]
    return bool((given >= 0).any() and ((given == read) | (given < 0)).all())


@contextlib.contextmanager
def _looked_up(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, all ids [B, T] that the model's nn.Embedding read."""
    found: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = input_of(module, args, kwargs)
        ids = worlds.unwrapped(ids) if isinstance(ids, Tensor) else ids  # of all that vmap maps
        if _may_be_ids(ids):
            found.append(ids)

    with contextlib.ExitStack() as watched:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                watched.enter_context(around(module, note))
        yield found


def amounts(name: str, value: Any) -> Any:
    """A number > 0, {pattern: number > 0} or None."""

    def positive(number: Any) -> float:
        return float(real(name, number, above=0, other=", or {pattern: number}"))

    if isinstance(value, Mapping) and value and all(isinstance(p, str) for p in value):
        return {pattern: positive(number) for pattern, number in value.items()}
    return None if value is None else positive(value)


def _ratio_of_each(
    ratio: float | Mapping[str, float] | None, layers: Mapping[str, DIPLayer]
) -> dict[str, float]:
    """Empty where there is none."""
    if ratio is None:
        return {}
    ratios = value_of_each("ratio", ratio, layers, "a DIP layer's name")
    of_variance: dict[Variance, list[str]] = {}  # layers may share one
    for name, layer in layers.items():
        of_variance.setdefault(layer.variance, []).append(name)
    require_alike("ratio", ratios, of_variance.values())
    return ratios


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    ratio: float | Mapping[str, float] | None = None,
    *,
    per: str = "layer",
    start: float | None = None,
    floor: float = 0.01,
) -> Summary:
    """Set each variance, and the prior of the objective's KL term, from the spread of real
    activations.

    per="layer": one sigma for all features of a layer, sigma = ratio * the root mean square of the
    spreads (standard deviations) of its input features. per="feature": sigma_j = ratio * the spread
    of feature j itself.

    The pull to the prior is weaker in a model of more than 4 DIP layers, and if the first layer
    that the batches reach sees fewer than 64 values of an example. In the second case sigma also
    starts below the prior's, unless a ratio or a start is given (docs/guides/variance.md).

    Args:
        model: A model with DIP layers. It is run in eval mode without noise; each module's mode is
            restored afterwards. A BatchNorm that has seen no batch yet takes each batch's own
            statistics, as in training (so it needs two examples in a batch); its running ones stay
            as they are. Power iterations of `torch.nn.utils.spectral_norm` are undone at the end.
        batches: One batch or an iterable of batches, such as a DataLoader; on the model's device. A
            batch is a tensor, a mapping (passed as keywords), or a list or tuple whose first
            element is the input. A list or tuple by itself is taken for several batches: put it
            inside a list, `[(x, y)]`.
        ratio: > 0, sigma over spread, of the prior and at the start; or {pattern: ratio}, where the
            first pattern that matches a layer's name counts. None: 1, and 0.1 where a batch holds
            tokens. These are: int32 or int64 where the model gets one tensor; a mapping's
            "input_ids" or "inputs_embeds"; any [B, T] of a batch that an nn.Embedding reads, unless
            its rows only rise, as time steps do. It may read them one place later, as Whisper's
            decoder reads its labels. A table's categories in one embedding look like tokens, unless
            the ids of each column start behind those of the column before: give the ratio.
        per: "layer" or "feature".
        start: > 0, sigma at the start over its prior's. None: 1, less where an example has few
            values. 0.3 lets a network learn before the noise has grown: for Adam and its kin.
        floor: > 0, for per="feature": the least spread that a feature is given, such as a blank
            pixel, as a multiple of the root mean square spread of its layer.

    Returns:
        The `summary`.

    Raises:
        TypeError: A ratio, start or floor that is no number, or batches that hold no dense tensors.
        ValueError: Bad values, a layer without a ratio, no batches, a DIP layer that no batch
            reached, or an input that is constant or not finite. The message names the layer.

    Warns:
        UserWarning: Inputs that vary by less than a thousandth of their size; it names the layers.
            A first layer most of whose features vary by less than a hundredth of the root mean
            square over all, as the raw columns of a table may.

    Examples:
        >>> model, x = dip.convert(nn.Sequential(nn.Linear(4, 2))), torch.randn(512, 4)
        >>> rows = dip.calibrate(model, [x], ratio=0.5)
        >>> [(row.name, round(row.ratio, 1)) for row in rows]
        [('0', 0.5)]

    Source: this project's choice; the paper does not state how lambda starts.
    """
    ratio = amounts("ratio", ratio)
    if start is not None:
        start = real("start", start, above=0)
    floor = real("floor", floor, above=0)
    one_of("per", per, PERS)
    layers = need_layers(model)
    full = {name: f"{name}.variance.log_variance".lstrip(".") for name in layers}
    check_settable({full[name]: layer.variance for name, layer in layers.items()})
    ratios = _ratio_of_each(ratio, layers)
    tokens = False

    def noted(looked_up: list[Tensor]) -> Iterator[Any]:
        nonlocal tokens
        for batch in each_batch(batches):
            looked_up.clear()
            yield batch  # and the model runs on it
            parts = leaves(dict(batch) if isinstance(batch, Mapping) else batch)
            given = [part for part in parts if _may_be_ids(part)]
            # along a row, positions, time steps and types only rise
            fall = [ids for ids in looked_up if (ids.diff() < 0).any()]
            read = any(_same_ids(leaf, ids) for leaf in given for ids in fall)
            tokens = tokens or _holds_tokens(batch) or read

    first = Examples()
    with _looked_up(model) as looked_up:
        spreads = measured_spreads(model, noted(looked_up), first)
    share = first.share()
    if start is None:  # a first input without features tells nothing
        start = math.sqrt(share or 1.0) if ratio is None else 1.0
    default = TOKENS_RATIO if tokens else RATIO
    levels = {name: spread.square().mean().sqrt() for name, spread in spreads.items()}
    constant = [
        name or "(root)" for name, level in levels.items() if len(spreads[name]) and not level > 0
    ]
    if constant:
        raise ValueError(
            f"batches: expected inputs that vary, got constant ones at {constant}; give several "
            "examples; what reads a constant is to be left plain, convert(exclude=...)"
        )
    learned = [layer.log_variance for layer in layers.values()]  # layers may share one
    pull = share * min(1.0, DEEP / len({id(each) for each in learned}))
    priors = {}  # ln of the prior's variance
    for name, level in levels.items():
        spread = spreads[name]
        spread = level.expand_as(spread) if per == "layer" else spread.clamp(min=floor * level)
        priors[name] = 2 * (ratios.get(name, default) * spread).log()
    more = 2 * math.log(start)
    large = [
        name or "(root)" for name, prior in priors.items() if (prior + max(more, 0) > 88).any()
    ]
    if large:
        raise ValueError(
            "ratio: expected one whose sigma^2 = (ratio * start * spread)^2 float32 can hold, got "
            f"{ratio or default} and start={start} at {large}"
        )
    for name, layer in layers.items():
        set_named(full[name], layer.variance, priors[name] + more)
        layer.variance.log_prior.copy_(dtensor.laid_out_as(priors[name], layer.variance.log_prior))
        layer.variance.pull.fill_(pull)
    return summary(model)
