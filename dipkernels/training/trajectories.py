"""Several draws of the noise in one forward pass, by a longer batch."""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections import UserDict
from collections.abc import Callable, Mapping
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..arguments import integer
from ..nn.inputs import undense
from ..nn.numbering import dip_layers, require_module, warn_of_equal_numbers
from ..noise import contexts

_STACKED = "torch.stack([model(...) for _ in range(m)])"  # where the batch cannot hold m of each


def trajectories(
    model: Callable[..., Any], *args: Any, m: int, in_dims: Any = 0, **kwargs: Any
) -> Any:
    """Run m independent noisy passes in one, by folding m into the batch: out[s, b] = f(x[b]; noise
    of trajectory s).

    Every tensor [B, ...] is repeated m times along its first dimension, example by example (row b *
    m + s). So the noise of an example does not depend on the other examples of the batch. BatchNorm
    in training mode sees all B * m rows at once. So does a model that compares the examples of its
    batch (CLIP's similarities, in-batch negatives) or numbers their rows (a graph's edges, an
    EmbeddingBag's offsets). There take torch.stack([model(x) for _ in range(m)]), outside
    fixed_noise, because inside it the passes would be equal. A model that takes the sequence first,
    [L, B, E], would get a longer sequence: pass a function that puts the batch first.

    Args:
        model: A module in training mode (or inside sampling_on), or a callable.
        args: Its positional arguments: any pytrees, dataclasses and mappings.
        m: Number of trajectories, >= 1.
        in_dims: 0 repeats a tensor, None passes it unchanged: layers that read it alone (a
            DeepONet's trunk) then draw once for all m. One value for all arguments; or a tuple for
            args, as in torch.vmap (kwargs are then repeated); or a dict from an argument's position
            or name, for those that differ from 0, such as {"position_ids": None}. An entry
            for a nested argument may be a prefix of its structure.
        kwargs: Its named arguments, the same.

    Returns:
        The model's output, any pytree, with every tensor [B * m, ...] as [m, B, ...] (a view).
        What is not a tensor, pytree, dataclass or mapping is returned as the model made it. Under
        fixed_noise(key, row0), row0 counts the repeated entries.

    Raises:
        TypeError: An input that is packed, nested or sparse.
        ValueError: A module without DIP layers although m > 1, an input whose first size is not B,
            or an output whose first size is not B * m. The message names it.
        RuntimeError: A model in eval mode, or one whose DIP layers all are, where the m copies
            would be equal.

    Examples:
        >>> model = dip.convert(nn.Sequential(nn.Linear(4, 2)))
        >>> dip.trajectories(model, torch.randn(8, 4), m=3).shape
        torch.Size([3, 8, 2])

    Source: arXiv 2506.04690, Algorithm 1.
    """
    require_module(model, or_function=True)
    m = integer("m", m, 1)
    if isinstance(model, nn.Module) and not model.training and contexts.MODE != "on":
        raise RuntimeError(
            "model: expected training mode, got eval mode, where the m trajectories would be "
            "equal; call model.train(), or use dip.predict(model, ..., k=m)"
        )
    if isinstance(model, nn.Module):
        warn_of_equal_numbers(model)
        layers = dip_layers(model).values()
        if m > 1 and not layers:
            raise ValueError(
                "model: expected DIP layers, found none: its m trajectories would be equal; "
                "convert it first, or pass a function that draws noise of its own"
            )
        if m > 1 and contexts.MODE is None and not any(layer.training for layer in layers):
            raise RuntimeError(
                "model: expected a DIP layer in training mode, got eval mode in each (a frozen "
                "backbone, a teacher that shares them), where the m trajectories would be equal; "
                "call train() of those that shall draw noise, or take m=1"
            )
    return folded(model, args, kwargs, m, in_dims)


