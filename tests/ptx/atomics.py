"""atom and red: read, change and write in one step, thread after thread."""

import numpy as np

from .kinds import KINDS, UNSIGNED, PTXError, u64
from .memory import words_of
from .rounding import float_max, float_min, ftz


def _change(how, kind, old, b, c):
    """What an atomic operation stores"""
    wide = KINDS[kind]
    x, y = old.view(wide), b.view(wide)
    if how == "add":
        result = x + y
        return ftz(result) if kind == "f32" else result  # atom.add.f32 of global memory flushes
    if how in ("min", "max"):
        if kind[0] == "f":
            return (float_min if how == "min" else float_max)(x, y, False, UNSIGNED[x.itemsize])
        return np.minimum(x, y) if how == "min" else np.maximum(x, y)
    if how == "inc":
        return np.where(x >= y, wide(0), x + wide(1))
    if how == "dec":
        return np.where((x == 0) | (x > y), y, x - wide(1))
    if how == "cas":
        return np.where(x == y, c.view(wide), x)
    if how == "exch":
        return y
    return {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[how](x, y)


class Atomics:
    """Part of a Run."""

    def atomic(self, mask, space, how, kind, address, b, c, size):
        """The old values. Threads come in the order of their numbers, or with errors=n in the n-th
        random one."""
        where = np.flatnonzero(self._spread(self.active(mask)))
        olds = np.zeros(self.T, UNSIGNED[size])
        if not len(where):
            return olds
        if self.errors:
            where = np.random.default_rng(self.errors).permutation(where)
        address = self._spread(address)[where].astype(u64)
        space, address = self.resolve(space, address)
        if space == "global":
            memory, place = self.memory.process, self.memory.locate(address, size, True)
        elif space == "variable":
            memory, place = self.kernel.variables, self.place_in_variables(address, size)
        elif space == "shared":
            memory, place = self.shared, self.place_in_shared(address, size, where)
            self.note_atomic(place, size, where)
        else:
            raise PTXError(f"an atomic operation of .{space} memory")
        words, at = words_of(memory, size), place // size
        operands = [None if v is None else self._spread(v)[where] for v in (b, c)]
        order = np.argsort(at, kind="stable")
        start = np.r_[True, at[order][1:] != at[order][:-1]]
        rank = np.arange(len(order)) - np.maximum.accumulate(
            np.where(start, np.arange(len(order)), 0)
        )
        # The first thread of every address, then the second, and so on.
        by_rank = np.argsort(rank, kind="stable")
        for picked in np.split(order[by_rank], np.cumsum(np.bincount(rank))[:-1]):
            old = words[at[picked]]
            values = [None if v is None else v[picked] for v in operands]
            olds[where[picked]] = old
            words[at[picked]] = np.asarray(_change(how, kind, old, *values)).view(UNSIGNED[size])
        return olds
