"""A whole network by each layer's own mean: what `predict(method="analytic")` runs.  docs/maths.md,
section 7.

One deterministic pass. Behind a DIPLinear the pre-activation is normal, so the activation that
follows is replaced by its exact expectation, and that number is what the next layer reads: the
spread of one layer's output is not carried into the next. So this is not Algorithm 2, whose passes
stay noisy through the whole depth, nor Algorithm 3, which leaves the activations as they are.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import functional
from ..models.convertible import is_adapter, is_conv1d_type
from ..models.forms import activation_kind, may_produce
from ..models.probe import around, input_of
from ..nn.layer import DIPLayer, has_own_forward
from ..nn.linear import DIPLinear
from ..nn.numbering import named_layers
from ..noise import contexts
from ..ops import expectation

_ACTIVATIONS = {"relu", "gelu", "silu", "tanh"}
# Without a mean here, whatever was computed before them.
_OTHERS = {"sigmoid", "log_sigmoid", "hardsigmoid", "hardswish", "hardtanh", "relu6"}
_OTHERS |= {"leaky_relu", "prelu", "rrelu", "threshold", "elu", "selu", "celu", "glu", "mish"}
_OTHERS |= {"softplus", "softsign", "tanhshrink", "softshrink", "hardshrink"}
# Keep columns columns: the same values in another shape.
_SHAPES = {"view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze"}
_SHAPES |= {"contiguous", "clone", "to", "float", "detach", "type_as"}
# Linear in one pre-activation, or in each of several layers', whose noises are independent: the
# mean goes through.
_ADDS = {"add", "sub", "rsub", "neg"}
_FACTORS = {"mul", "div", "truediv"}
_THROUGH = _ADDS | {"sum", "mean", "cat", "stack"}
_THROUGH |= {"avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"}
_THROUGH |= {"matmul", "mm", "bmm", "baddbmm", "addmm", "einsum", "linear"}
_THROUGH |= {"conv1d", "conv2d", "conv3d"}
_THROUGH |= {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
_THROUGH |= {"transpose", "permute", "movedim", "t", "T", "mT", "roll"}
_THROUGH |= {"chunk", "split", "getitem", "index_select", "select", "narrow", "unbind"}
_THROUGH |= {"expand", "repeat", "repeat_interleave", "pad", "where", "masked_fill"}
# Not linear: they read the mean, as in Algorithm 3.
_THROUGH |= {"layer_norm", "rms_norm", "batch_norm", "group_norm", "normalize"}
_THROUGH |= {"softmax", "scaled_dot_product_attention", "multi_head_attention_forward"}
_THROUGH |= {"log_softmax", "cross_entropy", "argmax"}


class _Normal(NamedTuple):
    """What is known of a tensor: its values are means, v [N] the variances; None where they differ
    from row to row.

    draws: whose noise is in it, where it was computed from the outputs of layers; none for an
    output itself. What was computed may go anywhere but into an activation whose mean is not known.
    """

    tensor: weakref.ref[Tensor]
    v: Tensor | None
    layer: str
    draws: tuple[object, ...] = ()


class _Expectations(TorchFunctionMode):
    """Follows the outputs of DIP layers to the activations behind them."""

    def __init__(self, layers: Mapping[str, DIPLayer]) -> None:
        super().__init__()
        self._normals: dict[int, _Normal] = {}
        self._draws = {name: layer.share or layer for name, layer in layers.items()}
        self.inside = 0  # how many DIPLinear are running, whose own activation is not followed

    def mark(
        self, tensor: Tensor, v: Tensor | None, layer: str, draws: tuple[object, ...] = ()
    ) -> None:
        key = id(tensor)
        self._normals[key] = _Normal(
            weakref.ref(tensor, lambda _: self._normals.pop(key, None)), v, layer, draws
        )

    def _find(self, value: object) -> _Normal | None:
        normal = self._normals.get(id(value)) if isinstance(value, Tensor) else None
        return normal if normal is not None and normal.tensor() is value else None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self.inside:
            return func(*args, **kwargs)
        marks = map(self._find, pytree.tree_leaves((args, kwargs)))
        found = [normal for normal in marks if normal is not None]
        if not found:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func)).strip("_")
        if name.startswith(("i", "r")) and name[1:] in ("add", "sub", "mul", "matmul"):
            name = name[1:]
        normal = found[0]
        if name in _ACTIVATIONS:
            return self._activate(name, normal, args, kwargs, func)
        if name in _OTHERS:
            raise self._error(normal, name)
        out = func(*args, **kwargs)
        drops = args[2] if len(args) > 2 else kwargs.get("training", True)
        if name in _SHAPES or (name == "dropout" and not drops):
            return self._like(out, normal)
        slope = _squared_slope(*args, **kwargs) if func is F.batch_norm else None
        if slope is not None and normal.v is not None:
            draws = normal.draws or (self._draws[normal.layer],)
            self.mark(out, normal.v.to(slope.device) * slope, normal.layer, draws)
        elif name in _THROUGH or name in _FACTORS or name.startswith("get"):
            self._computed(out, found, name in _ADDS and not kwargs)
        found = [n for n in found if not n.draws]
        if not found:
            return out
        normal = found[0]
        twice = len({n.layer for n in found}) < len(found)
        if name in _FACTORS and not twice:
            factors = [a for a in args if self._find(a) is None]
            if len(found) == 1 and factors and not isinstance(factors[0], Tensor):
                raise self._error(normal, f"{name} by a number, which analytic does not follow")
            return out
        if (name in _THROUGH and not twice) or name.startswith(("get", "size")):
            return out
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(out)):
            what = "products of one layer's output with itself" if twice else name
            raise self._error(normal, what)
        return out

    def _like(self, out: Tensor, normal: _Normal) -> Tensor:
        """The same values in another shape. Whose columns are no longer the layer's outputs has no
        v."""
        kept = normal.v is not None and out.shape[-1:] == normal.v.shape
        self.mark(out, normal.v if kept else None, normal.layer, normal.draws)
        return out

    def _computed(self, out: Any, found: list[_Normal], adds: bool) -> None:
        """What is computed of the outputs of layers: of a sum with noises apart the variance is
        their variances' sum, of all else it is not followed."""
        draws = tuple(draw for n in found for draw in n.draws or (self._draws[n.layer],))
        each = (
            [n.v for n in found if n.v is not None and n.v.shape == out.shape[-1:]] if adds else []
        )
        known = len(each) == len(found) and len(set(draws)) == len(draws)
        v = sum((v.to(out.device) for v in each[1:]), each[0].to(out.device)) if known else None
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():  # no index, by argmax
                self.mark(tensor, v, found[0].layer, draws)

    def _activate(
        self,
        name: str,
        normal: _Normal,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        func: Callable[..., Any],
    ) -> Tensor:
        positional = args[1] if name == "gelu" and len(args) > 1 else "none"
        approximate = kwargs.get("approximate", positional)
        kind = "gelu_tanh" if name == "gelu" and approximate == "tanh" else name
        y, mu = self._mean(kind, normal), normal.tensor()
        of_method = getattr(func, "__name__", "").endswith("_")
        if not (of_method or kwargs.get("inplace") or True in args[1:]):
            return y
        del self._normals[id(mu)]
        assert mu is not None  # it is among args
        return mu.copy_(y)

    def _mean(self, kind: str, normal: _Normal) -> Tensor:
        if normal.v is None:
            raise self._error(normal, f"{kind}, and its variance is not one number for each output")
        mu = normal.tensor()
        assert mu is not None
        return expectation.expected(mu, normal.v.to(mu.device), kind)

    @contextlib.contextmanager
    def around(self, module: nn.Module) -> Iterator[None]:
        """Inside, a call of a module that computes an activation by a formula of its own, such as
        quick_gelu, returns its mean."""
        calls: list[tuple[Tensor, _Normal, Tensor] | None] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = input_of(module, args, kwargs)
            normal = self._find(x)
            kind = None if normal is None else activation_kind(module)
            if normal is None or kind is None:
                calls.append(None)
            else:
                del self._normals[id(x)]  # inside, nothing is followed
                calls.append((x, normal, self._mean(kind, normal)))

        def after(module: nn.Module, args: Any, kwargs: Any, out: Any) -> Tensor | None:
            if (call := calls.pop()) is None:
                return None
            x, normal, y = call
            if out is x:  # in place
                return x.copy_(y)
            self._normals[id(x)] = normal
            return y

        with around(module, before, after):
            yield

    @staticmethod
    def _error(normal: _Normal, what: str) -> ValueError:
        return ValueError(
            "model: method='analytic' takes a DIPLinear whose output goes into relu, gelu, silu, "
            "tanh, a module of quick_gelu, sums, products of two layers, normalisation or "
            f"attention; that of {normal.layer!r} goes into {what}. Use method='sample'"
        )


