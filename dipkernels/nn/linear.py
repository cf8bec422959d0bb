"""nn.Linear on a noised input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional, worlds
from ..ops.activations import ACTIVATIONS
from ..ops.linear import affine
from .layer import DIPLayer, Noise, node_of, noised, with_noise


class DIPLinear(DIPLayer, nn.Linear):
    """nn.Linear on a noised input: y = act((x + sigma * z) W^T + b) in training, act(x W^T + b) in
    eval mode, to the bit.

    Every element gets its own new z. In bfloat16 a sigma below a few thousandths of |x| is mostly
    lost in rounding.

    Args:
        in_features, out_features, bias, device: As nn.Linear's.
        dtype: As nn.Linear's, for the weights; the variance stays float32.
        init_variance: sigma^2 at the start, a number > 0 or a tensor [in_features].
        num_samples: S >= 1 draws averaged inside the layer (as one draw with sigma / sqrt(S)).
        keep: What backward keeps of the input: "u" as nn.Linear does, "x" for layers that share an
            input, or "auto" (see functional.dip_linear).
        activation: None or its name, applied here (see functional.dip_linear).
        estimator: "sample", act of one draw; "mean", the mean of act over num_samples draws;
            "analytic", the exact mean over all draws, for which nothing is drawn (see
            functional.dip_linear).

    Raises:
        ValueError, TypeError: A bad argument, which the message names.

    Shape:
        Input [..., in_features], output [..., out_features].

    Examples:
        >>> layer = dip.DIPLinear(4, 2, init_variance=0.04)
        >>> layer(torch.randn(8, 4)).shape, layer.log_variance.shape
        (torch.Size([8, 2]), torch.Size([4]))

    Source: arXiv 2506.04690, u ~ N(v, diag(lambda)).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        init_variance: float | Tensor = 0.01,
        num_samples: int = 1,
        keep: str = "auto",
        activation: str | None = None,
        estimator: str = "sample",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._set_up(in_features, init_variance, num_samples, device)
        functional.check_estimator(estimator, activation, num_samples, keep)
        self.keep, self.activation, self.estimator = keep, activation, estimator

    plain_type = nn.Linear
    # of a converted layer too
    keep = "auto"
    activation: str | None = None
    estimator = "sample"

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is not Tensor and (node := node_of(self, input)) is not None:
            return node
        if not self.noisy():
            return self._activated(super().forward(self.without_noise(input)))
        if self.share is not None and self.estimator != "analytic":
            if self.estimator == "mean" and self.activation is not None:
                raise ValueError(
                    "estimator: expected 'sample' or 'analytic' where noise is shared, got 'mean'"
                )
            u = noised(self, input, worlds.autocast_dtype(input))
            return self._activated(F.linear(u, self.weight, self.bias))
        if self.estimator == "sample":  # at once: what dip_linear checks, the constructor has
            dtype, weight, bias = worlds.autocast_dtype(input), self.weight, self.bias
            y = with_noise(
                self, input, lambda noise: affine(input, weight, bias, *noise, self.keep, dtype)
            )
            return self._activated(y)
        analytic = self.estimator == "analytic"  # which draws nothing
        seed = self._stream_on(input.device) if analytic else None
        return with_noise(self, input, lambda noise: self._estimated(input, noise), seed=seed)

    def _estimated(self, input: Tensor, noise: Noise) -> Tensor:
        sigma, seed, draw = noise
        return functional.dip_linear(
            input,
            self.weight,
            self.bias,
            sigma,
            seed,
            row0=draw.row0,
            num_samples=self.num_samples,
            log_variance=True,
            keep=self.keep,
            activation=self.activation,
            estimator=self.estimator,
        )

    def _activated(self, y: Tensor) -> Tensor:
        return y if self.activation is None else ACTIVATIONS[self.activation](y)

    def extra_repr(self) -> str:
        activation = f", activation={self.activation}" if self.activation is not None else ""
        estimator = f", estimator={self.estimator}" if self.estimator != "sample" else ""
        return super().extra_repr() + activation + estimator
