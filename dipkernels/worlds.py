"""In which world a call is: eager, torch.compile, torch.export, torch.jit.trace, a transform of
torch.func, tensors without values, a DTensor, a CUDA graph that is captured.

Whatever acts differently in one of them asks here, and nothing else asks torch. A call may be in
several at once: torch.compile of torch.func.grad, or of a model of DTensors. All of it is plain
look-ups, which torch.compile traces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import forward_ad

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

# Inside what torch.compile traces, torch 2.10 and 2.11 say True to torch.compiler.is_exporting(),
# whoever traces. The flag behind it, which torch.export sets while it runs, is right in each
# release.
_HAS_FLAG = hasattr(torch.compiler, "_is_exporting_flag")


def tracing() -> bool:
    """Whether torch.compile or torch.export traces this call."""
    return torch.compiler.is_compiling()


def in_no_graph(function: Callable[..., None]) -> Callable[..., None]:
    """A function that torch.compile calls while it traces: what torch.compiler's
    assume_constant_result does, whose import takes seconds."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def exporting() -> bool:
    """Whether torch.export traces this call, strict or not."""
    if _HAS_FLAG:
        return torch.compiler._is_exporting_flag
    return torch.compiler.is_exporting()


def jit_tracing() -> bool:
    """Whether torch.jit.trace, or the ONNX export made of it, records this call."""
    return torch._C._get_tracing_state() is not None


def transforming() -> bool:
    """Whether a transform of torch.func (grad, jvp, vmap, ...) or forward-mode autograd is on."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def batched(x: Tensor) -> bool:
    """Whether x is several gradients at once (is_grads_batched): what an autograd.Function makes of
    those has no derivative, in silence."""
    return not tracing() and torch._C._functorch.is_legacy_batchedtensor(x)


def unwrapped(x: Tensor) -> Tensor:
    """x without the wrappers of torch.func; what vmap maps over comes first."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        mapped = functorch.maybe_get_bdim(x)
        x = functorch.get_unwrapped(x)
        if mapped >= 0:
            x = x.movedim(mapped, 0)
    return x


def wants_pieces() -> bool:
    """Whether derivatives have to come from operations that have their own.

    So it is under torch.func's transforms, and where torch.export keeps gradients: it loses the
    derivative of an autograd.Function, in silence.
    """
    return transforming() or (exporting() and torch.is_grad_enabled())


def has_values(x: Tensor) -> bool:
    """Whether x's numbers may be read: not while something traces, transforms or fakes it, nor of a
    subclass's."""
    if tracing() or transforming() or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    return not recording()


def frees_what_was_saved(*tensors: Tensor) -> bool:
    """Whether the backward pass at hand, on these, is the last one to read what was saved for it,
    and nothing looks on that may read it again: its memory may be written over."""
    if not all([has_values(t) and not batched(t) for t in tensors]):
        return False
    kept = torch._C._autograd._get_current_graph_task_keep_graph()
    watched = torch._C._len_torch_dispatch_stack() or capturing(tensors[0].device.type)
    return not (kept or watched)


def capturing(device: str) -> bool:
    """Whether what runs on this device now is recorded into a CUDA graph."""
    # fake tensors may be of a device that is not there
    there = device == "cuda" and not tracing() and torch.cuda.is_initialized()
    return there and torch.cuda.is_current_stream_capturing()


def recording() -> bool:
    """Whether make_fx records this call."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def has_ranks() -> bool:
    """Whether this process is one of a group of torch.distributed."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def counting() -> bool:
    """Whether torch's FlopCounterMode is on, which sees no product inside another operation than
    torch's own."""
    if tracing():
        return False
    modes = range(torch._C._len_torch_dispatch_stack())
    kinds = [type(torch._C._get_dispatch_stack_at(i)) for i in modes]
    return any(kind.__module__ == "torch.utils.flop_counter" for kind in kinds)


def is_dtensor(x: object) -> TypeIs[DTensor]:
    """Whether x is a DTensor, told by name: importing its module takes longer than importing this
    package."""
    return type(x).__name__ == "DTensor"


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The type that a matrix product on x would be given by autocast, or None where autocast leaves
    x alone."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(device)
    return None
