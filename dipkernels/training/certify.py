"""Certified radii of a network whose input alone is noised: randomised smoothing.  docs/maths.md,
section 9."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import described, integer, real
from ..models.probe import around, eval_mode, for_each, input_of, run_batch, untouched, watch
from ..nn.layer import DIPLayer
from ..nn.numbering import named_layers
from .predict import logits_of, predict, require_batch

ABSTAIN = -1


@dataclass(frozen=True, eq=False)
class Certificate:
    """For each example the smoothed classifier's class and its radius in L2.

    Attributes:
        classes: [B], int64; -1 where it abstains.
        radius: [B], float64; 0 where it abstains.
        sigma: The noise's standard deviation.
        confidence: The probability that an example's radius holds.
    """

    classes: Tensor
    radius: Tensor
    sigma: float
    confidence: float

    def accuracy(self, target: Tensor, radius: float) -> float:
        """Certified accuracy: the share of examples of the right class whose radius is at least
        this, 0 .. 1.
        """
        radius = real("radius", radius, least=0)
        if not isinstance(target, Tensor) or target.shape != self.classes.shape:
            raise ValueError(
                f"target: expected a tensor of shape {tuple(self.classes.shape)}, got "
                f"{described(target)}"
            )
        right = (self.classes == target.to(self.classes.device)) & (self.classes >= 0)
        return (right & (self.radius >= radius)).double().mean().item()


@torch.no_grad()
def certify(
    model: nn.Module,
    x: Tensor,
    *,
    k: int = 1000,
    k0: int = 64,
    confidence: float = 0.999,
    chunk: int = 16,
) -> Certificate:
    """The class that most noisy passes give, and the L2 radius around x within which no attack
    changes it.

    This holds for noise at the network's own input and nowhere else, with one sigma for all its
    features. The smoothed classifier is then a function of x + N(0, sigma^2 I). Noise further in
    certifies nothing, because nobody knows how far an attack on x moves a hidden layer. Convert
    with a filter that lets the first layer through, or put a DIPInput first. Draws are as in
    `predict`: under fixed_noise they repeat.

    Args:
        model: A classifier of two classes or more, with logits [B, C] as its output or as the
            `logits` of it, and one DIP layer, which reads x.
        x: [B, ...], the only input.
        k: Number of passes, >= 1, that bound the probability of the class.
        k0: Number of other passes, >= 1, that choose the class.
        confidence: In (0, 1): the probability that an example's radius holds.
        chunk: How many passes run at a time, folded into the batch; 1 for a model that draws once
            for a whole batch in eval mode. Dropout that stays on draws for each example.

    Returns:
        A Certificate with radius = sigma * Phi^-1(p), where p is the Clopper-Pearson lower bound of
        the class's probability. It abstains where p <= 1/2.

    Raises:
        ValueError: Bad values, a model whose noise is not at its input alone or that reads x past
            it (a skip connection) or compares the examples of a batch, several sigmas, or logits
            that are NaN.

    Examples:
        >>> model = nn.Sequential(dip.DIPInput(4, init_variance=0.25), nn.Linear(4, 3))
        >>> found = dip.certify(model, torch.randn(8, 4), k=100)
        >>> found.classes.shape, found.radius.shape, found.sigma
        (torch.Size([8]), torch.Size([8]), 0.5)

    Source: Cohen, Rosenfeld, Kolter 2019, arXiv 1902.02918, theorem 1 and the algorithm CERTIFY.
    """
    k, k0, chunk = integer("k", k, 1), integer("k0", k0, 1), integer("chunk", chunk, 1)
    confidence = real("confidence", confidence, above=0, below=1)
    require_batch(x)
    sigma = _input_sigma(model, x)
    if (len(x) > 1 or chunk > 1) and _compares_examples(model, x[:1]):
        raise ValueError(
            "model: expected an answer to each example by itself, got one that changes with the "
            "other examples of its batch (batch statistics, a contrastive head), so that no radius "
            "would hold; give one example and chunk=1"
        )
    votes = predict(_Classes(model), x, k=k0 + k, average=None, chunk=chunk)  # [k0 + k, B]
    chosen = votes[:k0].mode(0).values
    hits = (votes[k0:] == chosen).sum(0)
    lower = {n: lower_bound(n, k, confidence) for n in set(hits.tolist())}
    p = torch.tensor([lower[n] for n in hits.tolist()], dtype=torch.float64, device=x.device)
    sure = p > 0.5
    radius = torch.where(sure, sigma * torch.special.ndtri(p.clamp(min=0.5)), torch.zeros_like(p))
    return Certificate(torch.where(sure, chosen, ABSTAIN), radius, sigma, confidence)


class _Classes(nn.Module):
    """Each example's class by the model, so that no pass leaves its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits = logits_of(self.model(x))
        if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[-1] < 2:
            raise ValueError(
                "model: expected logits [B, C] of C >= 2 classes for each pass, got "
                f"{described(logits)}; of one logit z make two: torch.cat([-z, z], -1)"
            )
        if bool(logits.isnan().any()):  # argmax would take it for the surest class
            raise ValueError("model: expected logits that are numbers, got NaN for noisy inputs")
        return logits.argmax(-1)


