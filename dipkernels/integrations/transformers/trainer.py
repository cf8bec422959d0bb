"""A mixin for transformers' Trainer and TRL's trainers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
import math
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ...arguments import described, integer
from ...config import (
    CONFIG_FILE,
    VARIANCES_FILE,
    DIPConfig,
    apply,
    config_of,
    is_peft,
    load,
    load_state,
    save,
)
from ...models.parameters import load_variances, variance_tensors
from ...models.probe import eval_mode, seed_alike, untouched
from ...nn.wrappers import plain_names
from ...noise.contexts import noise_off
from ...reports import metrics
from ...training.objective import kl_penalty, smoothness
from ...training.predict import logits_of
from ..parts import (
    config_of_run,
    noise_of_step,
    on_trajectories,
    one_start,
    own_group,
    require_groups,
    size_of_batches,
    warn_of_another,
    warn_of_faults,
)
from .pretrained import folder_of_adapter, load_renamed
from .trl import of_trl, plain_without_gradients

_RUN = 2**32  # keys between the runs of two seeds
_NO_CONFIG = (
    "dip: expected a DIPConfig, or a model that dip.apply has converted, got neither; a resumed "
    "run takes the config of its checkpoint"
)
_WITHOUT_BATCHES = (
    "set init_variance=... in the config, or call dip.apply(model, config, batches) before"
)

_Trainer: Any = object  # a transformers.Trainer, or a subclass of it


class DIPMixin(_Trainer):  # type: ignore[misc]
    """Goes before a trainer of transformers or TRL among the bases of a class:
    `class DIPSFTTrainer(DIPMixin, SFTTrainer)`.

    The trainer then converts its model (after it has put adapters around it), calibrates it with
    the first batches of its training data, and trains by the config. The loss is the trainer's own,
    averaged over m trajectories, plus the KL term. Variances have a group of their own, with ten
    times the learning rate and no decay. Noise is a function of the seed, the step and the
    example's place in the global batch, so a resumed run draws what the uninterrupted one does.
    Each checkpoint gets dip_config.json and dip.safetensors, and its model file is the plain
    model's. Sigma, its share of the prior's and the KL term are logged with the loss.

    m trajectories take m times the time and the memory of activations. Evaluation is of the plain
    network. With k > 0 in the config the predictions are the means of k noisy passes, as logits.

    Args:
        dip: The config. None for a model that `dip.apply` has converted, or for a resumed run,
            which takes the config of its checkpoint.
        calibration_batches: Number of batches of the training data to calibrate with, >= 1.
        args, options: The trainer's own.

    Raises:
        ValueError: There is no config, the model has another one, a given optimiser lacks the
            variances or decays them, or the trainer runs nn.DataParallel with a key, or DeepSpeed's
            ZeRO-3. At a step: a batch that m > 1 cannot repeat, or lambda_s > 0 although the
            trainer's loss has no logits.
    """

    model_accepts_loss_kwargs: bool  # the trainer's own

    def __init__(
        self, *args: Any, dip: DIPConfig | None = None, calibration_batches: int = 8, **options: Any
    ) -> None:
        if dip is not None and not isinstance(dip, DIPConfig):
            raise TypeError(f"dip: expected a DIPConfig, got {type(dip).__name__}")
        self._dip_asked, self._dip_started = dip, False
        self._dip_batches = integer("calibration_batches", calibration_batches, 1)
        self._dip_at: tuple[Any, int, int] = (None, -1, 0)  # state of the run, step, micro-batch
        self._dip_checked = self._dip_loss_made = self._dip_adds_examples = False
        self._dip_missing: set[str] = set()  # weights that the trainer has not found to load
        super().__init__(*args, **options)
        self._dip_started = True
        if is_deepspeed_zero3_enabled():
            raise ValueError(
                "args: expected DeepSpeed's ZeRO up to stage 2, got stage 3, which hides "
                "log_variance from PyTorch; use FSDP2 there"
            )
        if getattr(self.args, "sync_ref_model", False) and getattr(self, "ref_model", None):
            raise ValueError(
                "sync_ref_model: expected False, for it copies the model's parameters one by one "
                "into a reference that has no variances, got True"
            )
        self._dip_start(self.model)

    # ---- the model

    @property
    def dip_config(self) -> DIPConfig:
        """The config of the model that is trained.

        Raises:
            ValueError: It has none.
        """
        config = config_of(self.model)
        if config is None:
            raise ValueError(_NO_CONFIG)
        return config

    def call_model_init(self, trial: Any = None) -> Any:
        model = super().call_model_init(trial)
        if self._dip_started:
            if self.place_model_on_device:
                self._move_model_to_device(model, self.args.device)
            self._dip_start(model)
        return model

    def _dip_start(self, model: Any) -> None:
        """Convert and calibrate the model, unless it has a config, or none was given."""
        config = config_of_run(model, self._dip_asked, "dip")
        if config is None:
            return
        if config_of(model) is None:
            config = self._dip_without_fused_head(model, config)
            needs = config.init_variance is None or config.watches_batches
            apply(model, config, self._dip_first_batches(model) if needs else None)
            one_start(model)
        self._dip_check_setting(config)

    def _dip_check_setting(self, config: DIPConfig) -> None:
        if self.args.n_gpu > 1 and config.key is not None:
            raise ValueError(
                f"key: expected None under nn.DataParallel, whose {self.args.n_gpu} replicas would "
                f"share their noise, got {config.key}; or start one process for each GPU by "
                "torchrun"
            )

    def _dip_without_fused_head(self, model: Any, config: DIPConfig) -> DIPConfig:
        """Without the head whose weight the trainer's loss reads past the layer: TRL's losses and
        Liger's."""
        fused = self.args.use_liger_kernel or of_trl(self)
        if not (fused and hasattr(model, "get_output_embeddings")):
            return config
        head = model.get_output_embeddings()
        names = [name for name, module in plain_names(model).items() if module is head]
        more = [name for name in names if name not in config.exclude]
        return dataclasses.replace(config, exclude=(*config.exclude, *more))

    def _dip_first_batches(self, model: Any) -> list[Any]:
        """What the model's forward takes of the first training batches, on the device."""
        if self.train_dataset is None:
            raise ValueError(
                "train_dataset: expected one, whose first batches set the noise (ratio), got "
                f"None; {_WITHOUT_BATCHES}"
            )
        with untouched(model):
            prepared: Any = self.get_train_dataloader()
            # accelerate's own would count as begun
            loader = getattr(prepared, "base_dataloader", prepared)
            batches = list(itertools.islice(loader, self._dip_batches))
        if not all(isinstance(batch, Mapping) for batch in batches):
            raise ValueError(
                "train_dataset: expected batches that are mappings, got "
                f"{type(batches[0]).__name__}; {_WITHOUT_BATCHES}"
            )
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        taken = inspect.signature(inner.forward).parameters
        batches = [dict(self._prepare_inputs(batch)) for batch in batches]
        found = [{name: v for name, v in batch.items() if name in taken} for batch in batches]
        if not all(found):
            raise ValueError(
                "train_dataset: expected batches of what the model's forward takes, got "
                f"{list(batches[0])}; {_WITHOUT_BATCHES}"
            )
        return found

    # ---- the optimiser

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        target, given = self.model if model is None else model, self.optimizer is not None
        if config_of(target) is None:
            raise ValueError(_NO_CONFIG)
        if given and not hasattr(self.optimizer, "param_groups"):
            raise ValueError(
                "deepspeed: expected a config without 'optimizer', whose one group would decay the "
                "variances, got one with it; leave it out, and the trainer makes its own"
            )
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if not given:
            own_group(target, optimizer, self.args.learning_rate)
        require_groups(target, optimizer, "or leave it to the trainer")
        return optimizer

    # ---- a step

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None, **options: Any
    ) -> Tensor:
        plain = plain_without_gradients if of_trl(self) else contextlib.nullcontext
        if not self._dip_checked and self._dip_is_a_mean(inputs, num_items_in_batch):
            self.model_accepts_loss_kwargs, num_items_in_batch = False, None
        if not self._dip_checked:
            self._dip_adds_examples = self._dip_is_a_sum(inputs, num_items_in_batch)
        self._dip_loss_made = False
        with self._dip_noise(inputs), plain(self.model):
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch, **options)
        self._dip_require_loss()
        if not self._dip_checked:
            self._dip_checked = True
            warn_of_faults(self.model)
        return loss

    def _dip_noise(self, inputs: Any) -> Any:
        """The noise of this micro-batch: its rows are its place in the batch of all processes and
        micro-batches."""
        step, config = self.state.global_step, self.dip_config
        run, before, last = self._dip_at  # a run that starts again has another state
        micro = last + 1 if run is self.state and before == step else 0
        self._dip_at = (self.state, step, micro)
        place = micro, self.args.process_index, self.args.world_size
        loader = self.callback_handler.train_dataloader
        known = loader is None or size_of_batches(loader)
        size = self._train_batch_size if known else None
        return noise_of_step(config, self.args.seed * _RUN + step, inputs, place, size)

    def _dip_require_loss(self) -> None:
        """Raise ValueError where the step has gone past this class's compute_loss."""
        config = self.dip_config
        lost = {n: getattr(config, n) for n in ("kl", "lambda_s") if getattr(config, n) > 0}
        lost |= {"m": config.m} if config.m > 1 else {}
        if lost and not self._dip_loss_made:
            raise ValueError(
                "compute_loss: expected DIPMixin's to be called, which does what the config says, "
                f"got a step of {type(self).__name__} without it, and so without {lost}; put your "
                "own compute_loss into a trainer behind the mixin, class Mine(DIPMixin, "
                "YourTrainer), or call super().compute_loss"
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **options: Any,
    ) -> Any:
        self._dip_loss_made = True
        own = functools.partial(super().compute_loss, model, **options)
        if not model.training:
            return own(inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        config = self.dip_config
        items = None if num_items_in_batch is None else num_items_in_batch * config.m
        # TRL's GRPO returns outputs to nobody, so ask where they are needed.
        with_outputs = return_outputs or config.lambda_s > 0
        if config.m > 1:
            self._dip_require_no_packs(inputs)
        answer, logits = on_trajectories(
            lambda batch: own(batch, return_outputs=with_outputs, num_items_in_batch=items),
            inputs,
            config.m,
            lambda answer: _logits(answer[1]) if config.lambda_s > 0 else None,
        )
        loss, outputs = answer if with_outputs else (answer, None)
        if self._dip_adds_examples:
            loss = loss / config.m
        # Where the micro-batches' losses are added up, each has its part of what a step has once.
        adds_up = self._dip_adds_up(num_items_in_batch)
        part = 1 / self.current_gradient_accumulation_steps if adds_up else 1.0
        if config.kl > 0:
            loss = loss + part * kl_penalty(self.model, config.kl).to(loss.device)
        if config.lambda_s > 0:
            loss = loss + part * config.lambda_s * smoothness(logits)
        return (loss, outputs) if return_outputs else loss

    def _dip_require_no_packs(self, inputs: Any) -> None:
        """Raise ValueError for sequences in one row that the model would take for one when that is
        repeated: transformers' flash attention looks for their starts in a batch of one row."""
        places = inputs.get("position_ids") if isinstance(inputs, Mapping) else None
        kind = getattr(getattr(self.model, "config", None), "_attn_implementation", None)
        if not isinstance(places, Tensor) or places.shape[:-1] != (1,) or "flash" not in str(kind):
            return
        if bool((places.diff() != 1).any()):
            raise ValueError(
                "m: expected 1, because position_ids pack several sequences into one row, which "
                f"{kind} tells apart in a batch of one row alone, got {self.dip_config.m}"
            )

    def _dip_adds_up(self, num_items_in_batch: Any) -> bool:
        """What `Trainer.training_step` asks: whether the loss is already a part of the step's."""
        if self.loss_is_scaled_for_ga is not None:
            return bool(self.loss_is_scaled_for_ga)
        return bool(self.model_accepts_loss_kwargs and num_items_in_batch is not None) or (
            self.compute_loss_func is not None
        )

    def _dip_is_a_mean(self, inputs: Any, items: Any) -> bool:
        """Whether the trainer gives num_items_in_batch to a loss that is not divided by it, and so
        takes the mean of a micro-batch for its part of the step's: the loss would be n times as
        large beside the KL term. So it is of BERT's classes, and of many a compute_loss. Asked once
        in a run of n > 1 micro-batches in a step; all ranks answer as one."""
        ranks = self.args.world_size if self.args.average_tokens_across_devices else 1
        n = self.args.gradient_accumulation_steps * ranks
        said = self.loss_is_scaled_for_ga is not None or self.compute_loss_func is not None
        if items is None or n == 1 or said or of_trl(self):
            return False
        self.model.train()  # as in a step, which may take gradients inside the loss
        one, two = (self._dip_loss_now(inputs, count) for count in (items, 2 * items))
        if not self._dip_on_any_rank(_is_times(one, two, 1)):
            return False
        warnings.warn(
            f"dipkernels: the loss of {type(self.model).__name__} is not divided by "
            f"num_items_in_batch, so the Trainer would make it {n} times as large beside the KL "
            "term; it is taken for a mean, as by trainer.model_accepts_loss_kwargs = False",
            stacklevel=3,
        )
        return True

    def _dip_is_a_sum(self, inputs: Any, items: Any) -> bool:
        """Whether the trainer's loss adds up the examples, so that m trajectories would make it m
        times as large. So does CTC's in transformers by default. Asked once; all ranks answer as
        one."""
        m, one, many = self.dip_config.m, math.nan, math.nan
        if m == 1 or of_trl(self):
            return False
        # without dropout the two differ by a factor alone; what only runs in training is asked
        # nothing, and another error comes again in the step
        with contextlib.suppress(Exception), eval_mode(self.model):
            one = self._dip_loss_now(inputs, items)
            many = self._dip_loss_now(inputs, None if items is None else items * m, m)
        if not self._dip_on_any_rank(_is_times(one, many, m)):
            if self._dip_on_any_rank(_is_another(one, many)):
                self._dip_warn_of_copies(inputs, items, one)
            return False
        warnings.warn(
            f"dipkernels: the loss of {type(self.model).__name__} is a sum over the batch; it is "
            f"divided by m = {m}, the number of trajectories. The KL term beside it is made for a "
            "mean: take one (a CTC model's config.ctc_loss_reduction = 'mean'), or a larger kl",
            stacklevel=3,
        )
        return True

    def _dip_warn_of_copies(self, inputs: Any, items: Any, loss: float) -> None:
        """Of a loss that is another where every example comes m times: it compares the examples of
        a batch, unless it draws something of its own (masks, time steps)."""
        other = math.nan
        with contextlib.suppress(Exception), eval_mode(self.model):
            other = self._dip_loss_now(inputs, items, seeded=True)
        if _is_times(loss, other, 1):
            warnings.warn(
                f"dipkernels: the loss of {type(self.model).__name__} changes where every example "
                f"comes m = {self.dip_config.m} times, so it seems to compare the examples of a "
                "batch (negatives from the batch), here with their own copies. Take "
                "DIPConfig(m=1), and key=None where the two of a pair come from two calls",
                stacklevel=4,
            )

    def _dip_loss_now(self, inputs: Any, items: Any, times: int = 1, seeded: bool = False) -> float:
        """The trainer's own loss, without noise, of a batch with every example so many times: the
        same draws each time it is asked, others where `seeded`, and no trace left."""
        run = functools.partial(super().compute_loss, self.model, num_items_in_batch=items)
        with untouched(self.model), noise_off(), self.compute_loss_context_manager():
            if seeded:
                seed_alike()
                torch.manual_seed(0)
            batch = dict(self._prepare_inputs(inputs))
            return float(on_trajectories(run, batch, times)[0].mean().item())

    def _dip_on_any_rank(self, found: bool) -> bool:
        here = torch.tensor([int(found)], device=self.args.device)
        return bool(self.accelerator.gather(here).any())

    # ---- predictions and logs

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        loss, logits, labels = super().prediction_step(
            model, inputs, prediction_loss_only, ignore_keys
        )
        config = config_of(self.model)
        if config is None or config.k == 0 or logits is None:
            return loss, logits, labels  # no logits for prediction_loss_only
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            raise ValueError(
                "k: expected 0 for predictions that are not one floating tensor of logits, got "
                f"{config.k} and {described(logits)}; set k=0, and call dip.predict in your own "
                "code"
            )
        prepared = self._prepare_inputs(inputs)
        own = {name: v for name, v in prepared.items() if name not in self.label_names}
        mean: Tensor = config.predict(model, **own)
        if config.average == "probs":
            mean = mean.clamp(min=torch.finfo(mean.dtype).tiny).log()
        elif config.average == "sigmoid":
            mean = torch.logit(mean, eps=torch.finfo(mean.dtype).eps)
        return loss, mean, labels

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        if "loss" in logs and config_of(self.model) is not None:
            logs |= metrics(self.model)
        super().log(logs, *args, **options)

    # ---- checkpoints

    def _dip_saves(self) -> bool:
        """Whether there are variances that PEFT does not save with its adapters."""
        return config_of(self.model) is not None and not is_peft(self.model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self._dip_saves():
            save(self.model, output_dir or self.args.output_dir, write=self.args.should_save)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        if self._dip_saves():
            # the plain model's: the variances are in dip.safetensors
            own = variance_tensors(self.model)
            whole = self.model.state_dict() if state_dict is None else state_dict
            state_dict = {name: value for name, value in whole.items() if name not in own}
        super()._save(output_dir, state_dict)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The trainer copies the files that it knows into the folder that it uploads.
        if config_of(self.model) is not None and self.args.should_save:
            for path in (Path(checkpoint_folder, n) for n in (CONFIG_FILE, VARIANCES_FILE)):
                if path.is_file():  # an adapter that is not "default" has a folder of its own
                    shutil.copy(path, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        target = self.model if model is None else model
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        was_plain = config_of(target) is None
        self._dip_restore(target, resume_from_checkpoint)
        if was_plain and is_peft(target):  # now each adapter with its variances
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        own = variance_tensors(self.model)  # missing to what compares names, as shards are loaded
        missing = [name for name in load_result.missing_keys if name not in own]
        self._dip_missing, load_result = set(missing), load_result._replace(missing_keys=missing)
        super()._issue_warnings_after_load(load_result)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        # DeepSpeed loads its own checkpoint, into the model that it has wrapped by then.
        unwrapped = self.model_wrapped is self.model
        if self.is_deepspeed_enabled and resume_from_checkpoint and unwrapped:
            self._dip_restore(self.model, resume_from_checkpoint)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.state.best_model_checkpoint is not None and not self.is_deepspeed_enabled:
            self._dip_restore(self.model, self.state.best_model_checkpoint)

    def _dip_restore(self, model: Any, folder: str) -> None:
        own, tied = config_of(model), getattr(model, "all_tied_weights_keys", None) or ()
        if not self.is_fsdp_enabled and self._dip_missing.difference(tied):
            load_renamed(model, folder)
        if own is None:
            folder = folder_of_adapter(model, folder)
            config = DIPConfig.load(folder)
            self._dip_check_setting(config)
            load(model, folder, self._dip_first_batches(model) if config.watches_batches else None)
            return
        if is_peft(model):  # load_adapter has set the variances
            return
        stored = DIPConfig.load(folder)
        load_variances(model, load_state(folder))
        warn_of_another(stored, own, f"the checkpoint {folder}")


class DIPTrainer(DIPMixin, transformers.Trainer):
    """transformers' Trainer with a config of DIP:
    `DIPTrainer(model, args, train_dataset=data, dip=DIPConfig())`."""


# ---- parts ---------------------------------------------------------------------------------------


def _is_times(first: float, second: float, factor: int) -> bool:
    """Whether the second is the first so many times, but for a GPU's last bits; not where that is
    infinite, as a first loss may be in 16 bits."""
    known = math.isfinite(first) and first != 0
    return known and math.isclose(second, factor * first, rel_tol=1e-3)


def _is_another(first: float, second: float) -> bool:
    """Whether two losses differ by more than rounding to 16 bits explains."""
    known = math.isfinite(first) and math.isfinite(second)
    return known and not math.isclose(first, second, rel_tol=0.02)


def _logits(outputs: Any) -> Tensor:
    found = logits_of(outputs)
    if not isinstance(found, Tensor) or not found.requires_grad:
        raise ValueError(
            "lambda_s: expected logits that the trainer's loss is made of, got none (a fused "
            "loss); set lambda_s=0"
        )
    return found
