"""Activations and gated products whose output is noised, for the layers that read it.
docs/maths.md, section 10."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import worlds
from ..arguments import integer, one_of
from ..ops.activations import ACTIVATIONS
from ..ops.gate import noised_gate
from .layer import DIM, Noise
from .twin import Producer, made_type


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), CLIP's activation: what a DIPActivation "quick_gelu" becomes by to_plain.

    Shape:
        Any shape; the output has the same.

    Examples:
        >>> from dipkernels.nn.activation import QuickGELU
        >>> QuickGELU()(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-0.1542,  0.0000,  0.8458])
    """

    def forward(self, input: Tensor) -> Tensor:
        return ACTIVATIONS["quick_gelu"](input)


PLAIN: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "quick_gelu": QuickGELU,
    "tanh": nn.Tanh,
}


class ActivationProducer(Producer):
    """Before the class of an activation."""

    kind: str  # one of ACTIVATIONS

    def _noised(self, noise: Noise, x: Tensor) -> Tensor:
        return noised_gate(x, None, *noise, self.kind, worlds.autocast_dtype(x))


class GateProducer(Producer):
    """Before the class of an activation that a gated product calls: act(a) * b + sigma * z of two
    inputs."""

    kind: str

    def _dip_plain(self, a: Tensor, b: Tensor) -> Any:
        return super()._dip_plain(a) * b

    def _noised(self, noise: Noise, a: Tensor, b: Tensor) -> Tensor:
        if a.dtype is not b.dtype:  # autocast rounds what a product makes, and not what a norm does
            wide = torch.promote_types(a.dtype, b.dtype)
            a, b = a.to(wide), b.to(wide)
        return noised_gate(a, b, *noise, self.kind, worlds.autocast_dtype(a))


class Activation(nn.Module):
    """An activation by its name, over features along `dim`."""

    def __init__(self, num_features: int, kind: str, dim: int) -> None:
        super().__init__()
        one_of("kind", kind, ACTIVATIONS)
        self.num_features, self.kind, self.dim = num_features, kind, integer("dim", dim)

    def forward(self, input: Tensor) -> Tensor:
        return ACTIVATIONS[self.kind](input)

    def extra_repr(self) -> str:
        return f"{self.num_features}, {self.kind!r}, dim={self.dim}"


class GatedActivation(Activation):
    """act(a) * b: SwiGLU with "silu", GEGLU with "gelu" or "gelu_tanh"; what a DIPGatedActivation
    becomes by to_plain.

    Args:
        num_features: K.
        kind: As for DIPActivation.
        dim: The feature dimension, a.shape[dim] = K.

    Shape:
        a and b have one shape. The output has it too, and the wider dtype of both.

    Examples:
        >>> from dipkernels.nn.activation import GatedActivation
        >>> a, b = torch.randn(8, 4), torch.randn(8, 4)
        >>> torch.equal(GatedActivation(4)(a, b), F.silu(a) * b)
        True
    """

    def __init__(self, num_features: int, kind: str = "silu", dim: int = -1) -> None:
        super().__init__(num_features, kind, dim)

    def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        y = super().forward(a)
        return y if b is None else y * b


