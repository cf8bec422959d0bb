"""Average a model's predictions over draws of its noise."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn

from .. import worlds
from ..arguments import described, integer, one_of
from ..models.check import require_finite
from ..models.probe import eval_mode
from ..nn.numbering import named_layers, warn_of_equal_numbers
from ..noise import contexts
from . import analytic
from .trajectories import folded, map_tensors


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
    """The prediction of k noisy passes, mean over s of softmax(f(x; noise s)), or for k = 0 of the
    plain network.

    Dropout and BatchNorm are in eval mode during the passes; each module's mode is restored. No
    gradients are kept. Under fixed_noise pass i (with chunk: chunk i) uses key + i *
    0x9E3779B97F4A7C15 mod 2^64. So the passes differ, and repeat with the same chunk. row0 counts
    examples. Meanwhile every thread's passes draw noise: see docs/guides/reproducibility.md.

    Args:
        model: A model with DIP layers.
        args: The model's positional arguments. All passes get the same objects: leave out what a
            pass changes, such as a cache of keys and values.
        k: Number of passes, >= 0, by default 16. 0 is Algorithm 3, one deterministic pass.
        average: "probs" (mean of the softmax over `dim`, at least float32), "sigmoid" (mean of the
            sigmoid, for one logit or several labels), "logits" (mean of the outputs, at least
            float32: for a regression), or None (all outputs).
        chunk: How many passes run at a time, >= 1, by default 1. They are folded into the batch as
            in `trajectories`, so leave it at 1 for a model that compares the examples of its batch.
            Memory grows with chunk, not with k.
        method: "sample", or "analytic", for MLPs and transformer blocks of linear layers: one
            deterministic pass in which every activation behind a DIPLinear is replaced by its exact
            expectation over that layer's noise (docs/maths.md, section 7); without k and chunk.
            GPT-2's Conv1D counts as a DIPLinear.
        dim: The dimension of the classes, for "probs". By default it is the last one, if the output
            is [B, K] or [B, T, K]. With more dimensions it must be given, such as 1 for a map [B,
            K, H, W].
        kwargs: The model's named arguments.

    Returns:
        [B, ...], or for average=None [k, B, ...] ([1, B, ...] for k = 0 and "analytic"). The
        model's output must be a tensor [B, ...], or have one as `logits`. With average=None it may
        be any pytree; leaves that are not tensors are those of the first pass.

    Raises:
        TypeError: An output without a floating tensor to average.
        ValueError: A bad argument, a model without DIP layers although k > 0, or an output whose
            shape does not fit `average` and `dim`. The message names it.

    Examples:
        >>> model = dip.convert(nn.Sequential(nn.Linear(4, 3)))
        >>> probabilities = dip.predict(model, torch.randn(8, 4), k=16)
        >>> probabilities.shape, probabilities.sum(-1).allclose(torch.ones(8))
        (torch.Size([8, 3]), True)

    Source: arXiv 2506.04690, Algorithms 2 and 3; whether logits or probabilities are averaged is
    not stated there.
    """
    one_of("method", method, ("sample", "analytic"))
    if method == "analytic" and not (k is None and chunk is None):
        raise ValueError(
            f"k, chunk: expected none with method='analytic', which is one pass, got {k}, {chunk}"
        )
    k = 16 if k is None else integer("k", k, 0)
    chunk = 1 if chunk is None else integer("chunk", chunk, 1)
    check_average(average, dim, (*AVERAGES, None))
    layers = named_layers(model)
    if k > 0 and not layers:
        raise ValueError(
            "model: expected DIP layers, found none: its k passes would be equal; convert it "
            "first, or pass k=0"
        )
    warn_of_equal_numbers(model)
    if k > 0 and not worlds.tracing():
        require_finite(layers)
    call: Callable[..., Any] = model
    if method == "analytic":
        call, k = functools.partial(analytic.expected, model), 0

    def run(*args: Any, **kwargs: Any) -> Any:
        out = call(*args, **kwargs)
        return out if average is None else logits_of(out)  # of an object of any class

    parts: list[Any] = []
    with torch.no_grad(), eval_mode(model):
        for number, first in enumerate(range(0, max(k, 1), chunk)):
            count = min(chunk, max(k, 1) - first)
            noise = contexts.sampling_on() if k > 0 else contextlib.nullcontext()
            key = contexts.numbered_pass(number, count) if k > 0 else contextlib.nullcontext()
            with noise, key:
                for layer in layers.values() if k > 0 else ():
                    if layer.share is not None:
                        layer.share.forget()
                if count > 1:
                    out = folded(run, args, kwargs, count, 0, chunked=True)
                else:
                    out = map_tensors(lambda name, value: value[None], run(*args, **kwargs))
            if average is None:  # copies: a model may return memory that its next pass writes into
                copied = map_tensors(lambda name, value: value.clone(), out)
                if copied is out:  # nothing in it changed
                    raise TypeError(
                        "model: expected tensors in the output, for average=None stacks them, got "
                        f"{_kind(out)}; return its parts (a distribution's mean and deviation), or "
                        "call the model k times inside dip.sampling_on()"
                    )
                parts.append(copied)
                continue
            part = tensor_output(out, average, dim, stacked=1).sum(0)
            parts = [parts[0].add_(part)] if parts else [part]
    if average is None:
        return map_tensors(_joined, *parts)
    return parts[0] / max(k, 1)


def _joined(name: str, *chunks: Tensor) -> Tensor:
    """The passes of one tensor of the output."""
    shapes = sorted({tuple(chunk.shape[1:]) for chunk in chunks})
    if len(shapes) > 1:
        raise ValueError(
            f"{name}: expected one shape in every pass, for average=None stacks them, got "
            f"{shapes}; call the model k times inside dip.sampling_on()"
        )
    return torch.cat(chunks)


AVERAGES = ("probs", "sigmoid", "logits")


def check_average(
    average: str | None, dim: int | None, known: tuple[str | None, ...] = AVERAGES
) -> None:
    """Raise ValueError for an unknown `average`, or a `dim` without a softmax to take over it."""
    one_of("average", average, known)
    if dim is not None and average != "probs":
        raise ValueError(
            f"dim: expected None with average={average!r}, which has no softmax, got {dim!r}"
        )


def require_batch(x: object) -> None:
    """Raise ValueError where this is no floating batch [B, ...] of finite values."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
        raise ValueError(
            f"x: expected a floating tensor [B, ...] of two or more dimensions, got {_kind(x)}"
        )
    if not bool(x.isfinite().all()):
        raise ValueError("x: expected finite values, got NaN or infinity")


