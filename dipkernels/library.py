"""The compiled library: where it lies, what it was built for, and the instruction set of its CPU
kernels."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from .arguments import one_of

CAPABILITIES = ("portable", "avx2", "avx512")
# Of the operations' schemas; csrc/perturb_op.cpp says the same of those that it was built for.
INTERFACE = "4"
MIN_TORCH = (2, 10)  # the first with the whole of the stable ABI that csrc/torch.h uses


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

    def lacks(self, kind: str) -> str | None:
        """Why it has no "cpu" or no "cuda" kernels, in words; None where it has them."""
        if not self.loaded:
            return self.error or "there is no compiled library"
        if self.cuda_archs if kind == "cuda" else self.cpu_capabilities:
            return None
        name = kind.upper()
        return f"the library was built without {name} kernels: DIPKERNELS_{name}=1 builds them"


def release(version: str) -> tuple[int, ...]:
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
def load() -> Library:
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
    if release(torch.__version__) < MIN_TORCH:
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
    path, lacks = load().path, load().lacks("cpu")
    if path is None or lacks:
        raise RuntimeError(f"cpu_capability: {lacks}")
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
