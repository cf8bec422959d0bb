"""Which kernels run: `choose` is pure and printable; `backend` and DIPKERNELS_BACKEND override it.

If a backend is forced and cannot run, the first call that needs it raises an error. The import
raises none.

- cpu: the compiled library's CPU kernels (AVX-512, AVX2 or portable, by DIPKERNELS_CPU_CAPABILITY
  or the machine)
- cuda: the compiled library's CUDA kernels
- triton: the Triton kernels
- reference: plain PyTorch in float64; slow, runs everywhere
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import gpus, library
from .arguments import one_of

NAMES = ("cpu", "cuda", "triton", "reference")


@dataclass(frozen=True)
class Plan:
    """What runs one operation, and why."""

    backend: str
    why: str


# ---- the GPUs at hand ----------------------------------------------------------------------------

# why the library's CUDA kernels cannot run here, once torch has initialised CUDA
_cuda_problem: str | None = None


def check_cuda() -> str | None:
    """Look whether the library's CUDA kernels can run on the visible GPUs; say so and fall back
    where they cannot.

    Returns the problem in one line, or None. Never raises.
    """
    global _cuda_problem
    if not library.load().cuda_archs:
        return None
    try:
        problem = gpus.problem(library.load())
    except (RuntimeError, AssertionError, OSError):
        return None  # torch's own error comes when the device is used
    if problem != _cuda_problem:
        _cuda_problem = problem
        _tell_listeners()
        if problem:
            warnings.warn(
                f"dipkernels: {choose('perturb', 'cuda').backend} runs on CUDA tensors: {problem}",
                RuntimeWarning,
                stacklevel=2,
            )
    return problem


def watch_cuda() -> None:
    """Have `check_cuda` called when torch initialises CUDA: at import nothing may touch a GPU.
    `ops` calls this once."""
    if library.load().cuda_archs:
        torch.cuda._lazy_call(check_cuda)


_INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


triton_problems: dict[str, str] = {}  # operation: why Triton cannot compile it here


def note_triton_problem(op: str, error: Exception) -> None:
    """Remember and report a kernel that this Triton cannot compile; re-raise any other error, or
    where Triton was asked for."""
    # Triton's own errors, and what its passes and ptxas throw; and those of the C compiler, which
    # compiles the part that launches: none is there, or no Python.h.
    is_compilation = type(error).__name__ in (
        "CompilationError",
        "CompileTimeAssertionFailure",
        "UnsupportedLanguageConstruct",
        "PTXASError",
        "OutOfResources",
        "CalledProcessError",
    ) or (
        isinstance(error, RuntimeError)
        and any(words in str(error) for words in ("PassManager", "C compiler"))
    )
    if not is_compilation:
        raise error
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    import triton  # for its version: its package has other names too, such as pytorch-triton

    problem = f"Triton {triton.__version__} cannot compile {op}: {said}"
    if forced == "triton":
        raise RuntimeError(f"{op}: backend 'triton' was asked for, and {problem}") from error
    triton_problems[op] = problem
    _tell_listeners()
    warnings.warn(
        f"dipkernels: {problem}; another backend runs instead", RuntimeWarning, stacklevel=2
    )


forced: str | None = None
_by_variable = False  # whether DIPKERNELS_BACKEND forced it
bad_variables: dict[str, str] = {}  # by name, what is wrong with its value: the first call says it
# called when a choice may change: `ops` keeps a table of what was chosen
listeners: list[Callable[[], None]] = []


def _tell_listeners() -> None:
    for listener in listeners:
        listener()


def _check_name(name: str, source: str) -> str | None:
    return None if one_of(source, name, (*NAMES, "auto")) == "auto" else name


def _force(name: str | None, by_variable: bool = False) -> None:
    global forced, _by_variable
    forced, _by_variable = name, by_variable
    _tell_listeners()


def _variable(name: str, check: Callable[[str, str], Any], otherwise: str) -> Any:
    """What check(value, name) makes of a variable at import; empty as unset. A bad value is kept
    for the first call."""
    try:
        return check(os.environ.get(name) or otherwise, name)
    except ValueError as error:
        bad_variables[name] = str(error)
        return check(otherwise, name)


class backend:
    """Force one backend for every operation that follows, or, as a context, for a block.

    Process-wide, not per thread.

    Args:
        name: "cpu", "cuda", "triton" or "reference"; or "auto": each device chooses again.

    Raises:
        ValueError: Another name.
        RuntimeError: That backend is missing: here, or at the first call.

    Examples:
        >>> layer, x = dip.DIPLinear(4, 2), torch.randn(8, 4)
        >>> with dip.backend("reference"):
        ...     y = layer(x)
    """

    def __init__(self, name: str) -> None:
        self._previous = forced, _by_variable
        wanted = _check_name(name, "backend")
        if wanted is not None and (missing := _missing(wanted)):
            raise RuntimeError(f"backend: {name!r} was asked for, but {missing}")
        bad_variables.pop("DIPKERNELS_BACKEND", None)
        _force(wanted)

    def __enter__(self) -> backend:
        return self

    def __exit__(self, *exc: object) -> None:
        _force(*self._previous)


class compiled_keep:
    """Set what keep="auto" means under torch.compile, for what follows or, as a context, for a
    block.

    It is read while torch.compile traces, so a change compiles anew. It holds for all threads.

    Args:
        keep: "x" or "u" (see functional.dip_linear); or "bytes": "u" if u's numbers are narrower
            than x's, as under autocast, otherwise "x".

    Raises:
        ValueError: Another value.

    Examples:
        >>> from dipkernels import backends
        >>> with backends.compiled_keep("u"):  # compile and train inside
        ...     backends.kept_when_compiled
        'u'
    """

    def __init__(self, keep: str) -> None:
        self._previous = kept_when_compiled
        self._set(_check_keep(keep, "keep"))

    def _set(self, keep: str) -> None:
        global kept_when_compiled
        kept_when_compiled = keep
        if bad_variables.pop("DIPKERNELS_COMPILED_KEEP", None):
            _tell_listeners()

    def __enter__(self) -> compiled_keep:
        return self

    def __exit__(self, *exc: object) -> None:
        self._set(self._previous)


def _check_keep(keep: str, source: str) -> str:
    return one_of(source, keep, ("x", "u", "bytes"))


_force(_variable("DIPKERNELS_BACKEND", _check_name, "auto"), by_variable=True)
kept_when_compiled: str = _variable("DIPKERNELS_COMPILED_KEEP", _check_keep, "x")


def warn_reference() -> None:
    """Say that a CPU has the slow path alone, where nobody asked for it. `ops` does so when it is
    imported: once."""
    if forced is None and not bad_variables:
        plan = choose("perturb", "cpu")
        if plan.backend == "reference":
            warnings.warn(
                f"dipkernels: the slow reference path runs: {plan.why}",
                RuntimeWarning,
                stacklevel=2,
            )


def _missing(name: str) -> str | None:
    """What this installation lacks for a backend on any device; None where it is complete."""
    if name == "triton":
        return None if has_triton() else "the package triton is not installed: pip install triton"
    return None if name == "reference" else library.load().lacks(name)


def _obstacle(name: str, device: str) -> str | None:
    """Why a backend cannot run on a device here, in words; None where it can."""
    if missing := _missing(name):
        return missing
    if torch.version.hip and device == "cuda" and name in ("cuda", "triton"):
        return gpus.FOR_AMD
    if name == "cpu":
        return None if device == "cpu" else "it runs on CPU tensors"
    if name == "cuda":
        return _cuda_problem if device == "cuda" else "it runs on CUDA tensors"
    if name == "triton" and device != "cuda" and not (device == "cpu" and _INTERPRETS):
        return (
            "it runs on CUDA tensors, and on CPU tensors by its interpreter (TRITON_INTERPRET=1 "
            "at import)"
        )
    return None


def runs_on(name: str, device: str) -> bool:
    return _obstacle(name, device) is None


# The stems of which the CUDA library has no kernel, and those whose work it does not fuse: samples
# behind an activation.
_NOT_IN_CUDA = ("expectation", "affine_variance", "norm", "gate")
_FUSED_BY_TRITON = ("linear", *_NOT_IN_CUDA)


def can_fuse(device: str) -> bool:
    """Whether Triton's linear may sample inside its GEMM there: on a GPU, or under its interpreter
    where it is forced."""
    if bad_variables or forced not in (None, "triton") or "linear" in triton_problems:
        return False
    return (device != "cpu" or forced == "triton") and runs_on("triton", device)


def choose(op: str, device: str, wide: bool = False) -> Plan:
    """The plan for one operation on tensors of `device` ("cpu", "cuda", ...). Launches nothing.

    wide: Whether its sizes are, by `is_wide`. Raises RuntimeError if a forced backend cannot run
    there, and ValueError if an environment variable has a value that is not allowed.
    """
    if bad_variables:
        raise ValueError("; ".join(bad_variables.values()))
    if device == "meta":
        return Plan("cpu", "shapes only")
    if forced is not None:
        by, way_out = "", "call dipkernels.backend('auto')"
        if _by_variable:
            by, way_out = " by DIPKERNELS_BACKEND", f"unset DIPKERNELS_BACKEND, or {way_out},"
        asked = f"backend {forced!r} was asked for{by}"
        if obstacle := _obstacle(forced, device):
            raise RuntimeError(
                f"{op}: {asked}, and it cannot run on device {device!r} here: {obstacle}; "
                f"{way_out} to let each device choose its own"
            )
        if forced == "cuda" and op.startswith(_NOT_IN_CUDA):
            raise RuntimeError(f"{op}: {asked}, and it has no kernel for it; use 'triton'")
        return Plan(forced, "asked for")
    on_gpu = device == "cuda"
    if on_gpu and torch.version.hip:
        return Plan("reference", gpus.FOR_AMD)
    if wide and on_gpu and op in ("linear", "linear_bwd") and runs_on("cuda", device):
        return Plan("cuda", "wide: the vendor's products, sample by sample")
    triton = on_gpu and op not in triton_problems and runs_on("triton", device)
    if triton and op.startswith(_FUSED_BY_TRITON):
        return Plan("triton", "only Triton fuses its passes")
    if on_gpu and op.startswith(_NOT_IN_CUDA):
        missing = "the CUDA library has no kernel for it, and Triton is missing"
        return Plan("reference", triton_problems.get(op) or missing)
    preferred = "cpu" if device == "cpu" else "cuda"
    if runs_on(preferred, device):
        return Plan(preferred, f"compiled kernels for {device}")
    if triton:
        return Plan("triton", _cuda_problem or "the library has no CUDA kernels")
    problem = triton_problems.get(op) or (_cuda_problem if on_gpu else None)
    problem = problem or (_missing("cpu") if device == "cpu" else library.load().error)
    return Plan("reference", problem or f"no kernels for device {device!r}")
