"""Distributional input projection layers (DIPNet, arXiv 2506.04690) at the cost of the plain layer."""

__version__ = "0.1.0"

from . import functional, reference
from .backends import backend
from .convert import DIPConversionWarning, calibrate, convert, param_groups, summary, to_plain
from .env_report import env_report
from .layers import DIPConv2d, DIPInput, DIPLinear, Variance, number_layers
from .objective import objective, penalty
from .seeds import fixed_noise, noise_off
from .trajectories import predict, trajectories

__all__ = [
    "DIPConv2d",
    "DIPConversionWarning",
    "DIPInput",
    "DIPLinear",
    "Variance",
    "backend",
    "calibrate",
    "convert",
    "env_report",
    "fixed_noise",
    "functional",
    "noise_off",
    "number_layers",
    "objective",
    "param_groups",
    "penalty",
    "predict",
    "reference",
    "summary",
    "to_plain",
    "trajectories",
]
