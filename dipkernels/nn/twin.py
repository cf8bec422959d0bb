"""Any other layer: its own class on a noised input."""

from __future__ import annotations

import inspect
from typing import Any, SupportsIndex

from torch import Tensor, nn

from .. import worlds
from . import inputs, tracing
from .layer import DIPLayer, noised


class _Twin(DIPLayer):
    """Before a class whose forward takes the input first: that forward on x + sigma * z."""

    input_name: str = ""  # of forward's first parameter, by which callers may pass the input

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not args and self.input_name not in kwargs:
            raise TypeError(f"{type(self).__name__}: expected its input first, got none")
        x = args[0] if args else kwargs[self.input_name]
        if type(x) is not Tensor:
            if isinstance(x, tracing.Proxy):
                return tracing.record(self, *args, **kwargs)
            inputs.require_tensor(self, x)
        u = noised(self, x, worlds.autocast_dtype(x)) if self.noisy() else self.copied_without_noise(x)
        if args:
            return super().forward(u, *args[1:], **kwargs)
        return super().forward(**{**kwargs, self.input_name: u})

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        # The class was made at run time, so a pickle names the plain one.
        return _new_twin, (self.plain_type, self.feature_dim), self.__getstate__()  # type: ignore[no-untyped-call]


_MADE: dict[tuple[type[nn.Module], int], type[nn.Module]] = {}


def twin_type(plain_type: type[nn.Module], feature_dim: int = -1, name: str = "") -> type[nn.Module]:
    """The DIP twin of a class that another package defines, made once; `name` for its first use."""
    if (plain_type, feature_dim) not in _MADE:
        body = {
            "plain_type": plain_type,
            "feature_dim": feature_dim,
            "input_name": first_parameter(plain_type) or "",
            "__module__": __name__,
        }
        _MADE[plain_type, feature_dim] = type(name or f"DIP{plain_type.__name__}", (_Twin, plain_type), body)
    return _MADE[plain_type, feature_dim]


def first_parameter(kind: type[nn.Module]) -> str | None:
    """The name of what forward takes first; None where it takes nothing that it names."""
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:2]
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return parameters[0].name if parameters and parameters[0].kind in named else None


def _new_twin(plain_type: type[nn.Module], feature_dim: int) -> nn.Module:
    kind = twin_type(plain_type, feature_dim)
    return kind.__new__(kind)
