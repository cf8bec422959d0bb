"""What every DIP layer is made of: a variance, a stream, and a projection of its input.
docs/maths.md, section 1."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import worlds
from ..arguments import integer
from ..noise import contexts, seeds
from ..ops.draw import MAX_SAMPLES, Draw
from ..ops.perturb import projection, without_noise
from ..worlds import is_dtensor
from . import inputs, tracing
from .variance import Variance, device_of_variance, in_zero, short

if TYPE_CHECKING:
    from .sharing import Share

_T = TypeVar("_T")
Noise = tuple[Tensor, Tensor, Draw]  # (ln(sigma^2), seed, draw) of one forward pass
_NUMBERS = itertools.count()  # a layer's stream until number_layers renumbers the model
MAX_LAYERS = 2**16  # the contract keeps 16 bits of the stream
# DIPLayer is mixed into modules, and is none itself.
if TYPE_CHECKING:
    Mixin = nn.Module
else:
    Mixin = object


class BesideWeights(Mixin):
    """A module with variances beside its weights: where those come from the meta device, whatever
    brings them gives these their values too."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        behind: list[type] = []  # whose forward comes behind the DIP class's
        for kind in cls.__mro__:
            own = vars(kind).get("forward")
            if own is not None and not getattr(own, "__isabstractmethod__", False):
                behind = [] if issubclass(kind, BesideWeights) else [*behind, kind]
        if hasattr(cls, "made_of") or not behind:  # convert looks at what it makes a twin of
            return
        if not behind[0].__module__.startswith(("torch.nn.", "dipkernels.")):
            raise TypeError(
                f"{cls.__name__}: expected torch's own forward behind the DIP class, got that of "
                f"{behind[0].__name__}, which a noisy pass would not call; inherit from the DIP "
                f"class alone, and compute the rest in a forward of {cls.__name__}"
            )

    def _beside(self) -> dict[str, Variance]:
        return {name: part for name, part in self.named_modules() if isinstance(part, Variance)}

    def _is_empty(self) -> bool:
        weights = (p for name, p in self.named_parameters() if not name.endswith("log_variance"))
        return any(p.is_meta for p in weights)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        empty = self._is_empty()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if recurse and empty and not self._is_empty():
            for variance in self._beside().values():  # to_empty leaves them undefined
                if variance.cannot_set() is None:
                    variance.reset_parameters()
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, *rest: Any
    ) -> None:
        # Before the children load, for they see their own names alone.
        if metadata.get("assign_to_params_buffers", False) and self._is_empty():
            given = (t for name, t in state_dict.items() if name.startswith(prefix))
            found = [t for t in given if isinstance(t, Tensor) and not t.is_meta]
            for name, variance in self._beside().items() if found else ():
                variance.follow(state_dict, f"{prefix}{name}.", found[0].device)
        super()._load_from_state_dict(state_dict, prefix, metadata, *rest)


