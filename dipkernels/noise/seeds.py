"""The seed of a layer's forward pass.  docs/maths.md, section 3."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import worlds
from ..worlds import is_dtensor
from . import contexts, guards


def draw(stream: Tensor, x: Tensor) -> Tensor:
    """The seed of one forward pass, int64 [2]: (key, number) under fixed_noise, otherwise two
    random integers.

    stream: int64 [2] = (0, the layer's number), on x's device. The random seed comes from the
    default generator of that device, in one call, as dropout's does.
    Raises RuntimeError in a checkpointed block's second computation that would draw other noise
    than its first, and under torch.jit.trace and torch.onnx.export.
    """
    traced = worlds.tracing()
    if worlds.exporting() if traced else worlds.jit_tracing():
        guards.refuse_in_trace()
    if contexts.KEY is None:
        if traced:
            if not worlds.exporting():
                guards.when_traced(x.device.type, is_dtensor(x))
        elif guards.ranks_to_compare and torch.distributed.is_initialized():
            guards.compare_ranks(x.device.type, is_dtensor(x))
        seed = torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=x.device)
    else:
        if traced and not worlds.exporting():
            guards.note_compiled()
        contexts.keep_for_replays(contexts.KEY, stream)
        seed = contexts.KEY.to(x.device) + stream
    if not traced:
        guards.watch_checkpoint(seed)
    return seed


def first_row(x: Tensor, dim: int = -1) -> int:
    """The row of x's first element: contexts.row0() * the rows of one entry of the leading
    dimension; dim is the feature one."""
    rows = contexts.row0()
    if rows == 0:
        return 0
    feature, entries = dim % x.ndim, contexts.entries()
    for d in range(0 if entries else 1, x.ndim):
        if d != feature:
            rows *= x.shape[d]
    return rows // entries if entries else rows
