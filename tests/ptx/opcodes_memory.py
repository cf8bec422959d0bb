"""Instructions that go to the run: memory, tickets, barriers, warps and matrices."""

import re

from .kinds import PTXError, width_of

_SPACES = ("global", "shared", "param")
_PLAIN = ("nc", "v2", "v4", "cta")  # of loads and stores: no matter here


class MemoryOpcodes:
    """Part of a Writer."""

    def space(self, parts):
        return next((space for space in _SPACES if space in parts), "generic")

    # ---- loads and stores

    def op_ld(self, parts, o):
        self.only(parts, *_SPACES, *_PLAIN)
        kind, targets, space = parts[-1], self.vector(o[0]), self.space(parts)
        size = width_of(kind)
        self.lines.append(
            f"v = E.load({space!r}, {self.address(o[1])}, {size}, {len(targets)}, {self.mask})"
        )
        for i, target in enumerate(targets):
            if kind.startswith("s"):
                self.assign(target, f"v[{i}].view(i{8 * size})", kind)
            else:
                self.assign(target, f"v[{i}]", f"b{8 * size}")

    def op_st(self, parts, o):
        self.only(parts, *_SPACES, *_PLAIN)
        kind = f"b{8 * width_of(parts[-1])}"
        values = "".join(f"{self.operand(v, kind)}, " for v in self.vector(o[1]))
        where = f"{self.space(parts)!r}, {self.address(o[0])}"
        self.lines.append(f"E.store({where}, ({values}), {width_of(kind)}, {self.mask})")

    def op_cvta(self, parts, o):
        assert "global" in parts  # whose generic addresses are the same numbers
        self.assign(o[0], self.operand(o[1], parts[-1]), parts[-1])

    def op_atom(self, parts, o):
        assert parts[1:] == ["acq_rel", "gpu", "global", "inc", "u32"]
        last = self.operand(o[2], "u32")
        self.lines.append(f"v = E.increment({self.mask}, {self.address(o[1])}, {last})")
        self.assign(o[0], "v", "b32")

    def op_cp(self, parts, o):
        if parts[1] != "async" or "bulk" in parts or "mbarrier" in parts:
            raise PTXError(f"{'.'.join(parts)} is not implemented")
        if parts[2] == "commit_group":
            self.lines.append(f"E.commit_group({self.mask})")
        elif parts[2] == "wait_group":
            self.lines.append(f"E.wait_group({self.mask}, {int(o[0], 0)})")
        else:
            count = self.operand(o[3], "u32") if len(o) > 3 else int(o[2], 0)
            where = f"{self.address(o[0])}, {self.address(o[1])}"
            self.lines.append(f"E.cp_async({self.mask}, {where}, {int(o[2], 0)}, {count})")

    # ---- blocks and warps

    def op_fence(self, parts, o):
        """Without effect here: blocks run in lockstep or one after the other, and see each other's
        writes at once."""

    def op_bar(self, parts, o):
        if parts[1:] == ["warp", "sync"]:
            self.lines.append(
                f"E.check_members({self.mask}, {self.operand(o[0], 'u32')}, 'bar.warp.sync')"
            )
        elif parts[1:] == ["sync"] and o == ["0"]:
            self.lines.append(f"E.barrier({self.mask})")
        else:
            raise PTXError(f"{'.'.join(parts)} {', '.join(o)} is not implemented")

    def op_shfl(self, parts, o):
        assert parts[1] == "sync" and parts[2] in ("down", "bfly", "idx") and parts[-1] == "b32"
        value, b, c, members = (self.operand(v, "b32") for v in o[1:5])
        self.lines.append(f"v = E.shuffle({self.mask}, {parts[2]!r}, {value}, {b}, {c}, {members})")
        for i, target in enumerate(o[0].split("|")):
            self.assign(target.strip(), f"v[{i}]", "b32" if i == 0 else None)

    # ---- matrices

    def op_ldmatrix(self, parts, o):
        assert "m8n8" in parts and parts[-1] == "b16"
        targets = self.vector(o[0])
        how = f"{len(targets)}, {'trans' in parts}"
        self.lines.append(f"v = E.ldmatrix({self.mask}, {self.address(o[1])}, {how})")
        self.assign_all(targets)

    def op_stmatrix(self, parts, o):
        assert "m8n8" in parts and parts[-1] == "b16"
        registers = self.listed(o[1])
        self.lines.append(
            f"E.stmatrix({self.mask}, {self.address(o[0])}, {registers}, {'trans' in parts})"
        )

    def op_mma(self, parts, o):
        shape, kind = parts[3], parts[7]
        known = {"m16n8k16": ("f16", "bf16"), "m16n8k8": ("tf32",)}
        if parts[4:6] != ["row", "col"] or (parts[6], parts[9]) != ("f32", "f32"):
            raise PTXError(f"{'.'.join(parts)} is not implemented")
        if kind not in known.get(shape, ()) or kind != parts[8] or len(parts) != 10:
            raise PTXError(f"{'.'.join(parts)} is not implemented")
        a, b, c = (self.listed(v) for v in o[1:4])
        self.lines.append(f"v = E.mma({self.mask}, {kind!r}, {a}, {b}, {c})")
        self.assign_all(self.vector(o[0]))

    def op_wgmma(self, parts, o):
        if parts[1] == "fence":
            return
        if parts[1] == "commit_group":
            self.lines.append("E.wgmma_commit()")
            return
        if parts[1] == "wait_group":
            self.lines.append(f"E.wgmma_wait({int(o[0], 0)})")
            return
        shape, kind = re.match(r"m64n(\d+)k16$", parts[4]), parts[6]
        if not shape or parts[5] != "f32" or kind != parts[7] or kind not in ("f16", "bf16"):
            raise PTXError(f"{'.'.join(parts)} is not implemented")
        targets, in_registers = self.vector(o[0]), o[1].startswith("{")
        a = self.listed(o[1]) if in_registers else self.operand(o[1], "b64")
        keep, signs = self.operand(o[3], "pred"), int(o[4]) * int(o[5])
        rest = [int(v) for v in o[6:]]
        ta, tb = (0, rest[0]) if in_registers else rest
        d, b = self.listed(o[0]), self.operand(o[2], "b64")
        what = f"{kind!r}, {int(shape[1])}, {d}, {a}, {b}, {keep}, {signs}, {ta}, {tb}"
        self.lines.append(f"v = E.wgmma({self.mask}, {what})")
        self.assign_all(targets)
