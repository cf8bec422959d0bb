"""Global memory: segments at addresses far apart, so that no small error leads from one tensor to
another."""

import numpy as np

from .kinds import PTXError, i64, u8, u16, u32, u64

SEGMENT_BITS = 40  # an address is (segment + 1) << 40 | offset
OFFSET = (1 << SEGMENT_BITS) - 1


class _Process:
    """All memory of this process as one array, from FIRST on; Memory.locate lets nothing but
    segments through."""

    FIRST = 1 << 16
    __array_interface__ = {  # noqa: RUF012
        "version": 3,
        "data": (FIRST, False),
        "shape": ((1 << 47) - FIRST,),
        "typestr": "|u1",
    }


class Memory:
    """The tensors that a launch may touch.

    Small ones are copied into an arena. Those of LARGE bytes are used where they lie, so that a
    tensor beyond 2^31 elements costs the pages that a kernel touches.
    """

    LARGE = 1 << 26

    def __init__(self):
        self.arrays: list[np.ndarray] = []
        self.places: list[int | None] = []  # in the arena; None: used where it lies
        self.low: list[int] = []  # the first byte's offset, which is the address's misalignment
        self.writable: list[bool] = []
        self.end = 0
        self.arena: np.ndarray | None = None
        self.process = np.asarray(_Process())

    def add(self, array: np.ndarray, misalign: int = 0, writable: bool = True) -> int:
        """The address of a contiguous array.

        Args:
            array: What lies there; copy_back writes what kernels stored.
            misalign: Bytes of the address beyond a multiple of 256.
            writable: False: a store is an error.
        """
        assert array.flags.c_contiguous and self.arena is None
        in_place = array.nbytes >= self.LARGE and (array.ctypes.data - misalign) % 16 == 0
        self.arrays.append(array)
        self.places.append(None if in_place else self.end)
        self.low.append(misalign)
        self.writable.append(writable)
        if not in_place:
            self.end += -(-(array.nbytes + misalign) // 256) * 256
        return (len(self.arrays) << SEGMENT_BITS) + misalign

    def freeze(self) -> None:
        """Nothing is added from here on."""
        memory = np.zeros(self.end + 512, u8)
        self.arena = memory[-memory.ctypes.data % 256 :]
        places, ends = [], []
        for array, place, low in zip(self.arrays, self.places, self.low, strict=True):
            ends.append(low + array.nbytes)
            if place is None:
                places.append(array.ctypes.data - low - _Process.FIRST)
            else:
                self.arena[place + low : place + low + array.nbytes] = array.reshape(-1).view(u8)
                places.append(self.arena.ctypes.data + place - _Process.FIRST)
        self.place_of = np.array(places or [0], i64)
        self.low_of = np.array(self.low or [0], i64)
        self.high_of = np.array(ends or [0], i64)
        self.may_write = np.array(self.writable or [False], bool)

    def copy_back(self) -> None:
        """What kernels stored, into the arrays that were added"""
        for array, place, low in zip(self.arrays, self.places, self.low, strict=True):
            if place is not None:
                new = self.arena[place + low : place + low + array.nbytes]
                flat = array.reshape(-1).view(u8)
                if not np.array_equal(flat, new):
                    flat[:] = new

    def locate(self, address: np.ndarray, size: int, write: bool) -> np.ndarray:
        """Where in `process` accesses of `size` bytes lie, checked."""
        astray = (address & u64(size - 1)) != 0
        if astray.any():
            raise PTXError(f"misaligned access of {size} bytes at {self._name(address[astray][0])}")
        segment = (address >> u64(SEGMENT_BITS)).astype(i64) - 1
        offset = (address & u64(OFFSET)).astype(i64)
        known = (segment >= 0) & (segment < len(self.arrays))
        if not known.all():
            raise PTXError(f"access of {size} bytes at {self._name(address[~known][0])}, no memory")
        inside = (offset >= self.low_of[segment]) & (offset + size <= self.high_of[segment])
        if not inside.all():
            raise PTXError(f"access of {size} bytes outside: {self._name(address[~inside][0])}")
        if write and not self.may_write[segment].all():
            bad = address[~self.may_write[segment]][0]
            raise PTXError(f"write to a tensor that is read only: {self._name(bad)}")
        return self.place_of[segment] + offset

    def _name(self, address) -> str:
        address = int(address)
        segment, offset = (address >> SEGMENT_BITS) - 1, address & OFFSET
        if offset >> (SEGMENT_BITS - 1):  # before the next segment
            segment, offset = segment + 1, offset - (1 << SEGMENT_BITS)
        if 0 <= segment < len(self.arrays):
            at = offset - self.low[segment]
            return f"byte {at} of tensor {segment}, which has {self.arrays[segment].nbytes}"
        return hex(address)


def words_of(memory: np.ndarray, size: int) -> np.ndarray:
    """Bytes as units of `size`"""
    return memory.view({1: u8, 2: u16, 4: u32, 8: u64}[size])
