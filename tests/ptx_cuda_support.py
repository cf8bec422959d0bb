"""csrc/cuda/perturb.cu as nvcc compiles it, host and device: its own launcher runs, and what it
launches goes to tests/ptx."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import ptx
import torch
from ptx_cuda_host import LAUNCH

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # as in csrc/launch.h


class Operand(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("outer_stride", ctypes.c_int64),
        ("feature_stride", ctypes.c_int64),
    )


class Draw(ctypes.Structure):
    """That of csrc/launch.h"""

    _fields_ = (
        ("seed", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("row0", "col0")),
        ("sample", ctypes.c_int32),
        ("sigma", ctypes.c_void_p),
        *((name, ctypes.c_bool) for name in ("sigma_is_double", "log_variance")),
        ("factor", ctypes.c_double),
    )


class PerturbArgs(ctypes.Structure):
    """That of csrc/launch.h"""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("outer", "features", "inner")),
        ("draw", Draw),
        *((name, Operand) for name in ("x", "u", "du")),
        ("dsigma", ctypes.c_void_p),
    )


def span(t: torch.Tensor) -> torch.Tensor:
    """The memory that t covers, gaps included, as one dimension"""
    if not t.numel():
        return t.flatten()
    return torch.as_strided(
        t, (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True) if n),), (1,)
    )


# csrc/launch.h's CudaForm by its bits: writes_from_end, sums_from_end, one_launch.
FORMS = {
    "default": 0b001,
    "from the start": 0b000,
    "from the end": 0b011,
    "one launch": 0b101,
    "one launch from the end": 0b111,
}


class Library:
    """The launcher and its kernels.

    Attributes:
        options: Of ptx.Kernel.run.
        launches: (kernel, grid, block) of each launch.
        queue: None, or where launches wait: (stream, grid, run), with run(blocks) to run some of
            its blocks.
        refuse: Of a kernel's name, the error that cudaLaunchKernel returns; 0: the kernel runs.
        host: Which copy of the host code runs; each has tickets of its own.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.module = ptx.Module((folder / "perturb.ptx").read_text())
        self.libraries: dict[tuple[int, int], ctypes.CDLL] = {}
        self.options: dict = {}
        self.launches: list[tuple[str, tuple, tuple]] = []
        self.queue: list[tuple[int, tuple, Callable]] | None = None
        self.refuse: Callable[[str], int] = lambda name: 0
        self.host = 0

    def load(self, multiprocessors: int) -> ctypes.CDLL:
        """The launcher asks once for the number of multiprocessors, so each number gets a copy of
        the library."""
        key = (multiprocessors, self.host)
        if key not in self.libraries:
            path = self.folder / f"perturb_{multiprocessors}_{self.host}_{os.getpid()}.so"
            shutil.copyfile(self.folder / "perturb.so", path)
            library = ctypes.CDLL(str(path), mode=ctypes.RTLD_LOCAL)
            library.stub_perturb.restype = ctypes.c_char_p
            arguments = [
                ctypes.POINTER(PerturbArgs),
                ctypes.c_int,
                ctypes.c_void_p,
                ctypes.c_void_p,
            ]
            library.stub_perturb.argtypes = arguments
            library.stub_scratch.restype = ctypes.c_int64
            self.libraries[key] = library
        return self.libraries[key]

    def call(
        self,
        arguments: PerturbArgs,
        form: str,
        memory: ptx.Memory,
        multiprocessors: int = 3,
        stream: int = 1,
        capturing: bool = False,
    ) -> None:
        """perturb_cuda(arguments) in one of FORMS; pointers are addresses of `memory`."""
        library, error = self.load(multiprocessors), []
        library.stub_set(multiprocessors, capturing)
        scratch = library.stub_scratch(ctypes.byref(arguments), FORMS[form])
        partials = memory.add(np.full(scratch, 0xFF, np.uint8))

        @LAUNCH
        def launch(name, grid, block, parameters, shared):
            try:
                kernel = self.module.kernels[name.decode()]
                sizes = [size for _, _, size in kernel.parameters]
                assert len(sizes) == 1
                data = ctypes.string_at(parameters[0], sizes[0])
                grid, block = tuple(grid[:3]), tuple(block[:3])
                self.launches.append((name.decode(), grid, block))
                if code := self.refuse(name.decode()):
                    return code

                def run(blocks=None):
                    only = {} if blocks is None else {"ctas": lambda grid: blocks}
                    kernel.run(grid, block, data, memory, shared, **self.options | only)
                    memory.copy_back()

                if self.queue is None:
                    run()
                else:
                    self.queue.append((stream, grid, run))
                return 0
            except BaseException as e:  # no exception crosses C
                error.append(e)
                return 999

        library.stub_on_launch(launch)
        message = library.stub_perturb(ctypes.byref(arguments), FORMS[form], partials, stream)
        if error:
            raise error[0]
        if message:
            raise RuntimeError(message.decode())

    def perturb(
        self,
        *,
        form="default",
        x=None,
        u=None,
        du=None,
        sigma=None,
        seed,
        row0=0,
        col0=0,
        sample=0,
        factor=1.0,
        log_variance=False,
        multiprocessors=3,
        misalign=(0, 0, 0),
        stream=1,
        capturing=False,
    ):
        """(u, dsigma), each None where not asked for.

        Args:
            form: One of FORMS.
            u: [M, K] is the rows layout, [B, C, inner] the channels one; gives the output's dtype,
                shape and strides. Outputs start as NaN, and gaps between rows must stay so.
            misalign: Elements by which x, u and du begin beyond a boundary.
        """
        like = next(t for t in (u, du) if t is not None)
        a, memory = PerturbArgs(), ptx.Memory()
        a.outer, a.features, a.inner = (
            (like.shape[0], like.shape[1], 1) if like.dim() == 2 else like.shape
        )
        a.draw = Draw(
            memory.add(seed.numpy(), writable=False),
            row0,
            col0,
            sample,
            factor=factor,
            log_variance=log_variance,
        )
        written = dsigma = None
        if sigma is not None:
            a.draw.sigma = memory.add(sigma.contiguous().numpy(), writable=False)
            a.draw.sigma_is_double = sigma.dtype is torch.float64
        for name, t, shift in zip(("x", "u", "du"), (x, u, du), misalign, strict=True):
            if t is None:
                continue
            raw = span(t).contiguous().view(torch.uint8).numpy().copy()
            if name == "u":
                raw[:] = 0xFF
                written = raw
            address = memory.add(raw, shift * t.element_size(), writable=name == "u")
            setattr(a, name, Operand(address, DTYPES.index(t.dtype), t.stride(0), t.stride(1)))
        if du is not None:
            dsigma = torch.full_like(sigma.contiguous(), float("nan"))
            a.dsigma = memory.add(dsigma.numpy())
        self.call(a, form, memory, multiprocessors, stream, capturing)
        return None if u is None else _without_gaps(written, u), dsigma


def _without_gaps(written: np.ndarray, u: torch.Tensor) -> torch.Tensor:
    if not u.numel():
        return u
    memory = torch.from_numpy(written).view(u.dtype)
    gaps = torch.ones(memory.shape, dtype=torch.bool)
    torch.as_strided(gaps, u.shape, u.stride()).fill_(False)
    assert memory[gaps].isnan().all(), "an element between two rows was written"
    return torch.as_strided(memory, u.shape, u.stride())
