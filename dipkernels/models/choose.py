"""Which modules of a model `convert` is to noise: by class, by name, by filter, and as far as it
can."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from torch import nn

from ..arguments import integer
from ..nn.attention import DIPMultiheadAttention
from ..nn.numbering import dip_layers, require_module
from ..nn.wrappers import plain_names
from .convertible import (
    OUT_PROJECTION,
    TWINS,
    Names,
    Types,
    counts_as,
    feature_dim_of,
    is_candidate,
    no_twin,
    put_away,
)
from .loose_weights import has_lazy_weights, own_matrices, unnoised
from .marks import noised_where_made
from .naming import alike, computing_weights, shown_together
from .patterns import Patterns, around, is_inside, strings
from .refused import block_names, cannot


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which modules are to be noised."""

    names: Names
    excluded: set[nn.Module]
    wanted: set[nn.Module]  # what exclude and filter let through, layers or not
    asked: dict[nn.Module, int]  # what `before` names, each with its feature dimension
    reasons: dict[nn.Module, str]  # why layers that are wanted cannot be converted
    matched: list[nn.Module]  # the layers that can
    blocks: set[str]  # the names of the modules inside which no layer is converted by itself
    noised: dict[nn.Module, nn.Module | None]  # layers whose input the module noises


def choose(
    model: nn.Module,
    types: Sequence[type[nn.Module]] | None,
    filter: Callable[[nn.Module, str], bool] | None,
    exclude: Sequence[str],
    before: Sequence[str] | Mapping[str, int] = (),
) -> Choice:
    """The choice by arguments as `convert`'s, which raises for those that are wrong."""
    require_module(model)
    if filter is not None and not callable(filter):
        raise TypeError(f"filter: expected a function of (module, name), got {filter!r}")
    kinds = _kinds(types)
    _refuse_wrapped(model)
    names: dict[nn.Module, list[str]] = {}
    for name, module in plain_names(model, remove_duplicate=False).items():
        names.setdefault(module, []).append(name)
    excluded = _excluded(names, exclude)
    asked = _asked_before(names, before)
    noised = noised_where_made(model)
    wanted = {
        module
        for module, every_name in names.items()
        if module not in excluded
        and module not in noised
        and (filter is None or _passes(filter, module, every_name[0], kinds))
    }
    blocks = block_names(names, kinds)
    impossible = cannot(names, kinds, blocks)
    reasons = {m: why for m, why in impossible.items() if m in wanted and m not in asked}
    matched = _matched(names, wanted - asked.keys() - reasons.keys(), kinds, blocks)
    if not matched and not asked:
        holders = unnoised(names, names.keys() - wanted | reasons.keys(), blocks)
        raise ValueError(_nothing_matched(model, kinds, names, alike(reasons, names) | holders))
    return Choice(names, excluded, wanted, asked, reasons, matched, blocks, noised)


def _kinds(types: Any) -> Types:
    """The classes to convert; a single one stands for a list of one."""
    given = TWINS if types is None else types
    listed = isinstance(given, Iterable) and not isinstance(given, (type, str))
    kinds = tuple(given) if listed else (given,)
    if not kinds or not all(isinstance(t, type) and t in TWINS for t in kinds):
        known = ", ".join(f"nn.{t.__name__}" for t in TWINS)
        raise ValueError(f"types: expected some of the classes {known}, got {types!r}")
    return kinds


def _refuse_wrapped(model: nn.Module) -> None:
    for name, module in model.named_modules():
        kinds = {c.__name__ for c in type(module).__mro__ if c.__module__.startswith("torch.")}
        wrapper = kinds & {"FSDPModule", "FullyShardedDataParallel", "DistributedDataParallel"}
        if wrapper:
            raise RuntimeError(
                f"model: expected one that is not yet wrapped, got {wrapper.pop()} at "
                f"{name or 'the root'!r}, which would not synchronise variances added now; convert "
                "first, then shard or wrap"
            )


def _excluded(names: Names, exclude: Sequence[str]) -> set[nn.Module]:
    patterns = Patterns("exclude", exclude)
    excluded = {
        module
        for module, every_name in names.items()
        if patterns.all(*(outer for name in every_name for outer in around(name)[1:]))
    }
    patterns.require_used([*chain(*names.values())])
    return excluded


def _asked_before(names: Names, before: Sequence[str] | Mapping[str, int]) -> dict[nn.Module, int]:
    """The modules that `before` names, each with its feature dimension."""
    dims: dict[str, int | None] = dict.fromkeys(strings("before", before))
    if isinstance(before, Mapping):
        dims = {pattern: integer(f"before[{pattern!r}]", dim) for pattern, dim in before.items()}
    patterns = Patterns("before", dims)
    found = {m: patterns.all(*every_name) for m, every_name in names.items()}
    patterns.require_used([*chain(*names.values())])
    asked: dict[nn.Module, int] = {}
    computing = computing_weights(module for module, hits in found.items() if hits)
    for module, hits in found.items():
        if hits and module not in computing:
            reason = no_twin(module)
            if reason is not None:
                raise ValueError(
                    "before: expected modules that noise can be put before, got "
                    f"{names[module][0]!r} ({type(module).__name__}): {reason}"
                )
            dim = dims[hits[0]]  # the first pattern counts
            asked[module] = feature_dim_of(module) if dim is None else dim
    return asked


def _passes(
    filter: Callable[[nn.Module, str], bool],
    module: nn.Module,
    name: str,
    types: Types,
) -> bool:
    if is_candidate(module, types):
        return filter(module, name)
    if not (own_matrices(module) or has_lazy_weights(module)):
        return True
    try:
        return filter(module, name)
    except AttributeError:  # a filter written for layers asks what this module has not
        return False


def _matched(
    names: Names, candidates: set[nn.Module], types: Types, blocks: set[str]
) -> list[nn.Module]:
    """The layers to convert. What is inside a LoRA layer goes with it, and an out_proj with its
    attention."""
    spares = [kept for wrapper in names if (kept := put_away(wrapper)) is not None]
    spare = {m for kept in spares for m in kept.modules()}
    matched = [
        m
        for m in names
        if m in candidates
        and counts_as(m) in types
        and m not in spare
        and not is_inside(names[m], blocks)
    ]
    owners: set[nn.Module] = {m.out_proj for m in names if isinstance(m, DIPMultiheadAttention)}
    owners |= {m.out_proj for m in matched if type(m) is nn.MultiheadAttention}
    return [m for m in matched if type(m) is not OUT_PROJECTION or m in owners]


def _nothing_matched(
    model: nn.Module, types: Types, names: Names, left: Mapping[tuple[nn.Module, ...], str]
) -> str:
    wanted = " or ".join(f"nn.{t.__name__}" for t in types)
    text = (
        f"model: expected a {wanted} to convert, found none that types, filter and exclude let "
        "through"
    )
    already = len(dip_layers(model))
    if already:
        text += f"; {already} layer(s) are DIP layers already"
    if left:
        text += f"; {sum(map(len, left))} module(s) cannot be converted: " + "; ".join(
            f"{shown_together(modules, names)}: {reason}"
            for modules, reason in list(left.items())[:5]
        )
    return text
