"""Whether the compiled library's CUDA kernels run on the GPUs at hand, and why not."""

from __future__ import annotations

import ctypes

import torch

from .library import Library, release

# The first NVIDIA driver of each CUDA major release: a static runtime runs on any driver of its
# major release or a newer one.
MIN_DRIVERS = {12: "525", 13: "580"}
# Its GPUs are called "cuda" too.
FOR_AMD = "torch is built for AMD's GPUs (ROCm), and these kernels are for NVIDIA's"


def problem(library: Library) -> str | None:
    """`problem_of` the visible GPUs. Initialises CUDA, makes no context; raises torch's own error
    where it cannot."""
    if torch.version.hip:
        return FOR_AMD
    found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    return problem_of(library, driver_version(), found) if found else None


def problem_of(library: Library, driver: int, gpus: list[tuple[int, int]]) -> str | None:
    """One line with what was found, what is needed and what to do; None where the kernels run on
    all `gpus`.

    driver: the CUDA version that the driver offers, 12080 for 12.8. gpus: compute capabilities.
    """
    major, minor = release(library.cuda_toolkit) if library.cuda_toolkit else (0, 0)
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


def driver_version() -> int:
    """The CUDA version that the driver offers, 12080 for 12.8. Asked of the driver itself, which
    torch has loaded: no torch that this package runs on says it."""
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value
