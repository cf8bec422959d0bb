"""Name patterns, those of Python's fnmatch: which of them match, and what to say of one that
decides nothing."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch


class Patterns:
    """The patterns of the argument of this name; a single one stands for a list of one. It notes
    which of them have matched a name. Raises TypeError where some are no strings."""

    def __init__(self, argument: str, patterns: Iterable[str]) -> None:
        self._argument, self._patterns = argument, strings(argument, patterns)
        self._used: set[str] = set()

    def all(self, *names: str) -> list[str]:
        """Those that match one of the names."""
        hits = [p for p in self._patterns if _matches(p, names)]
        self._used.update(hits)
        return hits

    def first(self, name: str) -> str | None:
        """The first that matches the name; only that one counts as used."""
        hit = next((p for p in self._patterns if _matches(p, (name,))), None)
        if hit is not None:
            self._used.add(hit)
        return hit

    def require_used(self, names: Iterable[str], what: str = "a module's name") -> None:
        """Raise ValueError for patterns that have decided nothing about these names, of `what`:
        with the names that look like them, or the earlier patterns that took what they match. A
        final "*" is for what is left, which may be nothing."""
        unused = [p for p in self._patterns if p not in self._used and p != "*"]
        if unused:
            raise ValueError(_no_match(self._argument, unused, names, what))


def value_of_each(argument: str, values: Any, names: Collection[str], what: str) -> dict[str, Any]:
    """For each name one value for all, or that of the first pattern that matches it. Raises
    ValueError where there is none, and for patterns that decide nothing, as
    `Patterns.require_used`."""
    by_pattern = values if isinstance(values, Mapping) else {"*": values}
    patterns = Patterns(argument, by_pattern)
    found = {name: patterns.first(name) for name in names}
    without = [name for name, pattern in found.items() if pattern is None]
    if without:
        raise ValueError(
            f"{argument}: expected a pattern for every layer, got none that matches {without}; end "
            "with '*'"
        )
    patterns.require_used(names, what)
    return {name: by_pattern[pattern] for name, pattern in found.items() if pattern is not None}


def require_alike(
    argument: str, values: Mapping[str, Any], sharing: Iterable[Collection[str]]
) -> None:
    """Raise ValueError for names of layers that share a variance and have different values."""
    for names in sharing:
        first, *others = (torch.as_tensor(values[name]) for name in names)
        if not all(torch.equal(first, other) for other in others):
            raise ValueError(
                f"{argument}: expected one value for layers that share a variance, got different "
                f"ones for {list(names)}; let one pattern match them all"
            )


def strings(argument: str, value: object) -> tuple[str, ...]:
    """The strings in value; a single one stands for a list of one. Raises TypeError for others."""
    values = (
        tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
    )
    if not all(isinstance(each, str) for each in values):
        raise TypeError(f"{argument}: expected strings, got {value!r}")
    return values


def shared_groups(value: object) -> tuple[tuple[str, ...], ...]:
    """The groups of patterns that `share` asks for. Raises TypeError or ValueError for others."""
    groups = value if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
    found = tuple(strings("share", group) for group in groups)
    if any(len(group) < 2 for group in found):
        raise ValueError(
            "share: expected groups of two or more patterns, such as [('q_proj', 'k_proj')], got "
            f"{value!r}"
        )
    return found


def _matches(pattern: str, names: Iterable[str]) -> bool:
    """Whether the pattern matches one of the names, or is one: a name may have brackets."""
    return any(name == pattern or fnmatch.fnmatchcase(name, pattern) for name in names)


def around(name: str) -> list[str]:
    """The names of the modules from the root's (empty) to this one: a.b gives "", "a", "a.b"."""
    parts = name.split(".") if name else []
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]


def is_inside(every_name: list[str], blocks: set[str]) -> bool:
    """Whether one of these names lies inside one of the blocks."""
    return any(outer in blocks for name in every_name if name for outer in around(name)[:-1])


def _no_match(argument: str, unused: list[str], names: Iterable[str], what: str) -> str:
    own = {name: name.rpartition(".")[2] for name in names if name}
    late = [p for p in unused if _matches(p, own)]
    if late:
        return (
            f"{argument}: expected narrow patterns before wide ones, got {late} behind patterns "
            "that match the same names"
        )
    like: list[str] = []
    for pattern in unused:
        last = pattern.strip("*.").rpartition(".")[2]
        close = difflib.get_close_matches(last, set(own.values()))
        for name in own:
            inside = _matches(pattern, around(name)[1:-1])
            if (own[name] in close or inside) and name not in like:
                like.append(name)
    text = f"{argument}: expected patterns that match {what}, got {unused} that match none"
    return f"{text}; names like them: {like[:3]}" if like else text