def folded(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    m: int,
    in_dims: Any,
    chunked: bool = False,
) -> Any:
    """chunked: whether these are passes of `predict`, which knows no in_dims."""
    dims, fold = _dims_of(in_dims, args, kwargs), _Fold(m, chunked)
    folded_args = [fold(value, dims[i], f"args[{i}]") for i, value in enumerate(args)]
    folded_kwargs = {name: fold(value, dims[name], name) for name, value in kwargs.items()}
    batch = fold.batch
    if batch is None:
        way_out = "" if chunked else f"; {_STACKED}"
        raise ValueError(
            f"args: expected a tensor [B, ...] to repeat, found none ({fold.as_it_is} passes one "
            f"as it is, and what an object holds is not seen){way_out}"
        )
    out = model(*folded_args, **folded_kwargs)
    return map_tensors(lambda name, value: _unfolded(name, value, batch, m, chunked), out)


def _dims_of(in_dims: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Any, Any]:
    """in_dims of every argument, by its position or name."""
    places = [*range(len(args)), *kwargs]
    if isinstance(in_dims, (tuple, list)):
        if len(in_dims) != len(args):
            raise ValueError(
                f"in_dims: expected one entry for each of {len(args)} positional arguments, got "
                f"{len(in_dims)}"
            )
        return dict.fromkeys(kwargs, 0) | dict(enumerate(in_dims))
    if isinstance(in_dims, dict):
        unknown = [key for key in in_dims if key not in places]
        if unknown:
            raise ValueError(f"in_dims: expected positions or names of arguments, got {unknown}")
        return dict.fromkeys(places, 0) | in_dims
    return dict.fromkeys(places, in_dims)


class _Fold:
    """Repeats tensors m times along their first dimension; remembers B and who set it."""

    def __init__(self, m: int, chunked: bool) -> None:
        self.m, self.first, self.chunked = m, "", chunked
        self.as_it_is = "chunk=1" if chunked else "in_dims=None"
        self.batch: int | None = None

    def __call__(self, value: Any, dims: Any, name: str) -> Any:
        try:
            pairs, spec = _flat(value, is_leaf=_is_packed)
        except RecursionError:
            raise _holds_itself(name, value) from None
        try:
            flat_dims = pytree._broadcast_to_and_flatten(dims, spec, is_leaf=lambda d: d is None)
        except ValueError:
            flat_dims = None
        if flat_dims is None:
            raise ValueError(
                f"in_dims: expected 0, None or a prefix of {name}'s structure, got {dims!r}"
            )
        leaves = [
            self._leaf(leaf, d, name + pytree.keystr(path))
            for (path, leaf), d in zip(pairs, flat_dims, strict=True)
        ]
        return pytree.tree_unflatten(leaves, spec)

    def _leaf(self, leaf: Any, dim: Any, name: str) -> Any:
        if dim is None:
            return leaf
        if isinstance(leaf, PackedSequence) or (isinstance(leaf, Tensor) and self.m > 1):
            kind = undense(leaf)
            if kind is not None:
                raise TypeError(
                    f"{name}: expected a dense tensor [B, ...] to repeat, got {kind}: pad it; "
                    f"{self.as_it_is} passes it as it is"
                )
        if not isinstance(leaf, Tensor):
            return map_tensors(lambda part, value: self._leaf(value, dim, part), leaf, name=name)
        if isinstance(dim, bool) or dim != 0:
            raise ValueError(f"in_dims: expected 0 or None for {name}, got {dim!r}")
        size = leaf.shape[0] if leaf.ndim else None
        if self.batch is None and size is not None:
            self.batch, self.first = size, name
        if size is None or size != self.batch:
            wanted = f"{self.batch}, as {self.first}" if self.batch is not None else "the batch"
            way_out = f"{self.as_it_is} for it passes it as it is"
            if not self.chunked:
                kind = (
                    "holds the parts of all examples in one row, as Qwen2-VL's patches"
                    if leaf.is_floating_point()
                    else "numbers the rows of another input, as a graph's edges do, m copies of "
                    "those would be wrong"
                )
                way_out += f". If it {kind}: {_STACKED}"
            raise ValueError(
                f"{name}: expected a tensor whose first size is {wanted}, got shape "
                f"{tuple(leaf.shape)}; {way_out}"
            )
        if self.m == 1:
            return leaf
        return leaf.unsqueeze(1).expand(size, self.m, *leaf.shape[1:]).flatten(0, 1)


