"""Says when an optimiser decays a variance, towards log_variance 0, which is sigma = 1, or learns
the noise of one key. docs/guides/variance.md, reproducibility.md."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from .. import worlds
from ..noise import guards

_variances: weakref.WeakKeyDictionary[nn.Module, None] = weakref.WeakKeyDictionary()
_checked: weakref.WeakKeyDictionary[Optimizer, tuple[Any, ...]] = weakref.WeakKeyDictionary()
_hook: Any = None
_FEW = 10  # steps may share a key: the inner ones of a meta-learner


def watch(variance: nn.Module) -> None:
    """From now on the first step of an optimiser that decays a parameter of `variance` warns."""
    global _hook
    _variances[variance] = None
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(_check)
        register_optimizer_step_pre_hook(_check_key)


def _check(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Look through an optimiser once, and again when its groups have changed."""
    if worlds.tracing():
        return
    groups = optimizer.param_groups
    seen = tuple((len(group["params"]), _decays(group)) for group in groups)
    if _checked.get(optimizer) == seen:
        return
    _checked[optimizer] = seen
    decayed = {
        id(p) for group in groups if _decays(group) for p in group["params"] if p.requires_grad
    }
    if not decayed:
        return
    if count := _count_in(decayed):
        warnings.warn(
            f"dipkernels: {type(optimizer).__name__} decays the log_variance of {count} DIP "
            "layer(s): weight decay pulls it towards 0, which is sigma = 1. Make the optimiser "
            "from dip.param_groups(model, lr), whose group of variances has none, "
            "or put the parameters named *.log_variance into a group with weight_decay=0",
            stacklevel=3,
        )


def _check_key(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Warn, once for a key, where too many steps in a row have had its noise; not of an attack,
    which trains its input."""
    if worlds.tracing() or guards.steps_of_one_key(optimizer) != _FEW + 1:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if _count_in({id(p) for p in parameters if p.grad is not None}):  # else none drew noise
        warnings.warn(
            f"dipkernels: {_FEW + 1} steps of an optimiser in a row had the noise of one key of "
            "fixed_noise. A network learns a noise that stays, as if it were data. Give each step "
            "a key of its own, such as its number: `with dip.fixed_noise(step):`",
            stacklevel=3,
        )


def _count_in(ids: set[int]) -> int:
    """How many variances have a parameter among these."""
    # a list made in one step, for another thread may make or copy a model meanwhile
    alive = [v for ref in _variances.keyrefs() if (v := ref()) is not None]
    return sum(any(id(p) in ids for p in _parameters(v)) for v in alive)


def _parameters(variance: nn.Module) -> Iterable[nn.Parameter | None]:
    # An optimiser for each parameter looks at every variance, so no module is walked for nothing.
    return variance.parameters() if variance._modules else variance._parameters.values()


def _decays(group: dict[str, Any]) -> bool:
    decay = group.get("weight_decay", 0)
    return isinstance(decay, Tensor) or bool(decay)  # reading a tensor would stop a GPU
