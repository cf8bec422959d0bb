"""Show the noise of a model: numbers for a logger, a figure, a line of progress.
docs/guides/trainers.md."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Generic, TextIO, TypeVar

import torch
from torch import Tensor, nn

from .arguments import integer
from .models.parameters import variances
from .nn.numbering import need_layers
from .training.objective import kl_penalty

Batch = TypeVar("Batch")


@torch.no_grad()
def metrics(model: nn.Module) -> dict[str, float]:
    """A few numbers about the variances, for any logger.

    Args:
        model: A model with DIP layers, wrapped or not. If it is sharded, every rank must call this.

    Returns:
        "dip/sigma": the mean over layers of the mean sigma. "dip/share": the mean over layers of
        sigma divided by the prior's sigma, which `calibrate` set. It is 1 at the start, or less
        where an example has few values, and falls where the loss makes the noise smaller.
        "dip/kl": the KL term with weight 1.
        "dip/sigma/GROUP" and "dip/share/GROUP": the same for the layers whose names differ in
        numbers alone, such as blocks.q_proj.

    Raises:
        ValueError: The model has no DIP layers, or a variance is not finite.

    Examples:
        >>> model = dip.convert(nn.Sequential(nn.Linear(4, 2)), init_variance=0.04)
        >>> {name: round(value, 3) for name, value in dip.metrics(model).items()}
        {'dip/kl': 0.0, 'dip/sigma': 0.2, 'dip/sigma/0': 0.2, 'dip/share': 1.0, 'dip/share/0': 1.0}
    """
    state = variances(model)
    groups: dict[str, list[tuple[float, float]]] = {}
    for name, values in state.items():
        layer, _, part = name.rpartition(".")
        if part == "log_variance" and len(values):
            sigma, prior = (values / 2).exp(), (state[f"{layer}.log_prior"] / 2).exp()
            own = layer.removesuffix(".variance") if layer != "variance" else type(model).__name__
            group = ".".join(word for word in own.split(".") if not word.isdigit()) or own
            pair = (sigma.mean().item(), (sigma / prior).mean().item())
            for key in ("", f"/{group}"):
                groups.setdefault(key, []).append(pair)
    found = {"dip/kl": kl_penalty(model, 1.0).item()}
    for i, what in enumerate(("dip/sigma", "dip/share")):
        found[what] = math.nan  # where no layer has features
        for key, pairs in groups.items():
            found[f"{what}{key}"] = sum(pair[i] for pair in pairs) / len(pairs)
    return found


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A Figure of matplotlib and its axes."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def plot(
    model: nn.Module,
    path: str | os.PathLike[str] | None = None,
    *,
    before: Mapping[str, Tensor] | None = None,
) -> Any:
    """Plot sigma against depth, before and after: one mark for each layer at its mean, and a bar
    from its least sigma to its largest.

    Args:
        model: A model with DIP layers.
        path: Where to write the figure, such as "sigma.png"; None writes none.
        before: What `variances` gave earlier; by default the priors, where training starts unless
            an example has few values.

    Returns:
        The matplotlib Figure.

    Raises:
        ValueError: The model has no DIP layers, a variance is not finite, or `before` is of other
            layers.
        ImportError: matplotlib is missing.

    Examples:
        >>> figure = dip.plot(dip.convert(nn.Sequential(nn.Linear(4, 2))))
        >>> figure.axes[0].get_ylabel()
        'sigma'
    """
    after = variances(model)
    names = [name for name in after if name.endswith("log_variance") and len(after[name])]
    priors = {n: after[n.removesuffix("log_variance") + "log_prior"] for n in names}
    start = priors if before is None else before
    if not set(names) <= start.keys():
        raise ValueError(
            f"before: expected the variances of {len(names)} layers, got none for "
            f"{set(names) - start.keys()}"
        )
    figure, axis = new_figure(max(5.0, 0.22 * len(names) + 2), 4.0)
    for state, label, shift in (
        (start, "before" if before is not None else "before (prior)", -0.12),
        (after, "after", 0.12),
    ):
        sigmas = [(state[name] / 2).exp() for name in names]
        means = [s.mean().item() for s in sigmas]
        # at least 0, for a mean of equal numbers is rounded
        below = [max(0.0, mean - s.min().item()) for mean, s in zip(means, sigmas)]
        above = [max(0.0, s.max().item() - mean) for mean, s in zip(means, sigmas)]
        at = [i + shift for i in range(len(names))]
        axis.errorbar(at, means, [below, above], fmt="o", ms=4, capsize=2, label=label)
    labels = [name.removesuffix(".log_variance").removesuffix(".variance") for name in names]
    axis.set_xticks(range(len(names)), labels, rotation=90, fontsize=6)
    axis.set(yscale="log", ylabel="sigma", xlabel="layer, in the model's order")
    axis.grid(alpha=0.3)
    axis.legend()
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


class progress(Generic[Batch]):
    """The batches, with a line that says how far they are, what `update` was given, and sigma.

        for x, y in (line := dip.progress(batches, model)):
            ...
            line.update(loss=loss)

    Args:
        batches: Any iterable.
        model: A model with DIP layers.
        every: Steps between lines, if they do not go to a terminal; by default a tenth of the
            batches.
        file: Where to write, by default standard error. On a terminal one line is rewritten twice a
            second.

    Raises:
        ValueError: The model has no DIP layers.

    Examples:
        >>> model = dip.convert(nn.Sequential(nn.Linear(4, 2)))
        >>> for x in (line := dip.progress([torch.randn(8, 4)] * 2, model, file=io.StringIO())):
        ...     line.update(loss=model(x).sum())
    """

    def __init__(
        self,
        batches: Iterable[Batch],
        model: nn.Module,
        *,
        every: int | None = None,
        file: TextIO | None = None,
    ) -> None:
        need_layers(model)
        self._batches, self._model = batches, model
        self._file = sys.stderr if file is None else file
        self._total: int | None = None
        with contextlib.suppress(TypeError):  # a DataLoader over an IterableDataset has no length
            self._total = len(batches)  # type: ignore[arg-type]
        self._on_terminal = self._file.isatty()
        tenth = max(1, (self._total or 1000) // 10)
        self._every = tenth if every is None else integer("every", every, 1)
        self._values: dict[str, Any] = {}

    def update(self, **values: Any) -> None:
        """Numbers or scalar tensors to show, such as loss=loss; read when a line is written."""
        self._values |= {
            name: v.detach() if isinstance(v, Tensor) else v for name, v in values.items()
        }

    def __iter__(self) -> Iterator[Batch]:
        start = shown = time.monotonic()
        done = 0
        for batch in self._batches:
            yield batch
            done += 1
            now = time.monotonic()
            last = done == self._total
            if last or (now - shown > 0.5 if self._on_terminal else done % self._every == 0):
                shown = now
                self._write(done, done / max(now - start, 1e-9))
        if done and self._on_terminal:
            self._file.write("\n")

    def _write(self, done: int, rate: float) -> None:
        noise = metrics(self._model)
        words = [f"{done}/{self._total}" if self._total is not None else str(done)]
        words += [f"{name} {float(value):.4g}" for name, value in self._values.items()]
        words += [
            f"sigma {noise['dip/sigma']:.3g} ({noise['dip/share']:.0%} of the prior)",
            f"{rate:.3g}/s",
        ]
        line = "  ".join(words)
        self._file.write(f"\r\x1b[K{line}" if self._on_terminal else f"{line}\n")
        self._file.flush()