class DIPLayer(BesideWeights):
    """What the DIP layers share: the child `variance`, the number of its stream, and when there is
    noise."""

    feature_dim: int = -1  # of the input
    # true of what makes another layer's input and noises that: twin.Producer
    noises_output = False
    _number: int
    # which count of layers gave the number: a call of number_layers, or "" for the process's
    _counted_in: str
    _stream: Tensor
    # with the layers that read the same input, if asked for: share_noise
    share: Share | None = None

    def _set_up(
        self,
        num_features: int,
        init_variance: float | Tensor,
        num_samples: int,
        device: Any,
    ) -> None:
        self.num_samples = integer("num_samples", num_samples, 1, MAX_SAMPLES)
        own = device_of_variance(weight_of(self), device)
        self.variance = Variance(num_features, init_variance, own)
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
            # nn.DataParallel's replicas have tensors in place of parameters
            if parameter is not None:
                if parameter.dtype is not torch.float32:
                    own = isinstance(parameter, nn.Parameter)  # functional_call's is a caller's
                    if own:
                        variance.widen()
                    if parameter.dtype.itemsize < 4 and (not own or in_zero(parameter)):
                        return parameter.float()
                return parameter
        elif isinstance(variance, Variance) and (before := variance.gathered_before()) is not None:
            return before
        try:
            gathered: Tensor = variance()
        except KeyError as error:
            raise RuntimeError(
                f"variance: expected its offloaded values to be at hand, got none for {error}; a "
                "checkpoint of the plain model was dispatched with offload. Load it, convert, "
                "then dispatch the converted model"
            ) from error
        # Of accelerate, which may cast what it loads, or of ZeRO; FSDP's mixed precision has an
        # error that names it.
        theirs = "forward" in variance.__dict__ or in_zero(gathered)
        return gathered.float() if gathered.dtype.itemsize < 4 and theirs else gathered

    def noisy(self) -> bool:
        """Whether a forward pass now would draw noise."""
        return self.training if contexts.MODE is None else contexts.MODE == "on"

    def __prepare_scriptable__(self) -> None:  # torch.jit.script asks every module of a model
        raise RuntimeError(
            f"dipkernels: torch.jit.script cannot compile {type(self).__name__}. Script the plain "
            "model, torch.jit.script(dipkernels.to_plain(copy.deepcopy(model))), which computes "
            "what this one does in eval mode; or use torch.jit.trace in eval mode or torch.export"
        )

    def without_noise(self, input: Tensor) -> Tensor:
        """The input; where DDP or noise_off may ask for log_variance, it is used all the same, for
        gradients of 0."""
        asked = (contexts.MODE == "off" and self.training) or ddp_waits()
        if asked and inputs.undense(input) is None:
            return without_noise(input, self._log_variance())
        return input

    def copied_without_noise(self, input: Tensor) -> Tensor:
        """The same for what others may change in place, which autograd refuses for the view made
        there."""
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
        """Set the stream that fixed_noise gives this layer, 0 <= number < 65536. model: what it was
        counted in."""
        self.__dict__["_number"] = integer("number", number, 0, MAX_LAYERS - 1)
        self.__dict__["_counted_in"] = model
        self._keep_stream()

    def _keep_stream(self) -> None:
        # int64 [2] = (0, number). No buffer: those are averaged, broadcast, emptied and replaced by
        # others' loops.
        # not log_variance's: SWAG and the like take parameters out of their modules
        device = self.variance.log_prior.device
        self.__dict__["_stream"] = torch.tensor(
            [0, self._number], device="cpu" if device.type == "meta" else device
        )

    def _stream_on(self, device: torch.device) -> Tensor:
        """The stream on this device, without a copy from the host."""
        if self._stream.device == device:
            return self._stream
        if worlds.tracing():  # the number itself would compile each layer anew
            return self._stream.to(device)
        return torch.arange(2, device=device) * self._number

    def _seed(self, x: Tensor) -> Tensor:
        """The seed of one forward pass on x."""
        if contexts.KEY is None:
            return seeds.draw(self._stream, x)
        if not worlds.tracing():
            contexts.note_number(self._number, self._counted_in)
        return seeds.draw(self._stream_on(x.device), x)

    def draw(self, x: Tensor, sample: int = 0) -> Draw:
        """Where the noise of one forward pass on x lies, and how log_variance scales it."""
        dim = self.feature_dim
        return Draw(dim, seeds.first_row(x, dim), 0, sample, self.num_samples**-0.5, True)

    # ---- moves

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._keep_stream()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._keep_stream()
        return self

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As nn.Module's; refuses what torch's tensor-parallel styles do to a layer with a variance
        inside."""
        if "variance" in self._modules and (
            name.startswith("variance.") or self._is_cut(name, param)
        ):
            raise ValueError(
                f"{type(self).__name__}: expected tensor parallelism by "
                "dip.parallelize_module(model, mesh, plan), which takes the same plan and keeps "
                "log_variance whole, got a style of torch's own; or parallelise the plain model, "
                "then convert it"
            )
        super().register_parameter(name, param)

    def _is_cut(self, name: str, param: nn.Parameter | None) -> bool:
        """Whether a DTensor split over ranks takes the place of a plain parameter."""
        before = self.__dict__["_parameters"].get(name)
        if before is None or is_dtensor(before) or not is_dtensor(param):
            return False
        return any(p.is_shard() for p in param.placements)

    def reset_parameters(self) -> None:
        """The plain layer's, and the variance's."""
        plain = getattr(super(), "reset_parameters", None)
        if plain is not None:
            plain()
        if "variance" in self._modules:  # the plain layer's constructor calls this first
            self.variance.reset_parameters()

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f"init_variance={short(self.variance.init_variance)}"]
        if self.num_samples > 1:
            parts.append(f"num_samples={self.num_samples}")
        if self.share is not None:
            parts.append(f"shared_by={self.share.num_layers}")
        return ", ".join(part for part in parts if part)


DIM = property(lambda layer: layer.dim)  # the feature_dim of a layer whose `dim` says it


# Functions and not methods: a class that gets a twin may have methods of the same names.


def weight_of(module: Any) -> Any:
    """The module's weight, if it has one; of a parametrised one what it is computed from, for
    reading it would compute it, which spectral_norm counts as a step; so too where a hook computes
    it (pruning, torch's older norms), for that gets the gradients."""
    if nn.utils.parametrize.is_parametrized(module, "weight"):
        return next(module.parametrizations["weight"].parameters(recurse=False), None)
    weight, own = getattr(module, "weight", None), module._parameters
    if not isinstance(weight, Tensor) or "weight" in own:
        return weight
    sources = (p for name, p in own.items() if p is not None and name.startswith("weight_"))
    return next((p for p in sources if p.shape == weight.shape), weight)


def has_own_forward(layer: DIPLayer) -> bool:
    """Whether its class is a user's subclass of a DIP class, with a forward of its own: what that
    computes before and behind the noise nobody knows."""
    package = __name__.partition(".")[0]
    module = getattr(type(layer).forward, "__module__", None)  # None of what exec has made
    return str(module).partition(".")[0] != package


def node_of(layer: DIPLayer, x: object, *args: Any, **kwargs: Any) -> Tensor | None:
    """Of a call on what is no plain tensor: its node where torch.fx traces it, None for a tensor of
    a subclass. Raises TypeError for what is none, where noise is drawn."""
    if not isinstance(x, tracing.Proxy):
        inputs.require_tensor(layer, x)
        return None
    return tracing.record(layer, x, *args, **kwargs)


def with_noise(
    layer: DIPLayer,
    x: Tensor,
    run: Callable[[Noise], _T],
    sample: int = 0,
    seed: Tensor | None = None,
) -> _T:
    """run(noise) of one forward pass on x, by a new seed unless one is given; where x is why it
    fails, an error in the layer's own words."""
    sigma = layer._log_variance()
    seed = layer._seed(x) if seed is None else seed
    if layer.share is not None and getattr(layer, "_is_replica", False):
        sigma = sigma.to(x.device)  # nn.DataParallel leaves a shared one where it was
    try:
        return run((sigma, seed, layer.draw(x, sample)))
    except inputs.FAILURES:
        inputs.explain(layer, x, sigma)
        raise


def noised(layer: DIPLayer, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """u = x + sigma * z of the layer's own seed, variance and feature dimension; of `dtype`, x's by
    default."""
    if layer.share is None:
        return fresh(layer, x, dtype)
    return layer.share.noised(layer, x, dtype)


def fresh(
    layer: DIPLayer,
    x: Tensor,
    dtype: torch.dtype | None,
    sample: int = 0,
    seed: Tensor | None = None,
) -> Tensor:
    """The same, drawn for this layer alone; by a new seed unless one is given."""
    return with_noise(layer, x, lambda noise: projection(x, *noise, dtype), sample, seed)


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
    """Whether DDP runs this forward pass: it stops at the next one where a parameter got no
    gradient."""
    return (
        torch.is_grad_enabled()
        and nn.parallel.DistributedDataParallel._active_ddp_module is not None
    )
