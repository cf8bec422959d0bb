"""The learnable variance of a layer's input.  docs/maths.md, section 1."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import worlds
from ..arguments import integer, real
from ..ops import dtensor
from ..worlds import has_ranks, is_dtensor
from . import decay

# What a Variance keeps in the state dict; all [K], float32.
TENSORS = ("log_variance", "log_prior", "pull")


def check_init_variance(init_variance: float | Tensor, num_features: int) -> float | Tensor:
    """A float, or a CPU float32 tensor [num_features]; every value finite and > 0."""
    if isinstance(init_variance, Tensor) and init_variance.ndim > 0:
        if init_variance.shape != (num_features,):
            raise ValueError(
                f"init_variance: expected a number or shape ({num_features},), got shape "
                f"{tuple(init_variance.shape)}"
            )
        values = init_variance.detach().to("cpu", torch.float32).clone()
        if not bool((values.isfinite() & (values > 0)).all()):
            raise ValueError(f"init_variance: expected finite values > 0, got {values}")
        return values
    value = float(real("init_variance", init_variance, above=0, other=" or a tensor of them"))
    if value > torch.finfo(torch.float32).max:
        raise ValueError(f"init_variance: expected a variance that float32 can hold, got {value}")
    return value


def require_finite_values(argument: str, log_variances: Mapping[str, Tensor]) -> None:
    """Raise ValueError naming those that are not the logarithms of variances that float32 can
    hold."""
    wide = [values.float() for values in log_variances.values()]
    finite = [(v.isfinite() & v.exp().isfinite()).all() for v in wide]
    # One look at all of them, for a GPU is waited for at each.
    found = torch.stack([each.to(finite[0].device) for each in finite]).tolist() if finite else []
    if broken := [name for name, fine in zip(log_variances, found, strict=True) if not fine]:
        raise ValueError(
            f"{argument}: expected finite variances, got NaN or infinity in {broken}, where "
            "sigma^2 = exp(log_variance); a step with such gradients spoils them: load_variances "
            "or calibrate sets them anew"
        )


class Variance(nn.Module):
    """The learnable variance of a projection, lambda = exp(log_variance), one per input feature.

    `log_variance` [K] is float32, or float64 behind `model.double()`, because in bfloat16 an
    optimiser's small steps would be lost in rounding. A state dict without it leaves it as it is.

    The buffer `log_prior` [K], float32 too, is ln gamma of the prior N(0, gamma) that the
    objective's KL term pulls to: init_variance until `calibrate` sets it. The buffer `pull` [K] is
    what each feature's KL term is multiplied by: 1, or less where `calibrate` finds that an example
    has few values.

    It is a module of its own, so that FSDP can shard it apart from weights of another type. Calling
    it returns log_variance.

    Args:
        num_features: K.
        init_variance: A number > 0 or a tensor [K], a variance (sigma = sqrt(init_variance)).
        device: The device of its tensors.

    Raises:
        ValueError, TypeError: A num_features or init_variance outside these.

    Examples:
        >>> dip.Variance(2, init_variance=0.25).sigma
        tensor([0.5000, 0.5000])

    Source: arXiv 2506.04690, Sigma = diag(lambda); log form: this project's.
    """

    log_variance: nn.Parameter
    log_prior: Tensor
    pull: Tensor
    # what FSDP gathered before the module around it: distributed.shard_variances
    gathered: Tensor | None = None
    gathered_with: tuple[Variance, ...] = ()  # the group that FSDP gathers at once

    def __init__(
        self,
        num_features: int,
        init_variance: float | Tensor = 0.01,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_features = integer("num_features", num_features, 0)
        self.init_variance = check_init_variance(init_variance, num_features)
        with torch.inference_mode(False):  # what is made in that mode can never be trained
            self._make(device)
            self.reset_parameters()
        # [K] standard deviation of the input, once measured: calibrate, summary
        self.spread: Tensor | None = None
        decay.watch(self)

    def _make(self, device: torch.device | str | None) -> None:
        # Filled past register_parameter and register_buffer, which accelerate's init_empty_weights
        # replaces: no checkpoint has to hold these.
        for name in TENSORS:
            values = torch.empty(self.num_features, dtype=torch.float32, device=device)
            if name == "log_variance":
                self.register_parameter(name, None)
                self._parameters[name] = nn.Parameter(values)
            else:
                self.register_buffer(name, None)
                self._buffers[name] = values
        self._from_meta = self.log_variance.is_meta  # until it has values

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        decay.watch(self)  # a copy does not come from __init__

    # ---- values

    def reset_parameters(self) -> None:
        """log_variance = log_prior = ln(init_variance), pull = 1."""
        self._fill({name: t for name, t in self._tensors().items() if name in TENSORS})
        if "log_variance" not in self._parameters:  # parametrised
            self.set_log_variance(self._initial("log_variance"))

    def set_log_variance(self, values: Tensor) -> None:
        """log_variance = values [K], the same on every rank; through the right_inverse of a
        parametrisation.

        Raises ValueError saying why where that cannot be, or where a variance would not be finite.
        """
        reason = self.cannot_set()
        if reason is not None:
            raise ValueError(f"log_variance: expected one that can be set, got one {reason}")
        require_finite_values("values", {"log_variance": values})
        with torch.no_grad():
            if "log_variance" in self._parameters:
                self.log_variance.copy_(dtensor.laid_out_as(values, self.log_variance))
                return
            before, values = self.log_variance.detach().clone(), values.to(self.log_variance)
            self.log_variance = values  # type: ignore[assignment]  # what parametrize makes of an assignment
            if not torch.allclose(self.log_variance, values, atol=1e-3):
                self.log_variance = before  # type: ignore[assignment]
                raise ValueError(
                    "log_variance: expected values that its parametrisation can take, got others"
                )

    def cannot_set(self) -> str | None:
        """Why log_variance cannot be set, as the end of a sentence; None where it can."""
        lack = self.lack(self.log_variance)
        if lack == "meta":
            return (
                "on the meta device (offloaded, or not loaded yet): set it before the model is "
                "dispatched"
            )
        if in_zero(self.log_variance):
            return (
                "in DeepSpeed's ZeRO, whose own copy would overwrite it: set it before "
                "deepspeed.initialize"
            )
        if lack:
            return "kept elsewhere by FSDP1: set it before the model is wrapped"
        if "log_variance" in self._parameters:
            return None
        if not nn.utils.parametrize.is_parametrized(self, "log_variance"):
            return "computed by a hook (pruning, weight_norm): remove that first"
        steps: Any = self.parametrizations["log_variance"]  # type: ignore[index]
        one_way = [type(step).__name__ for step in steps if not hasattr(step, "right_inverse")]
        if one_way:
            return f"parametrised by {', '.join(one_way)} without a right_inverse: give it one"
        return None

    def widen(self) -> None:
        """Float32 again, after a cast past `_apply`: `p.data = p.data.half()`, accelerate's dtype.
        Warns."""
        parameter = self.log_variance
        # FSDP's mixed precision has an error that names it
        if parameter.dtype.itemsize >= 4 or has_ranks():
            return
        warnings.warn(
            f"dipkernels: a log_variance was cast to {parameter.dtype}, where small steps round "
            "away; it is float32 again, with the values rounded. Cast by model.to(dtype), which "
            "leaves it as it is",
            stacklevel=4,
        )
        parameter.data = parameter.data.float()
        parameter.grad = None if parameter.grad is None else parameter.grad.float()

    def _tensors(self) -> dict[str, Tensor]:
        """Its own parameters and buffers."""
        return {
            name: t
            for name, t in (*self._parameters.items(), *self._buffers.items())
            if t is not None
        }

    def _initial(self, name: str) -> Tensor:
        """What this tensor starts at, [K], on the CPU: ln(init_variance), or 1 for the pull."""
        if name != "pull" and isinstance(self.init_variance, Tensor):
            return self.init_variance.log()
        start = 1.0 if name == "pull" else math.log(self.init_variance)
        # not torch.full, which DeepSpeed's zero.Init replaces
        value = torch.as_tensor(start, dtype=torch.float32, device="cpu")
        return value.repeat(self.num_features)

    @torch.no_grad()
    def _fill(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensor.copy_(dtensor.laid_out_as(self._initial(name), tensor))

    def forward(self) -> Tensor:
        # FSDP makes a subclass of this one, and after this call may free what it had gathered for
        # it.
        return self.log_variance if type(self) is Variance else self.log_variance.clone()

    def gathered_before(self) -> Tensor | None:
        """What FSDP gathered before the module around it, until it shards log_variance again; None
        also where that was without a gradient, and one is wanted."""
        gathered = self.gathered
        if gathered is None:
            return None
        own = self.log_variance
        if is_dtensor(own) and any(p.is_shard() for p in own.placements):
            for each in self.gathered_with:  # the next call gathers the values of now for all
                each.gathered = None
            return None
        learns = torch.is_grad_enabled() and own.requires_grad
        return None if learns and not gathered.requires_grad else gathered

    def lack(self, value: Tensor) -> str:
        """Why what log_variance gave has no numbers to read here: it is on the "meta" device (not
        loaded yet, or offloaded by accelerate between calls), or they are "elsewhere", which leaves
        a part or freed memory (FSDP1 and ZeRO-3 between passes); "" where it has."""
        if value.is_meta:
            return "meta"
        if not worlds.has_values(value):
            return ""
        freed = value.numel() > 0 and value.untyped_storage().size() == 0
        return "elsewhere" if freed or value.numel() != self.num_features else ""

    def require_values(self, value: Tensor) -> None:
        """Raise ValueError where there is a `lack` of them."""
        lack = self.lack(value)
        if lack == "elsewhere":
            raise ValueError(
                f"log_variance: expected {self.num_features} values, got a part of them or freed "
                "memory: FullyShardedDataParallel (FSDP1) or DeepSpeed's ZeRO-3 has them "
                "elsewhere. Train with fully_shard (FSDP2); to read them, call this inside "
                "summon_full_params of FSDP1, or inside "
                "deepspeed.zero.GatheredParameters(list(model.parameters()))"
            )
        if lack:
            raise ValueError(
                "log_variance: expected values, got none yet, for it is on the meta device: load "
                "or move the model first (to_empty, load_state_dict(assign=True)). If the "
                "parameters come by functional_call, put the KL term into the forward of the "
                "module that is called"
            )

    def detached(self) -> Tensor:
        """log_variance [K] without gradient, wherever it is kept; of a sharded one the whole, a
        collective."""
        offloaded = self.log_variance.is_meta and "forward" in self.__dict__  # which loads it
        value = self() if offloaded else self.log_variance
        self.require_values(value)
        value = dtensor.full(value.detach())
        return value.float() if value.dtype.itemsize < 4 else value

    @property
    def sigma(self) -> Tensor:
        """sigma = exp(log_variance / 2), [K], float32, without gradient; of a sharded one the
        whole, a collective."""
        return torch.exp(self.detached() / 2)

    def extra_repr(self) -> str:
        return f"{self.num_features}, init_variance={short(self.init_variance)}"

    # ---- moves and loads

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before, computed = self._tensors(), False
        empty = [name for name, t in before.items() if t.is_meta]

        def keep_precision(t: Tensor) -> Tensor:
            nonlocal computed
            try:
                moved = fn(t)
            except NotImplementedError:  # no data to copy: these values are known all the same
                known = [name for name in empty if t is before[name]]
                if is_dtensor(t) or not known:
                    raise
                t, computed = self._initial(known[0]), True
                moved = fn(t)
            size = t.dtype.itemsize
            if not t.is_floating_point() or size < 4 or moved.dtype.itemsize >= size:
                return moved
            wide = torch.promote_types(moved.dtype, torch.float32)
            return t.to(device=moved.device, dtype=wide)

        super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        after = self._tensors()
        if empty and not any(after[name].is_meta for name in empty):
            self._from_meta = False
            if not computed:  # by to_empty, which leaves all of them undefined
                self._fill(after)
        return self

    def follow(
        self, state_dict: dict[str, Any], prefix: str, device: torch.device | None = None
    ) -> None:
        """Before a load by assignment, add what the state dict lacks of its tensors: those that
        have no values yet; and all, on the device to which the weights beside it come from the meta
        device."""
        for name, tensor in self._tensors().items():
            key, to = prefix + name, torch.device("cpu") if device is None else device
            away = device is not None and not (is_dtensor(tensor) or tensor.device == device)
            # torch's set_model_state_dict gives the model's own tensor for what is missing
            if tensor.is_meta and getattr(state_dict.get(key, tensor), "is_meta", False):
                state_dict[key] = dtensor.laid_out_as(self._initial(name).to(to), tensor, to)
            elif away and key not in state_dict:
                state_dict[key] = tensor.detach().to(to)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *errors: Any
    ) -> None:
        if metadata.get("assign_to_params_buffers", False):
            self.follow(state_dict, prefix)
        own = [prefix + name for name in self._tensors()]
        absent = {key for key in own if key not in state_dict}
        for key in own:
            # With assign=True the tensor itself would become the parameter, half precision and all.
            value = state_dict.get(key)
            if isinstance(value, Tensor) and value.is_floating_point():
                state_dict[key] = value if value.dtype.itemsize >= 4 else value.float()
        below = self.state_dict(prefix=prefix, keep_vars=True) if self._modules else {}
        for key, value in below.items():  # a parametrisation's tensors: they stay as they are too
            if key not in state_dict and key not in absent:
                state_dict[key] = value.detach()
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *errors)
        missing = errors[0]
        missing[:] = [key for key in missing if key not in absent]

    @property
    def _is_hf_initialized(self) -> bool:
        """Always true; transformers asks after loading, and what its checkpoint lacked is then
        undefined memory."""
        tensors = self._tensors()
        if self._from_meta and not any(t.is_meta for t in tensors.values()):
            loaded = [n for n, t in tensors.items() if getattr(t, "_is_hf_initialized", False)]
            self._fill({name: t for name, t in tensors.items() if name not in loaded})
            self._from_meta = False
        return True

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        self._from_meta = False


def in_zero(parameter: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO steps it: a copy of its own, in float32, of stage 1 and 2 whole and
    of stage 3 in parts."""
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")


def device_of_variance(weight: object, device: torch.device | str | None) -> torch.device:
    """The weight's; without one, or beside one without data, where it was asked for, so that it has
    values all the same."""
    if isinstance(weight, Tensor) and not weight.is_meta:
        return weight.device
    return torch.get_default_device() if device is None else torch.device(device)


def short(init_variance: float | Tensor) -> str:
    if isinstance(init_variance, Tensor):
        return f"[{init_variance.min():.3g} .. {init_variance.max():.3g}]"
    return f"{init_variance:g}"
