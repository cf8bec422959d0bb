"""Any other class with noise: at its input (a twin), or at what it makes for others to read (a
producer; docs/maths.md, section 10)."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, SupportsIndex

from torch import Tensor, nn

from .. import worlds
from .layer import DIPLayer, Mixin, Noise, node_of, noised, with_noise


class Wrapper(DIPLayer):
    """Before a class whose forward takes the input first, and whatever else behind it."""

    input_name: str = "input"  # of forward's first parameter, by which callers may pass the input

    if not TYPE_CHECKING:  # to a type checker it is that of the class behind

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if not args:
                if self.input_name not in kwargs:
                    raise TypeError(f"{type(self).__name__}: expected its input first, got none")
                args = (kwargs.pop(self.input_name),)
            if type(args[0]) is not Tensor and (node := node_of(self, *args, **kwargs)) is not None:
                return node
            return self._dip_forward(*args, **kwargs)

    def _dip_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What forward computes."""
        raise NotImplementedError

    def _dip_plain(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The class's own forward."""
        return super().forward(x, *args, **kwargs)


class Producer(Wrapper):
    """Before the class of an f: f's own forward without noise, to the bit, and f(x) + sigma * z in
    one pass with it."""

    noises_output = True

    def _dip_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.noisy():
            return self.copied_without_noise(self._dip_plain(x, *args, **kwargs))
        return with_noise(self, x, lambda noise: self._noised(noise, x, *args, **kwargs))

    def _noised(self, noise: Noise, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """f(x) + sigma * z; noise: (sigma, seed, draw)."""
        raise NotImplementedError


class _Twin(Wrapper):
    """Before any class: its own forward on x + sigma * z."""

    def _dip_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        u = (
            noised(self, x, worlds.autocast_dtype(x))
            if self.noisy()
            else self.copied_without_noise(x)  # of a list or a PackedSequence, which has no dtype
        )
        return self._dip_plain(u, *args, **kwargs)


def twin_type(plain_type: type[nn.Module], feature_dim: int, name: str = "") -> type[nn.Module]:
    """The DIP twin of a class that another package defines, made once; `name` for its first use."""
    return made_type(_Twin, plain_type, name, feature_dim=feature_dim)


# ---- classes made at run time --------------------------------------------------------------------


class MadeTwin(Mixin):
    """Of a class made at run time, which a pickle cannot name: it names what the class was made
    of."""

    made_of: tuple[type[Any], type[nn.Module], tuple[tuple[str, Any], ...]]
    plain_type: type[nn.Module]

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return _new, self.made_of, self.__getstate__()  # type: ignore[no-untyped-call]


_MADE: dict[tuple[Any, ...], type[nn.Module]] = {}


def made_type(
    base: type[Any], plain_type: type[nn.Module], name: str = "", **facts: Any
) -> type[Any]:
    """The class `base` in front of plain_type, with these attributes; made once, and picklable.
    name: for its first use."""
    made_of = (base, plain_type, tuple(sorted(facts.items())))
    if made_of not in _MADE:
        body = {
            **facts,
            "plain_type": plain_type,
            "input_name": first_parameter(plain_type) or getattr(base, "input_name", ""),
            "made_of": made_of,
            "__module__": __name__,
        }
        _MADE[made_of] = type(
            name or f"DIP{plain_type.__name__}", (base, MadeTwin, plain_type), body
        )
    return _MADE[made_of]


def _new(
    base: type[Any], plain_type: type[nn.Module], facts: tuple[tuple[str, Any], ...]
) -> nn.Module:
    kind: Any = made_type(base, plain_type, **dict(facts))
    return kind.__new__(kind)


def first_parameter(kind: type[nn.Module]) -> str | None:
    """The name of what forward takes first; None where it takes nothing that it names."""
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:2]
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return parameters[0].name if parameters and parameters[0].kind in named else None
