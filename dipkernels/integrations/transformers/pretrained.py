"""A converted model out of the folder that a trainer or `save` left."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import transformers

from ...config import CONFIG_FILE, is_peft, load


def from_pretrained(
    kind: Any, folder: str | os.PathLike[str], *args: Any, batches: Any = None, **options: Any
) -> Any:
    """kind.from_pretrained(folder), converted and with its variances: what a trainer or `save` left
    in the folder.

    Args:
        kind: A class of transformers, such as AutoModelForCausalLM, or PEFT's
            AutoPeftModelForCausalLM.
        folder: A folder with dip_config.json and dip.safetensors.
        args, options: Those of kind.from_pretrained.
        batches: As for `dip.load`.

    Returns:
        The model, in eval mode.

    Raises:
        FileNotFoundError, ValueError: As for `dip.load`. ValueError also for a folder with an
            adapter and a kind that is not PEFT's, whose layers have other names.
    """
    model = kind.from_pretrained(folder, *args, **options)
    if Path(folder, "adapter_config.json").is_file() and not is_peft(model):
        raise ValueError(
            "kind: expected a class of PEFT, such as AutoPeftModelForCausalLM, because the folder "
            f"holds an adapter, got {kind.__name__}"
        )
    return load(model, folder, batches)


def folder_of_adapter(model: Any, folder: str) -> str:
    """Where PEFT writes the active adapter: a folder of its own, unless it is named "default"."""
    own = os.path.join(folder, str(model.active_adapter)) if is_peft(model) else folder
    return own if Path(own, CONFIG_FILE).is_file() else folder


def load_renamed(model: Any, folder: str) -> None:
    """Load what the trainer has not: its load_state_dict does not know the names by which
    save_pretrained wrote some models.

    transformers 5.24 writes a ViT by its former names, and says no more than "There were missing
    keys" on resuming.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        return
    loaded = type(model).from_pretrained(folder).state_dict()
    missing = model.load_state_dict(loaded, strict=False).missing_keys
    if missing:
        raise ValueError(
            f"folder: expected the weights of this model in {folder}, got none for {missing}"
        )