def _unfolded(name: str, value: Tensor, batch: int, m: int, chunked: bool) -> Tensor:
    if value.ndim == 0 or value.shape[0] != batch * m:
        if chunked:
            raise ValueError(
                f"{name}: expected a tensor whose first size is B * chunk = {batch * m}, got shape "
                f"{tuple(value.shape)}; take chunk=1; where it is a loss, leave out the labels"
            )
        got = (
            f"shape {tuple(value.shape)}: if it does not have the examples first (a recurrent "
            "state), give a function that leaves it out, such as lambda x: model(x)[0]; if it "
            f"pools rows (a graph's nodes), {_STACKED}"
        )
        if value.ndim == 0:
            got = (
                "a scalar: a loss made inside the model has lost its trajectories. Take it from "
                "logits with dip.objective, or use model(...).loss + dip.kl_penalty(model)"
            )
        raise ValueError(
            f"{name}: expected a tensor whose first size is B * m = {batch * m}, got {got}"
        )
    return value.unflatten(0, (batch, m)).transpose(0, 1)


def _holds_itself(name: str, value: object) -> ValueError:
    return ValueError(
        f"{name}: expected tensors in parts that do not hold themselves, got a "
        f"{type(value).__name__} with such a part; leave that out"
    )


# No lambda in the call: the Dynamo of torch 2.10 cannot test one for truth, as pytree does.
def _is_packed(part: Any) -> bool:
    return isinstance(part, PackedSequence)


def _flat(value: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[Any], Any]:
    """(path, leaf) of every leaf, and the structure; by number where a class was registered without
    the names of its parts, as diffusers registers its outputs."""
    try:
        return pytree.tree_flatten_with_path(value, is_leaf)
    except ValueError:
        leaves, spec = pytree.tree_flatten(value, is_leaf)
        return [((pytree.SequenceKey(i),), leaf) for i, leaf in enumerate(leaves)], spec


def map_tensors(fn: Callable[..., Tensor], *outs: Any, name: str = "output") -> Any:
    """fn(name, *tensors) for every tensor of one structure that the outs share; other leaves are
    the first one's, and so is every part in which nothing changes: a config, a cache.

    Raises ValueError where a part holds itself.
    """
    try:
        return _mapped(fn, outs, name)
    except RecursionError:
        raise _holds_itself(name, outs[0]) from None


def _mapped(fn: Callable[..., Tensor], outs: tuple[Any, ...], name: str) -> Any:
    first = outs[0]
    if isinstance(first, Tensor):
        return fn(name, *outs)
    pairs, spec = _flat(first)
    if not spec.is_leaf():
        others = [pytree.tree_leaves(out) for out in outs[1:]]
        if any(len(other) != len(pairs) for other in others):
            raise ValueError(
                f"{name}: expected as many parts in every pass, for average=None stacks them, got "
                f"{len(pairs)} and others; call the model k times inside dip.sampling_on()"
            )
        leaves = [
            _mapped(fn, (leaf, *(other[i] for other in others)), name + pytree.keystr(path))
            for i, (path, leaf) in enumerate(pairs)
        ]
        if all(new is old for new, (_, old) in zip(leaves, pairs)):
            return first
        return pytree.tree_unflatten(leaves, spec)
    get: Callable[[Any, Any], Any]
    if is_dataclass := dataclasses.is_dataclass(first) and not isinstance(first, type):
        get, paths = getattr, {f.name: f".{f.name}" for f in dataclasses.fields(first)}
    elif isinstance(first, Mapping):
        get, paths = operator.getitem, {key: f"[{key!r}]" for key in first}
    else:
        return first
    contents = {
        key: _mapped(fn, tuple(get(out, key) for out in outs), name + path)
        for key, path in paths.items()
    }
    if all(new is get(first, key) for key, new in contents.items()):
        return first
    if not is_dataclass and not isinstance(first, (dict, UserDict)):
        return contents  # a copy of another kind may share its contents with the caller's
    changed = copy.copy(first)
    for key, new in contents.items():
        if is_dataclass:
            object.__setattr__(changed, key, new)  # of a frozen one too
        else:
            changed[key] = new
    return changed
