"""What nvcc makes of CUDA sources, host and device code apart: PTX, and a library whose launches a
stub runtime hands on."""

from __future__ import annotations

import ctypes
from pathlib import Path

from cuda_support import FLAGS, ROOT, SOURCE
from program_support import find_tool, printed

STUB = Path(__file__).resolve().parent / "ptx_cuda_runtime.cpp"
_POINTERS = (
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_void_p),
)
LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, *_POINTERS, ctypes.c_size_t)


def _has_ubsan() -> bool:
    """Whether g++ brings the undefined-behaviour sanitizer; where it does not, its name comes back
    as it was"""
    name = "libubsan.so"
    return printed("g++", f"-print-file-name={name}").strip() != name


def build(folder: Path, arch: int, sources: tuple[Path, ...] = (SOURCE,)) -> Path:
    """Compiles for one architecture.

    Args:
        folder: Where NAME.ptx of each source ends up, and the library.
        arch: 80 for sm_80.
        sources: Linked together, with tests/ptx_cuda_runtime.cpp in place of a CUDA runtime.

    Returns:
        The library.
    """
    folder.mkdir(parents=True, exist_ok=True)
    nvcc = find_tool("nvcc")
    flags = [flag for flag in FLAGS if flag not in ("-Xcompiler", "-fvisibility=hidden")]
    flags = [f"-Xcompiler={flag}" if flag == "-fPIC" else flag for flag in flags]
    # undefined behaviour of the host code ends the process, with a line that names it
    if _has_ubsan():
        sanitize = ["-fsanitize=undefined", "-fno-sanitize-recover=all"]
        flags += [f"-Xcompiler={flag}" for flag in sanitize]
    else:
        sanitize = []
    target = f"-gencode=arch=compute_{arch},code=compute_{arch}"
    objects = [folder / f"{source.stem}.o" for source in sources]
    for source, to in zip(sources, objects, strict=True):
        printed(nvcc, "-c", *flags, target, "--keep", "--keep-dir", folder, source, "-o", to)
    include, stub = f"-I{ROOT / 'csrc'}", folder / "stub.o"
    printed("g++", "-std=c++17", "-O1", "-fPIC", "-c", include, STUB, "-o", stub)
    library = folder / f"{sources[-1].stem}.so"
    # Its own symbols first: a torch for CUDA has brought the real runtime's into the process.
    linked = ["-Wl,-z,defs", "-Wl,-Bsymbolic"]
    printed("g++", "-shared", *sanitize, *objects, stub, "-o", library, *linked)
    return library
