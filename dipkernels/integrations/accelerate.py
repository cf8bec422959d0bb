"""accelerate: the noise of a step of a loop written by hand, and the config with its checkpoints.
docs/guides/trainers.md."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn

from ..arguments import integer
from ..config import DIPConfig, require_config, save
from .parts import noise_of_step, warn_of_another


def step_noise(
    accelerator: Any,
    model: nn.Module,
    step: int,
    *,
    batch_size: int,
    micro: int = 0,
    batch: Any = None,
) -> contextlib.AbstractContextManager[object]:
    """The noise of one micro-batch of a step: forward and backward belong inside.

    The rows are the examples' places in the batch of all processes and micro-batches. So a step has
    the same noise on any number of them.

    Args:
        accelerator: The Accelerator.
        model: A model that `dip.apply` has converted, prepared or not.
        step: The optimiser step, >= 0; one number for all micro-batches of a step.
        batch_size: Number of examples in a batch of one process. Give the same number for the last
            batch, which may be smaller.
        micro: The number of the micro-batch in the step, under gradient accumulation.
        batch: The micro-batch itself. Give it if some micro-batches have longer examples than
            others, or a layer reads examples elsewhere than in its leading dimension. Then no two
            share noise.

    Returns:
        A context. If the config has key=None, it does nothing.

    Raises:
        ValueError: The model has no config.
    """
    config = require_config(model)
    micro, batch_size = integer("micro", micro, 0), integer("batch_size", batch_size, 1)
    place = micro, accelerator.process_index, accelerator.num_processes
    return noise_of_step(config, step, batch, place, batch_size)


def keep_config(accelerator: Any, model: nn.Module) -> None:
    """Let `accelerator.save_state` write dip_config.json and dip.safetensors too, and `load_state`
    compare the config.

    Args:
        accelerator: The Accelerator.
        model: A model that `dip.apply` has converted, prepared or not.

    Raises:
        ValueError: The model has no config. On loading: the folder has none, or one that cannot be
            read.

    Warns:
        UserWarning: On loading, where the folder's config is another.
    """
    require_config(model)

    def on_save(models: list[nn.Module], weights: list[Any], output_dir: str) -> None:
        save(model, output_dir)

    def on_load(models: list[nn.Module], input_dir: str) -> None:
        warn_of_another(DIPConfig.load(input_dir), require_config(model), input_dir)

    accelerator.register_save_state_pre_hook(on_save)
    accelerator.register_load_state_pre_hook(on_load)
