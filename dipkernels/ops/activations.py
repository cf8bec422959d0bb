"""The activations that a layer may apply, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda h: h * torch.sigmoid(1.702 * h),  # of CLIP: silu(1.702 h) / 1.702
    "tanh": torch.tanh,
}
# dy * act'(h) in one pass.
BACKWARDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "identity": lambda dy, h: dy,
    "relu": lambda dy, h: _aten.threshold_backward(dy, h, 0),
    "gelu": _aten.gelu_backward,
    "gelu_tanh": lambda dy, h: _aten.gelu_backward(dy, h, approximate="tanh"),
    "silu": _aten.silu_backward,
    # of infinity, which 1.702 h may be in 16 bits, PyTorch's is no number
    "quick_gelu": lambda dy, h: _aten.silu_backward(dy, (1.702 * h).clamp(-60, 60)),
    "tanh": lambda dy, h: _aten.tanh_backward(dy, torch.tanh(h)),
}


def act_of(activation: str) -> Callable[[Tensor], Tensor]:
    """The function of an activation's name; "identity" is the affine layer's."""
    return ACTIVATIONS.get(activation, lambda h: h)
