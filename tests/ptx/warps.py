"""What threads do together: barriers, shuffles, votes, matches and reductions of a warp."""

import numpy as np

from .kinds import WARP, PTXError, i32, i64, u32

_REDUCE = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


class Warps:
    """Part of a Run."""

    def active(self, mask):
        return self.live if mask is None else mask

    def _spread(self, value):
        return np.broadcast_to(value, self.T)

    def whole_warps(self, mask, what):
        """Raises where a part of a warp is active: those that have left count as inactive, as in
        .aligned forms."""
        of = self._spread(self.active(mask)).reshape(-1, WARP)
        if np.any(of.any(1) & ~of.all(1)):
            raise PTXError(f"{what} executed by a part of a warp")

    def check_members(self, mask, members, what):
        """Every active thread names itself, and all that it names are active: else they wait for
        ever."""
        active = self._spread(self.active(mask)).reshape(-1, WARP)
        members = self._spread(members).reshape(-1, WARP).astype(i64)
        arrived = (active << np.arange(WARP)).sum(1)[:, None]
        existing = (self.exists.reshape(-1, WARP) << np.arange(WARP)).sum(1)[:, None]
        if np.any(active & ((members & existing) != arrived)):
            raise PTXError(f"{what} executed by a part of a warp that is not the one it names")

    def barrier(self, mask):
        active = self._spread(self.active(mask)).reshape(self.ctas, -1)
        live = self.live.reshape(self.ctas, -1)
        arrived = active.any(1)
        if np.any(arrived & (active != live).any(1)):
            raise PTXError("bar.sync executed by a part of a block: the others never arrive here")
        self.epoch = self.epoch + arrived.astype(i32)
        self.stamp = (self.epoch[self.cta] << 11) | self.thread

    def barrier_reduce(self, mask, how, truth):
        """bar.red: popc, and, or of a predicate over the block"""
        self.barrier(mask)
        truth = (self._spread(truth) & self._spread(self.active(mask))).reshape(self.ctas, -1)
        count = truth.sum(1)
        if how == "and":
            result = count == self._spread(self.active(mask)).reshape(self.ctas, -1).sum(1)
        else:
            result = count.astype(u32) if how == "popc" else count > 0
        return np.repeat(result, self.size)

    def shuffle(self, mask, how, value, b, c, members):
        """(value of the source lane, whether it lies in range)"""
        self.check_members(mask, members, "shfl.sync")
        value = self._spread(value)
        b, c = (self._spread(v).astype(i64) for v in (b, c))
        lane, b, clamp, segment = self.lane, b & 31, c & 31, (c >> 8) & 31
        most, least = (lane & segment) | (clamp & ~segment), lane & segment
        if how == "up":
            source, good = lane - b, lane - b >= most
        elif how == "down":
            source, good = lane + b, lane + b <= most
        elif how == "bfly":
            source, good = lane ^ b, (lane ^ b) <= most
        else:
            source = least | (b & ~segment)
            good = source <= most
        source = self.warp_start + np.where(good, source, lane)
        active = self._spread(self.active(mask))
        if np.any(active & ~active[source]):
            raise PTXError("shfl.sync reads a lane that does not take part")
        return value[source], good

    def vote(self, mask, how, truth, members):
        self.check_members(mask, members, "vote.sync")
        active = self._spread(self.active(mask)).reshape(-1, WARP)
        truth = self._spread(truth).reshape(-1, WARP) & active
        count, of = truth.sum(1), active.sum(1)
        result = {
            "all": lambda: count == of,
            "any": lambda: count > 0,
            "uni": lambda: (count == of) | (count == 0),
            "ballot": lambda: (truth.astype(i64) << np.arange(WARP)).sum(1).astype(u32),
        }[how]()
        return np.repeat(result, WARP)

    def active_mask(self, mask):
        active = self._spread(self.active(mask)).reshape(-1, WARP)
        return np.repeat((active.astype(i64) << np.arange(WARP)).sum(1).astype(u32), WARP)

    def match(self, mask, how, value, members):
        """(lanes that hold the same value, whether all do); of match.all the lanes are 0 where they
        differ"""
        self.check_members(mask, members, "match.sync")
        active = self._spread(self.active(mask)).reshape(-1, WARP)
        value = self._spread(value).reshape(-1, WARP)
        same = (value[:, :, None] == value[:, None, :]) & active[:, None, :]
        lanes = (same.astype(i64) << np.arange(WARP)).sum(2).astype(u32)
        if how == "any":
            return lanes.reshape(-1), None
        every = (same | ~active[:, None, :]).all(2)
        return np.where(every, lanes, u32(0)).reshape(-1), every.reshape(-1)

    def reduce(self, mask, how, value, members):
        """redux.sync"""
        self.check_members(mask, members, "redux.sync")
        active = self._spread(self.active(mask)).reshape(-1, WARP)
        value = self._spread(value).reshape(-1, WARP)
        result = np.zeros(len(value), value.dtype)
        for warp in np.flatnonzero(active.any(1)):
            result[warp] = _REDUCE[how].reduce(value[warp][active[warp]], dtype=value.dtype)
        return np.repeat(result, WARP)
