"""What threads do together: barriers and shuffles."""

import numpy as np

from .kinds import WARP, PTXError, i32, i64, u32


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