class DIPActivation(ActivationProducer, Activation):
    """An activation with noise behind it: u = act(x) + sigma * z in training, act(x) in eval mode,
    to the bit.

    It takes one pass forward and one in backward, and keeps x alone. Use it where only plain layers
    read the output: they get their noise here. `convert(place="producer")` leaves them plain; for
    `convert` without it, `exclude` them. `to_plain` turns it into nn.ReLU, nn.GELU, nn.SiLU,
    nn.Tanh or dipkernels.nn.activation.QuickGELU.

    Args:
        num_features: K.
        kind: "relu", "gelu", "gelu_tanh", "silu", "quick_gelu" (CLIP's x sigmoid(1.702 x)) or
            "tanh".
        dim: The feature dimension, x.shape[dim] = K: -1 before linear layers, -3 before 2d
            convolutions.
        init_variance: sigma^2 to start from, a number > 0 or a tensor [K].
        num_samples: S >= 1 draws averaged, as one draw with sigma / sqrt(S).
        device: The variance's device.

    Shape:
        Any shape; the output has the same. Its dtype is x's, or autocast's if that is on.

    Raises:
        ValueError, TypeError: A bad argument, which the message names.

    Examples:
        >>> activation, x = dip.DIPActivation(4, "gelu"), torch.randn(8, 4)
        >>> torch.equal(activation.eval()(x), F.gelu(x))
        True

    Source: arXiv 2506.04690; drawing the noise where the input is made is this project's.
    """

    def __init__(
        self,
        num_features: int,
        kind: str,
        dim: int = -1,
        *,
        init_variance: float | Tensor = 0.01,
        num_samples: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_features, kind, dim)
        vars(self).update(
            {
                k: v
                for k, v in vars(PLAIN[kind]()).items()
                if not k.startswith("_") and k != "training"
            }
        )
        self._set_up(num_features, init_variance, num_samples, device)

    feature_dim = DIM

    @property
    def plain_type(self) -> type[nn.Module]:
        return type(PLAIN[self.kind]())


class DIPGatedActivation(GateProducer, GatedActivation):
    """A gated product with noise behind it: u = act(a) * b + sigma * z in training, act(a) * b in
    eval mode, to the bit.

        u = layer(gate_proj(x), up_proj(x))

    It takes one pass forward and one in backward, and keeps a and b alone. The layers that read it
    get their noise here, as with DIPActivation. `to_plain` turns it into a `GatedActivation`.

    Args:
        num_features: K.
        kind: "silu" (SwiGLU), "gelu" or "gelu_tanh" (GEGLU), or another of DIPActivation's.
        dim: The feature dimension, a.shape[dim] = K.
        init_variance, num_samples, device: As for DIPActivation.

    Shape:
        a and b have one shape. The output has it too, and the wider dtype of both, or autocast's.

    Raises:
        ValueError, TypeError: A bad argument, which the message names.

    Examples:
        >>> gate, a, b = dip.DIPGatedActivation(4, "silu"), torch.randn(8, 4), torch.randn(8, 4)
        >>> torch.equal(gate.eval()(a, b), F.silu(a) * b)
        True
    """

    plain_type = GatedActivation
    input_name = "a"
    feature_dim = DIM

    def __init__(
        self,
        num_features: int,
        kind: str = "silu",
        dim: int = -1,
        *,
        init_variance: float | Tensor = 0.01,
        num_samples: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_features, kind, dim)
        self._set_up(num_features, init_variance, num_samples, device)


# ---- a block that multiplies two branches --------------------------------------------------------


class GatedBlock(nn.Module):
    """Before the class of a block down(act(gate(x)) * up(x)), whose activation is a GateProducer:
    down(act(gate(x), up(x))). The block's own forward where another activation took its place."""

    plain_type: type[nn.Module]
    # the names of down, act, gate, up; the last two are one where they are halves of what it makes
    parts: tuple[str, str, str, str]
    input_name: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        down, act, gate, up = self.parts
        product: Any = getattr(self, act)
        if not isinstance(product, GateProducer) and not _holds_product(product):
            return super().forward(*args, **kwargs)
        x = args[0] if args else kwargs[self.input_name]
        a = getattr(self, gate)(x)
        a, b = a.chunk(2, dim=-1) if gate == up else (a, getattr(self, up)(x))
        return getattr(self, down)(product(a, b))


def _holds_product(module: object) -> bool:
    """Whether it is a wrapper (torch.compile) around a GateProducer."""
    parts = module.modules() if isinstance(module, nn.Module) else ()
    return any(isinstance(part, GateProducer) for part in parts)


def gated_block_type(kind: type[nn.Module], parts: tuple[str, str, str, str]) -> type[Any]:
    """The twin of a block's class, and nothing of its own but the forward."""
    return made_type(GatedBlock, kind, parts=parts)
