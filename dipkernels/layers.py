"""The modules: a plain layer on a noised input, u = x + sigma * z, y = Layer(u).  docs/maths.md, section 1."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional, seeds, tensor_parallel

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

    def __init__(
        self, num_features: int, init_variance: float | Tensor = 0.01, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.init_variance = check_init_variance(init_variance, num_features)
        self.log_variance = nn.Parameter(torch.empty(num_features, dtype=torch.float32, device=device))
        self.spread: Tensor | None = None  # [K] standard deviation of the input, once measured: calibrate, summary
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """log_variance = ln(init_variance)."""
        if isinstance(self.init_variance, Tensor):
            self.log_variance.copy_(tensor_parallel.laid_out_as(self.init_variance.log(), self.log_variance))
        else:
            self.log_variance.fill_(math.log(self.init_variance))

    def forward(self) -> Tensor:
        # FSDP makes a subclass of this one, and after this call may free what it had gathered for it.
        return self.log_variance if type(self) is Variance else self.log_variance.clone()

    @property
    def sigma(self) -> Tensor:
        """sigma = exp(log_variance / 2), [K], float32, without gradient; of a sharded one the whole, a collective."""
        return torch.exp(tensor_parallel.full(self.log_variance.detach()) / 2)

    # The styles of torch.distributed.tensor.parallel partition every module inside a layer as if it were the layer
    # itself: by what follows ColwiseParallel and RowwiseParallel leave log_variance whole on each rank.

    @property
    def weight(self) -> Tensor:
        return self.log_variance.detach()[None]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":
            return
        before = self._parameters.get(name)
        arrived = before is not None and not tensor_parallel.is_dtensor(before)
        super().register_parameter(name, tensor_parallel.replicated(param) if arrived else param)

    def extra_repr(self) -> str:
        return f"{self.log_variance.numel()}, init_variance={_short(self.init_variance)}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_precision(t: Tensor) -> Tensor:
            moved = fn(t)
            narrowed = t.is_floating_point() and moved.dtype.itemsize < t.dtype.itemsize and t.dtype.itemsize >= 4
            return (
                t.to(device=moved.device, dtype=torch.promote_types(moved.dtype, torch.float32)) if narrowed else moved
            )

        return super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
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


# DIPLayer is mixed into modules, and is none itself.
if TYPE_CHECKING:
    _Mixin = nn.Module
else:
    _Mixin = object


class DIPLayer(_Mixin):
    """What the DIP layers share: the child `variance`, the buffer `stream` = (0, number), and when there is noise."""

    _KEEPS: tuple[str, ...] = ("auto",)
    feature_dim: int = -1  # of the input
    stream: Tensor
    share: Share | None = None  # with the layers that read the same input, if asked for: share_noise

    def _set_up(
        self, num_features: int, init_variance: float | Tensor, num_samples: int, keep: str, device: Any
    ) -> None:
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
        variance = self._modules.get("variance") or self.variance
        if type(variance) is Variance and not (variance._forward_pre_hooks or variance._forward_hooks):
            return variance._parameters["log_variance"]  # type: ignore[return-value]
        gathered: Tensor = variance()
        return gathered

    def noisy(self) -> bool:
        """Whether a forward pass now would draw noise."""
        return self.training if seeds._MODE is None else seeds._MODE == "on"

    def set_number(self, number: int) -> None:
        """Set the stream that fixed_noise gives this layer, 0 <= number < 65536."""
        self.number = number
        self._fill_stream()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name != "variance.log_variance":  # from a tensor-parallel style, which comes to the child by itself
            super().register_parameter(name, param)

    def without_noise(self, input: Tensor) -> Tensor:
        """The input; under noise_off log_variance is then used all the same, with a gradient of zeros."""
        if seeds._MODE == "off" and self.training:
            return functional.without_noise(input, self._log_variance())
        return input

    def _fill_stream(self) -> None:
        stream = tensor_parallel.local(self.stream)
        stream.copy_(torch.tensor([0, self.number], device=stream.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._fill_stream()  # to_empty leaves a buffer's contents undefined
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if self.stream.is_meta and local_metadata.get("assign_to_params_buffers", False):
            # Tensors take the place of those on meta; no state dict holds the stream.
            names = (prefix + "weight", prefix + "variance.log_variance")
            arrived = [state_dict[name] for name in names if name in state_dict]
            if arrived and not arrived[0].is_meta:
                self.stream = torch.tensor([0, self.number], device=arrived[0].device)

    def reset_parameters(self) -> None:
        plain = getattr(super(), "reset_parameters", None)
        if plain is not None:
            plain()
        if "variance" in self._modules:  # the plain layer's constructor calls this first
            self.variance.reset_parameters()

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f"init_variance={_short(self.variance.init_variance)}"]
        if self.num_samples > 1:
            parts.append(f"num_samples={self.num_samples}")
        if self.share is not None:
            parts.append(f"shared_by={self.share.num_layers}")
        return ", ".join(part for part in parts if part)


class DIPLinear(DIPLayer, nn.Linear):
    """nn.Linear on a noised input: y = act((x + sigma * z) W^T + b) in training, act(x W^T + b) in eval mode, to the bit.

    in_features, out_features, bias, device, dtype: as nn.Linear. init_variance: sigma^2 to start from, a number > 0 or
    a tensor [in_features]. num_samples: S >= 1 draws averaged inside the layer (as one draw with sigma / sqrt(S)).
    keep: what backward keeps of the input: "u" as nn.Linear does, "x" for layers that share an input, or "auto" (see
    functional.dip_linear). activation: None, "relu", "gelu", "gelu_tanh", "silu" or "tanh", applied here. estimator:
    "sample", act of one draw; "mean", the mean of act over num_samples draws; "analytic", the exact mean over all
    draws, for which nothing is drawn (see functional.dip_linear). Input [..., in_features]; z is drawn afresh for every
    element. In bfloat16 a sigma below a
    few thousandths of |x| mostly rounds away. Raises ValueError naming the argument. Source: arXiv 2506.04690, u ~
    N(v, diag(lambda)).
    """

    _KEEPS = ("auto", "u", "x")

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
        self._set_up(in_features, init_variance, num_samples, keep, self.weight.device)
        if activation is not None and activation not in functional.ACTIVATIONS:
            raise ValueError(f"activation: expected None or one of {tuple(functional.ACTIVATIONS)}, got {activation!r}")
        if estimator not in functional.ESTIMATORS:
            raise ValueError(f"estimator: expected one of {functional.ESTIMATORS}, got {estimator!r}")
        if estimator == "analytic" and num_samples != 1:
            raise ValueError(f"num_samples: expected 1 with estimator='analytic', got {num_samples}")
        if estimator == "analytic" and keep == "u":
            raise ValueError(f"keep: expected 'auto' or 'x' with estimator={estimator!r}, got 'u'")
        self.activation, self.estimator = activation, estimator

    plain_type = nn.Linear
    activation: str | None = None  # of a converted layer too
    estimator = "sample"

    def forward(self, input: Tensor) -> Tensor:
        if not self.noisy():
            return self._activated(super().forward(self.without_noise(input)))
        if self.share is not None and self.estimator != "analytic":
            if self.estimator == "mean" and self.activation is not None:
                raise ValueError("estimator: expected 'sample' or 'analytic' where noise is shared, got 'mean'")
            u = noised(self, input, functional.autocast_dtype(input))
            return self._activated(F.linear(u, self.weight, self.bias))
        if self.estimator == "sample":  # at once: what dip_linear checks, the constructor has
            samples = self.num_samples
            where = (-1, seeds.first_row(input), 0, 0, 1, 1.0 if samples == 1 else samples**-0.5, True)
            seed, dtype = seeds.draw(self.stream, input), functional.autocast_dtype(input)
            sigma = self._log_variance()
            return self._activated(
                functional.affine(input, self.weight, self.bias, sigma, seed, where, self.keep, dtype)
            )
        return functional.dip_linear(
            input,
            self.weight,
            self.bias,
            self._log_variance(),
            self.stream if self.estimator == "analytic" else seeds.draw(self.stream, input),
            row0=seeds.first_row(input),
            num_samples=self.num_samples,
            log_variance=True,
            keep=self.keep,
            activation=self.activation,
            estimator=self.estimator,
        )

    def _activated(self, y: Tensor) -> Tensor:
        return y if self.activation is None else functional.ACTIVATIONS[self.activation](y)

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]
        parts += [f"activation={self.activation}"] if self.activation is not None else []
        parts += [f"estimator={self.estimator}"] if self.estimator != "sample" else []
        return ", ".join(parts)


class _DIPConv(DIPLayer):
    in_channels: int
    weight: Tensor
    _KEEPS = ("auto", "u")

    def __init__(
        self, *args: Any, init_variance: float | Tensor = 0.01, num_samples: int = 1, keep: str = "auto", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._set_up(self.in_channels, init_variance, num_samples, keep, self.weight.device)

    def forward(self, input: Tensor) -> Tensor:
        if not self.noisy():
            y: Tensor = super().forward(self.without_noise(input))
        else:
            y = super().forward(noised(self, input, functional.autocast_dtype(input)))
        return y


class DIPConv1d(_DIPConv, nn.Conv1d):
    """nn.Conv1d on a noised input, as DIPConv2d: input [N, C, L] or [C, L], sigma per input channel."""

    feature_dim = -2
    plain_type = nn.Conv1d


class DIPConv2d(_DIPConv, nn.Conv2d):
    """nn.Conv2d on a noised input: y = conv(x + sigma * z), sigma per input channel; nn.Conv2d itself in eval mode.

    Arguments of nn.Conv2d, then init_variance (a number > 0 or a tensor [in_channels], a variance), num_samples and
    keep as DIPLinear's ("auto" or "u"). Input [N, C, H, W] or [C, H, W]; z is drawn afresh for every pixel and added
    before the padding. channels_last stays channels_last. Raises ValueError naming the argument. Source: arXiv
    2506.04690.
    """

    feature_dim = -3
    plain_type = nn.Conv2d


class DIPConv3d(_DIPConv, nn.Conv3d):
    """nn.Conv3d on a noised input, as DIPConv2d: input [N, C, D, H, W] or [C, D, H, W], sigma per input channel."""

    feature_dim = -4
    plain_type = nn.Conv3d


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
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_features, self.dim = num_features, dim
        self._set_up(num_features, init_variance, num_samples, keep, device)

    @property
    def feature_dim(self) -> int:  # type: ignore[override]
        return self.dim

    def forward(self, input: Tensor) -> Tensor:
        return noised(self, input) if self.noisy() else self.without_noise(input)

    def reset_parameters(self) -> None:
        """Refill the variance."""
        self.variance.reset_parameters()

    def extra_repr(self) -> str:
        return f"{self.num_features}, dim={self.dim}, init_variance={_short(self.variance.init_variance)}"


# ---- any other layer: its own class on a noised input ----------------------------------------------------------------


class _Twin(DIPLayer):
    """Before a class whose forward takes the input first: that forward on x + sigma * z."""

    input_name: str = ""  # of forward's first parameter, by which callers may pass the input

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not args and self.input_name not in kwargs:
            raise TypeError(f"{type(self).__name__}: expected its input first, got none")
        x = args[0] if args else kwargs[self.input_name]
        u = noised(self, x, functional.autocast_dtype(x)) if self.noisy() else self.without_noise(x)
        if args:
            return super().forward(u, *args[1:], **kwargs)
        return super().forward(**{**kwargs, self.input_name: u})

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        # The class was made at run time, so a pickle names the plain one.
        return _new_twin, (self.plain_type, self.feature_dim), self.__getstate__()  # type: ignore[no-untyped-call]


_MADE: dict[tuple[type[nn.Module], int], type[nn.Module]] = {}


def twin_type(plain_type: type[nn.Module], feature_dim: int = -1, name: str = "") -> type[nn.Module]:
    """The DIP twin of a class that another package defines, made once; `name` for its first use."""
    if (plain_type, feature_dim) not in _MADE:
        body = {
            "plain_type": plain_type,
            "feature_dim": feature_dim,
            "input_name": first_parameter(plain_type) or "",
            "__module__": __name__,
        }
        _MADE[plain_type, feature_dim] = type(name or f"DIP{plain_type.__name__}", (_Twin, plain_type), body)
    return _MADE[plain_type, feature_dim]


def first_parameter(kind: type[nn.Module]) -> str | None:
    """The name of what forward takes first; None where it takes nothing that it names."""
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:2]
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return parameters[0].name if parameters and parameters[0].kind in named else None


def _new_twin(plain_type: type[nn.Module], feature_dim: int) -> nn.Module:
    kind = twin_type(plain_type, feature_dim)
    return kind.__new__(kind)


# ---- one draw and one u for layers that read the same input ----------------------------------------------------------


class Share:
    """One u for the layers that read one tensor: the first to be called draws it, the others take it.

    A layer that gets another tensor, or the same one a second time, draws afresh. u is let go when every layer has had
    it.
    """

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self._entry: tuple[Any, ...] | None = None  # (x, what u depends on beside x, the key, layers served, u)

    def noised(self, layer: DIPLayer, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        version = None if torch.compiler.is_compiling() or x.is_inference() else x._version
        place = (version, dtype, torch.is_grad_enabled(), seeds._ROW0)
        entry = self._entry
        if entry is None or entry[0] is not x or entry[1] != place or entry[2] is not seeds._KEY or layer in entry[3]:
            served, u = (layer,), _fresh(layer, x, dtype)
        else:
            served, u = (*entry[3], layer), entry[4]
        self._entry = None if len(served) == self.num_layers else (x, place, seeds._KEY, served, u)
        return u

    def __getstate__(self) -> dict[str, Any]:
        return {"num_layers": self.num_layers, "_entry": None}


def share_noise(layers: list[DIPLayer]) -> None:
    """Make these layers, in the model's order, share the first one's variance, its draw, and u.

    The others' variances are gone from the state dict, and `layer.variance` of each is the first one's.
    Raises ValueError for layers of another number of features or another feature dimension.
    """
    first = layers[0]
    wanted = (first.variance.log_variance.numel(), first.feature_dim, first.num_samples)
    for layer in layers[1:]:
        got = (layer.variance.log_variance.numel(), layer.feature_dim, layer.num_samples)
        if got != wanted:
            raise ValueError(
                f"share: expected layers of one (features, feature dimension, num_samples) = {wanted}, got {got}"
            )
    share = Share(len(layers))
    for layer in layers:
        layer.__dict__["share"] = share
        if layer is not first:
            del layer.variance
            layer.__dict__["variance"] = first.variance  # no child: a state dict and FSDP see one owner


def noised(layer: DIPLayer, x: Tensor, dtype: torch.dtype | None = None, sample: int = 0) -> Tensor:
    """u = x + sigma * z of the layer's own seed, variance and feature dimension; of `dtype`, x's by default."""
    return _fresh(layer, x, dtype, sample) if layer.share is None else layer.share.noised(layer, x, dtype)


def _fresh(layer: DIPLayer, x: Tensor, dtype: torch.dtype | None = None, sample: int = 0) -> Tensor:
    dim = layer.feature_dim
    return functional.perturb(
        x,
        layer._log_variance(),
        seeds.draw(layer.stream, x),
        dim=dim,
        row0=seeds.first_row(x, dim),
        sample=sample,
        num_samples=layer.num_samples,
        log_variance=True,
        dtype=dtype,
    )


# ---- the layers of a model -------------------------------------------------------------------------------------------


def dip_layers(model: nn.Module) -> dict[str, DIPLayer]:
    """Every DIP layer of the model by its first name, each once, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DIPLayer)}