def lower_bound(successes: int, trials: int, confidence: float) -> float:
    """Clopper and Pearson's one-sided lower bound of a probability: the p with P(X >= successes) =
    1 - confidence."""
    if successes == 0:
        return 0.0
    counts = torch.arange(successes, trials + 1, dtype=torch.float64, device="cpu")
    whole = torch.tensor(float(trials + 1), dtype=torch.float64, device="cpu")
    ways = torch.lgamma(whole) - torch.lgamma(counts + 1) - torch.lgamma(whole - counts)
    low, high, wanted = 0.0, 1.0, math.log1p(-confidence)
    for _ in range(53):  # bisection: the tail grows with p, which stays below 1
        p = (low + high) / 2
        tail = torch.logsumexp(ways + counts * math.log(p) + (trials - counts) * math.log1p(-p), 0)
        low, high = (low, p) if tail > wanted else (p, high)
    return low


def _input_sigma(model: nn.Module, x: Tensor) -> float:
    layers = named_layers(model)
    if len(layers) != 1:
        raise ValueError(
            f"model: expected noise at its input alone, from one DIP layer, got {len(layers)}: "
            f"{list(layers)}; noise further in certifies nothing. convert(model, filter=...) lets "
            "the first layer through, or put a DIPInput before a plain model"
        )
    ((name, layer),) = layers.items()
    if layer.noises_output:
        raise ValueError(
            f"model: expected noise at its input, got one DIP module, {name or '(root)'}, that "
            "noises its output; put a DIPInput before a plain model"
        )
    read: list[Tensor] = []

    watch(model, [layer], lambda *call: read.append(input_of(*call)), [x[:1]])
    if len(read) != 1 or not torch.equal(read[0].flatten(), x[:1].flatten()):
        raise ValueError(
            f"model: expected its DIP layer {name or '(root)'!r} to read x itself, once, got "
            "another input"
        )
    if _reads_past(model, layer, x[:1]):
        raise ValueError(
            f"model: expected to read x through its DIP layer {name or '(root)'!r} alone, got an "
            "output that depends on x without noise too (a skip connection, a second first layer); "
            "put a DIPInput before the whole model"
        )
    sigma = layer.variance.sigma
    if layer.num_samples != 1:
        raise ValueError(f"model: expected num_samples=1 at its input, got {layer.num_samples}")
    if not torch.allclose(sigma, sigma[0], rtol=1e-3, atol=0):
        raise ValueError(
            f"model: expected one sigma for all features of its input, got {sigma.min():.4g} to "
            f"{sigma.max():.4g}; fill log_variance with one value, the smallest for a bound that "
            "holds"
        )
    return sigma.min().item()


def _others(x: Tensor) -> list[Tensor]:
    """Other examples: not x + 1 alone, which a norm makes x again; -x for what reads signs."""
    return [x + torch.linspace(1, 2, x.numel(), dtype=x.dtype, device=x.device).view_as(x), -x]


def _logits(model: nn.Module, batches: list[Tensor]) -> list[Any]:
    """Those of each batch, without noise; each pass begins with the same state of the random
    generators, for dropout that stays on in eval mode."""
    outs: list[Any] = []

    def run(batch: Tensor) -> None:
        with untouched(model):
            outs.append(logits_of(run_batch(model, batch)))

    with eval_mode(model):
        for_each(batches, run)
    return outs


def _compares_examples(model: nn.Module, x: Tensor) -> bool:
    """Whether the answer to x, one example, is another beside others than beside itself, by more
    than rounding."""
    outs = _logits(model, [torch.cat([x, x, x]), torch.cat([x, *_others(x)])])
    if not all(isinstance(out, Tensor) and out.ndim for out in outs):
        return False
    alone, among = (out[:1].double() for out in outs)
    if alone.shape != among.shape:
        return True
    # what is masked stays, and its size is not that of rounding
    other = ~torch.isclose(alone, among, rtol=0, atol=0, equal_nan=True)
    if not other.any():
        return False
    alone, among = alone[other], among[other]
    rounding = 0.05 * alone.nan_to_num().abs().max().item()
    return not torch.allclose(alone, among, rtol=0, atol=rounding)


def _reads_past(model: nn.Module, layer: DIPLayer, x: Tensor) -> bool:
    """Whether the output depends on x where what the layer would noise is held."""
    held: list[Tensor] = []

    def hold(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        held.append(output.clone())
        return held[0].clone()  # what follows may work in place

    with around(layer, after=hold, name="without_noise"):
        first, *others = _logits(model, [x, *_others(x)])
    return isinstance(first, Tensor) and not all(
        torch.allclose(first, other, equal_nan=True) for other in others
    )
