"""Several noisy passes of one model: `trajectories` for training (Algorithm 1), `predict` (Algorithms 2 and 3)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from . import analytic, seeds
from .check import require_finite
from .layers import dip_layers, warn_of_equal_numbers
from .probe import eval_mode


def trajectories(model: Callable[..., Any], *args: Any, m: int, in_dims: Any = 0, **kwargs: Any) -> Any:
    """m independent noisy passes in one: out[s, b] = f(x[b]; noise of trajectory s), by folding m into the batch.

    model: a module in training mode (or inside sampling_on), or a callable. args, kwargs: any pytrees; every tensor
    [B, ...] is repeated m times along its first dimension, example by example (row b * m + s), so that the noise of an
    example does not depend on what else is in the batch. m: >= 1.
    in_dims: 0 folds a tensor, None passes it as it is: one for all, a tuple for args as in torch.vmap (kwargs are then
    folded), or a dict from argument position or name for those that differ from 0, such as {"position_ids": None}.
    Entries may be prefixes.
    Returns the model's output, any pytree, with every tensor [B * m, ...] as [m, B, ...] (a view). What is neither a
    tensor nor a pytree, dataclass or mapping is handed back as the model made it. Under fixed_noise(key, row0), row0
    counts folded entries. BatchNorm in training mode sees all B * m rows at once.
    Raises ValueError for a module without DIP layers where m > 1, an input whose first size is not B or an output whose first size
    is not B * m, naming it, and RuntimeError for a model in eval mode, which would give m equal copies. Source: arXiv
    2506.04690, Algorithm 1.
    """
    _check_count("m", m, 1)
    if isinstance(model, nn.Module) and not model.training and seeds._MODE != "on":
        raise RuntimeError(
            "model: expected training mode, got eval mode, where the m trajectories would be equal; "
            "call model.train(), or use dip.predict(model, ..., k=m)"
        )
    if isinstance(model, nn.Module):
        warn_of_equal_numbers(model)
        if m > 1 and not dip_layers(model):
            raise ValueError(
                "model: expected DIP layers, found none: its m trajectories would be equal; convert it first, or pass a "
                "function that draws noise of its own"
            )
    return _folded(model, args, kwargs, m, in_dims)


@overload
def predict(
    model: nn.Module,
    *args: Any,
    k: int | None = None,
    average: str = "probs",
    chunk: int | None = None,
    method: str = "sample",
    dim: int | None = None,
    **kwargs: Any,
) -> Tensor: ...
@overload
def predict(
    model: nn.Module,
    *args: Any,
    k: int | None = None,
    average: None,
    chunk: int | None = None,
    method: str = "sample",
    dim: int | None = None,
    **kwargs: Any,
) -> Any: ...
def predict(
    model: nn.Module,
    *args: Any,
    k: int | None = None,
    average: str | None = "probs",
    chunk: int | None = None,
    method: str = "sample",
    dim: int | None = None,
    **kwargs: Any,
) -> Any:
    """The prediction of k noisy passes, mean over s of softmax(f(x; noise s)); k = 0: of the plain network.

    model: a module with DIP layers; dropout and BatchNorm are in eval mode meanwhile, and each module's mode is
    restored. args, kwargs: the model's; no gradients are kept. k: >= 0, 16 by default; 0 is Algorithm 3, one deterministic pass.
    average: "probs" (mean of the softmax over `dim`, at least float32), "sigmoid" (mean of the sigmoid, for one logit
    or several labels), "logits" (mean of the outputs, at least float32), or None (all outputs). dim: of the classes, for
    "probs": the last one by default where the output is [B, K] or [B, T, K], and to be given where it has more
    dimensions, such as 1 for a map [B, K, H, W]. chunk: >= 1 passes at a time (1), folded into the batch as `trajectories` does; memory
    grows with chunk, not with k. The output must be a tensor [B, ...], or have one as `logits`; with average=None any
    pytree, whose leaves that are not tensors are those of the first pass.
    Under fixed_noise pass i (chunk i) takes the key + i * 0x9E3779B97F4A7C15 mod 2^64: passes differ, and replay for
    the same chunk; row0 counts examples.
    method: "sample", or "analytic": one deterministic pass in which every activation behind a DIPLinear is replaced by
    its exact expectation over that layer's noise, for the cost of k = 0; k and chunk do not apply. Each layer reads the
    mean of the one before: this approximates Algorithm 2 and is neither it nor Algorithm 3. For MLPs and transformer
    blocks of linear layers; a ValueError names the layer where a model's structure does not allow it.
    Returns [B, ...], or for average=None [k, B, ...] ([1, B, ...] for k = 0 and "analytic").
    Raises ValueError, TypeError or RuntimeError naming the argument. Source: arXiv 2506.04690, Algorithms 2 and 3;
    whether logits or probabilities are averaged is not stated there.
    """
    if method not in ("sample", "analytic"):
        raise ValueError(f"method: expected 'sample' or 'analytic', got {method!r}")
    if method == "analytic" and not (k is None and chunk is None):
        raise ValueError(f"k, chunk: expected none with method='analytic', which is one pass, got {k}, {chunk}")
    k, chunk = 16 if k is None else k, 1 if chunk is None else chunk
    _check_count("k", k, 0)
    _check_count("chunk", chunk, 1)
    check_average(average, dim)
    layers = dip_layers(model)
    if k > 0 and not layers:
        raise ValueError(
            "model: expected DIP layers, found none: its k passes would be equal; convert it first, or pass k=0"
        )
    warn_of_equal_numbers(model)
    if k > 0:
        require_finite(layers)
    parts: list[Any] = []
    if method == "analytic":
        with torch.no_grad(), eval_mode(model):
            out = analytic.expected(model, *args, **kwargs)
        return _map_tensors(_add_leading, out) if average is None else tensor_output(out, average, dim)
    with torch.no_grad(), eval_mode(model):
        for number, first in enumerate(range(0, max(k, 1), chunk)):
            count = min(chunk, max(k, 1) - first)
            if k == 0:
                out = _map_tensors(_add_leading, model(*args, **kwargs))
            else:
                with seeds.sampling_on(), seeds.numbered_pass(number, count):
                    out = _passes(model, args, kwargs, count)
            if average is None:
                parts.append(out)
                continue
            part = tensor_output(out, average, dim, stacked=1).sum(0)
            parts = [parts[0].add_(part)] if parts else [part]
    if average is None:
        return _map_tensors(lambda name, *chunks: torch.cat(chunks), *parts)
    return parts[0] / max(k, 1)


def _passes(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], count: int) -> Any:
    if count == 1:
        return _map_tensors(_add_leading, model(*args, **kwargs))
    return _folded(model, args, kwargs, count, 0)


def _add_leading(name: str, value: Tensor) -> Tensor:
    return value[None]


_AVERAGES = ("probs", "sigmoid", "logits", None)


def check_average(average: str | None, dim: int | None, known: tuple[str | None, ...] = _AVERAGES) -> None:
    """Raise ValueError for an unknown `average`, or a `dim` without a softmax to take over it."""
    if average not in known:
        raise ValueError(f"average: expected one of {known}, got {average!r}")
    if dim is not None and average != "probs":
        raise ValueError(f"dim: expected None with average={average!r}, which has no softmax, got {dim!r}")


def tensor_output(out: Any, average: str, dim: int | None = None, stacked: int = 0) -> Tensor:
    """The output, or its `logits`, at least float32; its softmax over dim for "probs", its sigmoid for "sigmoid".

    stacked: the number of dimensions in front of the model's own, which dim does not count.
    """
    if not isinstance(out, Tensor):
        out = out.get("logits", out) if isinstance(out, Mapping) else getattr(out, "logits", out)
    if not isinstance(out, Tensor) or not out.is_floating_point():
        raise TypeError(
            f"model: expected a floating output, or one named 'logits', got {_kind(out)}; or pass average=None"
        )
    values: Tensor = out.to(torch.promote_types(out.dtype, torch.float32))
    if average == "sigmoid":
        return values.sigmoid()
    if average == "probs":
        return values.softmax(_class_dim(tuple(values.shape[stacked:]), dim) + stacked)
    return values


def _class_dim(shape: tuple[int, ...], dim: int | None) -> int:
    """The dimension of the classes of an output [B, ...]; ValueError where a softmax would say nothing."""
    ndim = len(shape)
    if dim is not None and (not isinstance(dim, int) or isinstance(dim, bool) or not -ndim < dim < ndim or dim == 0):
        raise ValueError(f"dim: expected a dimension of the output {shape} behind the batch's, got {dim!r}")
    if dim is None and ndim > 3:
        raise ValueError(
            f"dim: expected the dimension of the classes for an output of shape {shape}, got None; dim=1 for a map "
            "[B, K, H, W], dim=-1 where the classes come last"
        )
    found = -1 if dim is None else dim
    if ndim < 2 or shape[found] == 1:
        raise ValueError(
            f"average: expected 'sigmoid' (one logit) or 'logits' for an output of shape {shape}, got 'probs', whose "
            "softmax over one class is 1"
        )
    return found % ndim


def _kind(value: object) -> str:
    if isinstance(value, Mapping):
        return f"{type(value).__name__} of {list(value)}"
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _check_count(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer >= {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value}")


# ---- folding m into the batch --------------------------------------------------------------------------------------


def _folded(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], m: int, in_dims: Any) -> Any:
    arg_dims, kwarg_dims = _dims_of(in_dims, args, kwargs)
    fold = _Fold(m)
    folded_args = [fold(value, dims, f"args[{i}]") for i, (value, dims) in enumerate(zip(args, arg_dims, strict=True))]
    folded_kwargs = {name: fold(value, kwarg_dims[name], name) for name, value in kwargs.items()}
    batch = fold.batch
    if batch is None:
        raise ValueError("args: expected a tensor [B, ...] to repeat, found none (in_dims=None passes one as it is)")
    out = model(*folded_args, **folded_kwargs)
    return _map_tensors(lambda name, value: _unfolded(name, value, batch, m), out)


def _dims_of(in_dims: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """in_dims of every argument, positional and named."""
    if isinstance(in_dims, (tuple, list)):
        if len(in_dims) != len(args):
            raise ValueError(
                f"in_dims: expected one entry for each of {len(args)} positional arguments, got {len(in_dims)}"
            )
        return list(in_dims), dict.fromkeys(kwargs, 0)
    if isinstance(in_dims, dict):
        unknown = [key for key in in_dims if key not in kwargs and key not in range(len(args))]
        if unknown:
            raise ValueError(f"in_dims: expected positions or names of arguments, got {unknown}")
        return [in_dims.get(i, 0) for i in range(len(args))], {name: in_dims.get(name, 0) for name in kwargs}
    return [in_dims] * len(args), dict.fromkeys(kwargs, in_dims)


class _Fold:
    """Repeats tensors m times along their first dimension; remembers B and who set it."""

    def __init__(self, m: int) -> None:
        self.m, self.first = m, ""
        self.batch: int | None = None

    def __call__(self, value: Any, dims: Any, name: str) -> Any:
        pairs, spec = pytree.tree_flatten_with_path(value)
        try:
            flat_dims = pytree._broadcast_to_and_flatten(dims, spec, is_leaf=lambda d: d is None)
        except ValueError:
            flat_dims = None
        if flat_dims is None:
            raise ValueError(f"in_dims: expected 0, None or a prefix of {name}'s structure, got {dims!r}")
        leaves = [
            self._leaf(leaf, d, name + pytree.keystr(path)) for (path, leaf), d in zip(pairs, flat_dims, strict=True)
        ]
        return pytree.tree_unflatten(leaves, spec)

    def _leaf(self, leaf: Any, dim: Any, name: str) -> Any:
        if dim is None or not isinstance(leaf, Tensor):
            return leaf
        if isinstance(dim, bool) or dim != 0:
            raise ValueError(f"in_dims: expected 0 or None for {name}, got {dim!r}")
        size = leaf.shape[0] if leaf.ndim else None
        if self.batch is None and size is not None:
            self.batch, self.first = size, name
        if size is None or size != self.batch:
            wanted = f"{self.batch}, as {self.first}" if self.batch is not None else "the batch"
            raise ValueError(
                f"{name}: expected a tensor whose first size is {wanted}, got shape {tuple(leaf.shape)}; "
                "in_dims=None for it passes it as it is"
            )
        if self.m == 1:
            return leaf
        return leaf.unsqueeze(1).expand(size, self.m, *leaf.shape[1:]).flatten(0, 1)


def _unfolded(name: str, value: Tensor, batch: int, m: int) -> Tensor:
    if value.ndim == 0:
        raise ValueError(
            f"{name}: expected a tensor whose first size is B * m = {batch * m}, got a scalar: a loss made "
            "inside the model has lost its trajectories. Take it from logits with dip.objective, "
            "or use model(...).loss + dip.kl_penalty(model)"
        )
    if value.shape[0] != batch * m:
        raise ValueError(
            f"{name}: expected a tensor whose first size is B * m = {batch * m}, got shape {tuple(value.shape)}"
        )
    by_example: Tensor = value.unflatten(0, (batch, m))
    return by_example.transpose(0, 1)


# ---- outputs: pytrees, and dataclasses and mappings that are none ----------------------------------------------------


def _map_tensors(fn: Callable[..., Tensor], *outs: Any, name: str = "output") -> Any:
    """fn(name, *tensors) for every tensor of one structure that the outs share; other leaves are the first one's."""
    first = outs[0]
    if isinstance(first, Tensor):
        return fn(name, *outs)
    pairs, spec = pytree.tree_flatten_with_path(first)
    if not spec.is_leaf():
        others = [pytree.tree_leaves(out) for out in outs[1:]]
        leaves = [
            _map_tensors(fn, leaf, *(other[i] for other in others), name=name + pytree.keystr(path))
            for i, (path, leaf) in enumerate(pairs)
        ]
        return pytree.tree_unflatten(leaves, spec)
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        changed = copy.copy(first)
        for field in (f.name for f in dataclasses.fields(first)):
            content = _map_tensors(fn, *(getattr(out, field) for out in outs), name=f"{name}.{field}")
            object.__setattr__(changed, field, content)
        return changed
    if isinstance(first, Mapping):
        return {key: _map_tensors(fn, *(out[key] for out in outs), name=f"{name}[{key!r}]") for key in first}
    return first
