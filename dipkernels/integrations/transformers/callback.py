"""DIP in a Trainer whose class cannot be changed."""

from __future__ import annotations

import contextlib
import os
import warnings
from typing import Any

import torch
import transformers

from ...config import DIPConfig, apply, config_of, is_peft, save
from ...reports import metrics
from ...training.objective import kl_penalty
from ..parts import (
    config_of_run,
    learning_variances,
    require_groups,
    warn_of_faults,
)
from .trl import of_trl, plain_without_gradients


class DIPCallback(transformers.TrainerCallback):
    """DIP in a Trainer whose class cannot be changed:
    `Trainer(model, args, callbacks=[DIPCallback(batches=batches)])`.

    It converts and calibrates the model when the trainer is made, adds the gradient of the KL term
    before each optimiser step, writes dip_config.json and dip.safetensors into each checkpoint, and
    puts sigma into state.log_history.

    It refuses what a callback cannot do: m > 1 and lambda_s > 0 (the batch and the loss are the
    trainer's), a key (the noise is drawn from torch's generator, whose state the trainer keeps in
    its checkpoints), predictions with k > 0, weight decay by the trainer's own optimiser, FSDP,
    DeepSpeed, and KL under fp16. It warns that the variances learn at the weights' rate, unless
    `optimizers` is made from `param_groups` after `dip.apply`. The logged loss and the clipped norm
    do not contain the KL term, and the trainer's loggers do not see sigma. `DIPMixin` does all of
    this. In TRL's trainers a pass without gradients is the plain network's, as with `DIPMixin`.

    Args:
        config: A config with m=1 and key=None; by default DIPConfig(m=1, key=None).
        batches: As `dip.apply`'s. Neither is needed for a model that `dip.apply` has converted.

    Raises:
        ValueError: The config or the trainer asks for what a callback cannot do. Raised when the
            callback is made, or the trainer.
    """

    def __init__(self, config: DIPConfig | None = None, batches: Any = None) -> None:
        if config is not None and not isinstance(config, DIPConfig):
            raise TypeError(f"config: expected a DIPConfig, got {type(config).__name__}")
        self._asked = config
        self.config: Any = config  # the model's, once it trains
        self.batches = batches
        self._checked, self._training = False, contextlib.ExitStack()
        if config is not None:
            _require_possible(config)

    def on_init_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        model, optimizer = options["model"], options.get("optimizer")
        config = config_of_run(model, self._asked, "config") or DIPConfig(m=1, key=None)
        _require_possible(config)
        self.config = config
        if args.fsdp or args.deepspeed or (args.fp16 and config.kl > 0):
            raise ValueError(
                "args: expected neither FSDP, DeepSpeed nor fp16 with a DIPCallback; use DIPMixin"
            )
        if optimizer is None and args.weight_decay > 0:
            raise ValueError(
                f"weight_decay: expected 0 with a DIPCallback, got {args.weight_decay}: the "
                "trainer's optimiser would decay the variances. Call dip.apply(model, config, "
                "batches) and pass optimizers=(torch.optim.AdamW(dip.param_groups(model, "
                "lr)), None), or use DIPMixin"
            )
        if config_of(model) is None:
            apply(model, config, self.batches)
        if optimizer is not None:
            require_groups(model, optimizer, "or leave it to DIPMixin")
        else:
            warnings.warn(
                "DIPCallback: the variances learn at the weights' learning rate, a tenth of the "
                "recipe's; pass optimizers=(torch.optim.AdamW(dip.param_groups(model, lr)), None) "
                "after dip.apply, or use DIPMixin",
                stacklevel=2,
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        if config_of(options["model"]) is None:
            raise ValueError(
                "callbacks: expected DIPCallback in Trainer(callbacks=[...]), got one that was "
                "added later"
            )
        # again, for one that was added later
        self.config = config_of_run(options["model"], self._asked, "config")
        _require_possible(self.config)
        self._training.close()  # of a run that an error ended
        if of_trl(args):
            self._training.enter_context(plain_without_gradients(options["model"]))

    def on_train_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        self._training.close()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        model = options["model"]
        if not self._checked:
            self._checked = True
            warn_of_faults(model)
        parameters, kl = list(learning_variances(model).values()), self.config.kl
        if kl > 0 and parameters:
            gradients = torch.autograd.grad(kl_penalty(model, kl), parameters)
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def on_log(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        if state.log_history and "loss" in state.log_history[-1]:
            state.log_history[-1] |= metrics(options["model"])

    def on_save(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        if not is_peft(options["model"]):
            folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
            save(options["model"], folder, write=args.should_save)


def _require_possible(config: DIPConfig) -> None:
    """Raise ValueError naming all of the config that a callback cannot do."""
    possible = {"m": 1, "lambda_s": 0, "k": 0, "key": None}
    wrong = [name for name, value in possible.items() if getattr(config, name) != value]
    if wrong:
        raise ValueError(
            f"config: expected {', '.join(f'{n}={possible[n]}' for n in wrong)}, all that a "
            f"callback can do, got {', '.join(f'{n}={getattr(config, n)}' for n in wrong)}; use "
            "DIPMixin in the trainer's class"
        )
