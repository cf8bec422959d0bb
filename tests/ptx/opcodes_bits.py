"""Moves, conversions, bits and comparisons."""

from .kinds import FLOATS, KINDS, UNSIGNED, name_of, width_of

_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


class BitOpcodes:
    """Part of a Writer."""

    # ---- moves

    def op_mov(self, parts, o):
        kind = parts[1]
        if kind == "pred":
            return self.assign(o[0], self.operand(o[1], "pred"))
        total = 8 * width_of(kind)
        if o[1].startswith("{"):
            pieces = self.vector(o[1])
            bits = total // len(pieces)
            terms = [
                f"({self.operand(p, f'b{bits}')}.astype(u{total}) << "
                f"{self._count(i * bits, total)})"
                for i, p in enumerate(pieces)
            ]
            return self.assign(o[0], " | ".join(terms))
        if o[0].startswith("{"):
            pieces = self.vector(o[0])
            bits = total // len(pieces)
            self.lines.append(f"w = {self.operand(o[1], f'b{total}')}")
            for i, piece in enumerate(pieces):
                self.assign(piece, f"(w >> {self._count(i * bits, total)}).astype(u{bits})")
            return None
        plain = f"b{total}"
        return self.assign(o[0], self.operand(o[1], plain), plain)

    def _count(self, bits, total):
        return self.constant(UNSIGNED[total // 8](bits))

    def op_selp(self, parts, o):
        kind = f"b{8 * width_of(parts[1])}"
        a, b = self.operand(o[1], kind), self.operand(o[2], kind)
        self.assign(o[0], f"np.where({self.operand(o[3], 'pred')}, {a}, {b})[()]", kind)

    # ---- conversions

    def op_cvt(self, parts, o):
        to, source, how = parts[-2], parts[-1], parts[1:-2]
        if to in ("bf16x2", "f16x2"):
            assert source == "f32" and how == ["rn"]
            one = "f32_to_bf16({})" if to == "bf16x2" else "({}).astype(f16).view(u16)"
            high, low = (one.format(self.operand(v, "f32")) for v in o[1:3])
            return self.assign(o[0], f"packed({low}, {high})")
        a = self.operand(o[1], source)
        if to not in FLOATS:
            assert source not in FLOATS and not how
        elif source not in FLOATS:
            assert how == ["rn"]
        elif how in (["rni"], ["sat"]):
            assert to == source == "f32"
            a = f"{'np.rint' if how == ['rni'] else 'saturated'}({a})"
        else:
            assert how in ([], ["rn"])
            a = f"bf16_to_f32({a})" if source == "bf16" else a
        if to == "bf16":
            assert source == "f32"
            return self.assign(o[0], f"f32_to_bf16({a})", "b16")
        return self.assign(o[0], f"np.asarray({a}).astype({name_of(to)})[()]", to)

    # ---- bits

    def _bits(self, parts, o, symbol):
        kind = parts[1]
        self.assign(o[0], f"{self.operand(o[1], kind)} {symbol} {self.operand(o[2], kind)}")

    def op_and(self, parts, o):
        self._bits(parts, o, "&")

    def op_or(self, parts, o):
        self._bits(parts, o, "|")

    def op_xor(self, parts, o):
        self._bits(parts, o, "^")

    def op_not(self, parts, o):
        self.assign(o[0], f"~{self.operand(o[1], parts[1])}")

    def op_shl(self, parts, o):
        kind = f"b{8 * width_of(parts[1])}"
        self.assign(o[0], self._shift("<<", "shift_left", o, kind), kind)

    def op_shr(self, parts, o):
        self.assign(o[0], self._shift(">>", "shift_right", o, parts[1]), parts[1])

    def _shift(self, symbol, function, o, kind):
        a, amount, bits = self.operand(o[1], kind), o[2], 8 * width_of(kind)
        if amount not in self.registers and int(amount, 0) < bits:
            return f"{a} {symbol} {self.constant(KINDS[kind](int(amount, 0)))}"
        return f"{function}({a}, {self.operand(amount, 'u32')}, {bits})"

    def op_bfe(self, parts, o):
        assert parts[1] in ("u32", "s32")
        a, position, length = (self.operand(v, "u32") for v in o[1:4])
        self.assign(o[0], f"bit_field({a}, {position}, {length}, {parts[1] == 's32'})")

    def op_prmt(self, parts, o):
        assert parts == ["prmt", "b32"]
        a, b, selector = (self.operand(v, "u32") for v in o[1:4])
        self.assign(o[0], f"permute_bytes({a}, {b}, {selector})")

    # ---- comparisons

    def op_setp(self, parts, o):
        kind, how = parts[-1], parts[1]
        self.only(parts, how)
        targets = [t.strip() for t in o[0].split("|")]
        if kind.endswith("x2"):  # two comparisons: of the low halves, and of the high ones
            assert len(targets) == 2
            values = ", ".join(f"halves({self.operand(v, 'b32')})" for v in o[1:3])
            self.lines.append(f"h = [{values}]")
            kind = kind.removesuffix("x2")
            as_kind = ".view(f16)" if kind == "f16" else ""
            results = [
                self._test(how, kind, *(f"h[{i}][{side}]{as_kind}" for i in (0, 1)))
                for side in (0, 1)
            ]
        else:
            test = self._test(how, kind, *(self.operand(v, kind) for v in o[1:3]))
            results = [test, f"~{test}"]
        if len(targets) == 2:
            self.lines.append(f"v = ({results[0]}, {results[1]})")
            results = ["v[0]", "v[1]"]
        for target, result in zip(targets, results, strict=False):
            self.assign(target, result)

    def _test(self, how, kind, a, b):
        if kind not in FLOATS:
            return f"({a} {_COMPARE[how]} {b})"
        if kind == "bf16":
            a, b = f"bf16_to_f32({a})", f"bf16_to_f32({b})"
        nan = f"np.isnan({a}) | np.isnan({b})"
        if how == "nan":
            return f"({nan})"
        if how == "ne":
            return f"(({a} < {b}) | ({a} > {b}))"
        if how in _COMPARE:
            return f"({a} {_COMPARE[how]} {b})"
        assert how.endswith("u")  # or not a number
        return f"(({a} {_COMPARE[how[:-1]]} {b}) | {nan})"