def _squared_slope(
    input: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """Of F.batch_norm's arguments what it multiplies the variance of each column by; None where
    that depends on the batch, or the features are no columns."""
    if training or var is None or input.ndim != 2:
        return None
    slope = 1 / (var.float() + eps)
    return slope if weight is None else slope * weight.float().square()


def _is_linear(layer: DIPLayer) -> bool:
    """Whether it is a DIPLinear, or has the weight of one transposed, as transformers' Conv1D."""
    if has_own_forward(layer):
        return False
    return isinstance(layer, DIPLinear) or is_conv1d_type(getattr(layer, "plain_type", None))


def _variance(layer: DIPLayer) -> Tensor:
    weight: Any = layer.weight
    weight = weight if isinstance(layer, DIPLinear) else weight.t()
    v = expectation.variance(weight, layer._log_variance(), True)
    # "sample" averages its draws before the activation; "mean" behind it, where each draw has the
    # whole variance.
    return v if getattr(layer, "estimator", "sample") == "mean" else v / layer.num_samples


def expected(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """model(*args, **kwargs), of a model in eval mode, with every activation behind a DIPLinear
    replaced by its expectation (see above).

    Raises ValueError for an activation without a closed form here, or one behind a convolution, a
    DIPInput, a LoRA layer or a norm, or inside what has noise before it; and for a model some of
    whose modules noise their output.
    """
    layers = named_layers(model)
    producers = [name or "(root)" for name, layer in layers.items() if layer.noises_output]
    if producers:
        raise ValueError(
            f"model: method='analytic' takes layers that noise their own input, got {producers} "
            "that noise their output (convert with place='producer'). Use method='sample'"
        )
    mode, names = _Expectations(layers), {layer: name for name, layer in layers.items()}

    def enter(*call: object) -> None:
        mode.inside += 1

    def noised(layer: Any, args: Any, kwargs: Any, same: Any) -> Any:
        """Of what a layer computes inside, an expert or a user's subclass, its noised input."""
        if not isinstance(same, Tensor):
            return None
        same = same.view_as(same)  # not what others read beside it
        mode.mark(same, None, names[layer], (layer,) if is_adapter(layer) else ())
        return same

    def behind(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        linear = _is_linear(layer)
        mode.inside -= linear
        if not isinstance(output, Tensor):
            return None
        x, v = input_of(layer, args, kwargs), _variance(layer) if linear else None
        if v is not None and getattr(layer, "activation", None) is not None:
            mu = F.linear(x, layer.weight, layer.bias)
            return functional.expectation(mu, v, layer.activation)
        output = output.view_as(output) if output is x else output  # a DIPInput's
        mode.mark(output, v, names[layer])
        return output

    with contextlib.ExitStack() as stack:
        stack.enter_context(contexts.sampling_on())  # without the fast path, which calls no layer
        for layer in names:
            linear = _is_linear(layer)
            stack.enter_context(around(layer, enter if linear else None, behind))
            if not linear:
                stack.enter_context(around(layer, after=noised, name="without_noise"))
        for module in model.modules():  # torch's own call the functions that are followed
            if may_produce(module) and not type(module).__module__.startswith("torch.nn."):
                stack.enter_context(mode.around(module))
        stack.enter_context(contexts.noise_off())
        stack.enter_context(mode)
        return model(*args, **kwargs)
