"""A layer as a leaf of torch.fx's graphs."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy as Proxy


def record(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The call of a layer, on a torch.fx.Proxy among others, as one node of the graph that torch.fx
    traces. Raises RuntimeError where the layer is the whole of what is traced."""
    tracer = next(value for value in (*args, *kwargs.values()) if isinstance(value, Proxy)).tracer
    path = tracer.path_of_module(layer) if hasattr(tracer, "path_of_module") else ""
    if not path:
        name = type(layer).__name__
        raise RuntimeError(
            f"dipkernels: torch.fx keeps {name} as a module that the graph calls, so it must be a "
            f"submodule of what is traced, got {name} itself; trace torch.nn.Sequential(layer)"
        )
    if not (layer._forward_pre_hooks or layer._forward_hooks):
        return tracer.create_proxy("call_module", path, args, kwargs)
    # The tracer has followed the hooks into the graph; called as a module, the layer would run them
    # again.
    module = tracer.create_proxy("get_attr", path, (), {})
    return tracer.create_proxy("call_method", "forward", (module, *args), kwargs)
