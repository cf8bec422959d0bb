"""Layers whose weight a module reads past them, without calling them, as its bytecode shows."""

from __future__ import annotations

import dis
import functools
import inspect
import re
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from .convertible import TWINS

_PLAIN_LOOKS = re.compile(
    r"bias|(in|out)_(features|channels)|kernel_size|stride|padding.*|dilation|groups|training|"
    r"requires_grad_|parameters|="
)
_HARMLESS = re.compile(r"dtype|device|shape|ndim|data|grad|requires_grad|is_cuda|numel|size|dim|=")
_SETTING_UP = re.compile(r"init|reset|tie|load|extra_repr|prune")


@functools.cache
def read_past(kind: Any) -> frozenset[str]:
    """The children that this class's own code never calls or hands on, and whose weight it reads.

    Found in the bytecode of its methods: `F.linear(x, self.qkv.weight)` where no method mentions
    `self.qkv` otherwise.
    """
    if kind.forward is nn.Sequential.forward:  # which calls every child
        return frozenset()
    read, used, replaced = set(), set(), set()
    for base in kind.__mro__:
        if base in (nn.Module, object) or (base in TWINS and base is not kind):
            continue
        found = {name: code for name, each in vars(base).items() if (code := _code_of(each))}
        kept = {name: code for name, code in found.items() if name not in replaced}
        for name, code in kept.items():
            for child, is_read in _mentions(code, code.co_varnames[:1]):
                if not is_read:
                    used.add(child)
                elif not _SETTING_UP.search(name):
                    read.add(child)
        # by a method where none of this class calls the base class's
        replaced |= kept.keys() - {name for code in kept.values() for name in _called(code)}
    return frozenset(read - used)


def _code_of(member: Any) -> Any:
    """The code of a method, also of one that a decorator has wrapped; None of anything else."""
    if callable(member):
        member = inspect.unwrap(getattr(member, "__func__", member))
    return getattr(member, "__code__", None)


def _called(code: types.CodeType) -> set[str]:
    """The names that this code looks up, but for those of `self`: `super().forward`."""
    return _names(code) - {path[0] for path in _paths(code, code.co_varnames[:1]) if path}


def _names(code: types.CodeType) -> set[str]:
    inner = (each for each in code.co_consts if isinstance(each, types.CodeType))
    return {*code.co_names}.union(*map(_names, inner))


def _mentions(code: types.CodeType, own: tuple[str, ...]) -> Iterator[tuple[str, bool]]:
    """(child, whether its weight is read) for every `self.child` in this code that is more than a
    harmless look."""
    for path in _paths(code, own):
        child, attribute, further = (*path, "", "", "")[:3]
        if child in ("", "="):
            continue
        if attribute == "weight":
            if not _HARMLESS.fullmatch(further):
                yield child, True
        elif not _PLAIN_LOOKS.fullmatch(attribute):
            yield child, False


@functools.cache  # for the classes of a model have most of their methods in common
def _paths(code: types.CodeType, own: tuple[str, ...]) -> list[list[str]]:
    """What follows each `self` in this code: ["a", "b"] for self.a.b, and ["a", "="] where self.a.b
    is set."""
    found: list[list[str]] = []
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found += _paths(constant, own)
    path: list[str] | None = None  # of the self that was loaded last
    for step in dis.get_instructions(code):
        if step.opname in ("NOP", "EXTENDED_ARG"):
            continue
        if path is not None:
            if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                path.append(step.argval)
                continue
            found.append([*path, "="] if step.opname == "STORE_ATTR" else path)
            path = None
        if step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")):
            # two in one from 3.13 on
            loaded = step.argval[-1:] if isinstance(step.argval, tuple) else (step.argval,)
            path = [] if loaded == own else None
    return found
