"""ldmatrix, stmatrix, mma and wgmma: exact products, added in float64 and rounded once per
instruction."""

import numpy as np

from .kinds import WARP, PTXError, f16, f32, f64, i64, u16, u32, u64
from .rounding import bf16_to_f32
from .shared import SEVERAL

GROUP = 4 * WARP  # the threads of a wgmma


class Matrices:
    """Part of a Run."""

    def ldmatrix(self, mask, address, count, transposed):
        self.whole_warps(mask, "ldmatrix")
        mask = self._spread(self.active(mask))
        address = self._spread(address)
        where = np.flatnonzero(mask & (self.lane < 8 * count))
        place = self.place_in_shared(address[where], 16, where)
        # A row is read by the whole warp; its thread stands for it, and another warp is another
        # thread.
        self.note_read(place, 16, where)
        rows = np.zeros((self.T, 8), u16)
        rows[where] = self.shared.view(u16).reshape(-1, 8)[place // 16]
        of = rows.reshape(-1, WARP, 8)[:, : 8 * count].reshape(-1, count, 8, 8)
        if transposed:
            of = of.transpose(0, 1, 3, 2)
        words = np.ascontiguousarray(of).view(u32).reshape(-1, count, WARP)  # lane = 4 row + pair
        return [np.ascontiguousarray(words[:, i]).reshape(-1) for i in range(count)]

    def stmatrix(self, mask, address, registers, transposed):
        self.whole_warps(mask, "stmatrix")
        mask, count = self._spread(self.active(mask)), len(registers)
        words = np.stack([self._spread(r).reshape(-1, WARP) for r in registers], axis=1)
        of = np.ascontiguousarray(words).view(u16).reshape(-1, count, 8, 8)
        if transposed:
            of = of.transpose(0, 1, 3, 2)
        rows = np.zeros((len(of), WARP, 8), u16)
        rows[:, : 8 * count] = of.reshape(-1, 8 * count, 8)
        where = np.flatnonzero(mask & (self.lane < 8 * count))
        place = self.place_in_shared(self._spread(address)[where], 16, where)
        self.shared.view(u16).reshape(-1, 8)[place // 16] = rows.reshape(-1, 8)[where]
        self.note_write(place, 16, where)

    def _operand(self, registers, kind):
        """Registers as float64 [warps, lanes, elements]: two of 16 bits of each, or one tf32"""
        words = np.stack([self._spread(r) for r in registers], axis=1)
        if kind == "tf32":
            wide = (words & u32(0xFFFFE000)).view(f32).astype(f64)
            return wide.reshape(-1, WARP, len(registers))
        halves = np.ascontiguousarray(words).view(u16)
        wide = halves.view(f16).astype(f64) if kind == "f16" else bf16_to_f32(halves).astype(f64)
        return wide.reshape(-1, WARP, 2 * len(registers))

    def mma(self, mask, kind, a, b, c):
        """m16n8k16 of 16-bit data and m16n8k8 of tf32, float32 sums"""
        self.whole_warps(mask, "mma.sync")
        a, b = self._operand(a, kind), self._operand(b, kind)
        lane = np.arange(WARP)
        group, within = lane // 4, lane % 4
        depth = 8 if kind == "tf32" else 16
        left, right = np.zeros((len(a), 16, depth)), np.zeros((len(a), depth, 8))
        if kind == "tf32":
            for i in range(4):
                left[:, group + 8 * (i & 1), within + 4 * (i >> 1)] = a[:, :, i]
            for i in range(2):
                right[:, within + 4 * i, group] = b[:, :, i]
        else:
            for i in range(8):
                left[:, group + 8 * (i >> 1 & 1), 2 * within + (i & 1) + 8 * (i >> 2)] = a[:, :, i]
            for i in range(4):
                right[:, 2 * within + (i & 1) + 8 * (i >> 1), group] = b[:, :, i]
        sums = np.zeros((len(a), 16, 8))
        places = [(group + 8 * (i >> 1), 2 * within + (i & 1)) for i in range(4)]
        for (row, col), register in zip(places, c, strict=True):
            sums[:, row, col] = self._spread(register).view(f32).reshape(-1, WARP)
        total = (left @ right + sums).astype(f32)
        return [
            np.ascontiguousarray(total[:, row, col]).reshape(-1).view(u32) for row, col in places
        ]

    # ---- wgmma

    def _described(self, descriptor, rows, transposed, leaders):
        """Byte offsets [warpgroups, rows, 16] of a matrix in shared memory, by a descriptor; rows:
        those of A or B's columns"""
        descriptor = self._spread(descriptor).reshape(-1, GROUP)
        if np.any(descriptor != descriptor[:, :1]):
            raise PTXError("wgmma: the threads of a warpgroup disagree about a descriptor")
        d = descriptor[leaders, 0].astype(u64)
        fields = [((d >> u64(at)) & u64(0x3FFF)).astype(i64) << 4 for at in (0, 16, 32)]
        start, leading, stride = (field[:, None, None] for field in fields)
        modes = set((d >> u64(62)).tolist())
        if len(modes) != 1 or np.any((d >> u64(49)) & u64(7)):
            raise PTXError(
                "wgmma: a descriptor with a base offset, or of several modes, is not implemented"
            )
        mode = modes.pop()
        pitch = {0: 16, 1: 128, 2: 64, 3: 32}[mode]
        i, k = np.arange(rows)[:, None], np.arange(16)[None, :]
        if transposed:  # rows lie side by side
            per = pitch // 2
            if mode == 0:
                leading, stride = stride, leading
            offset = i // per * leading + k // 8 * stride + (k % 8 * pitch + i % per * 2)
        elif mode == 0:
            offset = i // 8 * stride + k // 8 * leading + (i % 8 * 16 + k % 8 * 2)
        else:
            offset = i // 8 * stride + (i % 8 * pitch + k * 2)
        address = start + offset
        return address ^ (((address >> 7) & {0: 0, 1: 7, 2: 3, 3: 1}[mode]) << 4)

    def _matrix(self, descriptor, rows, transposed, kind, leaders):
        """Its values, and from here on its units are being read"""
        address = self._described(descriptor, rows, transposed, leaders)
        if np.any((address < 0) | (address + 2 > self.shared_size)):
            raise PTXError(
                f"wgmma reads byte {int(address.max())} of {self.shared_size} of shared memory"
            )
        place = address + self.shared_base.reshape(-1, GROUP)[leaders, 0][:, None, None]
        units = place // self.unit
        last = self.written[units]
        if not last.all() or (self.in_flight is not None and self.in_flight[units].any()):
            raise PTXError(
                "wgmma reads shared memory that nobody wrote, or that cp.async has not delivered"
            )
        epoch = self.epoch[self.cta.reshape(-1, GROUP)[leaders, 0]][:, None, None]
        mine = self.stamp.reshape(-1, GROUP)[leaders, 0][:, None, None]
        if self.races and np.any(((last >> 11) == epoch) & (last != mine)):
            raise PTXError(
                "race: wgmma reads shared memory that was written since the last barrier"
            )
        self.busy[units] = True
        self.reading.append((self.group, units, leaders))
        halves = self.shared.view(u16)[place // 2]
        return halves.view(f16).astype(f64) if kind == "f16" else bf16_to_f32(halves).astype(f64)

    def wgmma(self, mask, kind, n, d, a, b, keep, signs, transposed_a, transposed_b):
        """D [64, n] = keep D + A B. a: four registers or a descriptor."""
        active = self._spread(self.active(mask)).reshape(-1, GROUP)
        if np.any(active.any(1) & ~active.all(1)):
            raise PTXError("wgmma executed by a part of a warpgroup")
        leaders = np.flatnonzero(active[:, 0])
        lane = np.arange(GROUP)
        warp, group, within = lane // 32, lane % 32 // 4, lane % 4
        right = self._matrix(b, n, transposed_b, kind, leaders)
        if isinstance(a, list):
            of = self._operand(a, kind).reshape(-1, GROUP, 8)[leaders]
            left = np.zeros((len(leaders), 64, 16))
            for i in range(8):
                row, col = 16 * warp + group + 8 * (i >> 1 & 1), 2 * within + (i & 1) + 8 * (i >> 2)
                left[:, row, col] = of[:, :, i]
        else:
            left = self._matrix(a, 64, transposed_a, kind, leaders)
        product = signs * (left @ right.transpose(0, 2, 1))
        keep = self._spread(keep)
        results = []
        for r, register in enumerate(d):
            row, col = 16 * warp + group + 8 * (r >> 1 & 1), 8 * (r >> 2) + 2 * within + (r & 1)
            old = np.where(keep, self._spread(register).view(f32), f32(0)).astype(f64)
            old = old.reshape(-1, GROUP)
            old[leaders] += product[:, row, col]
            results.append(old.astype(f32).reshape(-1).view(u32))
        return results

    def wgmma_commit(self):
        self.group += 1

    def wgmma_wait(self, most):
        """All groups but the last `most` have read what they read."""
        left = []
        for group, units, leaders in self.reading:
            if group < self.group - most:
                stamp = self.stamp.reshape(-1, GROUP)[leaders, 0][:, None, None] | SEVERAL
                self.read[units] = np.broadcast_to(stamp, units.shape)
            else:
                left.append((group, units, leaders))
        self.reading = left
        self.busy[:] = False
        for _, units, _ in left:
            self.busy[units] = True
