"""Shared memory: who wrote and who read each unit last, between which barriers, and what cp.async
has on its way."""

import numpy as np

from .kinds import PTXError, i32, i64, u8, u64

# A stamp is epoch << 11 | thread: between two barriers of its block an epoch lasts. These are no
# threads:
SEVERAL, ATOMIC = 2047, 2046


class SharedMemory:
    """That of the blocks that run together, one after another. Part of a Run."""

    def __init__(self, kernel, dynamic: int, blocks: int, races: bool):
        self.shared_size = kernel.shared_bytes + dynamic
        self.stride = -(-max(self.shared_size, 16) // 16) * 16
        self.shared = np.zeros(blocks * self.stride, u8)
        self.shared_base = self.cta * self.stride
        self.unit, self.races = kernel.shared_unit, races
        units = len(self.shared) // self.unit
        # stamps; 0: nobody yet
        self.written = np.zeros(units, i32)
        self.read = np.zeros(units, i32)
        self.pending: list = []  # cp.async on its way: (threads, their group, places, data)
        self.in_flight = np.zeros(units, bool) if kernel.has_cp_async else None
        self.committed = np.zeros(self.T, i32)
        # wgmma: which units each group reads, from its issue until its wait.
        self.reading: list = []
        self.busy = np.zeros(units, bool) if kernel.has_wgmma else None
        self.group = 0

    def place_in_shared(self, address, size, where):
        """Where in `shared` accesses lie, checked; where: the threads, or None for all"""
        address = address.astype(i64)
        if np.any(address & (size - 1)):
            raise PTXError(f"misaligned access of {size} bytes of shared memory")
        if np.any((address < 0) | (address + size > self.shared_size)):
            raise PTXError(
                f"access of {size} bytes at byte {int(address.max())} of {self.shared_size} of "
                "shared memory"
            )
        return address + (self.shared_base if where is None else self.shared_base[where])

    def _units(self, place, size):
        count = size // self.unit
        first = place // self.unit
        return first[:, None] + np.arange(count) if count > 1 else first[:, None]

    def _byte(self, place, bad):
        row = np.flatnonzero(bad.any(1))[0]
        return int(place[row] % self.stride + np.flatnonzero(bad[row])[0] * self.unit)

    def _refuse(self, bad, place, message):
        if bad.any():
            raise PTXError(message.format(f"shared byte {self._byte(place, bad)}"))

    def note_read(self, place, size, where):
        units = self._units(place, size)
        stamp = (self.stamp if where is None else self.stamp[where])[:, None]
        written = self.written[units]
        self._refuse(written == 0, place, "read of {} that nobody wrote")
        if self.in_flight is not None:
            self._refuse(self.in_flight[units], place, "read of {} before cp.async has arrived")
        if not self.races:
            return
        bad = ((written >> 11) == (stamp >> 11)) & (written != stamp)
        self._refuse(
            bad, place, "race: {} is read and was written by another thread since the last barrier"
        )
        old = self.read[units]
        new = np.where(((old >> 11) == (stamp >> 11)) & (old != stamp), stamp | SEVERAL, stamp)
        self.read[units] = new
        lost = self.read[units] != new
        if lost.any():  # several threads read one unit by this instruction
            self.read[units[lost]] = np.broadcast_to(stamp | SEVERAL, units.shape)[lost]

    def note_write(self, place, size, where, *, check=True, atomic=False):
        units = self._units(place, size)
        if check and self.busy is not None:
            self._refuse(self.busy[units], place, "write of {}, which a wgmma still reads")
        stamp = (self.stamp if where is None else self.stamp[where])[:, None]
        mark = stamp & ~SEVERAL | ATOMIC if atomic else stamp
        if check and self.races:
            written, read, epoch = self.written[units], self.read[units], stamp >> 11
            bad = ((written >> 11) == epoch) & (written != stamp) & (written != mark)
            self._refuse(bad, place, "race: {} is written by two threads between two barriers")
            bad = ((read >> 11) == epoch) & (read != stamp)
            self._refuse(
                bad,
                place,
                "race: {} is written and was read by another thread since the last barrier",
            )
        self.written[units] = np.broadcast_to(mark, units.shape)

    def note_atomic(self, place, size, where):
        """Read and written, which atomic operations of several threads may do between two
        barriers"""
        units = self._units(place, size)
        self._refuse(self.written[units] == 0, place, "read of {} that nobody wrote")
        self.note_write(place, size, where, atomic=True)

    # ---- cp.async

    def cp_async(self, mask, shared, source, size, count):
        """count: bytes to read, the rest are zeros"""
        where = np.flatnonzero(np.broadcast_to(self.active(mask), self.T))
        if len(where) == 0:
            return
        shared = np.broadcast_to(shared, self.T)[where]
        source = np.broadcast_to(source, self.T)[where].astype(u64)
        count = np.broadcast_to(count, self.T)[where].astype(i64)
        if np.any((count != 0) & (count != size)):
            raise PTXError("cp.async of a part of its bytes is not implemented")
        place = self.place_in_shared(shared, size, where)
        data = np.zeros((len(where), size), u8)
        some = np.flatnonzero(count == size)
        if len(some):
            at = self.memory.locate(source[some], size, False)
            data[some] = self.memory.process[at[:, None] + np.arange(size)]
        self.note_write(place, size, where)
        self.in_flight[self._units(place, size)] = True
        self.pending.append((where, self.committed[where], place, data))

    def commit_group(self, mask):
        self.committed = self.committed + self.active(mask).astype(i32)

    def wait_group(self, mask, most):
        """The data of all groups of the active threads but their last `most` arrive."""
        active, left = self.active(mask), []
        for where, group, place, data in self.pending:
            done = active[where] & (group < self.committed[where] - most)
            if done.any():
                size = data.shape[1]
                self.shared[place[done][:, None] + np.arange(size)] = data[done]
                self.note_write(place[done], size, where[done], check=False)
                self.in_flight[self._units(place[done], size)] = False
            if not done.all():
                left.append((where[~done], group[~done], place[~done], data[~done]))
        self.pending = left
