"""Learned noise at the input of every layer (distributional input projection, DIPNet, arXiv
2506.04690), by fused kernels.

First convert, calibrate and param_groups; in each step trajectories and objective; then predict,
summary and check. README.md and docs/quickstart.md show a whole training."""

__version__ = "0.1.0"

import importlib as _importlib
import os.path as _path
import typing as _typing

# a source tree, where that folder lies beside this one
if not _path.isdir(_path.join(__path__[0], "triton_kernels")):
    __path__.append(_path.dirname(__path__[0]))

from . import functional as functional
from .backends import backend as backend
from .env_report import env_report as env_report

# What is imported at its first use, by module: the operations are needed at once, much else never.
_HOMES = {
    "config": ("DIPConfig", "apply", "config_of", "load", "save"),
    "distributed": ("check_ranks", "parallelize_module", "shard_variances"),
    "models.calibrate": ("calibrate",),
    "models.check": ("check",),
    "models.convert": ("DIPConversionWarning", "convert", "producer_plan", "to_plain"),
    "models.parameters": ("load_variances", "param_groups", "variances"),
    "models.summary": ("summary",),
    "nn.activation": ("DIPActivation", "DIPGatedActivation"),
    "nn.attention": ("DIPMultiheadAttention",),
    "nn.conv": ("DIPConv1d", "DIPConv2d", "DIPConv3d"),
    "nn.input": ("DIPInput",),
    "nn.linear": ("DIPLinear",),
    "nn.norm": ("DIPLayerNorm", "DIPRMSNorm"),
    "nn.numbering": ("number_layers",),
    "nn.variance": ("Variance",),
    "noise.contexts": ("fixed_noise", "noise_off", "sampling_on"),
    "reports": ("metrics", "plot", "progress"),
    "training.certify": ("certify",),
    "training.objective": ("energy_score", "kl_penalty", "objective", "penalty"),
    "training.predict": ("predict",),
    "training.trajectories": ("trajectories",),
    "training.tune": ("tune",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted([*_HOME, "backend", "diagnostics", "env_report", "functional"])

if _typing.TYPE_CHECKING:
    from . import diagnostics as diagnostics
    from .config import DIPConfig as DIPConfig
    from .config import apply as apply
    from .config import config_of as config_of
    from .config import load as load
    from .config import save as save
    from .distributed import check_ranks as check_ranks
    from .distributed import parallelize_module as parallelize_module
    from .distributed import shard_variances as shard_variances
    from .models.calibrate import calibrate as calibrate
    from .models.check import check as check
    from .models.convert import DIPConversionWarning as DIPConversionWarning
    from .models.convert import convert as convert
    from .models.convert import producer_plan as producer_plan
    from .models.convert import to_plain as to_plain
    from .models.parameters import load_variances as load_variances
    from .models.parameters import param_groups as param_groups
    from .models.parameters import variances as variances
    from .models.summary import summary as summary
    from .nn.activation import DIPActivation as DIPActivation
    from .nn.activation import DIPGatedActivation as DIPGatedActivation
    from .nn.attention import DIPMultiheadAttention as DIPMultiheadAttention
    from .nn.conv import DIPConv1d as DIPConv1d
    from .nn.conv import DIPConv2d as DIPConv2d
    from .nn.conv import DIPConv3d as DIPConv3d
    from .nn.input import DIPInput as DIPInput
    from .nn.linear import DIPLinear as DIPLinear
    from .nn.norm import DIPLayerNorm as DIPLayerNorm
    from .nn.norm import DIPRMSNorm as DIPRMSNorm
    from .nn.numbering import number_layers as number_layers
    from .nn.variance import Variance as Variance
    from .noise.contexts import fixed_noise as fixed_noise
    from .noise.contexts import noise_off as noise_off
    from .noise.contexts import sampling_on as sampling_on
    from .reports import metrics as metrics
    from .reports import plot as plot
    from .reports import progress as progress
    from .training.certify import certify as certify
    from .training.objective import energy_score as energy_score
    from .training.objective import kl_penalty as kl_penalty
    from .training.objective import objective as objective
    from .training.objective import penalty as penalty
    from .training.predict import predict as predict
    from .training.trajectories import trajectories as trajectories
    from .training.tune import tune as tune

else:  # a type checker would take any name for one of this module

    def __getattr__(name: str) -> _typing.Any:
        if name == "diagnostics":
            return _importlib.import_module(f"{__name__}.diagnostics")
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(_importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value  # found without this function from now on
        return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]  # nothing else is for users
