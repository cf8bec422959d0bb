"""One run: the state of the blocks that run together, and their loads and stores."""

import numpy as np

from .approximations import approximate
from .atomics import Atomics
from .kinds import WARP, WINDOWS, PTXError, i32, i64, u8, u32, u64
from .matrices import Matrices
from .memory import words_of
from .shared import SharedMemory
from .warps import Warps


def _same(a, b, size):
    """Whether these words are equal, or the same but for what is in two NaN, which is not
    modelled."""
    equal = a == b
    if size in (4, 8) and not equal.all():
        equal |= np.isnan(a.view(f"f{size}")) & np.isnan(b.view(f"f{size}"))
    return equal.all()


class Run(Warps, SharedMemory, Atomics, Matrices):
    """T threads, block after block, each padded to whole warps."""

    def __init__(self, kernel, grid, block, ctas, params, memory, dynamic, races, errors):
        self.kernel, self.memory, self.params, self.errors = kernel, memory, params, errors
        size = block[0] * block[1] * block[2]
        self.size = -(-size // WARP) * WARP
        self.ctas, self.T = len(ctas), len(ctas) * self.size
        linear = np.tile(np.arange(self.size), self.ctas)
        # Who is who in the search for races: threads, or warps where bar.warp.sync orders the
        # threads of one.
        self.thread = (linear >> 5 if kernel.has_warp_barriers else linear).astype(i32)
        self.cta = np.repeat(np.arange(self.ctas), self.size)
        self.exists = linear < size
        self.live = self.exists.copy()
        self.here = None if self.live.all() else self.live.copy()
        self._number(linear, grid, block, ctas)
        self.lane = (linear % WARP).astype(i64)
        self.warp_start = (np.arange(self.T) // WARP) * WARP
        self.epoch = np.ones(self.ctas, i32)
        self.stamp = (self.epoch[self.cta] << 11) | self.thread
        SharedMemory.__init__(self, kernel, dynamic, self.ctas, races)
        self.local_size = -(-max(kernel.local_bytes, 16) // 16) * 16
        self.local = np.zeros(self.T * self.local_size, u8) if kernel.local_bytes else None
        self.steps = 0

    def _number(self, linear, grid, block, ctas):
        """The special registers; what is the same for all threads stays a scalar."""
        x, y = block[0], block[1]
        special = {
            "%tid.x": linear % x,
            "%tid.y": linear // x % y,
            "%tid.z": linear // x // y,
            "%laneid": linear % WARP,
            "%warpid": linear // WARP,
            "%nwarpid": self.size // WARP,
        }
        for name, compare in (
            ("eq", "__eq__"),
            ("lt", "__lt__"),
            ("le", "__le__"),
            ("gt", "__gt__"),
            ("ge", "__ge__"),
        ):
            of = getattr(np.arange(WARP)[None, :], compare)(np.arange(WARP)[:, None])
            bits = (of.astype(i64) << np.arange(WARP)).sum(1)
            special[f"%lanemask_{name}"] = bits[linear % WARP]
        for axis, name in enumerate("xyz"):
            of = np.array([cta[axis] for cta in ctas])
            special[f"%ctaid.{name}"] = np.repeat(of, self.size) if len(ctas) > 1 else of[0]
            special[f"%ntid.{name}"], special[f"%nctaid.{name}"] = block[axis], grid[axis]
        self.special = {key: np.asarray(value).astype(u32)[()] for key, value in special.items()}

    def approximate(self, name, exact, flush):
        return approximate(name, exact, self.errors, flush)

    def trap(self, mask):
        if np.any(self.active(mask)):
            raise PTXError("trap")

    # ---- loads and stores

    def resolve(self, space, address):
        """(the memory that addresses lie in, where in it); of generic and global addresses their
        upper bits tell"""
        if space not in ("generic", "global"):
            return space, address
        for name, window in WINDOWS.items():
            inside = (address & u64(window)) != 0
            if not inside.any():
                continue
            if not inside.all():
                raise PTXError("addresses of several kinds of memory by one instruction")
            if space == "global" and name != "variable":
                raise PTXError(f"access of global memory at an address of {name} memory")
            return name, address - u64(window)
        return "global", address

    def _words(self, space, address, size, total, where, write):
        """(memory as units of `size`, which of its rows of `total` bytes)"""
        space, address = self.resolve(space, address.astype(u64))
        if space == "global":
            place, memory = self.memory.locate(address, total, write), self.memory.process
        elif space == "variable":
            place, memory = self.place_in_variables(address, total), self.kernel.variables
        elif space == "local":
            place, memory = self._place_in_local(address, total, where), self.local
        else:
            place, memory = self.place_in_shared(address, total, where), self.shared
        return space, place, words_of(memory, size)

    def place_in_variables(self, address, size):
        address = address.astype(i64)
        if np.any((address & (size - 1)) | (address + size > len(self.kernel.variables))):
            raise PTXError(
                f"access of {size} bytes outside of the module's variables, or misaligned"
            )
        return address

    def _place_in_local(self, address, size, where):
        address = address.astype(i64)
        if np.any(
            (address & (size - 1)) | (address < 0) | (address + size > self.kernel.local_bytes)
        ):
            raise PTXError(
                f"access of {size} bytes outside of {self.kernel.local_bytes} of local memory, or "
                "misaligned"
            )
        threads = np.arange(self.T) if where is None else where
        return address + threads * self.local_size

    def load(self, space, address, size, count, mask):
        """`count` registers of `size` bytes each"""
        if space == "param":
            return self._load_param(address, size, count)
        total = size * count
        uniform = mask is None and np.ndim(address) == 0 and space == "global" and self.here is None
        if uniform:
            where, address = None, np.asarray(address).reshape(1)
        else:
            mask = self._spread(self.active(mask))
            where = None if mask.all() else np.flatnonzero(mask)
            address = self._spread(address)
            if where is not None:
                address = address[where]
        space, place, words = self._words(space, address, size, total, where, False)
        if space == "shared":
            self.note_read(place, total, where)
        found = words.reshape(-1, count)[place // total]
        results = []
        for i in range(count):
            column = found[:, i]
            if uniform:
                column = column[0]
            elif where is not None:
                spread = np.zeros(self.T, column.dtype)
                spread[where] = column
                column = spread
            results.append(column)
        return results

    def _load_param(self, address, size, count):
        first, last = int(np.min(address)), int(np.max(address))
        if first != last:
            raise PTXError("threads read different parameters by one instruction")
        if first < 0 or first + size * count > len(self.params) or first % size:
            raise PTXError(
                f"read of {size * count} bytes at byte {first} of {len(self.params)} of parameters"
            )
        return list(words_of(self.params, size)[first // size : first // size + count])

    def store(self, space, address, values, size, mask):
        total = size * len(values)
        mask = self._spread(self.active(mask))
        if not mask.any():
            return
        where = None if mask.all() else np.flatnonzero(mask)
        address = self._spread(address)
        values = [self._spread(v) for v in values]
        if where is not None:
            address, values = address[where], [v[where] for v in values]
        data = np.stack(values, axis=1)
        space, place, words = self._words(space, address, size, total, where, True)
        rows = words.reshape(-1, len(values))
        rows[place // total] = data
        if not _same(rows[place // total], data, size):
            raise PTXError(f"two threads store different values to one address of {space} memory")
        if space == "shared":
            self.note_write(place, total, where)
