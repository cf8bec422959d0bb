"""The launchers of triton_kernels/*.py on CPU tensors, with Triton's compiler and tests/ptx in
place of a GPU.

    with compiled(noise, perturb, linear, activation, arch=80) as launches:
        u = perturb.perturb(x, sigma, seed, ...)  # compiled as for a GPU, run by the interpreter

Arguments are bound, specialised (divisible by 16, equal to 1) and packed as Triton's own launcher
does it.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct

import numpy as np
import ptx
import torch
from triton_support import specialised, standing_in, triton

_PACK = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "fp32": "f", "fp64": "d"}
_PACK |= {"u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q"}
# what does not change between launches: a compiled kernel by its specialisation
_compiled: dict = {}


def _span(t: torch.Tensor) -> tuple[int, int]:
    """First byte and end of the memory that a tensor covers"""
    last = (
        sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1 if t.numel() else 0
    )
    return t.data_ptr(), t.data_ptr() + last * t.element_size()


def _segments(tensors: list[torch.Tensor]) -> list[tuple[int, int]]:
    """Their spans, those that overlap as one"""
    result: list[tuple[int, int]] = []
    for first, end in sorted(_span(t) for t in tensors):
        if result and first < result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((first, end))
    return result


def _bytes_at(first: int, end: int) -> np.ndarray:
    """The memory of this process from `first` to `end`"""
    if end <= first:
        return np.zeros(0, np.uint8)
    return np.ctypeslib.as_array((ctypes.c_uint8 * (end - first)).from_address(first))


def _flat(values: tuple, kinds: tuple):
    """(value, type) of every argument that a kernel is given, those in tuples one by one"""
    for value, kind in zip(values, kinds, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(value, kind)
        elif kind != "constexpr":
            yield value, kind


def _up_to_ptx(*arguments):
    """Triton's hook: no ptxas, whose work nothing here reads."""
    if not arguments:
        return "up to PTX", "up to PTX"
    stages = arguments[1]
    stages["cubin"] = lambda src, metadata: b""
    return None


def compile_kernel(kernel, args, kwargs, arch: int):
    """(the bound arguments, their types, the parsed PTX, threads of a block, bytes of shared
    memory)"""
    bound, signature, key, compiles = specialised(kernel, args, kwargs, arch)
    if key not in _compiled:
        before = triton.knobs.runtime.add_stages_inspection_hook
        triton.knobs.runtime.add_stages_inspection_hook = _up_to_ptx
        try:
            binary = compiles()
        finally:
            triton.knobs.runtime.add_stages_inspection_hook = before
        (parsed,) = ptx.Module(binary.asm["ptx"]).kernels.values()
        _compiled[key] = parsed, 32 * binary.metadata.num_warps, binary.metadata.shared
    return bound, signature, *_compiled[key]


class Launches(list):
    """(kernel's name, grid, threads of a block) of every launch.

    Attributes:
        mutate: None, or a function of the kernel's name and the parsed kernel: what runs instead.
    """

    mutate = None


class _Launcher:
    def __init__(self, kernel, arch, launches, options):
        self.kernel, self.arch, self.launches, self.options = kernel, arch, launches, options

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self._launch(grid, args, kwargs)

    def _launch(self, grid, args, kwargs):
        bound, signature, parsed, threads, shared = compile_kernel(
            self.kernel, args, kwargs, self.arch
        )
        grid = tuple(grid(bound) if callable(grid) else grid)
        values = list(_flat(tuple(bound.values()), tuple(signature.values())))
        memory, addresses = ptx.Memory(), []
        for first, end in _segments([v for v, kind in values if kind[0] == "*"]):
            addresses.append((first, end, memory.add(_bytes_at(first, end), first % 16)))
        data = b""
        # Triton adds two pointers to scratch memory, which these kernels do not use.
        for value, kind in [*values, (None, "*"), (None, "*")]:
            if kind[0] == "*":
                piece = struct.pack("Q", 0 if value is None else _address(value, addresses))
            else:
                piece = struct.pack(_PACK[kind], value)
            data += b"\0" * (-len(data) % len(piece)) + piece
        self.launches.append((self.kernel.__name__, grid, threads))
        if self.launches.mutate:
            parsed = self.launches.mutate(self.kernel.__name__, parsed)
        parsed.run(grid, (threads,), data, memory, shared, **self.options)
        memory.copy_back()


def _address(tensor, addresses) -> int:
    first, last = _span(tensor)
    return next(
        at + first - start for start, end, at in addresses if start <= first and last <= end
    )


@contextlib.contextmanager
def compiled(*modules, arch: int = 80, multiprocessors: int = 4, **options):
    """Inside, the modules' kernels run by the interpreter; options: of ptx.Kernel.run."""
    launches = Launches()

    def of_kernel(kernel):
        return _Launcher(kernel, arch, launches, options)

    with standing_in(modules, of_kernel, arch, multiprocessors):
        yield launches
