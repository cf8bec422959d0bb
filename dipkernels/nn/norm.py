"""LayerNorm and RMSNorm whose output is noised, for the linear layers that read it.  docs/maths.md,
section 10."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn

from .. import worlds
from ..ops.norm import noised_norm
from .layer import Noise
from .twin import Producer


class NormProducer(Producer):
    """Before the class of a norm over the feature dimension."""

    kind = "layer"  # or "rms"
    offset = 0.0  # what is added to the weight
    weight_name = "weight"
    eps_name = "eps"  # of the module's attribute, or of a child's, "ln.eps"
    like_input = False  # whether what it makes lies in memory as its input does, not in dense rows

    def _noised(self, noise: Noise, x: Tensor) -> Tensor:
        eps: float | None = operator.attrgetter(self.eps_name)(self)
        if eps is None:  # of 16-bit data torch takes float32's, in which it computes
            eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
        weight: Tensor | None = getattr(self, self.weight_name, None)
        bias: Tensor | None = getattr(self, "bias", None)
        sigma, seed, draw = noise
        how = draw._replace(dim=-1), self.kind, eps, self.offset, worlds.autocast_dtype(x)
        if draw.dim == -1:
            u = noised_norm(x, weight, bias, sigma, seed, *how)
        else:
            u = noised_norm(x.movedim(draw.dim, -1), weight, bias, sigma, seed, *how)
            u = u.movedim(-1, draw.dim)
        if self.like_input and u.stride() != x.stride():
            # a sum lies as its first term does
            u = u.contiguous() if x.is_contiguous() else torch.zeros_like(x, dtype=u.dtype) + u
        return u

    def _set_up_norm(self, init_variance: float | Tensor, num_samples: int, device: Any) -> None:
        shape: tuple[int, ...] = tuple(self.normalized_shape)  # type: ignore[arg-type]
        if len(shape) != 1:
            raise ValueError(
                "normalized_shape: expected one dimension, the last, whose features have a "
                f"variance each, got {shape}; "
                f"put a DIPInput behind an nn.{self.plain_type.__name__}"  # type: ignore[union-attr]
            )
        self._set_up(shape[0], init_variance, num_samples, device)


class DIPLayerNorm(NormProducer, nn.LayerNorm):
    """nn.LayerNorm with noise behind it: u = LayerNorm(x) + sigma * z in training, LayerNorm(x) in
    eval mode, to the bit.

    It takes one pass forward and one in backward, and keeps what nn.LayerNorm keeps. Use it where
    only plain layers read the output: they get their noise here. `convert(place="producer")` finds
    such places.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: As for nn.LayerNorm; one
            dimension, K features.
        init_variance: sigma^2 to start from, a number > 0 or a tensor [K].
        num_samples: S >= 1 draws averaged, as one draw with sigma / sqrt(S).

    Shape:
        [..., K] to [..., K], of x's dtype, or autocast's if that is on.

    Raises:
        ValueError, TypeError: A bad argument, which the message names.

    Examples:
        >>> norm, x = dip.DIPLayerNorm(4), torch.randn(8, 4)
        >>> torch.equal(norm.eval()(x), F.layer_norm(x, (4,)))
        True

    Source: arXiv 2506.04690, u ~ N(v, diag(lambda)); drawing it where v is made is this project's.
    """

    plain_type = nn.LayerNorm

    def __init__(  # all by name: torch.nn.utils.skip_init looks for device
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        init_variance: float | Tensor = 0.01,
        num_samples: int = 1,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self._set_up_norm(init_variance, num_samples, device)


class DIPRMSNorm(NormProducer, nn.RMSNorm):
    """nn.RMSNorm with noise behind it: u = RMSNorm(x) + sigma * z in training, as `DIPLayerNorm`.

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: As for nn.RMSNorm; one dimension,
            K features.
        init_variance, num_samples: As for DIPLayerNorm.

    Shape:
        [..., K] to [..., K].

    Raises:
        ValueError, TypeError: A bad argument, which the message names.

    Examples:
        >>> norm, x = dip.DIPRMSNorm(4), torch.randn(8, 4)
        >>> torch.equal(norm.eval()(x), F.rms_norm(x, (4,)))
        True
    """

    kind = "rms"
    plain_type = nn.RMSNorm

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        init_variance: float | Tensor = 0.01,
        num_samples: int = 1,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self._set_up_norm(init_variance, num_samples, device)
