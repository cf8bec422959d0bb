"""A whole DIP training in one value with a JSON form, `DIPConfig`; and `apply`, `save` and `load`
of a model. docs/guides/trainers.md."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import integer, one_of, real
from .models.calibrate import PERS, amounts, calibrate
from .models.convert import PLACES, convert, unchanged_by_errors
from .models.convertible import TWINS, base_layer, is_adapter, of_peft
from .models.marks import CONFIG
from .models.parameters import load_variances, variances
from .models.patterns import Patterns, around, shared_groups, strings
from .models.probe import listed
from .nn.layer import DIPLayer
from .nn.numbering import Model, dip_layers, require_module
from .nn.wrappers import inmost, plain_names
from .noise.contexts import fixed_noise
from .training.objective import KL, objective
from .training.predict import check_average, predict
from .training.trajectories import trajectories
from .worlds import has_ranks

VERSION = 1  # of dip_config.json
UNCALIBRATED = 0.01  # every variance until `calibrate` sets it
CONFIG_FILE, VARIANCES_FILE = "dip_config.json", "dip.safetensors"
_TYPES = {kind.__name__: kind for kind in TWINS}


@dataclass(frozen=True, kw_only=True)
class DIPConfig:
    """A whole training in one value: what to convert, how much noise, the objective, the prediction
    and the noise's key. The defaults are the recipe.

    Args:
        types: Names of some of the classes that `convert` takes, such as ("Linear",).
        include: Name patterns. If there are any, only layers are converted whose name, or the name
            of a module around them, matches.
        exclude: Name patterns, as `convert`'s.
        before: Patterns, or {pattern: feature dimension}, as `convert`'s.
        place: "input" or "producer", as `convert`'s: where the noise is drawn.
        share: Groups of patterns, as `convert`'s.
        ratio: Sigma over spread, as for `calibrate`: a number, {pattern: number} or None.
        init_variance: Instead of ratio: sigma^2 itself, > 0, or {pattern: sigma^2}. Then nothing is
            calibrated.
        per: "layer" or "feature", as `calibrate`'s.
        start: Sigma at the start over its prior's, > 0, as `calibrate`'s.
        m: Trajectories in a training step, >= 1. Time and the memory of activations grow m times.
        kl: Weight of the KL term, >= 0, as `objective`'s.
        lambda_s: Weight of the smoothness term, >= 0; above 0 it needs m >= 2.
        k: Number of passes of a prediction, >= 0; 0 is the plain network.
        average: What a prediction averages: "probs", "sigmoid" or "logits".
        key: The key of the noise in training: step i takes key + i. None draws from torch's
            generator. Use None for a network that calls one layer several times in a pass (a
            recurrent cell) or maps over its batch (torch.vmap): under a key the layer repeats its
            noise in each call.

    Raises:
        ValueError, TypeError: A value outside these, which the message names.

    Examples:
        >>> config = dip.DIPConfig(exclude=["head"], ratio=0.5, m=4)
        >>> dip.DIPConfig.from_dict(config.to_dict()) == config
        True
    """

    types: Sequence[str] = ("Linear", "Conv1d", "Conv2d", "Conv3d", "MultiheadAttention")
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    before: Sequence[str] | Mapping[str, int] = ()
    place: str = "input"
    share: Sequence[Sequence[str]] = ()
    ratio: float | Mapping[str, float] | None = None
    init_variance: float | Mapping[str, float] | None = None
    per: str = "layer"
    start: float | None = None
    m: int = 2
    kl: float = KL
    lambda_s: float = 0.0
    k: int = 0
    average: str = "probs"
    key: int | None = 0

    def __post_init__(self) -> None:
        of_names = ("types", "include", "exclude", "before")
        kept: dict[str, Any] = {name: strings(name, getattr(self, name)) for name in of_names}
        if isinstance(self.before, Mapping):
            kept["before"] = {p: integer(f"before[{p!r}]", d) for p, d in self.before.items()}
        kept["share"] = shared_groups(self.share)
        kept |= {name: amounts(name, getattr(self, name)) for name in ("ratio", "init_variance")}
        kept |= {"m": integer("m", self.m, 1), "k": integer("k", self.k, 0)}
        for name in ("kl", "lambda_s"):
            kept[name] = float(real(name, getattr(self, name), least=0))
        if self.start is not None:
            kept["start"] = float(real("start", self.start, above=0))
        if self.key is not None:
            kept["key"] = integer("key", self.key, other=" or None")
        for name, value in kept.items():
            object.__setattr__(self, name, value)
        unknown = [name for name in self.types if name not in _TYPES]
        if unknown or not self.types:
            raise ValueError(
                f"types: expected names of some of {list(_TYPES)}, got {list(self.types)}"
            )
        one_of("place", self.place, PLACES)
        one_of("per", self.per, PERS)
        check_average(self.average, None)
        for name, plain in (("ratio", None), ("start", None), ("per", "layer")):
            if self.init_variance is not None and getattr(self, name) != plain:
                raise ValueError(
                    f"{name}: expected {plain!r} with init_variance, which is not calibrated, "
                    f"got {getattr(self, name)!r}"
                )
        if self.lambda_s > 0 and self.m < 2:
            raise ValueError(
                "lambda_s: expected 0 with m = 1, because one trajectory has no variance, got "
                f"{self.lambda_s}"
            )

    @property
    def watches_batches(self) -> bool:
        """Whether `convert` needs to run batches."""
        return bool(self.before) or self.place == "producer"

    # ---- JSON

    def to_dict(self) -> dict[str, Any]:
        """The fields and the version of their form, as JSON takes them."""
        return {"version": VERSION, **json.loads(json.dumps(dataclasses.asdict(self)))}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DIPConfig:
        """The config that `to_dict` gave. Missing fields have their defaults.

        Raises:
            ValueError, TypeError: Another version, keys that this release does not know, or values
                that it does not take.
        """
        if not isinstance(data, Mapping):
            raise TypeError(
                f"data: expected a mapping, such as to_dict gives, got {type(data).__name__}"
            )
        if data.get("version") != VERSION:
            way = (
                "read it with the release that wrote it"
                if "version" in data
                else "for fields written by hand take DIPConfig(**data)"
            )
            raise ValueError(
                f"version: expected {VERSION}, which this release of dipkernels reads, got "
                f"{data.get('version')!r}; {way}"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(data.keys() - known - {"version"})
        if unknown:
            raise ValueError(f"data: expected keys among {sorted(known)}, got unknown {unknown}")
        return cls(**{name: value for name, value in data.items() if name != "version"})

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write dip_config.json into the folder, which is made if it is missing."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        _replace(Path(folder, CONFIG_FILE), lambda new: new.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> DIPConfig:
        """The config that `save` wrote into the folder.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is not JSON, or as for `from_dict`.
        """
        path = _saved(folder, CONFIG_FILE)
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error

    # ---- what a training loop calls

    def noise(
        self, step: int, row0: int = 0, entries: int = 0
    ) -> contextlib.AbstractContextManager[object]:
        """The noise of a training step: `fixed_noise(key + step, row0, entries)`; no effect if key
        is None.

        Args:
            step: The optimiser step, >= 0; another number for each step, otherwise steps share
                noise.
            row0: Index of this process's first example in the global batch, times m.
            entries: Number of this process's examples, times m, as `fixed_noise`'s.
        """
        if self.key is None:
            return contextlib.nullcontext()
        return fixed_noise(self.key + integer("step", step, 0), row0, entries)

    def trajectories(self, model: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`dip.trajectories` with m: [m, B, ...]."""
        return trajectories(model, *args, m=self.m, **kwargs)

    def objective(
        self, out: Tensor, target: Any, loss_fn: Callable[[Tensor, Any], Tensor], model: nn.Module
    ) -> Tensor:
        """`dip.objective` with kl and lambda_s: a scalar."""
        return objective(out, target, loss_fn, model, kl=self.kl, lambda_s=self.lambda_s)

    def predict(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """`dip.predict` with k and average: [B, ...]."""
        return predict(model, *args, **{"k": self.k, "average": self.average, **kwargs})


# ---- a model -------------------------------------------------------------------------------------


def apply(model: Model, config: DIPConfig, batches: Iterable[Any] | None = None) -> Model:
    """Convert the model in place and set its variances, as the config says. The model remembers the
    config.

    This calls `convert`, then `calibrate` unless the config has an init_variance. From then on a
    PEFT model saves and loads its variances with each adapter (docs/guides/trainers.md).

    Args:
        model: A model without DIP layers. Call this after `get_peft_model`, before you make an
            optimiser, and before DDP or FSDP wraps the model.
        config: What to do.
        batches: The same as for `calibrate`. Needed unless the config sets `init_variance`, and
            for `before` and place="producer".

    Returns:
        The model.

    Raises:
        TypeError: The config is no DIPConfig.
        ValueError: The model has DIP layers already, batches are needed and missing, or an adapter
            was put around DIP layers; also what `convert` and `calibrate` raise. The model stays
            plain.

    Examples:
        >>> batches = [torch.randn(64, 4)]
        >>> model = dip.apply(nn.Sequential(nn.Linear(4, 2)), dip.DIPConfig(ratio=0.5), batches)
        >>> type(model[0]).__name__
        'DIPLinear'
    """
    if not isinstance(config, DIPConfig):
        raise TypeError(f"config: expected a DIPConfig, got {type(config).__name__}")
    require_order(model)
    if dip_layers(model):
        raise ValueError(
            "model: expected one without DIP layers, got some; call dip.to_plain(model) first, or "
            "dip.load"
        )
    if batches is not None:
        batches = listed(batches)
    elif config.init_variance is None:
        raise ValueError(
            "batches: expected some, because ratio measures the inputs on them, got None; or set "
            "init_variance=... in the config"
        )
    with unchanged_by_errors(model):
        convert_as(model, config, batches)
        calibrate_as(model, config, batches or ())
    return model


def convert_as(model: nn.Module, config: DIPConfig, batches: Iterable[Any] | None = None) -> None:
    """The first half of `apply`: what the model remembers, too."""
    require_order(model)
    names = plain_names(model)
    include = Patterns("include", config.include)
    include.all(*names)
    include.require_used(names)
    options: dict[str, Any] = {"batches": batches} if config.watches_batches else {}
    if config.include:
        options["filter"] = lambda module, name: bool(include.all(*around(name)))
    convert(
        model,
        UNCALIBRATED if config.init_variance is None else config.init_variance,
        types=[_TYPES[name] for name in config.types],
        exclude=config.exclude,
        share=config.share,
        before=config.before,
        place=config.place,
        **options,
    )
    remember_config(model, config)


def calibrate_as(model: nn.Module, config: DIPConfig, batches: Iterable[Any]) -> None:
    """The second half of `apply`: set variances and priors by the ratio; nothing where the config
    has an init_variance."""
    if config.init_variance is None:
        calibrate(model, batches, config.ratio, per=config.per, start=config.start)


def config_of(model: nn.Module) -> DIPConfig | None:
    """The config that was applied to the model, or to what it wraps.

    Args:
        model: Any module.

    Returns:
        The config; None if there is none, or if no DIP layer is left.

    Raises:
        ValueError: Its parts have configs that differ.

    Examples:
        >>> model = dip.apply(nn.Sequential(nn.Linear(4, 2)), dip.DIPConfig(init_variance=0.04))
        >>> dip.config_of(model).init_variance
        0.04
    """
    require_module(model)
    found: dict[str, DIPConfig] = {}
    for name, module in plain_names(model).items():
        config = vars(module).get(CONFIG)
        if isinstance(config, DIPConfig) and dip_layers(module):
            found[name] = config
    first = next(iter(found.values()), None)
    if any(config != first for config in found.values()):
        raise ValueError(
            f"model: expected one config for all of it, got several that differ, of {list(found)}; "
            "apply one to the whole after dip.to_plain, or train and save each part by itself"
        )
    return first


def require_config(model: nn.Module) -> DIPConfig:
    """`config_of` the model. Raises ValueError where it has none."""
    config = config_of(model)
    if config is None:
        raise ValueError(
            "model: expected one that dip.apply has converted, got one without a config. Save it "
            "by torch.save(model.state_dict(), path), or convert by dip.apply(model, "
            "dip.DIPConfig(), batches)"
        )
    return config


def require_order(model: nn.Module) -> None:
    """Raise ValueError where an adapter was put around DIP layers, which freezes their
    variances."""
    require_module(model)
    around_dip = [
        name
        for name, m in plain_names(model).items()
        if is_adapter(m) and not isinstance(m, DIPLayer) and isinstance(base_layer(m), DIPLayer)
    ]
    if around_dip:
        raise ValueError(
            f"model: expected get_peft_model before dip.apply, got {len(around_dip)} adapter(s) "
            f"around DIP layers, such as {around_dip[0]!r}, whose variances PEFT froze; call "
            "get_peft_model with the plain model, and dip.apply afterwards; or call "
            "dip.convert(model), which moves the noise to the adapters"
        )


def remember_config(model: nn.Module, config: DIPConfig) -> None:
    """From now on `config_of` the model is this one, in whatever it is wrapped, and of its parts
    that had another; a model of PEFT carries its variances with its adapters."""
    model = inmost(model)
    for module in model.modules():
        if module is model or CONFIG in vars(module):
            vars(module)[CONFIG] = config
    if is_peft(model):
        from .integrations.peft import keep_variances

        keep_variances(model)


def is_peft(model: nn.Module) -> bool:
    """Whether PEFT's own class is around the model."""
    return of_peft(model, "PeftModel")


# ---- a folder ------------------------------------------------------------------------------------


def save(model: nn.Module, folder: str | os.PathLike[str], *, write: bool | None = None) -> None:
    """Write dip_config.json and dip.safetensors (variances, priors) into a folder, beside the files
    that a framework saves there.

    Args:
        model: A model that `apply` or `load` has converted, wrapped or not. If it is sharded, every
            rank must call this.
        folder: It is made if it is missing.
        write: Whether this process writes. By default the first rank does, or the only process.

    Raises:
        ValueError: The model has no config, or a variance is not finite.
        ImportError: safetensors is missing.

    Examples:
        >>> model = dip.apply(nn.Sequential(nn.Linear(4, 2)), dip.DIPConfig(init_variance=0.04))
        >>> dip.save(model, folder)
        >>> sorted(os.listdir(folder))
        ['dip.safetensors', 'dip_config.json']
    """
    config = require_config(model)
    require_order(model)
    save_state(config, variances(model), folder, write)


def save_state(
    config: DIPConfig,
    state: Mapping[str, Tensor],
    folder: str | os.PathLike[str],
    write: bool | None = None,
) -> None:
    """The files of `save` from what `variances` gave."""
    tensors = _safetensors()
    if write is None:
        write = not has_ranks() or torch.distributed.get_rank() == 0
    if write:
        data = {name: values.contiguous() for name, values in state.items()}
        _replace(
            Path(folder, VARIANCES_FILE),
            lambda new: tensors.save_file(data, new, metadata={"format": "pt"}),
        )
        config.save(folder)


def load(
    model: Model, folder: str | os.PathLike[str], batches: Iterable[Any] | None = None
) -> Model:
    """Convert the model as the config in the folder says, unless it is converted already, and set
    its variances and priors.

    Args:
        model: A plain model with its weights loaded, or one with the same DIP layers.
        folder: A folder that `save` wrote.
        batches: As for `convert`; needed for a plain model whose config has `before` or
            place="producer".

    Returns:
        The model, which remembers the config.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: Another version, unknown keys, or variances of other layers or shapes. A plain
            model stays plain.
        ImportError: safetensors is missing.

    Examples:
        >>> model = dip.apply(nn.Sequential(nn.Linear(4, 2)), dip.DIPConfig(init_variance=0.04))
        >>> dip.save(model, folder)
        >>> again = dip.load(nn.Sequential(nn.Linear(4, 2)), folder)
        >>> torch.equal(again[0].log_variance, model[0].log_variance)
        True
    """
    config, state = DIPConfig.load(folder), load_state(folder)
    with unchanged_by_errors(model):
        if not dip_layers(model):
            convert_as(model, config, batches)
        require_order(model)
        try:
            load_variances(model, without_prompt_encoder(model, state))
        except ValueError as error:
            raise ValueError(
                f"{Path(folder, VARIANCES_FILE)}: {error}. If a part of the model was converted by "
                "itself, convert that part of this one as then, and load again"
            ) from error
        remember_config(model, config)
    return model


def load_state(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The variances and priors in the folder, by name. Raises FileNotFoundError or ValueError."""
    path = _saved(folder, VARIANCES_FILE)
    tensors = _safetensors()
    try:
        return tensors.load_file(path)
    except Exception as error:  # of safetensors' own class
        raise ValueError(
            f"{path}: expected a file of safetensors, got one that it cannot read: {error}"
        ) from error


def without_prompt_encoder(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state without the layers of PEFT's prompt encoder, where the model has none: a prompt
    that is loaded for prediction has been computed already."""
    encoder = "prompt_encoder."
    if not is_peft(model) or any(name.startswith(encoder) for name in dip_layers(model)):
        return state
    return {name: values for name, values in state.items() if not name.startswith(encoder)}


def _saved(folder: str | os.PathLike[str], name: str) -> Path:
    """The file of this name. Raises FileNotFoundError where there is none."""
    path = Path(folder, name)
    if not path.is_file():
        raise FileNotFoundError(
            f"folder: expected a {name}, which dip.save writes, got none in {folder}; a model that "
            "was saved without it: convert it as before, then load_variances"
        )
    return path


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"{VARIANCES_FILE} needs safetensors: pip install safetensors") from error
    return safetensors.torch


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """The file is the old one or the whole new one; its folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    write(new)
    os.replace(new, path)
