"""What is wrong with a layer's input, in the layer's own words: looked at where a call has
failed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..ops.draw import DTYPES
from ..worlds import has_ranks, is_dtensor

# The types that ops raises, and torch for a layout or a device that an operation has no kernel for.
FAILURES = (TypeError, ValueError, RuntimeError)
_BATCHED = {-1: "[..., {}]", -2: "[N, {0}, L] or [{0}, L]", -3: "[N, {0}, H, W] or [{0}, H, W]"}
_BATCHED[-4] = "[N, {0}, D, H, W] or [{0}, D, H, W]"


def require_tensor(layer: Any, x: object) -> None:
    """Raise TypeError where a layer would draw noise for what is no tensor: a list, None, a
    PackedSequence."""
    if not isinstance(x, Tensor) and layer.noisy():
        packed = "; noise it before it is packed, by a DIPInput" * isinstance(x, PackedSequence)
        raise TypeError(
            f"{_shown(layer)}: expected a tensor where noise is drawn, got {type(x).__name__}"
            f"{packed}; in eval mode the layer takes what the plain layer takes"
        )


def undense(x: object) -> str | None:
    """What x is where it is no dense tensor, in words; None where it is one."""
    if not isinstance(x, Tensor):
        return type(x).__name__
    if x.is_nested:
        return "a nested tensor"
    return None if x.layout is torch.strided else f"a tensor of layout {x.layout}"


def explain(layer: Any, x: Tensor, sigma: Tensor) -> None:
    """Raise what is wrong with the input x of a DIP layer that failed, or with the ln(sigma^2) that
    its variance gave; return where neither is the reason."""
    if is_dtensor(x) or is_dtensor(sigma):  # tensor_parallel names the ranks and layouts too
        return
    name = _shown(layer)
    dim, features = layer.feature_dim, sigma.numel()
    kind = undense(x)
    if kind is not None:
        way_out = "torch.nested.to_padded_tensor(x, 0.0)" if x.is_nested else "x.to_dense()"
        raise TypeError(
            f"{name}: expected a dense tensor where noise is drawn, got {kind}; pass {way_out}. In "
            "eval mode the layer takes what the plain layer takes"
        )
    if x.dtype not in DTYPES:
        expected = ", ".join(str(dtype) for dtype in DTYPES)
        way_out = ""
        if x.is_complex():
            way_out = "; noise is real, so leave complex layers out: convert(exclude=...)"
        raise TypeError(f"{name}: expected an input of type {expected}, got {x.dtype}{way_out}")
    if sigma.shape != (layer.variance.num_features,):  # of functional_call, or set by hand
        raise ValueError(
            f"{name}: expected a log_variance of shape ({layer.variance.num_features},), got "
            f"{tuple(sigma.shape)}; for one of each example use torch.vmap over the call"
        )
    if not -x.dim() <= dim < x.dim() or x.shape[dim] != features:
        wanted = f"with {features} features along dimension {dim}"
        if dim in _BATCHED:
            wanted = f"of shape {_BATCHED[dim].format(features)}"
        way_out = ""
        if has_ranks():  # an activation between a column-wise and a row-wise layer
            way_out = "; if that is a shard: ColwiseParallel(use_local_output=False) in front of it"
        elif -x.dim() <= dim < x.dim() and x.shape[dim] == _read_by_weight(layer):
            way_out = (
                "; its weight reads that many, so it was cut or widened since it was converted: "
                "to_plain, then convert and calibrate again"
            )
        raise ValueError(f"{name}: expected an input {wanted}, got {tuple(x.shape)}{way_out}")
    if x.device != sigma.device:
        raise ValueError(
            f"{name}: expected an input on {sigma.device}, where its variance is, got one on "
            f"{x.device}"
        )
    if sigma.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name}: expected its variance in torch.float32, got {sigma.dtype}; keep it out of "
            "mixed precision: dipkernels.shard_variances, for FSDP; torch_autocast in place of "
            "bf16, for DeepSpeed's stage 0"
        )


def _read_by_weight(layer: Any) -> int | None:
    """How many features the weight of a linear layer or a convolution takes; None of another."""
    known = isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd))
    weight = layer.weight if known else None
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        return None
    if getattr(layer, "transposed", False):
        return weight.shape[0]
    return weight.shape[1] * int(getattr(layer, "groups", 1))


def _shown(layer: Any) -> str:
    return f"{getattr(layer, 'shown_as', type(layer).__name__)}({layer.extra_repr()})"
