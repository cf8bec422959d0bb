"""Matrix weights that are in no layer that `convert` knows."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .. import worlds
from ..nn.input import DIPInput
from ..nn.layer import DIPLayer
from .convertible import TWINS, Names, counts_as, no_twin
from .naming import class_of, computing_weights, patterns_for
from .patterns import is_inside

ELSEWHERE = "; {pattern: dimension} says where its features are, if not in the last one"
_QUIET = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.utils.parametrize.ParametrizationList,
    nn.ParameterList,
    nn.ParameterDict,
)
_LEAST_SHARE = 0.01  # of a model's matrix weights, for what is no layer by the look of it


def own_matrices(module: Any) -> dict[str, Tensor]:
    """The floating and complex Parameters of two dimensions or more that are the module's own, in a
    list of its own, or what a parametrisation computes its own from; and what else holds 8-bit
    numbers, as quantised weights do, but for masks."""
    parameters: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    parameters |= {n: b for n, b in module.named_buffers(recurse=False) if _in_eight_bits(b)}
    listed = (nn.ParameterList, nn.ParameterDict)
    lists = {name: each for name, each in module.named_children() if isinstance(each, listed)}
    if nn.utils.parametrize.is_parametrized(module):
        lists |= module.parametrizations.items()
    for name, each in lists.items():
        parameters |= {f"{name}.{own}": p for own, p in each.named_parameters()}
    return {name: p for name, p in parameters.items() if _is_matrix(name, p)}


def has_lazy_weights(module: nn.Module) -> bool:
    """Whether Parameters of its own get their shapes from a first batch."""
    return any(nn.parameter.is_lazy(p) for p in module.parameters(recurse=False))


def _in_eight_bits(p: Tensor) -> bool:
    return p.dtype.itemsize == 1 and p.dtype is not torch.bool


def _is_matrix(name: str, p: Tensor) -> bool:
    if nn.parameter.is_lazy(p):
        return False
    if not (p.is_floating_point() or p.is_complex() or _in_eight_bits(p)):
        return False
    # a class token or positions, [1, N, D]; not StyleGAN2's modulated weight, [1, N, C, H, W]
    modulated = p.ndim > 4 and name.startswith("weight")
    embedded = p.ndim > 2 and p.shape[0] == 1 and not modulated
    return sum(size != 1 for size in p.shape) >= 2 and not embedded and not _is_mask(p)


def _may_be_a_table(name: str, p: Tensor) -> bool:
    """Whether it may be of positions, tokens or states, which are real."""
    return p.ndim == 2 and "weight" not in name and not p.is_complex()


def _is_mask(p: Tensor) -> bool:
    """Whether it is of zeros and ones, by its first entries. One of zeros alone may be a weight
    that is not loaded yet."""
    if p.dtype is not torch.uint8 or p.is_meta or not p.numel() or not worlds.has_values(p):
        return False
    return bool(p[:1].max() == 1)


def unnoised(
    names: Names, known: set[nn.Module], blocks: set[str]
) -> dict[tuple[nn.Module, ...], str]:
    """{modules: reason} for those that are no layer of `types` and hold matrix weights, one entry
    for each class.

    known: what is converted, left out on purpose, or named already. Small ones, such as a table of
    relative positions, count as layers only where the name of a matrix begins with `weight`.
    """
    kinds = (nn.Embedding, nn.EmbeddingBag)
    counted = computing_weights(names)  # with the module
    own = {m: own_matrices(m) for m in names if m not in counted and not isinstance(m, kinds)}
    total = sum({id(p): p.numel() for each in own.values() for p in each.values()}.values())
    by_class: dict[type[nn.Module], list[nn.Module]] = {}
    for module, matrices in own.items():
        if not matrices or module in known or is_inside(names[module], blocks) or is_quiet(module):
            continue
        around_layers = any(child in known for child in module.modules())
        if around_layers and all(_may_be_a_table(*each) for each in matrices.items()):
            continue  # a model's or a block's own, beside its layers
        by_class.setdefault(class_of(module), []).append(module)
    found = {}
    for kind, modules in by_class.items():
        share = sum(p.numel() for m in modules for p in own[m].values()) / total
        called = list(dict.fromkeys(name for m in modules for name in own[m]))
        if share < _LEAST_SHARE and not any(name.startswith("weight") for name in called):
            continue
        shown = ", ".join(called[:4]) + ", ..." * (len(called) > 4)
        elsewhere = ELSEWHERE * (not kind.__module__.startswith("torch.nn."))
        way_out = (
            f"before={patterns_for(modules, names)} with batches=[...] puts noise at its "
            f"input{elsewhere}"
        )
        if refused := next(filter(None, map(no_twin, modules)), None):
            way_out = f"put a DIPInput in front of it, as before=[...] cannot take it: {refused}"
        found[tuple(modules)] = (
            f"{share:.1%} of the model's matrix weights are its own tensors ({shown}), which "
            f"get no noise: {way_out}"
        )
    return found


def is_quiet(module: nn.Module) -> bool:
    """Whether its weights are no miss: a layer's, whose own way names them, a norm's, a table's, or
    behind noise of its own."""
    plain = counts_as(module) is not None or isinstance(module, (*TWINS, DIPLayer, *_QUIET))
    noised = any(isinstance(child, DIPInput) for child in module.children())  # by its own code
    name, package = type(module).__name__, type(module).__module__
    # takes no input: of positions, a bias
    table = len(inspect.signature(type(module).forward).parameters) == 1
    # not a NormedLinear, which multiplies by a normed matrix
    norm = "Norm" in name and not any(part in name for part in ("Linear", "Conv"))
    known = norm or any(part in name for part in ("Embed", "Positional"))
    return plain or noised or table or known or package.startswith("peft.")
