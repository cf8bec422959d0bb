"""The projection alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..arguments import integer
from .layer import DIM, DIPLayer, node_of, noised


class DIPInput(DIPLayer, nn.Module):
    """The noise alone, for a network's input or an embedding: u = x + sigma * z while training, x
    in eval mode.

    Args:
        num_features: K.
        dim: The feature dimension, x.shape[dim] = K.
        init_variance: sigma^2 to start from, a number > 0 or a tensor [K].
        num_samples: S >= 1 draws averaged, as one draw with sigma / sqrt(S).
        device: The variance's device.

    Raises:
        ValueError, TypeError: A bad argument, which the message names.

    Shape:
        Input and output have one shape, with K features along dim.

    Examples:
        >>> images, noise = torch.rand(2, 3, 8, 8), dip.DIPInput(3, dim=1)
        >>> noise(images).shape, torch.equal(noise.eval()(images), images)
        (torch.Size([2, 3, 8, 8]), True)

    Source: arXiv 2506.04690 (v_0 = x is projected too).
    """

    def __init__(
        self,
        num_features: int,
        dim: int = -1,
        *,
        init_variance: float | Tensor = 0.01,
        num_samples: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_features, self.dim = num_features, integer("dim", dim)
        self._set_up(num_features, init_variance, num_samples, device)

    feature_dim = DIM

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is not Tensor and (node := node_of(self, input)) is not None:
            return node
        return noised(self, input) if self.noisy() else self.copied_without_noise(input)

    def extra_repr(self) -> str:
        return f"{self.num_features}, dim={self.dim}, {super().extra_repr()}"
