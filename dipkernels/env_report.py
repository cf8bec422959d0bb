"""What is installed, what the compiled library carries, and which kernels would run."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import platform
from collections.abc import Callable

import torch

from . import backends, library

# What the build reads, and Triton's own code at the first call on a GPU; backends reads the others.
_VALUES = dict.fromkeys(("DIPKERNELS_AUTOTUNE", "DIPKERNELS_CPU", "DIPKERNELS_CUDA"), ("0", "1"))
# All that docs/environment.md has, without DIPKERNELS_; and what the tests and checks here set.
_KNOWN = ("CPU", "CUDA", "CUDA_ARCHS", "BACKEND", "COMPILED_KEEP", "CPU_CAPABILITY", "AUTOTUNE")
_OURS = ("TEST_SEED", "TEST_ORDER", "GPU_CHECK")
_VARIABLES = ("TRITON_INTERPRET", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


class EnvReport(dict[str, object]):
    """A dict that prints as lines of "name: value"."""

    def __str__(self) -> str:
        width = max(len(name) for name in self)
        return "\n".join(f"{name:{width}}  {_text(value)}" for name, value in self.items())


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}={v}" for k, v in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _or_error(ask: Callable[[], object]) -> object:
    """The answer, or the error in words: a report on a broken installation must still print."""
    try:
        return ask()
    except (RuntimeError, OSError, ValueError, AttributeError, ImportError) as error:
        return f"{type(error).__name__}: {error}"


def _library() -> dict[str, object]:
    found = library.load()
    report: dict[str, object] = {
        "library": f"{found.path}" if found.loaded else f"not loaded: {found.error}"
    }
    if found.loaded:
        report["compiler"] = found.compiler or "unknown"
        report["CPU instruction sets"] = found.cpu_capabilities
        report["CPU instruction set in use"] = _or_error(library.cpu_capability)
        report["CUDA architectures"] = found.cuda_archs
        report["CUDA toolkit"] = found.cuda_toolkit or "none"
    return report


def _bad_variables() -> list[str]:
    """What is wrong with the names and values of this package's variables."""
    problems = list(backends.bad_variables.values())
    for name, values in _VALUES.items():
        if (value := os.environ.get(name)) and value not in values:
            problems.append(f"{name}: expected one of {values}, got {value!r}")
    for name in sorted(os.environ):
        if (
            name.startswith("DIPKERNELS_")
            and name.removeprefix("DIPKERNELS_") not in _KNOWN + _OURS
        ):
            problems.append(f"{name}: expected DIPKERNELS_ and one of {_KNOWN}; nothing reads it")
    return problems


def _triton() -> str:
    """Its version, and why it does not load where it is installed and does not."""
    version = _version("triton")
    try:
        # its package has other names too
        return str(importlib.import_module("triton").__version__)
    except Exception as error:
        if version != "not installed":
            return f"{version}, which does not load: {type(error).__name__}: {error}"
    return version


def _kernels(op: str, device: str) -> object:
    plan = _or_error(functools.partial(backends.choose, op, device))
    return f"{plan.backend} ({plan.why})" if isinstance(plan, backends.Plan) else plan


def env_report() -> EnvReport:
    """Versions, the compiled library and what it carries, each device's backend, threads,
    environment variables.

    `python -m dipkernels` prints it. Raises nothing: what cannot be found out is said in words.

    Returns:
        A dict that prints as a table.

    Examples:
        >>> "torch" in dip.env_report()
        True
    """
    from . import __version__

    report = EnvReport(
        {
            "dipkernels": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _or_error(_triton),
            "numpy": _version("numpy"),
            "platform": f"{platform.system()} {platform.machine()}",
        }
    )
    compiled = _or_error(_library)
    report.update(compiled if isinstance(compiled, dict) else {"library": compiled})
    for device in ("cpu", "cuda"):
        if device == "cuda" and not torch.cuda.is_available():
            cuda = torch.version.cuda
            built = f" that torch, built for CUDA {cuda}, can use" if cuda else ""
            report["kernels on cuda"] = f"no CUDA device{built}"
            continue
        if device == "cuda":
            _or_error(backends.check_cuda)
        report[f"kernels on {device}"] = kernels = _kernels("perturb", device)
        for op in ("linear", "expectation"):  # where they run elsewhere
            if (others := _kernels(op, device)) != kernels:
                report[f"{op} on {device}"] = others
    if torch.cuda.is_available():
        report["CUDA devices"] = [
            torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
        ]
    if problems := _bad_variables():
        report["bad variables"] = problems
    if backends.triton_problems:
        report["triton problems"] = list(backends.triton_problems.values())
    report["threads"] = torch.get_num_threads()
    names = sorted(
        {name for name in os.environ if name.startswith("DIPKERNELS_")}
        | {n for n in _VARIABLES if n in os.environ}
    )
    report["environment"] = {name: os.environ[name] for name in names}
    return report
