"""The modules: a plain layer on a noised input, u = x + sigma * z, y = Layer(u).  docs/maths.md, section 1."""

from __future__ import annotations

import inspect
import itertools
import math
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from . import decay, functional, inputs, seeds, tensor_parallel, tracing, worlds

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
    bfloat16 an optimiser's small steps would round away. A state dict without it leaves it as it is; where it is on the
    meta device, and so has no value yet, it becomes ln(init_variance) when it is moved, filled or loaded.
    The buffer `log_prior` [K], float32 too, is ln gamma of the prior N(0, gamma) that the objective's KL term pulls to:
    init_variance until `calibrate` sets it.
    A module of its own, so that FSDP can shard it apart from weights of another type; calling it returns log_variance.
    Raises ValueError for an init_variance outside these. Source: arXiv 2506.04690, Sigma = diag(lambda); log form:
    this project's.
    """

    log_variance: nn.Parameter

    def __init__(
        self, num_features: int, init_variance: float | Tensor = 0.01, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.init_variance = check_init_variance(init_variance, num_features)
        self.register_parameter("log_variance", None)
        # Past register_parameter, which accelerate's init_empty_weights replaces: no checkpoint has to hold this one.
        self._parameters["log_variance"] = nn.Parameter(torch.empty(num_features, dtype=torch.float32, device=device))
        self.log_prior: Tensor
        self.register_buffer("log_prior", None)  # the same for include_buffers
        self._buffers["log_prior"] = torch.empty(num_features, dtype=torch.float32, device=device)
        self._from_meta = self.log_variance.is_meta  # until it has values
        self.spread: Tensor | None = None  # [K] standard deviation of the input, once measured: calibrate, summary
        self.reset_parameters()
        decay.watch(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        decay.watch(self)  # a copy does not come from __init__

    # ---- values

    def reset_parameters(self) -> None:
        """log_variance = log_prior = ln(init_variance)."""
        if "log_variance" in self._parameters:
            self._fill(self._tensors())
        else:
            self._fill({"log_prior": self.log_prior})
            self.set_log_variance(self._initial())

    def start_anew(self) -> None:
        """After to_empty, which leaves it undefined: ln(init_variance), where a parametrisation lets it be set."""
        if self.cannot_set() is None:
            self.reset_parameters()

    def set_log_variance(self, values: Tensor) -> None:
        """log_variance = values [K], the same on every rank; through the right_inverse of a parametrisation.

        Raises ValueError saying why where that cannot be.
        """
        reason = self.cannot_set()
        if reason is not None:
            raise ValueError(f"log_variance: expected one that can be set, got one {reason}")
        with torch.no_grad():
            if "log_variance" in self._parameters:
                self.log_variance.copy_(tensor_parallel.laid_out_as(values, self.log_variance))
                return
            before, values = self.log_variance.detach().clone(), values.to(self.log_variance)
            self.log_variance = values  # type: ignore[assignment]  # what parametrize makes of an assignment
            if not torch.allclose(self.log_variance, values, rtol=1e-3, atol=1e-3):
                self.log_variance = before  # type: ignore[assignment]
                raise ValueError("log_variance: expected values that its parametrisation can take, got others")

    def cannot_set(self) -> str | None:
        """Why log_variance cannot be set, as the end of a sentence; None where it can."""
        if self.log_variance.is_meta:
            return "on the meta device (offloaded, or not loaded yet): set it before the model is dispatched"
        if "log_variance" in self._parameters:
            return None
        if not nn.utils.parametrize.is_parametrized(self, "log_variance"):
            return "that a hook computes (pruning, weight_norm): remove that first"
        steps: Any = self.parametrizations["log_variance"]  # type: ignore[index]
        one_way = [type(step).__name__ for step in steps if not hasattr(step, "right_inverse")]
        return f"parametrised by {', '.join(one_way)} without a right_inverse: give it one" if one_way else None

    def widen(self) -> None:
        """Float32 again, after a cast past `_apply`: `p.data = p.data.half()`, accelerate's dtype. Warns."""
        parameter = self.log_variance
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if parameter.dtype.itemsize >= 4 or distributed:  # FSDP's mixed precision has an error that names it
            return
        warnings.warn(
            f"dipkernels: a log_variance was cast to {parameter.dtype}, where small steps round away; it is float32 "
            "again, with the values rounded. Cast by model.to(dtype), which leaves it as it is",
            stacklevel=4,
        )
        parameter.data = parameter.data.float()
        parameter.grad = None if parameter.grad is None else parameter.grad.float()

    def _tensors(self) -> dict[str, Tensor]:
        """Its own parameters and buffers."""
        return {name: t for name, t in (*self._parameters.items(), *self._buffers.items()) if t is not None}

    def _initial(self) -> Tensor:
        """ln(init_variance), [K], on the CPU."""
        if isinstance(self.init_variance, Tensor):
            return self.init_variance.log()
        return torch.full((self.num_features,), math.log(self.init_variance), dtype=torch.float32, device="cpu")

    @torch.no_grad()
    def _fill(self, tensors: dict[str, Tensor]) -> None:
        for tensor in tensors.values():
            if isinstance(self.init_variance, Tensor):
                tensor.copy_(tensor_parallel.laid_out_as(self.init_variance.log(), tensor))
            else:
                tensor.fill_(math.log(self.init_variance))

    def forward(self) -> Tensor:
        # FSDP makes a subclass of this one, and after this call may free what it had gathered for it.
        return self.log_variance if type(self) is Variance else self.log_variance.clone()

    def detached(self) -> Tensor:
        """log_variance [K] without gradient, wherever it is kept; of a sharded one the whole, a collective."""
        # accelerate's offload has it on meta, but for the time of a call.
        value = self() if self.log_variance.is_meta and "forward" in self.__dict__ else self.log_variance
        return tensor_parallel.full(value.detach())

    @property
    def sigma(self) -> Tensor:
        """sigma = exp(log_variance / 2), [K], float32, without gradient; of a sharded one the whole, a collective."""
        return torch.exp(self.detached() / 2)

    def extra_repr(self) -> str:
        return f"{self.num_features}, init_variance={_short(self.init_variance)}"

    # ---- moves and loads

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before, computed = self._tensors(), False
        empty = [name for name, t in before.items() if t.is_meta]

        def keep_precision(t: Tensor) -> Tensor:
            nonlocal computed
            try:
                moved = fn(t)
            except NotImplementedError:  # no data to copy: these values are known all the same
                if tensor_parallel.is_dtensor(t) or not any(t is before[name] for name in empty):
                    raise
                t, computed = self._initial(), True
                moved = fn(t)
            narrowed = t.is_floating_point() and moved.dtype.itemsize < t.dtype.itemsize and t.dtype.itemsize >= 4
            return (
                t.to(device=moved.device, dtype=torch.promote_types(moved.dtype, torch.float32)) if narrowed else moved
            )

        super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        after = self._tensors()
        if empty and not any(after[name].is_meta for name in empty):
            self._from_meta = False
            if not computed:  # by to_empty, which leaves all of them undefined
                self._fill(after)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        absent, assigns = set(), local_metadata.get("assign_to_params_buffers", False)
        for name, tensor in self._tensors().items():
            key = prefix + name
            value = state_dict.get(key)
            # torch's set_model_state_dict fills in the model's own tensor for what is missing: nothing, on meta.
            if key in state_dict and not (assigns and tensor.is_meta and getattr(value, "is_meta", False)):
                # With assign=True the tensor itself would become the parameter, half precision and all.
                if isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize < 4:
                    state_dict[key] = value.float()
            elif assigns and tensor.is_meta:
                sibling = state_dict.get(prefix.removesuffix("variance.") + "weight")
                values = self._initial().to(getattr(sibling, "device", "cpu"))
                state_dict[key] = tensor_parallel.laid_out_as(values, tensor, values.device)
            else:
                absent.add(key)
        below = self.state_dict(prefix=prefix, keep_vars=True) if self._modules else {}
        for key, value in below.items():  # a parametrisation's tensors: they stay as they are too
            if key not in state_dict and key not in absent:
                state_dict[key] = value.detach()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        missing[:] = [key for key in missing if key not in absent]

    @property
    def _is_hf_initialized(self) -> bool:
        """Always true; transformers asks after loading, and what its checkpoint lacked is then undefined memory."""
        tensors = self._tensors()
        if self._from_meta and not any(t.is_meta for t in tensors.values()):
            loaded = (name for name, t in tensors.items() if getattr(t, "_is_hf_initialized", False))
            self._fill({name: tensors[name] for name in tensors.keys() - set(loaded)})
            self._from_meta = False
        return True

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        self._from_meta = False