def number_layers(model: nn.Module) -> nn.Module:
    """Number the model's DIP layers 0, 1, 2, ... in the model's order: layer i then takes stream i under fixed_noise.

    model: any module. Returns it. `convert` calls this; a model built by hand needs it for noise that does not depend
    on what was built before it, and a model of deep-copied layers for its layers to differ. Adding a layer renumbers
    those after it. Layers that share one draw have one number.
    Raises ValueError for more than 65536 layers. Source: the noise contract, DESIGN.
    """
    layers = dip_layers(model)
    if len(layers) > MAX_LAYERS:
        raise ValueError(f"model: expected at most {MAX_LAYERS} DIP layers, got {len(layers)}")
    numbers = itertools.count()
    shared: dict[Share | None, int] = {}
    for layer in layers.values():
        number = next(numbers) if layer.share not in shared else shared[layer.share]
        if layer.share is not None:
            shared[layer.share] = number
        layer.set_number(number)
    # A stream is the same on every rank; DDP would broadcast it before each forward pass.
    ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    streams = (f"{name}.stream".lstrip(".") for name in layers)
    model._ddp_params_and_buffers_to_ignore = sorted({*ignored, *streams})  # type: ignore[assignment]
    return model


def _short(init_variance: float | Tensor) -> str:
    if isinstance(init_variance, Tensor):
        return f"[{init_variance.min():.3g} .. {init_variance.max():.3g}]"
    return f"{init_variance:g}"
