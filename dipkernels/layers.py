"""The modules: a plain layer on a noised input, u = x + sigma * z, y = Layer(u).  docs/maths.md, section 1."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from . import functional, seeds

_NUMBERS = itertools.count()  # a layer's stream until number_layers renumbers the model
MAX_LAYERS = 2**16  # the contract keeps 16 bits of the stream


def check_init_variance(init_variance: float | Tensor, num_features: int) -> float | Tensor:
    """A float, or a CPU float32 tensor [num_features]; every value finite and > 0."""
    if isinstance(init_variance, Tensor) and init_variance.ndim > 0:
        if init_variance.shape != (num_features,):
            raise ValueError(
                f"init_variance: expected a number or shape ({num_features},), got shape {tuple(init_variance.shape)}"
            )
        values = init_variance.detach().to("cpu", torch.float32).clone()
        if not bool((values.isfinite() & (values > 0)).all()):
            raise ValueError(f"init_variance: expected finite values > 0, got {values}")
        return values
    try:
        value = float(init_variance)
    except (TypeError, ValueError):
        raise ValueError(f"init_variance: expected a number or a tensor, got {init_variance!r}") from None
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"init_variance: expected a finite number > 0, got {init_variance!r}")
    return value


class Variance(nn.Module):
    """The learnable variance of a projection, lambda = exp(log_variance), one per input feature.

    num_features: K. init_variance: a number > 0 or a tensor [K], a variance (sigma = sqrt(init_variance)).
    `log_variance` [K] is float32 whatever the model's type: half-precision casts move it to the device only, for in
    bfloat16 an optimiser's small steps would round away. A state dict without it leaves it at its initial value.
    A module of its own, so that FSDP can shard it apart from weights of another type; calling it returns log_variance.
    Raises ValueError for an init_variance outside these. Source: arXiv 2506.04690, Sigma = diag(lambda); log form:
    this project's.
    """

    def __init__(self, num_features: int, init_variance: float | Tensor = 0.01, device=None) -> None:
        super().__init__()
        self.init_variance = check_init_variance(init_variance, num_features)
        self.log_variance = nn.Parameter(torch.empty(num_features, dtype=torch.float32, device=device))
        self.spread: Tensor | None = None  # [K] standard deviation of the input, once measured: calibrate, summary
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """log_variance = ln(init_variance)."""
        if isinstance(self.init_variance, Tensor):
            self.log_variance.copy_(self.init_variance.log())
        else:
            self.log_variance.fill_(math.log(self.init_variance))

    def forward(self) -> Tensor:
        # FSDP makes a subclass of this one, and after this call may free what it had gathered for it.
        return self.log_variance if type(self) is Variance else self.log_variance.clone()

    @property
    def sigma(self) -> Tensor:
        """sigma = exp(log_variance / 2), [K], float32, without gradient."""
        return torch.exp(self.log_variance.detach() / 2)

    def extra_repr(self) -> str:
        return f"{self.log_variance.numel()}, init_variance={_short(self.init_variance)}"

    def _apply(self, fn, recurse=True):
        def keep_precision(t: Tensor) -> Tensor:
            moved = fn(t)
            narrowed = t.is_floating_point() and moved.dtype.itemsize < t.dtype.itemsize and t.dtype.itemsize >= 4
            return (
                t.to(device=moved.device, dtype=torch.promote_types(moved.dtype, torch.float32)) if narrowed else moved
            )

        return super()._apply(keep_precision, recurse)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        key = prefix + "log_variance"
        if key in state_dict:
            # With assign=True the tensor itself would become the parameter, half precision and all.
            if isinstance(state_dict[key], Tensor) and state_dict[key].dtype.itemsize < 4:
                state_dict[key] = state_dict[key].float()
        elif local_metadata.get("assign_to_params_buffers", False) and self.log_variance.is_meta:
            sibling = state_dict.get(prefix.removesuffix("variance.") + "weight")
            fresh = Variance(self.log_variance.numel(), self.init_variance, getattr(sibling, "device", None))
            state_dict[key] = fresh.log_variance.detach()
        else:
            self.reset_parameters()
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)


class DIPLayer:
    """What the DIP layers share: the child `variance`, the buffer `stream` = (0, number), and when there is noise."""

    _KEEPS: tuple[str, ...] = ("auto",)

    def _set_up(self, num_features: int, init_variance: float | Tensor, num_samples: int, keep: str, device) -> None:
        if not isinstance(num_samples, int) or isinstance(num_samples, bool) or not 1 <= num_samples <= 65536:
            raise ValueError(f"num_samples: expected an integer from 1 to 65536, got {num_samples!r}")
        if keep not in self._KEEPS:
            raise ValueError(f"keep: expected one of {self._KEEPS} for {type(self).__name__}, got {keep!r}")
        self.num_samples, self.keep = num_samples, keep
        self.number = next(_NUMBERS) % MAX_LAYERS
        self.variance = Variance(num_features, init_variance, device)
        stream = torch.tensor([0, self.number], device=device)
        self.register_buffer("stream", stream, persistent=False)

    @property
    def log_variance(self) -> nn.Parameter:
        """The parameter of the child `variance`: ln(sigma^2), float32, one per input feature."""
        return self.variance.log_variance

    def _log_variance(self) -> Tensor:
        """What calling `variance` gives, without the microseconds of a call that no hook wants."""
        variance = self._modules["variance"]
        if type(variance) is Variance and not (variance._forward_pre_hooks or variance._forward_hooks):
            return variance._parameters["log_variance"]
        return variance()

    def noisy(self) -> bool:
        """Whether a forward pass now would draw noise."""
        return self.training if seeds._MODE is None else seeds._MODE == "on"

    def set_number(self, number: int) -> None:
        """Set the stream that fixed_noise gives this layer, 0 <= number < 65536."""
        self.number = number
        self._fill_stream()

    def _fill_stream(self) -> None:
        self.stream.copy_(torch.tensor([0, self.number], device=self.stream.device))

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._fill_stream()  # to_empty leaves a buffer's contents undefined
        return self

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "variance" in self._modules:  # the plain layer's constructor calls this first
            self.variance.reset_parameters()

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, init_variance={_short(self.variance.init_variance)}"
        return text if self.num_samples == 1 else f"{text}, num_samples={self.num_samples}"


class DIPLinear(DIPLayer, nn.Linear):
    """nn.Linear on a noised input: y = (x + sigma * z) W^T + b while training, y = x W^T + b in eval mode, to the bit.

    in_features, out_features, bias, device, dtype: as nn.Linear. init_variance: sigma^2 to start from, a number > 0 or
    a tensor [in_features]. num_samples: S >= 1 draws averaged inside the layer (as one draw with sigma / sqrt(S)).
    keep: what backward keeps of the input: "u" as nn.Linear does, "x" for layers that share an input, or "auto" (see
    functional.dip_linear). Input [..., in_features]; z is drawn afresh for every element. In bfloat16 a sigma below a
    few thousandths of |x| mostly rounds away. Raises ValueError naming the argument. Source: arXiv 2506.04690, u ~
    N(v, diag(lambda)).
    """

    _KEEPS = ("auto", "u", "x")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        init_variance: float | Tensor = 0.01,
        num_samples: int = 1,
        keep: str = "auto",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._set_up(in_features, init_variance, num_samples, keep, self.weight.device)

    def forward(self, input: Tensor) -> Tensor:
        if not self.noisy():
            return super().forward(input)
        return functional.dip_linear(
            input,
            self.weight,
            self.bias,
            self._log_variance(),
            seeds.draw(self.stream, input),
            row0=seeds.first_row(input),
            num_samples=self.num_samples,
            log_variance=True,
            keep=self.keep,
        )


class DIPConv2d(DIPLayer, nn.Conv2d):
    """nn.Conv2d on a noised input: y = conv(x + sigma * z), sigma per input channel; nn.Conv2d itself in eval mode.

    Arguments of nn.Conv2d, then init_variance (a number > 0 or a tensor [in_channels], a variance), num_samples and
    keep as DIPLinear's ("auto" or "u"). Input [N, C, H, W] or [C, H, W]; z is drawn afresh for every pixel and added
    before the padding. channels_last stays channels_last. Raises ValueError naming the argument. Source: arXiv
    2506.04690.
    """

    _KEEPS = ("auto", "u")

    def __init__(
        self, *args, init_variance: float | Tensor = 0.01, num_samples: int = 1, keep: str = "auto", **kwargs
    ) -> None:
        super().__init__(*args, **kwargs)
        self._set_up(self.in_channels, init_variance, num_samples, keep, self.weight.device)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(_noised(self, input, -3, functional.autocast_dtype(input)) if self.noisy() else input)


class DIPInput(DIPLayer, nn.Module):
    """A projection alone, for a network's input or an embedding: u = x + sigma * z while training, x in eval mode.

    num_features: K. dim: the feature dimension, x.shape[dim] = K. init_variance: a number > 0 or a tensor [K], a
    variance. num_samples: S >= 1 averaged draws. device: of the variance. Returns a tensor of x's shape.
    Raises ValueError naming the argument. Source: arXiv 2506.04690 (v_0 = x is projected too).
    """

    def __init__(
        self,
        num_features: int,
        dim: int = -1,
        init_variance: float | Tensor = 0.01,
        num_samples: int = 1,
        keep: str = "auto",
        device=None,
    ) -> None:
        super().__init__()
        self.num_features, self.dim = num_features, dim
        self._set_up(num_features, init_variance, num_samples, keep, device)

    def forward(self, input: Tensor) -> Tensor:
        return _noised(self, input, self.dim) if self.noisy() else input

    def reset_parameters(self) -> None:
        """Refill the variance."""
        self.variance.reset_parameters()

    def extra_repr(self) -> str:
        return f"{self.num_features}, dim={self.dim}, init_variance={_short(self.variance.init_variance)}"


def _noised(layer: DIPLayer, x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    return functional.perturb(
        x,
        layer._log_variance(),
        seeds.draw(layer.stream, x),
        dim=dim,
        row0=seeds.first_row(x, dim),
        num_samples=layer.num_samples,
        log_variance=True,
        dtype=dtype,
    )


def dip_layers(model: nn.Module) -> dict[str, DIPLayer]:
    """Every DIP layer of the model by its first name, each once, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DIPLayer)}


def number_layers(model: nn.Module) -> nn.Module:
    """Number the model's DIP layers 0, 1, 2, ... in the model's order: layer i then takes stream i under fixed_noise.

    model: any module. Returns it. `convert` calls this; a model built by hand needs it for noise that does not depend
    on what was built before it, and a model of deep-copied layers for its layers to differ. Adding a layer renumbers
    those after it.
    Raises ValueError for more than 65536 layers. Source: the noise contract, DESIGN.
    """
    layers = dip_layers(model)
    if len(layers) > MAX_LAYERS:
        raise ValueError(f"model: expected at most {MAX_LAYERS} DIP layers, got {len(layers)}")
    for number, layer in enumerate(layers.values()):
        layer.set_number(number)
    return model


def _short(init_variance: float | Tensor) -> str:
    if isinstance(init_variance, Tensor):
        return f"[{init_variance.min():.3g} .. {init_variance.max():.3g}]"
    return f"{init_variance:g}"
