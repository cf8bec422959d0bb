"""A module that makes a layer's input and noises what it makes: u = f(x) + sigma * z.
docs/maths.md, section 10."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import inputs, tracing
from .layer import DIPLayer, beside


class Producer(DIPLayer):
    """Before the class of an f: f's own forward without noise, to the bit, and f(x) + sigma * z in
    one pass with it."""

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
