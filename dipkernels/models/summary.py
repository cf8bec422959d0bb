"""What a converted model looks like: one row per layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ..nn.numbering import need_layers
from ..nn.wrappers import inmost
from .check import require_finite
from .marks import PLAN
from .place import ProducerPlan
from .spreads import SMALL, measured_spreads


@dataclass(frozen=True)
class Row:
    """One DIP layer: sigma (not variance) over its features; ratio = median of sigma / the input's
    spread, or None."""

    name: str
    type: str
    features: int
    sigma_min: float
    sigma_mean: float
    sigma_max: float
    ratio: float | None
    number: int


class Summary(list[Row]):
    """A list of Row that prints as a table; `plan` is that of convert(place="producer"), printed
    below it."""

    plan: ProducerPlan | None = None

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """{name of the layer: its other fields}, fit for JSON."""
        rows = [asdict(row) for row in self]
        return {row.pop("name"): row for row in rows}

    def __str__(self) -> str:
        width = max([len("layer"), *(len(row.name or "(root)") for row in self)])
        kind = max([len("type"), *(len(row.type) for row in self)])
        lines = [
            f"{'layer':{width}}  {'type':{kind}}  {'number':>6}  {'features':>8}  "
            f"{'sigma min':>9}  {'mean':>9}  {'max':>9}  {'ratio':>7}"
        ]
        for row in self:
            ratio = "-" if row.ratio is None else f"{row.ratio:.3g}"
            name = f"{row.name or '(root)':{width}}  {row.type:{kind}}"
            lines.append(
                f"{name}  {row.number:6}  {row.features:8}  "
                f"{row.sigma_min:9.4g}  {row.sigma_mean:9.4g}  {row.sigma_max:9.4g}  {ratio:>7}"
            )
        return "\n".join(lines if self.plan is None else [*lines, str(self.plan)])


def summary(model: nn.Module, batches: Iterable[Any] | None = None) -> Summary:
    """One row for each DIP layer: features, sigma min / mean / max, ratio = median over features of
    sigma_j / spread_j.

    Args:
        model: Any module with DIP layers.
        batches: The same as for `calibrate`, to measure the spread (standard deviation) of each
            layer's input features. Without batches the ratio uses the spread that was measured
            last; it is None if none was.

    Returns:
        A Summary, a list of Row that prints as a table. Features whose spread is below a hundredth
        of the layer's root mean square spread are left out of the ratio.

    Raises:
        TypeError: Something other than a model, or batches that hold no dense tensors.
        ValueError: There are no DIP layers, a variance is NaN or infinite, or the batches are
            such as `calibrate` refuses.

    Examples:
        >>> plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model = dip.convert(plain, init_variance=0.04)
        >>> print(dip.summary(model))
        layer  type       number  features  sigma min       mean        max    ratio
        0      DIPLinear       0         4        0.2        0.2        0.2        -
        2      DIPLinear       1         8        0.2        0.2        0.2        -
    """
    layers = need_layers(model)
    require_finite(layers)
    if batches is not None:
        measured_spreads(model, batches)
    rows = Summary()
    rows.plan = vars(inmost(model)).get(PLAN)
    for name, layer in layers.items():
        sigma, spread, ratio = layer.variance.sigma.double().cpu(), layer.variance.spread, None
        if spread is not None:
            varies = spread > SMALL * spread.square().mean().sqrt()
            # The median: a few features that hardly vary would rule a mean.
            ratio = (sigma / spread)[varies].median().item() if bool(varies.any()) else None
        low = mean = high = 0.0
        if len(sigma):
            low, mean, high = sigma.min().item(), sigma.mean().item(), sigma.max().item()
        rows.append(
            Row(name, type(layer).__name__, len(sigma), low, mean, high, ratio, layer.number)
        )
    return rows
