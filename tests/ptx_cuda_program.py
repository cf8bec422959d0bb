"""tools/verify/sanitize_cuda.cu as nvcc compiles it, without a GPU: the stub runtime's memory and
launches are tests/ptx.

    python tests/ptx_cuda_program.py FOLDER [--record] MODE [PLANT]

FOLDER holds what ptx_cuda_host.build made of SOURCES. What the program says and its exit code are
its own; an access outside of a tensor, or a race, ends it with exit code 9, as under
compute-sanitizer. --record: launches are counted by name and none runs.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import numpy as np
import ptx
from cuda_support import ROOT, SOURCE
from ptx.memory import SEGMENT_BITS
from ptx_cuda_host import LAUNCH

PROGRAM = ROOT / "tools" / "verify" / "sanitize_cuda.cu"
SOURCES = (SOURCE, PROGRAM)
ERROR_CODE = 9
_CALLBACKS = (
    ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_size_t),  # allocate
    ctypes.CFUNCTYPE(None, ctypes.c_uint64),  # release
    ctypes.CFUNCTYPE(None, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),  # copy
    ctypes.CFUNCTYPE(None, ctypes.c_uint64, ctypes.c_int, ctypes.c_size_t),  # fill
)


class Callbacks(ctypes.Structure):
    """`Memory` of ptx_cuda_runtime.cpp"""

    _fields_ = tuple(zip(("allocate", "release", "copy", "fill"), _CALLBACKS, strict=True))


class Device:
    """Memory of a device: allocations are freed in the opposite order, so that an address is a
    place in a list."""

    def __init__(self):
        self.buffers: list[np.ndarray] = []

    def allocate(self, size: int) -> int:
        self.buffers.append(np.zeros(size, np.uint8))
        return len(self.buffers) << SEGMENT_BITS

    def release(self, address: int) -> None:
        assert address == len(self.buffers) << SEGMENT_BITS, (
            "expected the last allocation to be freed first"
        )
        self.buffers.pop()

    def at(self, address: int, size: int) -> np.ndarray:
        offset = address & ((1 << SEGMENT_BITS) - 1)
        found = self.buffers[(address >> SEGMENT_BITS) - 1][offset : offset + size]
        assert len(found) == size, f"{size} bytes at {offset} are outside of the allocation"
        return found

    def memory(self) -> ptx.Memory:
        memory = ptx.Memory()
        for number, buffer in enumerate(self.buffers, 1):
            assert memory.add(buffer) == number << SEGMENT_BITS
        return memory


def _ending(function):
    """No exception crosses C: it ends the process."""

    def call(*arguments):
        try:
            return function(*arguments)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            os._exit(ERROR_CODE if isinstance(error, ptx.PTXError) else 3)

    return call


def run(folder: Path, arguments: list[str], runs: bool) -> int:
    library = ctypes.CDLL(str(folder / f"{PROGRAM.stem}.so"))
    kernels: dict[str, ptx.Kernel] = {}
    for source in SOURCES:
        kernels |= ptx.Module((folder / f"{source.stem}.ptx").read_text()).kernels
    device, launched = Device(), set()

    def copy(address, host, size, to_device):
        there = device.at(address, size)
        here = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(host))
        if to_device:
            there[:] = here
        else:
            here[:] = there

    def launch(name, grid, block, parameters, shared):
        kernel = kernels[name.decode()]
        launched.add(kernel.name)
        if runs:
            memory = device.memory()
            data = ctypes.string_at(parameters[0], kernel.param_bytes)
            kernel.run(tuple(grid[:3]), tuple(block[:3]), data, memory, shared, errors=1)
            memory.copy_back()
        return 0

    def fill(address, byte, size):
        device.at(address, size)[:] = byte

    functions = zip(_CALLBACKS, (device.allocate, device.release, copy, fill), strict=True)
    kept = (
        LAUNCH(_ending(launch)),
        Callbacks(*(kind(_ending(function)) for kind, function in functions)),
    )
    library.stub_on_launch(kept[0])
    library.stub_on_memory(kept[1])
    library.stub_set(1, 0)
    words = [b"sanitize_cuda", *(a.encode() for a in arguments)]
    code = library.main(len(words), (ctypes.c_char_p * (len(words) + 1))(*words))
    own = {name for name in kernels if "forgetful" not in name}
    print(f"kernels launched: {len(launched & own)} of {len(own)}", flush=True)
    return code


if __name__ == "__main__":
    options = [a for a in sys.argv[2:] if a != "--record"]
    sys.exit(run(Path(sys.argv[1]), options, "--record" not in sys.argv))
