"""What TRL's trainers do that transformers' does not: passes of the model as its own reference."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ...config import is_peft
from ...models.probe import around
from ...noise import contexts
from ...noise.contexts import noise_off


def of_trl(thing: object) -> bool:
    """Whether it is a trainer of TRL's, or its arguments."""
    return any(c.__module__.startswith("trl.") for c in type(thing).__mro__)


@contextlib.contextmanager
def plain_without_gradients(model: Any) -> Iterator[None]:
    """Inside, a pass of the model without gradients is the plain network's: TRL's reference is the
    model itself with its adapter off, and its completions are the model's own."""
    entered: list[contextlib.ExitStack] = []

    def before(*call: Any) -> None:
        entered.append(contextlib.ExitStack())
        if not torch.is_grad_enabled() and contexts.MODE != "on":  # as dip.predict has it
            entered[-1].enter_context(noise_off())

    def after(*call: Any) -> None:
        entered.pop().close()

    inner = model.get_base_model() if is_peft(model) else model  # generate calls no more than that
    with around(inner, before, after):  # no hooks: at Ctrl-C torch calls none
        yield
