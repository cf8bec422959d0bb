"""A module that makes a layer's input and noises what it makes: u = f(x) + sigma * z.  docs/maths.md, section 10."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, SupportsIndex

from torch import Tensor, nn

from . import inputs, tracing
from .layer import DIPLayer, beside
from .twin import first_parameter


class Producer(DIPLayer):
    """Before the class of an f: f's own forward without noise, to the bit, and f(x) + sigma * z in one pass with it."""

    noises_output = True
    input_name: str = "input"  # of forward's first parameter, by which callers may pass the input

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x: Any = args[0] if args else kwargs.get(self.input_name)
        if type(x) is not Tensor:
            if isinstance(x, tracing.Proxy):
                proxy: Tensor = tracing.record(self, *args, **kwargs)
                return proxy
            inputs.require_tensor(self, x)
        if not self.noisy():
            return self.copied_without_noise(self._plain(*args, **kwargs))
        sigma, seed = beside(x, self), self._seed(x)
        try:
            more = {name: value for name, value in kwargs.items() if name != self.input_name}
            return self._noised(sigma, seed, x, *args[1:], **more)
        except inputs.FAILURES:
            inputs.explain(self, x, sigma)
            raise

    def _plain(self, *args: Any, **kwargs: Any) -> Tensor:
        """f(x)."""
        y: Tensor = super().forward(*args, **kwargs)
        return y

    def _noised(self, sigma: Tensor, seed: Tensor, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """f(x) + sigma * z of forward's arguments, sigma given as ln(sigma^2)."""
        raise NotImplementedError


if TYPE_CHECKING:
    _Mixin = nn.Module
else:
    _Mixin = object


class MadeTwin(_Mixin):
    """Of a class made at run time, which a pickle cannot name: it names what the class was made of."""

    made_of: tuple[type[Any], type[nn.Module], tuple[tuple[str, Any], ...]]

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return _new, self.made_of, self.__getstate__()  # type: ignore[no-untyped-call]


_MADE: dict[tuple[Any, ...], type[nn.Module]] = {}


def made_type(base: type[Any], plain_type: type[nn.Module], **facts: Any) -> type[Any]:
    """The class `base` in front of plain_type, with these attributes; made once, and picklable."""
    made_of = (base, plain_type, tuple(sorted(facts.items())))
    if made_of not in _MADE:
        body = {
            **facts,
            "plain_type": plain_type,
            "input_name": first_parameter(plain_type) or "input",
            "made_of": made_of,
            "__module__": __name__,
        }
        _MADE[made_of] = type(f"DIP{plain_type.__name__}", (base, MadeTwin, plain_type), body)
    return _MADE[made_of]


def _new(base: type[Any], plain_type: type[nn.Module], facts: tuple[tuple[str, Any], ...]) -> nn.Module:
    kind: Any = made_type(base, plain_type, **dict(facts))
    made: nn.Module = kind.__new__(kind)
    return made
