"""Moves, conversions, bits and comparisons."""

from .kinds import FLOATS, KINDS, UNSIGNED, PTXError, name_of, width_of

_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_COMPARE |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
_COMBINE = {"and": "&", "or": "|", "xor": "^"}
_INTEGRAL = ("rni", "rzi", "rmi", "rpi")


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
            return self._convert_pair(parts, to.removesuffix("x2"), how, o)
        a = self.operand(o[1], source)
        if source == "bf16":
            a = f"bf16_to_f32({a})"
        if "ftz" in how and source == "f32":
            a = f"ftz({a})"
        rest = [h for h in how if h != "ftz"]
        if source in FLOATS and to in FLOATS:
            return self._float_to_float(parts, source, to, a, rest, o)
        if to == "tf32":
            assert rest == ["rna"] and source == "f32"
            return self.assign(o[0], f"to_tf32({a})")
        if source in FLOATS:
            (mode,) = (h for h in rest if h != "sat")  # to integers it saturates anyhow
            assert mode in _INTEGRAL
            return self.assign(o[0], f"to_integer({a}, {name_of(to)}, {mode!r})", to)
        if to in FLOATS:
            return self._integer_to_float(parts, source, to, a, rest, o)
        assert rest in ([], ["sat"])
        if rest:
            info = f"np.iinfo({name_of(to)})"
            wide = f"({a}).astype(object)" if source == "u64" else f"({a}).astype(i64)"
            return self.assign(
                o[0], f"np.clip({wide}, int({info}.min), int({info}.max)).astype({name_of(to)})", to
            )
        return self.assign(o[0], f"({a}).astype({name_of(to)})", to)

    def _convert_pair(self, parts, to, how, o):
        assert parts[-1] == "f32" and how in (["rn"], ["rz"])
        one = "f32_to_bf16({}, {!r})" if to == "bf16" else "to_f16({}, {!r}).view(u16)"
        high, low = (one.format(self.operand(v, "f32"), how[0]) for v in o[1:3])
        self.assign(o[0], f"packed({low}, {high})")

    def _float_to_float(self, parts, source, to, a, how, o):
        whole = [h for h in how if h in _INTEGRAL]
        modes = [h for h in how if h in ("rn", "rz", "rm", "rp")]
        assert set(how) <= {*whole, *modes, "sat"} and len(whole) + len(modes) <= 1
        if whole:
            a = f"integral({a}, {whole[0]!r})"
        if "sat" in how:
            a = f"saturated({a})"
        mode = modes[0] if modes else "rn"
        if to == "bf16":
            assert source in ("f32", "bf16") and mode in ("rn", "rz")
            return self.assign(o[0], f"f32_to_bf16({a}, {mode!r})", "b16")
        if to == "f16":
            return self.assign(o[0], f"to_f16({a}, {mode!r})", to)
        if to == "f32" and mode != "rn":
            a = f"to_f32({a}, 0.0, {mode!r})"
        result = f"np.asarray({a}).astype({name_of(to)})[()]"
        return self.assign(o[0], f"ftz({result})" if "ftz" in parts and to == "f32" else result, to)

    def _integer_to_float(self, parts, source, to, a, how, o):
        assert len(how) == 1 and how[0] in ("rn", "rz", "rm", "rp")
        if how[0] == "rn" and to in ("f32", "f64"):
            return self.assign(o[0], f"({a}).astype({name_of(to)})", to)
        if source[1:] == "64":
            raise PTXError(f"{'.'.join(parts)} is not implemented")
        a = f"({a}).astype(f64)"  # exact
        if to == "f64":
            return self.assign(o[0], a, to)
        if to == "bf16":
            assert how[0] == "rn" and source[1:] != "32"
            return self.assign(o[0], f"f32_to_bf16(({a}).astype(f32))", "b16")
        return self.assign(o[0], f"to_{to}({a}, {'0.0, ' if to == 'f32' else ''}{how[0]!r})", to)

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
        combine = parts[2] if len(o) > 3 else None
        self.only(parts, how, "ftz", *([combine] if combine else []))
        targets = [t.strip() for t in o[0].split("|")]
        if kind.endswith("x2"):  # two comparisons: of the low halves, and of the high ones
            assert len(targets) == 2 and "ftz" not in parts
            values = ", ".join(f"halves({self.operand(v, 'b32')})" for v in o[1:3])
            self.lines.append(f"h = [{values}]")
            kind = kind.removesuffix("x2")
            as_kind = ".view(f16)" if kind == "f16" else ""
            results = [
                self._test(how, kind, *(f"h[{i}][{side}]{as_kind}" for i in (0, 1)))
                for side in (0, 1)
            ]
        else:
            a, b = self.operand(o[1], kind), self.operand(o[2], kind)
            if "ftz" in parts:
                a, b = f"ftz({a})", f"ftz({b})"
            test = self._test(how, kind, a, b)
            results = [test, f"~{test}"]
        if combine:
            other = self.operand(o[3].lstrip("!"), "pred")
            other = f"~{other}" if o[3].startswith("!") else other
            results = [f"{result} {_COMBINE[combine]} {other}" for result in results]
        if len(targets) == 2:
            self.lines.append(f"v = ({results[0]}, {results[1]})")
            results = ["v[0]", "v[1]"]
        for target, result in zip(targets, results, strict=False):
            self.assign(target, result)

    def _test(self, how, kind, a, b):
        if kind == "bf16":
            a, b = f"bf16_to_f32({a})", f"bf16_to_f32({b})"
        return self._float_test(how, a, b) if kind in FLOATS else f"({a} {_COMPARE[how]} {b})"

    def _float_test(self, how, a, b):
        nan = f"np.isnan({a}) | np.isnan({b})"
        if how == "nan":
            return f"({nan})"
        if how == "num":
            return f"~({nan})"
        if how == "ne":
            return f"(({a} < {b}) | ({a} > {b}))"
        if how in ("eq", "lt", "le", "gt", "ge"):
            return f"({a} {_COMPARE[how]} {b})"
        if how == "neu":  # or not a number, here and below
            return f"~({a} == {b})"
        assert how[:-1] in _COMPARE and how.endswith("u")
        return f"(({a} {_COMPARE[how[:-1]]} {b}) | {nan})"
