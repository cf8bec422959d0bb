"""One run: the state of the blocks that run together, and their loads and stores."""

import numpy as np

from .approximations import approximate
from .kinds import VARIABLES, WARP, PTXError, i32, i64, u32, u64
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


class Run(Warps, SharedMemory, Matrices):
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
        self.steps = 0

    def _number(self, linear, grid, block, ctas):
        """The special registers; what is the same for all threads stays a scalar."""
        x, y = block[0], block[1]
        special = {
            "%tid.x": linear % x,
            "%tid.y": linear // x % y,
            "%tid.z": linear // x // y,
        }
        for axis, name in enumerate("xyz"):
            of = np.array([cta[axis] for cta in ctas])
            special[f"%ctaid.{name}"] = np.repeat(of, self.size) if len(ctas) > 1 else of[0]
            special[f"%ntid.{name}"], special[f"%nctaid.{name}"] = block[axis], grid[axis]
        self.special = {key: np.asarray(value).astype(u32)[()] for key, value in special.items()}

    def approximate(self, name, exact, flush):
        return approximate(name, exact, self.errors, flush)

    # ---- loads and stores

    def words(self, space, address, size, total, where, write):
        """(memory as units of `size`, where in it accesses of `total` bytes lie)"""
        address = address.astype(u64)
        if space == "shared":
            place, memory = self.place_in_shared(address, total, where), self.shared
        elif np.any(address >= VARIABLES):
            place, memory = (address - u64(VARIABLES)).astype(i64), self.kernel.variables
            if np.any((place & (total - 1)) | (place < 0) | (place + total > len(memory))):
                raise PTXError(
                    f"access of {total} bytes outside of the module's variables, or misaligned"
                )
        else:
            place, memory = self.memory.locate(address, total, write), self.memory.process
        return place, words_of(memory, size)

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
        place, words = self.words(space, address, size, total, where, False)
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
        place, words = self.words(space, address, size, total, where, True)
        rows = words.reshape(-1, len(values))
        rows[place // total] = data
        if not _same(rows[place // total], data, size):
            raise PTXError(f"two threads store different values to one address of {space} memory")
        if space == "shared":
            self.note_write(place, total, where)