def logits_of(out: Any) -> Any:
    """A tensor as it is, of another output what it has as `logits`, or itself."""
    if isinstance(out, Tensor):
        return out
    return out.get("logits", out) if isinstance(out, Mapping) else getattr(out, "logits", out)


def tensor_output(out: Any, average: str, dim: int | None = None, stacked: int = 0) -> Tensor:
    """The output, or its `logits`, at least float32; its softmax over dim for "probs", its sigmoid
    for "sigmoid".

    stacked: the number of dimensions in front of the model's own, which dim does not count.
    """
    out = logits_of(out)
    if not isinstance(out, Tensor) or not out.is_floating_point():
        raise TypeError(
            f"model: expected a floating output, or one named 'logits', got {_kind(out)}; return "
            "that alone, or pass average=None to predict"
        )
    values: Tensor = out.to(torch.promote_types(out.dtype, torch.float32))
    if average == "sigmoid":
        return values.sigmoid()
    if average == "probs":
        return values.softmax(_class_dim(tuple(values.shape[stacked:]), dim) + stacked)
    return values


def _class_dim(shape: tuple[int, ...], dim: int | None) -> int:
    """The dimension of the classes of an output [B, ...]; ValueError where a softmax would say
    nothing."""
    ndim = len(shape)
    if dim is not None and (not -ndim < integer("dim", dim) < ndim or dim == 0):
        raise ValueError(
            f"dim: expected a dimension of the output {shape} behind the batch's, got {dim!r}"
        )
    if dim is None and ndim > 3:
        raise ValueError(
            f"dim: expected the dimension of the classes for an output of shape {shape}, got None; "
            "dim=1 for a map [B, K, H, W], dim=-1 where the classes come last; average='logits' "
            "for what is no classes, such as a generated image"
        )
    found = -1 if dim is None else dim
    if ndim == 1 and shape[0] > 1:
        raise ValueError(
            f"average: expected 'sigmoid' (one logit for each example) or 'logits' for an output "
            f"of shape {shape}, got 'probs'; or x[None], of one example alone"
        )
    if ndim < 2 or shape[found] == 1:
        raise ValueError(
            f"average: expected 'sigmoid' (one logit) or 'logits' for an output of shape {shape}, "
            "got 'probs', whose softmax over one class is 1"
        )
    return found % ndim


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{type(value).__name__} of {list(value)}"
    return described(value)
