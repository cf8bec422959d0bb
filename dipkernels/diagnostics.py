"""How smooth a network is and how loud its noise is, for the deterministic network and for the
noised mean predictor.

The noised mean predictor is f_k(x) = mean over s < k of f(x; noise s). Its k noises stay the same,
so it is one smooth function. k = 0 is the deterministic network, f_0(x) = f(x).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .arguments import described, integer, one_of, real
from .models.probe import eval_mode, frozen
from .models.spreads import measured_spreads
from .nn.numbering import dip_layers, need_layers, require_module
from .noise import contexts
from .training.predict import check_average, predict, require_batch, tensor_output

_TINY = 1e-30  # stands for a norm of zero in a division


def predictor(
    model: Callable[..., Any],
    k: int = 0,
    *,
    average: str = "logits",
    dim: int | None = None,
    key: int = 0,
    target: Callable[[Tensor], Tensor] | None = None,
) -> Callable[[Tensor], Tensor]:
    """f_k as a function of one tensor x [B, ...]: mean over s < k of f(x; noise s); for k = 0, f(x)
    without noise.

    Args:
        model: A module, or a callable. A module runs in eval mode; each module's mode is restored.
        k: Number of passes, >= 0. Their noise depends on key, and is the same at every call.
        average: "logits" (the outputs), "probs" (their softmax over dim) or "sigmoid", as in
            `predict`. An output that is not a tensor must have one as `logits`.
        dim: As for `predict`.
        key: The key of the noise.
        target: A function that is applied to each mean, such as a loss.

    Returns:
        A function that torch.func can differentiate.

    Examples:
        >>> model = dip.convert(nn.Sequential(nn.Linear(4, 2)))
        >>> f = dip.diagnostics.predictor(model, k=8)
        >>> x = torch.randn(3, 4)
        >>> torch.equal(f(x), f(x))
        True
    """
    require_module(model, or_function=True)
    k = integer("k", k, 0)
    check_average(average, dim)
    if k > 0 and isinstance(model, nn.Module) and not dip_layers(model):
        raise ValueError(
            "model: expected DIP layers, found none: its k passes would be equal; convert it first"
        )

    def f(x: Tensor) -> Tensor:
        total: Any = 0
        with _evaluating(model), contexts.fixed_noise(key) if k else contexts.noise_off():
            for number in range(max(k, 1)):
                with contexts.numbered_pass(number):
                    total = total + tensor_output(model(x), average, dim)
        mean: Tensor = total / max(k, 1)
        return mean if target is None else target(mean)

    return f


def _of_module(
    context: Callable[[nn.Module], contextlib.AbstractContextManager[None]],
    model: Callable[..., Any],
) -> contextlib.AbstractContextManager[None]:
    """The context of a module; none of another function."""
    return context(model) if isinstance(model, nn.Module) else contextlib.nullcontext()


@contextlib.contextmanager
def _evaluating(model: Callable[..., Any]) -> Iterator[None]:
    """Eval mode with noise, and attention by kernels that forward differentiation knows."""
    with _of_module(eval_mode, model), contexts.sampling_on(), sdpa_kernel(SDPBackend.MATH):
        yield


# ---- local Lipschitz constant and smoothness -----------------------------------------------------


def lipschitz(
    model: Callable[..., Any],
    x: Tensor,
    *,
    k: int = 0,
    average: str = "logits",
    dim: int | None = None,
    key: int = 0,
    iterations: int = 100,
    tolerance: float = 1e-4,
) -> Tensor:
    """The local Lipschitz constant of f_k at every example: the largest singular value of its
    Jacobian d f_k / d x.

    Args:
        model: A module or callable, [B, ...] -> [B, ...], that treats each example by itself.
        x: [B, ...], floating.
        k, average, dim, key: As for `predictor`.
        iterations: The largest number of steps, >= 1, of power iteration on J^T J: v -> J^T (J v),
            by forward and then reverse differentiation.
        tolerance: The iteration ends when no value changes by more than this, relatively.

    Returns:
        [B], of x's type: a lower bound that rises to the constant.

    Examples:
        >>> model = dip.convert(nn.Sequential(nn.Linear(2, 2, bias=False)))
        >>> _ = model[0].weight.data.copy_(torch.diag(torch.tensor([3.0, 1.0])))
        >>> found = dip.diagnostics.lipschitz(model, torch.randn(4, 2))
        >>> [round(value, 2) for value in found.tolist()]
        [3.0, 3.0, 3.0, 3.0]

    Source: arXiv 2506.04690 claims a lower one for the noised predictor.
    """
    require_batch(x)
    f = predictor(model, k, average=average, dim=dim, key=key)
    x = x.detach()
    with _of_module(frozen, model):
        f_of_x, pull_back, *_ = torch.func.vjp(f, x)
        if f_of_x.ndim < 2 or len(f_of_x) != len(x):
            raise ValueError(
                f"model: expected an output [{len(x)}, ...] for each example, got shape "
                f"{tuple(f_of_x.shape)}"
            )

        def step(v: Tensor) -> tuple[Tensor, Tensor]:
            jv = torch.func.jvp(f, (x,), (v,))[1]  # [B, ...]
            return _norm(jv), pull_back(jv)[0]

        return _power_iteration(step, x, iterations, tolerance)


def smoothness(
    model: Callable[..., Any],
    x: Tensor,
    loss_fn: Callable[[Tensor], Tensor],
    *,
    k: int = 0,
    average: str = "logits",
    dim: int | None = None,
    key: int = 0,
    which: str = "magnitude",
    iterations: int = 100,
    tolerance: float = 1e-4,
) -> Tensor:
    """The local smoothness of the loss of f_k at every example: the top eigenvalue of its Hessian
    in the input.

    Args:
        model, x: As for `lipschitz`.
        loss_fn: Takes f_k's output [B, ...] and gives a loss for each example, [B], or their sum;
            such as lambda out: F.cross_entropy(out, y, reduction="none").
        k, average, dim, key: As for `predictor`.
        which: "magnitude", the largest |eigenvalue|, which is the Lipschitz constant of the
            gradient, or "largest", the largest with its sign.
        iterations: As for `lipschitz`, with v -> H v by forward differentiation of the gradient.
            "largest" needs a second power iteration, on H + |top|.
        tolerance: As for `lipschitz`.

    Returns:
        [B], of x's type.

    Examples:
        >>> model = dip.convert(nn.Sequential(nn.Linear(2, 2)))
        >>> x, loss = torch.randn(4, 2), lambda out: out.square().sum(-1)
        >>> dip.diagnostics.smoothness(model, x, loss).shape
        torch.Size([4])

    Source: arXiv 2506.04690, second-order smoothness.
    """
    require_batch(x)
    one_of("which", which, ("magnitude", "largest"))
    x = x.detach()

    def loss(out: Tensor) -> Tensor:
        losses = loss_fn(out)
        if not isinstance(losses, Tensor) or losses.shape not in ((), (len(x),)):
            raise ValueError(
                f"loss_fn: expected one loss for each example, [{len(x)}], or their sum, got "
                f"{described(losses)}"
            )
        return losses.sum()

    gradient = torch.func.grad(predictor(model, k, average=average, dim=dim, key=key, target=loss))

    def times_hessian(v: Tensor) -> Tensor:
        return torch.func.jvp(gradient, (x,), (v,))[1]

    def step(v: Tensor) -> tuple[Tensor, Tensor]:
        # The norm rises to |top| even where two eigenvalues are of one size and opposite signs; v^T
        # H v would not.
        hv = times_hessian(v)
        return _norm(hv), hv

    with _of_module(frozen, model):
        top = _power_iteration(step, x, iterations, tolerance)
        if which == "magnitude":
            return top

        def shifted_step(v: Tensor) -> tuple[Tensor, Tensor]:
            shifted = times_hessian(v) + _like(top, v) * v  # no eigenvalue below 0
            return (v * shifted).flatten(1).sum(1), shifted

        return _power_iteration(shifted_step, x, iterations, tolerance) - top


def _power_iteration(
    step: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, iterations: int, tolerance: float
) -> Tensor:
    """The values of step(v) = (value [B], next v), v of norm 1 for each example, once they have
    settled."""
    iterations = integer("iterations", iterations, 1)
    tolerance = real("tolerance", tolerance, least=0)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu").to(x)
    v = v / _like(_norm(v), v)
    value = x.new_zeros(len(x))
    for _ in range(iterations):
        before, (value, v) = value, (each.detach() for each in step(v))
        v = v / _like(_norm(v).clamp(min=_TINY), v)
        if bool(((value - before).abs() <= tolerance * value.abs()).all()):
            break
    return value


def _norm(v: Tensor) -> Tensor:
    return v.flatten(1).norm(dim=1)


def _like(per_example: Tensor, v: Tensor) -> Tensor:
    return per_example.reshape(-1, *[1] * (v.ndim - 1))


# ---- output variance and signal-to-noise ---------------------------------------------------------


def output_variance(
    model: nn.Module,
    *args: Any,
    k: int = 16,
    average: str = "logits",
    chunk: int = 1,
    dim: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """The variance of every output over k noisy passes, Var_s[f(x; noise s)], unbiased.

    Args:
        model: As for `predict`.
        args: The model's positional arguments.
        k: Number of passes, >= 2.
        average: What the variance is taken of: "logits" (the outputs), "probs" (their softmax over
            dim) or "sigmoid", as in `predict`.
        chunk, dim: As for `predict`.
        kwargs: The model's named arguments.

    Returns:
        A tensor of the output's shape, at least float32.

    Examples:
        >>> model = dip.convert(nn.Sequential(nn.Linear(4, 2)))
        >>> dip.diagnostics.output_variance(model, torch.randn(8, 4)).shape
        torch.Size([8, 2])

    Source: arXiv 2506.04690, the constraint Var[f(x)].
    """
    k = integer("k", k, 2, other=", for a variance")
    check_average(average, dim)
    out = predict(model, *args, k=k, average=None, chunk=chunk, **kwargs)
    return tensor_output(out, average, dim, stacked=1).var(0)


@dataclass(frozen=True)
class LayerNoise:
    """One DIP layer: the mean over features of the input's variance and of the noise's variance,
    and their ratio."""

    name: str
    signal: float
    noise: float

    @property
    def ratio(self) -> float:
        return self.signal / self.noise

    @property
    def decibels(self) -> float:
        return 10 * math.log10(self.ratio) if self.ratio > 0 else -math.inf


class LayerNoises(list[LayerNoise]):
    """A list of LayerNoise that prints as a table."""

    def __str__(self) -> str:
        width = max([len("layer"), *(len(row.name or "(root)") for row in self)])
        lines = [f"{'layer':{width}}  {'signal':>10}  {'noise':>10}  {'ratio':>10}  {'dB':>6}"]
        for row in self:
            signal_and_noise = f"{row.signal:10.4g}  {row.noise:10.4g}  {row.ratio:10.4g}"
            lines.append(f"{row.name or '(root)':{width}}  {signal_and_noise}  {row.decibels:6.1f}")
        return "\n".join(lines)


def signal_to_noise(model: nn.Module, batches: Iterable[Any]) -> LayerNoises:
    """The signal-to-noise ratio at every DIP layer's input: sum_j Var[x_j] / sum_j (lambda_j / S).

    Args:
        model: A model with DIP layers. It runs in eval mode without noise.
        batches: As for `calibrate`. Var[x_j] is over all rows of the batches; S is the layer's
            num_samples.

    Returns:
        LayerNoises, one LayerNoise for each layer, which prints as a table.

    Raises:
        ValueError: As for `summary`.

    Examples:
        >>> model, x = dip.convert(nn.Sequential(nn.Linear(4, 2))), torch.randn(512, 4)
        >>> _ = dip.calibrate(model, [x], ratio=0.5)
        >>> [round(row.ratio, 3) for row in dip.diagnostics.signal_to_noise(model, [x])]
        [4.0]
    """
    spreads = measured_spreads(model, batches)
    rows = LayerNoises()
    for name, layer in need_layers(model).items():
        noise = layer.variance.sigma.double().cpu().square().mean().item() / layer.num_samples
        rows.append(LayerNoise(name, spreads[name].square().mean().item(), noise))
    return rows
