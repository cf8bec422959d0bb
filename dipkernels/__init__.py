"""Learned noise at the input of every layer (distributional input projection, DIPNet, arXiv 2506.04690), by fused kernels."""

__version__ = "0.1.0"

import os.path as _path

if not _path.isdir(_path.join(__path__[0], "triton_kernels")):  # a source tree, where that folder lies beside this one
    __path__.append(_path.dirname(__path__[0]))

from . import diagnostics, functional, reference
from .backends import backend
from .config import DIPConfig, apply, config_of, load, save
from .distributed import check_ranks, parallelize_module, shard_variances
from .env_report import env_report
from .models.calibrate import calibrate
from .models.check import check
from .models.convert import DIPConversionWarning, convert, producer_plan, to_plain
from .models.parameters import load_variances, param_groups, variances
from .models.summary import summary
from .nn.activation import DIPActivation, DIPGatedActivation
from .nn.attention import DIPMultiheadAttention
from .nn.conv import DIPConv1d, DIPConv2d, DIPConv3d
from .nn.input import DIPInput
from .nn.linear import DIPLinear
from .nn.norm import DIPLayerNorm, DIPRMSNorm
from .nn.numbering import number_layers
from .nn.variance import Variance
from .noise.contexts import fixed_noise, noise_off, sampling_on
from .reports import metrics, plot, progress
from .training.certify import Certificate, certify
from .training.objective import kl_penalty, objective, penalty
from .training.predict import predict
from .training.trajectories import trajectories
from .training.tune import Tuned, tune

__all__ = [
    "Certificate",
    "DIPActivation",
    "DIPConfig",
    "DIPConv1d",
    "DIPConv2d",
    "DIPConv3d",
    "DIPConversionWarning",
    "DIPGatedActivation",
    "DIPInput",
    "DIPLayerNorm",
    "DIPLinear",
    "DIPMultiheadAttention",
    "DIPRMSNorm",
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
    "producer_plan",
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
