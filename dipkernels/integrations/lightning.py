"""Lightning: a callback that makes a LightningModule train by a DIPConfig.
docs/guides/trainers.md."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import os
from collections.abc import Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..arguments import integer
from ..config import (
    UNCALIBRATED,
    DIPConfig,
    apply,
    calibrate_as,
    config_of,
    convert_as,
    require_config,
)
from ..models.convert import to_plain
from ..models.parameters import variances
from ..models.probe import untouched
from ..nn.numbering import dip_layers
from ..reports import metrics
from ..training.objective import kl_penalty
from .parts import (
    config_of_run,
    noise_of_step,
    on_trajectories,
    one_start,
    require_groups,
    size_of_batches,
    warn_of_another,
    warn_of_faults,
)

_KEY = "dip_config"  # in a checkpoint
_WAY_OUT = "make it in configure_optimizers, which is called after the model was converted"


_Callback: Any = pl.Callback  # without types where lightning is not installed


class DIPCallback(_Callback):  # type: ignore[misc]
    """`Trainer(callbacks=[DIPCallback(DIPConfig())])`: convert, calibrate, train by the config,
    log, save, resume.

    The module is converted before `configure_optimizers` is called, which must use
    `dip.param_groups(self, lr)`. `training_step` gets each batch with every example m times. So the
    mean that it returns is the mean over m trajectories. The KL term is added to its loss. Noise is
    a function of the step and of the example's place in the global batch. Sigma, its share of the
    prior's and the KL term are logged. The config is in each checkpoint.

    m trajectories take m times the time and the memory of activations.

    Args:
        config: What to do. None for a module that `dip.apply` has converted.
        batches: As for `dip.apply`; needed for `before` and place="producer". None takes the first
            batches of the training data. The module's forward must then take what `calibrate` hands
            it: a mapping as keywords, or the first element of a tuple.
        calibration_batches: How many of them, >= 1.

    Raises:
        ValueError: When training starts, for what a callback cannot do: lambda_s > 0 and k > 0
            (the loss and `predict_step` are the module's), manual optimisation, a `training_step`
            of dataloader_iter, FSDP and DeepSpeed strategies, a plain module under a strategy
            that spawns or forks, an optimiser that lacks the variances or decays them.
    """

    def __init__(
        self,
        config: DIPConfig | None = None,
        batches: Iterable[Any] | None = None,
        calibration_batches: int = 8,
    ) -> None:
        if config is not None and not isinstance(config, DIPConfig):
            raise TypeError(f"config: expected a DIPConfig, got {type(config).__name__}")
        self.asked, self.batches = config, batches
        self.calibration_batches = integer("calibration_batches", calibration_batches, 1)
        self._checked = False
        self._to_plain = False
        self._noise, self._wrapped = contextlib.ExitStack(), contextlib.ExitStack()

    # ---- before training

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        pl_module.configure_model()  # which Lightning calls after this, and for each stage again
        if stage != "fit":
            self._convert_for_checkpoint(pl_module)
            return
        config = config_of_run(pl_module, self.asked, "config")
        if config is None:
            raise ValueError(
                "config: expected a DIPConfig, or a module that dip.apply has converted, got "
                "neither"
            )
        self._require_possible(trainer, pl_module, config)
        if config_of(pl_module) is None:
            self._require_module_comes_back(trainer)
            self._require_no_copies(trainer, pl_module)
            if self.batches is not None:
                apply(pl_module, config, self.batches)
                one_start(pl_module)
            else:  # calibrated when training starts, unless a checkpoint is loaded before
                convert_as(pl_module, config)
        self._wrap(trainer, pl_module)

    def _convert_for_checkpoint(self, pl_module: Any) -> None:
        """Before a stage without training, which may load a checkpoint with variances. Without one
        the module is plain again after it."""
        config = self.asked
        if config is None or dip_layers(pl_module):
            return
        if self.batches is not None or not config.watches_batches:
            convert_as(pl_module, config, self.batches)
            self._to_plain = True

    @staticmethod
    def _require_possible(trainer: Any, pl_module: Any, config: DIPConfig) -> None:
        asked = {name: getattr(config, name) for name in ("lambda_s", "k") if getattr(config, name)}
        if asked:
            raise ValueError(
                "config: expected lambda_s=0 and k=0, because loss and prediction are the "
                f"module's, got {asked}; call dip.objective and dip.predict in the module"
            )
        if not pl_module.automatic_optimization:
            raise ValueError(
                "pl_module: expected automatic optimisation, got manual; call dip.apply and "
                "config.objective in the module"
            )
        if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
            raise ValueError(
                "pl_module: expected training_step(batch, ...), got training_step(dataloader_iter)"
            )
        strategy = type(trainer.strategy).__name__
        if "FSDP" in strategy or "DeepSpeed" in strategy:
            raise ValueError(
                f"strategy: expected one process or DDP, got {strategy}; docs/cluster.md has FSDP2 "
                "by hand"
            )

    @staticmethod
    def _require_module_comes_back(trainer: Any) -> None:
        """Refuse to convert a copy in another process, of which the caller's module gets back the
        parameters that it has itself."""
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            raise ValueError(
                "pl_module: expected one that dip.apply has converted, because a strategy that "
                "spawns or forks trains a copy of it, and the plain module would come back "
                "without variances, got a plain one; call dip.apply(module, config, batches) "
                "before fit, and give the trainer DIPCallback()"
            )

    def _require_no_copies(self, trainer: Any, pl_module: Any) -> None:
        """Refuse callbacks before this one that have copied the plain module, to average it."""
        for callback in itertools.takewhile(lambda each: each is not self, trainer.callbacks):
            kept = vars(callback).values()
            if any(isinstance(value, (AveragedModel, type(pl_module))) for value in kept):
                raise ValueError(
                    "callbacks: expected DIPCallback before those that copy the module, got it "
                    f"behind {type(callback).__name__}, whose copy has no variances"
                )

    def _wrap(self, trainer: Any, pl_module: Any) -> None:
        step, before = pl_module.training_step, vars(pl_module).get("training_step")
        save = pl_module.on_save_checkpoint

        # One that torch.compile made is there, and takes any arguments: Lightning asks which.
        @functools.wraps(step if before is None else inspect.unwrap(step))
        def training_step(batch: Any, *args: Any, **options: Any) -> Any:
            config = require_config(pl_module)
            out, _ = on_trajectories(lambda b: step(b, *args, **options), batch, config.m)
            return _with_kl(out, pl_module, config)

        def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
            # one of weights only calls no callback
            self.on_save_checkpoint(trainer, pl_module, checkpoint)
            save(checkpoint)

        pl_module.training_step = training_step
        pl_module.on_save_checkpoint = on_save_checkpoint

        def unwrap() -> None:
            del pl_module.training_step, pl_module.on_save_checkpoint
            if before is not None:
                pl_module.training_step = before

        self._wrapped.callback(unwrap)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._at = (-1, 0)  # of this run, not of one before
        config = require_config(pl_module)
        if config.init_variance is None and _at_their_start(pl_module):
            calibrate_as(pl_module, config, self._first_batches(trainer, pl_module))
            one_start(pl_module)
        for optimizer in trainer.optimizers:
            require_groups(pl_module, optimizer, _WAY_OUT)

    def _first_batches(self, trainer: Any, pl_module: Any) -> list[Any]:
        """The first training batches, on the device, for a forward that takes them as they come."""
        if type(pl_module).forward is pl.LightningModule.forward:
            raise ValueError(
                "batches: expected some, because the module has no forward to calibrate with, got "
                "None; give the callback batches and the module a forward, or call dip.apply on "
                "its network before, or set init_variance=... in the config"
            )
        loaders = trainer.train_dataloader
        if isinstance(loaders, (Mapping, list, tuple)):
            raise ValueError(
                f"batches: expected some, because the training data are {len(loaders)} loaders, "
                "whose batches the module's forward does not take as they come, got None; give the "
                "callback batches, or set init_variance=... in the config"
            )
        with untouched(pl_module):
            first = list(itertools.islice(loaders, self.calibration_batches))
            first = [trainer.precision_plugin.convert_input(batch) for batch in first]
        return [trainer.strategy.batch_to_device(batch) for batch in first]

    # ---- a step

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        step, config = trainer.global_step, require_config(pl_module)
        micro = self._at[1] + 1 if self._at[0] == step else 0
        self._at = (step, micro)
        place = micro, trainer.global_rank, trainer.world_size
        size = size_of_batches(trainer.train_dataloader)
        self._noise.enter_context(noise_of_step(config, step, batch, place, size))

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if not self._checked:
            self._checked = True
            warn_of_faults(pl_module)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._noise.close()
        step = trainer.global_step
        every = trainer.log_every_n_steps
        if step != self._at[0] and every and step % every == 0:
            pl_module.log_dict(metrics(pl_module), batch_size=1)

    # ---- after it

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._noise.close()
        self._wrapped.close()
        if self._to_plain:
            self._to_plain = False
            to_plain(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint[_KEY] = require_config(pl_module).to_dict()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        stored, own = _config_in("ckpt_path", checkpoint), config_of(pl_module)
        self._to_plain = False  # the variances are the checkpoint's
        if own is not None:
            warn_of_another(stored, own, "the checkpoint")


def load_from_checkpoint(
    kind: type[Any],
    path: str | os.PathLike[str],
    *,
    batches: Iterable[Any] | None = None,
    **options: Any,
) -> Any:
    """kind.load_from_checkpoint(path), converted and with its variances.

    Args:
        kind: The class of the LightningModule, which makes a plain one.
        path: A checkpoint that a trainer with a `DIPCallback` wrote.
        batches: As for `dip.load`.
        options: Those of kind.load_from_checkpoint.

    Returns:
        The module, in eval mode.

    Raises:
        ValueError: The checkpoint has no config.
    """
    module = kind.load_from_checkpoint(path, strict=False, **options)
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    convert_as(module, _config_in("path", checkpoint), batches)
    module.load_state_dict(checkpoint["state_dict"])
    return module.eval()


def _config_in(argument: str, checkpoint: Mapping[str, Any]) -> DIPConfig:
    if _KEY not in checkpoint:
        raise ValueError(
            f"{argument}: expected a checkpoint of a DIPCallback, got one without a config"
        )
    return DIPConfig.from_dict(checkpoint[_KEY])


def _at_their_start(pl_module: nn.Module) -> bool:
    """Whether the priors are all where the conversion has put them: so they are after an error
    before training, and after a tuner, which loads what it wrote before it trained. No training
    moves them, and no parametrisation."""
    found = [values for name, values in variances(pl_module).items() if name.endswith("log_prior")]
    start = torch.tensor(UNCALIBRATED, device="cpu").log()
    return all(torch.allclose(values, start) for values in found)


def _with_kl(out: Any, pl_module: nn.Module, config: DIPConfig) -> Any:
    """What training_step returned, with the KL term in its loss; None skips the batch."""
    loss = out["loss"] if isinstance(out, Mapping) else out
    if loss is None or config.kl == 0:
        return out
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        raise ValueError(f"training_step: expected a scalar loss, got {type(loss).__name__}")
    total = loss + kl_penalty(pl_module, config.kl).to(loss.device)
    return {**out, "loss": total} if isinstance(out, Mapping) else total
