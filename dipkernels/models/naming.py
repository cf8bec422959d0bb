"""How modules are named together in a warning or an error."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from .convertible import TWINS, Names, is_adapter
from .patterns import Patterns

_TORCHS = {kind.__name__ for kind in TWINS}
# of a parametrised module, for each of which torch makes a class, the class before that
class_of = nn.utils.parametrize.type_before_parametrizations


def alike(reasons: Mapping[nn.Module, str], names: Names) -> dict[tuple[nn.Module, ...], str]:
    """{modules: reason}, one entry for those of one class and reason whose names differ in their
    numbers alone."""
    groups: dict[tuple[type, str, str], list[nn.Module]] = {}
    for module, reason in reasons.items():
        key = (class_of(module), reason, _wide(names[module][0]))
        groups.setdefault(key, []).append(module)
    return {tuple(modules): reason for (_, reason, _), modules in groups.items()}


def shown_together(modules: Sequence[nn.Module], names: Names) -> str:
    """Modules of one class in a warning or an error."""
    first = modules[0]
    kind, origin = type(first).__name__, type(first).__module__.partition(".")[0]
    if kind in _TORCHS and origin != "torch" and not is_adapter(first):
        kind = f"{origin}'s {kind}"  # torch_geometric's Linear
    if len(modules) > 1:
        kind += f", {len(modules)} of them"
    patterns = ", ".join(patterns_for(modules, names)) or "the model itself"
    return f"{patterns} ({kind})"


def patterns_for(modules: Sequence[nn.Module], names: Names) -> list[str]:
    """Patterns for the names of these, one for those that differ in their numbers alone; none
    matches another module's."""
    own = {*modules, *computing_weights(modules)}
    by_pattern: dict[str, list[str]] = {}
    for module in modules:
        by_pattern.setdefault(_wide(names[module][0]), []).append(names[module][0])
    patterns: list[str] = []
    for pattern, every_name in by_pattern.items():
        wide = len(every_name) > 1 and not Patterns("before", [pattern]).all(
            *(name for m in names if m not in own for name in names[m])
        )
        patterns += [pattern] if wide else every_name
    return patterns


def _wide(name: str) -> str:
    """A pattern for the names that differ from this one in their numbers alone."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)


def computing_weights(modules: Iterable[nn.Module]) -> set[nn.Module]:
    """The modules inside the parametrised ones of these, from which their weights are computed."""
    parametrised: Any = filter(nn.utils.parametrize.is_parametrized, modules)
    return {p for m in parametrised for p in m.parametrizations.modules()}
