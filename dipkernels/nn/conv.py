"""nn.Conv1d, nn.Conv2d and nn.Conv3d on a noised input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import worlds
from ..ops import conv
from .layer import DIPLayer, node_of, noised, with_noise

_TORCHS = (nn.Conv1d._conv_forward, nn.Conv2d._conv_forward, nn.Conv3d._conv_forward)


class _DIPConv(DIPLayer):
    in_channels: int
    weight: Tensor
    bias: Tensor | None
    padding_mode: Any
    padding: Any
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    _conv_forward: Any

    def __init__(  # all by name: torch.nn.utils.skip_init looks for device
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        init_variance: float | Tensor = 0.01,
        num_samples: int = 1,
    ) -> None:
        window = (kernel_size, stride, padding, dilation, groups)
        super().__init__(in_channels, out_channels, *window, bias, padding_mode, device, dtype)
        self._set_up(in_channels, init_variance, num_samples, device)

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is not Tensor and (node := node_of(self, input)) is not None:
            return node
        if not self.noisy():
            return super().forward(self.without_noise(input))
        dtype, weight, bias = worlds.autocast_dtype(input), self.weight, self.bias  # read once
        alike = dtype is not None or input.dtype is weight.dtype
        own = alike and conv.fits(input, self.log_variance)
        window = self._window(input) if own else None
        if window is None:
            return self._conv_forward(noised(self, input, dtype), weight, bias)
        return with_noise(
            self, input, lambda noise: conv.own_input(input, weight, bias, *noise, dtype, window)
        )

    def _window(self, input: Tensor) -> conv.Window | None:
        """How this layer's window moves over a batch; None where torch pads or groups the input in
        another way, or a subclass or the object convolves in its own."""
        plain = self.padding_mode == "zeros" and not isinstance(self.padding, str)
        plain = plain and type(self)._conv_forward in _TORCHS and "_conv_forward" not in vars(self)
        if not plain or self.share is not None or input.dim() != 1 - self.feature_dim:
            return None
        return conv.Window(self.stride, self.padding, self.dilation, self.groups)


class DIPConv1d(_DIPConv, nn.Conv1d):
    """nn.Conv1d on a noised input, with the arguments of DIPConv2d; one sigma for each input
    channel.

    Shape:
        Input [N, C, L] or [C, L].

    Examples:
        >>> dip.DIPConv1d(3, 5, 3, padding=1)(torch.randn(2, 3, 8)).shape
        torch.Size([2, 5, 8])
    """

    feature_dim = -2
    plain_type = nn.Conv1d


class DIPConv2d(_DIPConv, nn.Conv2d):
    """nn.Conv2d on a noised input: y = conv(x + sigma * z), one sigma for each input channel;
    nn.Conv2d itself in eval mode.

    Every pixel gets its own new z, added before the padding. channels_last stays
    channels_last. The other arguments are nn.Conv2d's.

    Args:
        init_variance: sigma^2 to start from, a number > 0 or a tensor [in_channels].
        num_samples: As for DIPLinear.

    Raises:
        ValueError, TypeError: A bad argument, which the message names.

    Shape:
        Input [N, C, H, W] or [C, H, W].

    Examples:
        >>> layer = dip.DIPConv2d(3, 5, kernel_size=3, padding=1)
        >>> layer(torch.randn(2, 3, 8, 8)).shape, layer.log_variance.shape
        (torch.Size([2, 5, 8, 8]), torch.Size([3]))

    Source: arXiv 2506.04690.
    """

    feature_dim = -3
    plain_type = nn.Conv2d


class DIPConv3d(_DIPConv, nn.Conv3d):
    """nn.Conv3d on a noised input, with the arguments of DIPConv2d; one sigma for each input
    channel.

    Shape:
        Input [N, C, D, H, W] or [C, D, H, W].

    Examples:
        >>> dip.DIPConv3d(1, 2, 3, padding=1)(torch.randn(2, 1, 4, 4, 4)).shape
        torch.Size([2, 2, 4, 4, 4])
    """

    feature_dim = -4
    plain_type = nn.Conv3d