def device_of_variance(weight: Tensor, device: torch.device | str | None) -> torch.device:
    """The weight's; beside a weight without data, where it was asked for, so that it has values all the same."""
    if not weight.is_meta:
        return weight.device
    return torch.get_default_device() if device is None else torch.device(device)


# DIPLayer is mixed into modules, and is none itself.
if TYPE_CHECKING:
    _Mixin = nn.Module
else:
    _Mixin = object


class DIPLayer(_Mixin):
    """What the DIP layers share: the child `variance`, the number of its stream, and when there is noise."""

    _KEEPS: tuple[str, ...] = ("auto",)
    feature_dim: int = -1  # of the input
    _number: int
    _counted_in: str  # which count of layers gave the number: a call of number_layers, or "" for the process's
    _stream: Tensor
    share: Share | None = None  # with the layers that read the same input, if asked for: share_noise

    def _set_up(
        self, num_features: int, init_variance: float | Tensor, num_samples: int, keep: str, device: Any
    ) -> None:
        if not isinstance(num_samples, int) or isinstance(num_samples, bool) or not 1 <= num_samples <= 65536:
            raise ValueError(f"num_samples: expected an integer from 1 to 65536, got {num_samples!r}")
        if keep not in self._KEEPS:
            raise ValueError(f"keep: expected one of {self._KEEPS} for {type(self).__name__}, got {keep!r}")
        self.num_samples, self.keep = num_samples, keep
        self.variance = Variance(num_features, init_variance, device)
        self.number = next(_NUMBERS) % MAX_LAYERS

    @property
    def log_variance(self) -> nn.Parameter:
        """The parameter of the child `variance`: ln(sigma^2), float32, one per input feature."""
        return self.variance.log_variance

    def _log_variance(self) -> Tensor:
        """What calling `variance` gives, without the microseconds of a call that no hook wants."""
        variance = self._modules.get("variance") or self.variance
        if type(variance) is Variance and not (worlds.tracing() or _is_hooked(variance)):
            parameter = variance._parameters.get("log_variance")
            if parameter is not None:  # nn.DataParallel's replicas have tensors in place of parameters
                if parameter.dtype is not torch.float32:
                    variance.widen()
                return parameter
        try:
            gathered: Tensor = variance()
        except KeyError as error:
            raise RuntimeError(
                f"variance: expected its offloaded values to be at hand, got none for {error}; a checkpoint of the "
                "plain model was dispatched with offload. Load it, convert, then dispatch the converted model"
            ) from error
        # Of accelerate, which may cast what it loads; FSDP's mixed precision has an error that names it.
        return gathered.float() if "forward" in variance.__dict__ and gathered.dtype.itemsize < 4 else gathered

    def noisy(self) -> bool:
        """Whether a forward pass now would draw noise."""
        return self.training if seeds._MODE is None else seeds._MODE == "on"

    def __prepare_scriptable__(self) -> None:  # torch.jit.script asks every module of a model
        tracing.refuse_script(self)

    def without_noise(self, input: Tensor) -> Tensor:
        """The input; where DDP or noise_off may ask for log_variance, it is used all the same, for gradients of 0."""
        if (seeds._MODE == "off" and self.training) or ddp_waits():
            return functional.without_noise(input, self._log_variance())
        return input

    def copied_without_noise(self, input: Tensor) -> Tensor:
        """The same for what others may change in place, which autograd refuses for the view made there."""
        same = self.without_noise(input)
        return same if same is input else same.clone()

    # ---- the number, and what is computed from it

    @property
    def number(self) -> int:
        """The stream that fixed_noise gives this layer, 0 <= number < 65536."""
        return self._number

    @number.setter
    def number(self, number: int) -> None:
        self.set_number(number)

    def set_number(self, number: int, model: str = "") -> None:
        """Set the stream that fixed_noise gives this layer, 0 <= number < 65536. model: what it was counted in."""
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < MAX_LAYERS:
            raise ValueError(f"number: expected an integer from 0 to {MAX_LAYERS - 1}, got {number!r}")
        self.__dict__["_number"], self.__dict__["_counted_in"] = number, model
        self._keep_stream()

    @property
    def stream(self) -> Tensor:
        """int64 [2] = (0, number), made afresh on the variance's device."""
        return torch.tensor([0, self._number], device=self.variance.log_variance.device)

    def _keep_stream(self) -> None:
        # No buffer: those are averaged, broadcast, emptied and replaced by others' loops.
        device = self.variance.log_variance.device
        self.__dict__["_stream"] = torch.tensor([0, self._number], device="cpu" if device.type == "meta" else device)

    def _stream_on(self, device: torch.device) -> Tensor:
        """`stream` on this device, without a copy from the host."""
        kept: Tensor = self._stream
        if kept.device == device:
            return kept
        if worlds.tracing():  # the number itself would compile each layer anew
            return kept.to(device)
        return torch.arange(2, device=device) * self._number

    def _seed(self, x: Tensor) -> Tensor:
        """The seed of one forward pass on x."""
        if seeds._KEY is None:
            return seeds.draw(self._stream, x)
        if not worlds.tracing():
            seeds.note_number(self._number, self._counted_in)
        return seeds.draw(self._stream_on(x.device), x)

    # ---- moves

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._keep_stream()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        weight = getattr(self, "weight", None)
        empty = isinstance(weight, Tensor) and weight.is_meta  # now: what follows may change the tensor itself
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if recurse and empty and not self.weight.is_meta and "variance" in self._modules:
            self.variance.start_anew()
        self._keep_stream()
        return self

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As nn.Module's; refuses what torch's tensor-parallel styles do to a layer with a variance inside."""
        if "variance" in self._modules and (name.startswith("variance.") or self._is_cut(name, param)):
            raise ValueError(
                f"{type(self).__name__}: expected tensor parallelism by dip.parallelize_module(model, mesh, plan), "
                "which takes the same plan and keeps log_variance whole, got a style of torch's own; or parallelise "
                "the plain model, then convert it"
            )
        super().register_parameter(name, param)

    def _is_cut(self, name: str, param: nn.Parameter | None) -> bool:
        """Whether a DTensor split over ranks takes the place of a plain parameter."""
        before = self.__dict__["_parameters"].get(name)
        if before is None or tensor_parallel.is_dtensor(before) or not tensor_parallel.is_dtensor(param):
            return False
        return any(p.is_shard() for p in param.placements)

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
        self._set_up(in_features, init_variance, num_samples, keep, device_of_variance(self.weight, device))
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
        if type(input) is not Tensor:
            if isinstance(input, tracing.Proxy):
                return tracing.record(self, input)
            inputs.require_tensor(self, input)
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
            seed, dtype = self._seed(input), functional.autocast_dtype(input)
            sigma = self._log_variance()
            try:
                y = functional.affine(input, self.weight, self.bias, sigma, seed, where, self.keep, dtype)
            except inputs.FAILURES:
                inputs.explain(self, input, sigma)
                raise
            return self._activated(y)
        seed = self._stream_on(input.device) if self.estimator == "analytic" else self._seed(input)
        sigma = _beside(input, self)
        try:
            return functional.dip_linear(
                input,
                self.weight,
                self.bias,
                sigma,
                seed,
                row0=seeds.first_row(input),
                num_samples=self.num_samples,
                log_variance=True,
                keep=self.keep,
                activation=self.activation,
                estimator=self.estimator,
            )
        except inputs.FAILURES:
            inputs.explain(self, input, sigma)
            raise

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

    def __init__(  # all by name: torch.nn.utils.skip_init looks for device
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        init_variance: float | Tensor = 0.01,
        num_samples: int = 1,
        keep: str = "auto",
    ) -> None:
        places = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        super().__init__(*places, device, dtype)
        self._set_up(in_channels, init_variance, num_samples, keep, device_of_variance(self.weight, device))

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is not Tensor:
            if isinstance(input, tracing.Proxy):
                return tracing.record(self, input)
            inputs.require_tensor(self, input)
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
        if type(input) is not Tensor:
            if isinstance(input, tracing.Proxy):
                return tracing.record(self, input)
            inputs.require_tensor(self, input)
        return noised(self, input) if self.noisy() else self.copied_without_noise(input)

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
        if type(x) is not Tensor:
            if isinstance(x, tracing.Proxy):
                return tracing.record(self, *args, **kwargs)
            inputs.require_tensor(self, x)
        u = noised(self, x, functional.autocast_dtype(x)) if self.noisy() else self.copied_without_noise(x)
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
    it, when x is gone, or when its gradient is there: a layer that is skipped (an expert, an early exit) keeps
    neither alive, and takes no u of a step before.
    """

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        # By device, for nn.DataParallel's replicas share this object: (x, what u depends on beside x, the key, layers
        # served, u); x by a weak reference, but in a graph that torch.compile makes.
        self._entries: dict[Any, tuple[Any, ...]] = {}

    def noised(self, layer: DIPLayer, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        compiling = worlds.tracing()
        version = None if compiling or x.is_inference() else x._version
        place = (version, dtype, torch.is_grad_enabled(), seeds._ROW0)
        device = "compiled" if compiling else x.device
        entry = self._entries.get(device)
        same = entry is not None and (entry[0] if compiling else entry[0]()) is x
        if not same or entry[1] != place or entry[2] is not seeds._KEY or layer in entry[3]:  # type: ignore[index]
            served, u = (layer,), _fresh(layer, x, dtype)
        else:
            served, u = (*entry[3], layer), entry[4]  # type: ignore[index]
        if len(served) == self.num_layers:
            self._entries.pop(device, None)
        else:
            held = x if compiling else weakref.ref(x, self._forget(device))
            self._entries[device] = (held, place, seeds._KEY, served, u)
            if len(served) == 1 and not compiling and x.grad_fn is None and u.requires_grad:
                # A model's input outlives the step: a layer that this one skips would take u in the next.
                u.register_hook(self._let_go(device, weakref.ref(u)))
        return u

    def _forget(self, device: object) -> Callable[[weakref.ref[Tensor]], None]:
        entries = self._entries

        def forget(dead: weakref.ref[Tensor]) -> None:
            if device in entries and entries[device][0] is dead:
                del entries[device]

        return forget

    def _let_go(self, device: object, u: weakref.ref[Tensor]) -> Callable[[Tensor], None]:
        entries = self._entries

        def let_go(slope: Tensor) -> None:
            if device in entries and entries[device][4] is u():
                del entries[device]

        return let_go

    def __getstate__(self) -> dict[str, Any]:
        return {"num_layers": self.num_layers, "_entries": {}}


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
    sigma, seed = _beside(x, layer), layer._seed(x)
    try:
        return functional.perturb(
            x,
            sigma,
            seed,
            dim=dim,
            row0=seeds.first_row(x, dim),
            sample=sample,
            num_samples=layer.num_samples,
            log_variance=True,
            dtype=dtype,
        )
    except inputs.FAILURES:
        inputs.explain(layer, x, sigma)
        raise


def _beside(x: Tensor, layer: DIPLayer) -> Tensor:
    """The layer's log_variance; for nn.DataParallel's replica of a layer that shares the first one's, on x's device."""
    log_variance = layer._log_variance()
    elsewhere = layer.share is not None and getattr(layer, "_is_replica", False)
    return log_variance.to(x.device) if elsewhere else log_variance


# ---- where a variance may be used without a call, and where it must be used at all -----------------------------------


def _is_hooked(module: nn.Module) -> bool:
    """Whether nn.Module.__call__ would do more than call the class's forward."""
    return bool(
        "forward" in module.__dict__
        or module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or module._compiled_call_impl is not None
        or _has_any_global_hook()
    )


def ddp_waits() -> bool:
    """Whether DDP runs this forward pass: it stops at the next one where a parameter got no gradient."""
    return torch.is_grad_enabled() and nn.parallel.DistributedDataParallel._active_ddp_module is not None


# ---- the layers of a model -------------------------------------------------------------------------------------------


def dip_layers(model: nn.Module) -> dict[str, DIPLayer]:
    """Every DIP layer of the model by its first name, each once, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DIPLayer)}


def number_layers(model: nn.Module) -> nn.Module:
    """Number the model's DIP layers 0, 1, 2, ... in the model's order: layer i then takes stream i under fixed_noise.

    model: any module. Returns it. `convert` calls this; a model built by hand needs it for noise that does not depend
    on what was built before it, and so does one joined from models that were converted apart or from deep-copied
    layers, for its layers to differ. Under fixed_noise the first warns, and `predict` and `trajectories` of either;
    a copy that is called by itself draws its original's noise. Adding a layer renumbers those after it.
    Layers that share one draw have one number.
    Raises ValueError for more than 65536 layers. Source: the noise contract, DESIGN.
    """
    layers = dip_layers(model)
    if len(layers) > MAX_LAYERS:
        raise ValueError(f"model: expected at most {MAX_LAYERS} DIP layers, got {len(layers)}")
    numbers, counted_in = itertools.count(), uuid.uuid4().hex
    shared: dict[Share | None, int] = {}
    for layer in layers.values():
        number = next(numbers) if layer.share not in shared else shared[layer.share]
        if layer.share is not None:
            shared[layer.share] = number
        layer.set_number(number, counted_in)
    ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    model._ddp_params_and_buffers_to_ignore = sorted({*ignored, *own_buffers(layers)})  # type: ignore[assignment]
    return model


def own_buffers(layers: Iterable[str]) -> set[str]:
    """The buffers of layers of these names: the same on every rank, and DDP would broadcast them before each pass."""
    return {f"{name}.variance.log_prior".lstrip(".") for name in layers}


def warn_of_equal_numbers(model: nn.Module) -> None:
    """Warn under fixed_noise where layers of the model have one number, and so one noise, without sharing it."""
    if seeds._KEY is None or worlds.tracing():
        return
    owners: dict[int, tuple[str, Share | None]] = {}
    for name, layer in dip_layers(model).items():
        first, share = owners.setdefault(layer.number, (name, layer.share))
        if first != name and (share is None or share is not layer.share):
            warnings.warn(
                f"dipkernels: the layers {first!r} and {name!r} have one number ({layer.number}), so that fixed_noise "
                "gives them one noise; call dip.number_layers(model) on the whole model",
                stacklevel=3,
            )
            return


def _short(init_variance: float | Tensor) -> str:
    if isinstance(init_variance, Tensor):
        return f"[{init_variance.min():.3g} .. {init_variance.max():.3g}]"
    return f"{init_variance:g}"
