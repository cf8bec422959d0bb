"""Instructions that go to the run: memory, atomic operations, barriers, warps and matrices."""

import re

from .kinds import WINDOWS, PTXError, u64, width_of

_SPACES = ("global", "shared", "param", "local")
# What says how soon others see an access, or how it is cached: no matter here.
_ORDER = set(
    ["relaxed", "acquire", "release", "acq_rel", "volatile", "weak", "cta", "cluster", "gpu", "sys"]
)
_CACHES = set(
    [
        "nc",
        "ca",
        "cg",
        "cs",
        "lu",
        "cv",
        "wb",
        "wt",
        "cop",
        "v2",
        "v4",
        "L1",
        "L2",
        "no_allocate",
        "cache_hint",
    ]
)
_CACHES |= set(
    ["evict_first", "evict_last", "evict_normal", "evict_unchanged", "64B", "128B", "256B"]
)


class MemoryOpcodes:
    """Part of a Writer."""

    def space(self, parts):
        if "const" in parts:
            raise PTXError(f"{'.'.join(parts)}: .const memory is not implemented")
        return next((space for space in _SPACES if space in parts), "generic")

    # ---- loads and stores

    def op_ld(self, parts, o):
        self.only(parts, *_SPACES, *_ORDER, *_CACHES)
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
        self.only(parts, *_SPACES, *_ORDER, *_CACHES)
        kind = f"b{8 * width_of(parts[-1])}"
        values = "".join(f"{self.operand(v, kind)}, " for v in self.vector(o[1]))
        where = f"{self.space(parts)!r}, {self.address(o[0])}"
        self.lines.append(f"E.store({where}, ({values}), {width_of(kind)}, {self.mask})")

    def op_cvta(self, parts, o):
        space = next(s for s in _SPACES if s in parts)
        value = self.operand(o[1], parts[-1])
        if space in ("shared", "local"):
            window = self.constant(u64(WINDOWS[space]))
            value = f"{value} {'-' if 'to' in parts else '+'} {window}"
        self.assign(o[0], value, parts[-1])

    def op_atom(self, parts, o):
        self._atomic(parts, o[0], o[1:])

    def op_red(self, parts, o):
        self._atomic(parts, None, o)

    def _atomic(self, parts, target, o):
        operations = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
        how, kind = next(p for p in parts[1:] if p in operations), parts[-1]
        self.only(parts, how, "global", "shared", *_ORDER)
        allowed = {"add": ("u32", "s32", "u64", "f32", "f64"), "inc": ("u32",), "dec": ("u32",)}
        if kind not in allowed.get(how, ("u32", "s32", "u64", "s64", "b32", "b64")):
            raise PTXError(f"{'.'.join(parts)} is not implemented")
        bits = f"b{8 * width_of(kind)}"
        values = [self.operand(v, f"b{8 * width_of(kind)}") for v in o[1:]]
        b, c = (*values, "None")[:2]
        where = f"{self.space(parts)!r}, {how!r}, {kind!r}, {self.address(o[0])}"
        self.lines.append(f"v = E.atomic({self.mask}, {where}, {b}, {c}, {width_of(kind)})")
        if target is not None:
            self.assign(target, "v", bits)

    def op_cp(self, parts, o):
        if parts[1] != "async" or "bulk" in parts or "mbarrier" in parts:
            raise PTXError(f"{'.'.join(parts)} is not implemented")
        if parts[2] == "commit_group":
            self.lines.append(f"E.commit_group({self.mask})")
        elif parts[2] == "wait_group":
            self.lines.append(f"E.wait_group({self.mask}, {int(o[0], 0)})")
        elif parts[2] == "wait_all":
            self.lines.append(f"E.commit_group({self.mask}); E.wait_group({self.mask}, 0)")
        else:
            count = self.operand(o[3], "u32") if len(o) > 3 else int(o[2], 0)
            where = f"{self.address(o[0])}, {self.address(o[1])}"
            self.lines.append(f"E.cp_async({self.mask}, {where}, {int(o[2], 0)}, {count})")

    # ---- blocks and warps

    def op_bar(self, parts, o):
        if parts[1:] == ["warp", "sync"]:
            self.lines.append(
                f"E.check_members({self.mask}, {self.operand(o[0], 'u32')}, 'bar.warp.sync')"
            )
        elif parts[1:] in (["sync"], ["sync", "aligned"]) and o == ["0"]:
            self.lines.append(f"E.barrier({self.mask})")
        elif parts[1] == "red" and o[1] == "0" and len(o) == 3:
            how = parts[2]
            truth = self.operand(o[2].lstrip("!"), "pred")
            truth = f"~{truth}" if o[2].startswith("!") else truth
            self.lines.append(f"v = E.barrier_reduce({self.mask}, {how!r}, {truth})")
            self.assign(o[0], "v", "b32" if how == "popc" else None)
        else:
            raise PTXError(f"{'.'.join(parts)} {', '.join(o)} is not implemented")

    def op_barrier(self, parts, o):
        self.op_bar([p for p in parts if p != "cta"], o)

    def op_shfl(self, parts, o):
        assert parts[1] == "sync" and parts[-1] == "b32"
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
