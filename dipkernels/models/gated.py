"""The blocks of gated products, down(act(gate(x)) * up(x)), as other packages write them: told by
the bytecode of their classes."""

from __future__ import annotations

from inspect import CO_VARARGS, CO_VARKEYWORDS
from types import CodeType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def _gate_first(self: Any, x: Tensor) -> Any:
    return self.down(self.act(self.gate(x)) * self.up(x))


def _up_first(self: Any, x: Tensor) -> Any:
    return self.down(self.up(x) * self.act(self.gate(x)))


def _gate_first_named(self: Any, x: Tensor) -> Any:
    y = self.down(self.act(self.gate(x)) * self.up(x))
    return y


def _up_first_named(self: Any, x: Tensor) -> Any:
    y = self.down(self.up(x) * self.act(self.gate(x)))
    return y


def _product_named(self: Any, x: Tensor) -> Any:  # Llama 4
    y = self.act(self.gate(x)) * self.up(x)
    return self.down(y)


def _halves(self: Any, x: Tensor) -> Any:  # Phi-3, GLM-4
    y = self.gate(x)
    gate, y = y.chunk(2, dim=-1)
    y = y * self.act(gate)
    return self.down(y)


def _function(self: Any, x: Tensor) -> Any:  # Meta's Llama; no module that could draw
    return self.down(F.silu(self.gate(x)) * self.up(x))


_FORMS = [
    f.__code__
    for f in (
        _gate_first,
        _up_first,
        _gate_first_named,
        _up_first_named,
        _product_named,
        _halves,
        _function,
    )
]


def gated_parts(kind: type[nn.Module]) -> tuple[str, str, str, str] | None:
    """The names of down, act, gate and up where the class's forward is down(act(gate(x)) * up(x))
    and nothing else; gate and up may be the halves of what one layer makes. act is "F.silu" where
    the class calls that function.

    Told by its bytecode, which must be that of the same expression compiled here, but for the
    names.
    """
    code = getattr(kind.forward, "__code__", None)
    if not isinstance(code, CodeType):
        return None
    for form in _FORMS:
        if _shape(code) == _shape(form):
            named = dict(zip(form.co_names, code.co_names, strict=True))
            if named.get("chunk", "chunk") == "chunk":
                gate = named["gate"]
                act = f"{named['F']}.{named['silu']}" if "F" in named else named["act"]
                return named["down"], act, gate, named.get("up", gate)
    return None


def _shape(code: CodeType) -> tuple[Any, ...]:
    return (
        code.co_code,
        code.co_argcount,
        code.co_flags & (CO_VARARGS | CO_VARKEYWORDS),
        len(code.co_names),
        [c for c in code.co_consts if not (c is None or isinstance(c, str))],  # no docstring
    )
