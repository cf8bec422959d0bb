"""Distributional input projection layers (DIPNet, arXiv 2506.04690) at the cost of the plain layer."""

__version__ = "0.1.0"

import os.path as _path

if not _path.isdir(_path.join(__path__[0], "triton_kernels")):  # a source tree, where that folder lies beside this one
    __path__.append(_path.dirname(__path__[0]))

from . import diagnostics, functional, reference
from .attention import DIPMultiheadAttention
from .backends import backend
from .certify import Certificate, certify
from .check import check
from .config import DIPConfig, apply, config_of, load, save
from .convert import (
    DIPConversionWarning,
    calibrate,
    convert,
    load_variances,
    param_groups,
    summary,
    to_plain,
    variances,
)
from .distributed import check_ranks, parallelize_module, shard_variances
from .env_report import env_report
from .layers import DIPConv1d, DIPConv2d, DIPConv3d, DIPInput, DIPLinear, Variance, number_layers
from .objective import kl_penalty, objective, penalty
from .reports import metrics, plot, progress
from .seeds import fixed_noise, noise_off, sampling_on
from .trajectories import predict, trajectories
from .tune import Tuned, tune

__all__ = [
    "Certificate",
    "DIPConfig",
    "DIPConv1d",
    "DIPConv2d",
    "DIPConv3d",
    "DIPConversionWarning",
    "DIPInput",
    "DIPLinear",
    "DIPMultiheadAttention",
    "Tuned",
    "Variance",
    "apply",
    "backend",
    "calibrate",
    "certify",
    "check",
    "check_ranks",
    "config_of",
    "convert",
    "diagnostics",
    "env_report",
    "fixed_noise",
    "functional",
    "kl_penalty",
    "load",
    "load_variances",
    "metrics",
    "noise_off",
    "number_layers",
    "objective",
    "parallelize_module",
    "param_groups",
    "penalty",
    "plot",
    "predict",
    "progress",
    "reference",
    "sampling_on",
    "save",
    "shard_variances",
    "summary",
    "to_plain",
    "trajectories",
    "tune",
    "variances",
]
