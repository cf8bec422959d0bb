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

import ctypes
import functools
import importlib.util
import os
import platform
import re
import shlex
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .arguments import one_of

NAMES = ("cpu", "cuda", "triton", "reference")
CAPABILITIES = ("portable", "avx2", "avx512")
# Of the operations' schemas; csrc/perturb_op.cpp says the same of those that it was built for.
INTERFACE = "4"
MIN_TORCH = (2, 10)  # the first with the whole of the stable ABI that csrc/torch.h uses
# The first NVIDIA driver of each CUDA major release: a static runtime runs on any driver of its
# major release or a newer one.
MIN_DRIVERS = {12: "525", 13: "580"}


@dataclass(frozen=True)
class Plan:
    """What runs one operation, and why."""

    backend: str
    why: str


@dataclass(frozen=True)
class Library:
    """The compiled library as found: `error` is None when it is loaded."""

    path: str | None = None
    error: str | None = None
    cpu_capabilities: tuple[str, ...] = ()
    cuda_archs: tuple[str, ...] = ()
    compiler: str | None = None
    cuda_toolkit: str | None = None  # "12.8": what the CUDA kernels were compiled with

    @property
    def loaded(self) -> bool:
        return self.path is not None and self.error is None


def _release(version: str) -> tuple[int, ...]:
    """(2, 10) of "2.10.0a0+git123"."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def c_functions(path: str) -> ctypes.CDLL:
    functions = ctypes.CDLL(path)
    functions.dip_build_info.restype = ctypes.c_char_p
    return functions


def _how_to_build() -> str:
    root = Path(__file__).resolve().parent.parent
    if (root / "setup.py").exists():
        return f"pip install --no-build-isolation --no-deps -e {shlex.quote(str(root))}"
    return (
        "pip install --no-build-isolation --no-deps --force-reinstall . in the folder of the source"
    )


def _installed_elsewhere() -> Path | None:
    """Where sys.path has another dipkernels, which has a compiled library: Python started in a
    folder of source takes that for the package."""
    here = Path(__file__).resolve().parent
    folders = [Path(entry, "dipkernels") for entry in sys.path]
    # Path.is_file raises where a folder may not be read, and resolve where the current one is gone
    return next((f for f in folders if os.path.isfile(f / "_C.so") and f.resolve() != here), None)


@functools.cache
def library() -> Library:
    """Load dipkernels/_C.so once. The operations' schemas must be defined first: `ops` calls
    this."""
    found = Path(__file__).with_name("_C.so")
    if os.path.isfile(found):
        return _loaded(str(found))
    if archive := next((f for f in found.parents if os.path.isfile(f)), None):
        return Library(
            error=f"no compiled library: dipkernels was imported from inside {archive}, and none "
            "loads from inside a file. Install it by pip, or unpack it into a folder and put that "
            "on sys.path (PYTHONPATH) in its place"
        )
    if installed := _installed_elsewhere():
        return Library(
            error="no compiled library in the folder of source from which dipkernels was imported, "
            f"{Path(__file__).resolve().parent.parent}; the installed package, in {installed}, has "
            "one. Run Python from another folder, or build it here, with g++ and ninja at hand: "
            f"{_how_to_build()}"
        )
    return Library(
        error="no compiled library: it was not built, or built with DIPKERNELS_CPU=0 and "
        f"DIPKERNELS_CUDA=0. To build it, with g++ and ninja at hand: {_how_to_build()}"
    )


def _loaded(path: str) -> Library:
    found = f"found torch {torch.__version__}"
    if _release(torch.__version__) < MIN_TORCH:
        error = f"{found}, the compiled library needs torch >= 2.10: pip install 'torch>=2.10'"
        return Library(path, error)
    try:
        torch.ops.load_library(path)
        built = c_functions(path).dip_build_info().decode(errors="replace")
    except (OSError, AttributeError, RuntimeError) as error:
        said = str(error.__cause__ or error)  # torch's own words name the file alone
        reason = said.splitlines()[0] if said else type(error).__name__
        return Library(
            path,
            f"{reason}: {found} on {platform.machine()}, the compiled library needs an unmodified "
            "torch >= 2.10 and the machine it was built for: pip install --force-reinstall "
            "--no-deps dipkernels",
        )
    info = dict(line.split("=", 1) for line in built.splitlines() if "=" in line)
    if info.get("interface") != INTERFACE:
        return Library(
            path,
            f"the library was built for interface {info.get('interface', 'none')}, and this source "
            f"has interface {INTERFACE}: build it again. {_how_to_build()}",
        )
    return Library(
        path=path,
        cpu_capabilities=tuple(info["cpu"].split()),
        cuda_archs=tuple(info["cuda"].split()),
        compiler=info["compiler"],
        cuda_toolkit=info.get("toolkit") or None,
    )


def cpu_capability(name: str | None = None) -> str:
    """The instruction set that the CPU kernels use; `name` ("portable", "avx2", "avx512", "auto")
    changes it.

    Results are the same bits for each. Raises RuntimeError if the library or the machine lacks what
    was asked for.
    """
    path = library().path
    if path is None or not library().cpu_capabilities:
        raise RuntimeError(f"cpu_capability: {_missing('cpu')}")
    functions = c_functions(path)
    if name is not None:
        one_of("cpu_capability", name, (*CAPABILITIES, "auto"))
        if functions.dip_set_cpu_capability(-1 if name == "auto" else CAPABILITIES.index(name)):
            raise RuntimeError(
                "cpu_capability: expected an instruction set that the library carries and this "
                f"machine has, got {name!r}"
            )
    current = functions.dip_cpu_capability()
    if current < 0:
        wanted = os.environ.get("DIPKERNELS_CPU_CAPABILITY")
        raise RuntimeError(
            f"DIPKERNELS_CPU_CAPABILITY: expected one of {(*CAPABILITIES, 'auto')} that this "
            f"machine has, got {wanted!r}; unset it for the best of them"
        )
    return CAPABILITIES[current]


# ---- the GPUs at hand ----------------------------------------------------------------------------

# why the library's CUDA kernels cannot run here, once torch has initialised CUDA
_cuda_problem: str | None = None
# Its GPUs are called "cuda" too.
_FOR_AMD = "torch is built for AMD's GPUs (ROCm), and these kernels are for NVIDIA's"


def _cuda_problem_of(library: Library, driver: int, gpus: list[tuple[int, int]]) -> str | None:
    """One line with what was found, what is needed and what to do; None where the kernels run on
    all `gpus`.

    driver: the CUDA version that the driver offers, 12080 for 12.8. gpus: compute capabilities.
    """
    major, minor = _release(library.cuda_toolkit) if library.cuda_toolkit else (0, 0)
    offered = f"{driver // 1000}.{driver % 1000 // 10}"
    if driver < 1000 * major:
        return (
            f"the NVIDIA driver offers CUDA {offered}, the compiled kernels need CUDA {major}.0 "
            f"(driver >= {MIN_DRIVERS.get(major, 'one for it')}): update the driver"
        )
    archs = [divmod(int(arch.rstrip("af")), 10) for arch in library.cuda_archs]
    for number, gpu in enumerate(gpus):
        if any(arch[0] == gpu[0] and arch[1] <= gpu[1] for arch in archs):
            continue
        built = " ".join(f"sm_{a}" for a in library.cuda_archs)
        here = f"GPU {number} is sm_{gpu[0]}{gpu[1]}, the compiled kernels are for {built}"
        if gpu < (8, 0):
            return f"{here}, and they need sm_80 or newer"
        if gpu < archs[-1]:
            return f"{here} and newer: build for it with DIPKERNELS_CUDA_ARCHS={gpu[0]}{gpu[1]}"
        if driver < 1000 * major + 10 * minor:
            return (
                f"{here} and PTX, for which the driver must offer CUDA {major}.{minor} and offers "
                f"{offered}: update the driver"
            )
    return None


def _driver_version() -> int:
    """The CUDA version that the driver offers, 12080 for 12.8. Asked of the driver itself, which
    torch has loaded: no torch that this package runs on says it."""
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


def check_cuda() -> str | None:
    """Look whether the library's CUDA kernels can run on the visible GPUs; say so and fall back
    where they cannot.

    Returns the problem in one line, or None. Initialises CUDA where torch can, makes no context;
    never raises.
    """
    global _cuda_problem
    if not library().cuda_archs:
        return None
    try:
        gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
        driver = _driver_version() if gpus and not torch.version.hip else 0
    except (RuntimeError, AssertionError, OSError):
        return None  # torch's own error comes when the device is used
    problem = _cuda_problem_of(library(), driver, gpus) if gpus else None
    problem = _FOR_AMD if torch.version.hip else problem
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
    if library().cuda_archs:
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
    if name == "reference":
        return None
    if not library().loaded:
        return library().error or "there is no compiled library"
    if library().cuda_archs if name == "cuda" else library().cpu_capabilities:
        return None
    kind = name.upper()
    return f"the library was built without {kind} kernels: DIPKERNELS_{kind}=1 builds them"


def _obstacle(name: str, device: str) -> str | None:
    """Why a backend cannot run on a device here, in words; None where it can."""
    if missing := _missing(name):
        return missing
    if torch.version.hip and device == "cuda" and name in ("cuda", "triton"):
        return _FOR_AMD
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


# Where an affine layer on a GPU samples inside its own GEMM (Triton's `linear`) instead of writing
# u first. By the arithmetic of docs/measured_gpu_expectation.md: neither bound has been measured
# yet; `make gpu-check` times both forms around them. N: one tile of columns draws the noise once,
# and u's 2 M K elements of traffic go; two would draw it twice
FUSED_COLUMNS = 128
# M N K = 32 x 1024 x 1024: the product takes microseconds, as each of the two kernels saved does
FUSED_WORK = 2**25
# N of the mean over samples behind an activation: each tile of columns draws again, and beyond,
# that takes longer than a sample's way through memory.
FUSED_MEAN_COLUMNS = 512


def can_fuse(device: str) -> bool:
    """Whether Triton's linear may sample inside its GEMM there: on a GPU, or under its interpreter
    where it is forced."""
    if bad_variables or forced not in (None, "triton") or "linear" in triton_problems:
        return False
    return (device != "cpu" or forced == "triton") and runs_on("triton", device)


def is_narrow(dtype: torch.dtype, m: int, n: int, k: int) -> bool:
    """Whether an affine layer of m rows, n out-features and k in-features is for that, where it
    may; of 16-bit types alone, because in float32 the vendor's product is far ahead."""
    return dtype in (torch.float16, torch.bfloat16) and (
        n <= FUSED_COLUMNS or m * n * k <= FUSED_WORK
    )


def is_wide(dtype: torch.dtype, m: int, n: int, k: int) -> bool:
    """Whether a mean behind an activation, weight [n, k] of this dtype, is for row blocks where
    CUDA kernels draw."""
    return m * n * k > FUSED_WORK and (dtype is torch.float32 or n > FUSED_MEAN_COLUMNS)


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
        return Plan("reference", _FOR_AMD)
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
    problem = problem or (_missing("cpu") if device == "cpu" else library().error)
    return Plan("reference", problem or f"no kernels for device {device!r}")
