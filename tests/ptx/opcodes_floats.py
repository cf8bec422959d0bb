"""Arithmetic: add to rcp, of integers and floats, each with one rounding."""

from .kinds import FLOATS, PTXError, name_of, u16, u32

MODES = ("rn", "rz", "rm", "rp")
_ONE = {"f16": 0x3C00, "bf16": 0x3F80}


class FloatOpcodes:
    """Part of a Writer."""

    def _mode(self, parts):
        return next((p for p in parts if p in MODES), "rn")

    def _inputs(self, o, kind, parts):
        values = [self.operand(v, kind) for v in o]
        return [f"ftz({v})" for v in values] if "ftz" in parts else values

    def _finish(self, target, expression, kind, parts):
        if "ftz" in parts:
            expression = f"ftz({expression})"
        if "sat" in parts:
            expression = f"saturated({expression})"
        self.assign(target, expression, kind)

    # ---- sums and products

    def _half(self, parts, o, how):
        """16-bit floats, one or two in a register: a product and a sum, rounded once"""
        kind = parts[-1].removesuffix("x2")
        self.only(parts, "rn")
        one, minus = (self.constant(u16(_ONE[kind] | sign)) for sign in (0, 0x8000))
        zero = self.constant(u16(0x8000))
        values = [self.operand(v, "b32" if parts[-1].endswith("x2") else "b16") for v in o[1:]]
        order = {
            "+": "{one}, {0}, {1}",
            "-": "{minus}, {1}, {0}",
            "*": "{0}, {1}, {zero}",
            "fma": "{0}, {1}, {2}",
        }[how]

        def of(*names):
            return f"sum16({kind!r}, {order.format(*names, one=one, minus=minus, zero=zero)})"

        if not parts[-1].endswith("x2"):
            return self.assign(o[0], of(*values), "b16")
        self.lines.append("h = [" + ", ".join(f"halves({v})" for v in values) + "]")
        low, high = (of(*(f"h[{i}][{side}]" for i in range(len(values)))) for side in (0, 1))
        return self.assign(o[0], f"packed({low}, {high})")

    def _arithmetic(self, parts, o, symbol):
        kind = parts[-1]
        if kind in ("f16", "bf16", "f16x2", "bf16x2"):
            return self._half(parts, o, symbol)
        if kind[0] != "f":
            self.only(parts, "lo") if symbol == "*" else self.only(parts)
            a, b = (self.operand(v, kind) for v in o[1:3])
            return self.assign(o[0], f"{a} {symbol} {b}", kind)
        self.only(parts, *MODES, "ftz", "sat")
        a, b = self._inputs(o[1:3], kind, parts)
        self.products.pop(o[0], None)
        if self.contract and len(parts) == 2 and self._fuse(o, kind, symbol, a, b):
            return None
        how = self._mode(parts)
        if how == "rn":
            expression = f"{a} {symbol} {b}"
        else:
            name = "mul" if symbol == "*" else "add"
            expression = f"{name}{kind[1:]}({a}, {'-' if symbol == '-' else ''}{b}, {how!r})"
        return self._finish(o[0], expression, kind, parts)

    def _fuse(self, o, kind, symbol, a, b):
        """A product and a sum that ptxas may contract; whether this was such a sum"""
        if symbol == "*":
            if o[0] not in o[1:]:
                self.products[o[0]] = (a, b)
            return False
        sign = "-" if symbol == "-" else ""
        if o[1] in self.products:
            x, y = self.products[o[1]]
            self.assign(o[0], f"fma{kind[1:]}({x}, {y}, {sign}{b})", kind)
        elif o[2] in self.products:
            x, y = self.products[o[2]]
            self.assign(o[0], f"fma{kind[1:]}({sign}{x}, {y}, {a})", kind)
        else:
            return False
        return True

    def op_add(self, parts, o):
        self._arithmetic(parts, o, "+")

    def op_sub(self, parts, o):
        self._arithmetic(parts, o, "-")

    def op_mul(self, parts, o):
        kind = parts[-1]
        if parts[1] == "wide":
            return self.assign(o[0], self._wide(kind, o), self._doubled(kind))
        if parts[1] == "hi":
            return self.assign(o[0], self._high(kind, o), kind)
        return self._arithmetic(parts, o, "*")

    def _doubled(self, kind):
        return f"{kind[0]}{2 * int(kind[1:])}"

    def _wide(self, kind, o):
        to = name_of(self._doubled(kind))
        return " * ".join(f"{self.operand(v, kind)}.astype({to})" for v in o[1:3])

    def _high(self, kind, o):
        if kind[1:] == "64":
            function = "high64" if kind == "u64" else "signed_high64"
            return f"{function}({self.operand(o[1], kind)}, {self.operand(o[2], kind)})"
        to = name_of(self._doubled(kind))
        return f"(({self._wide(kind, o)}) >> {to}({kind[1:]})).astype({name_of(kind)})"

    def op_mad(self, parts, o):
        kind = parts[-1]
        if kind[0] not in "us":
            raise PTXError(f"{'.'.join(parts)} is not implemented")
        if parts[1] == "wide":
            wide = self._doubled(kind)
            return self.assign(o[0], f"{self._wide(kind, o)} + {self.operand(o[3], wide)}", wide)
        if parts[1] == "hi":
            return self.assign(o[0], f"{self._high(kind, o)} + {self.operand(o[3], kind)}", kind)
        self.only(parts, "lo")
        a, b, c = (self.operand(v, kind) for v in o[1:4])
        return self.assign(o[0], f"{a} * {b} + {c}", kind)

    def op_fma(self, parts, o):
        kind = parts[-1]
        if kind not in ("f32", "f64"):
            return self._half(parts, o, "fma")
        self.only(parts, *MODES, "ftz", "sat")
        how = self._mode(parts)
        if kind == "f64" and how != "rn":
            raise PTXError(f"{'.'.join(parts)} is not implemented")
        a, b, c = self._inputs(o[1:4], kind, parts)
        return self._finish(o[0], f"fma{kind[1:]}({a}, {b}, {c}, {how!r})", kind, parts)

    # ---- quotients, roots, powers

    def op_div(self, parts, o):
        kind = parts[-1]
        if kind[0] in "us":
            self.only(parts)
            a, b = (self.operand(v, kind) for v in o[1:3])
            return self.assign(o[0], f"quotient({a}, {b})", kind)
        a, b = self._inputs(o[1:3], kind, parts)
        if parts[1] in ("full", "approx"):
            self.only(parts, "full", "approx", "ftz")
            assert kind == "f32"
            exact = f"fast_quotient({a}, {b}, {parts[1] == 'full'})"
            return self.assign(o[0], f"E.approximate('div', {exact}, {'ftz' in parts})", kind)
        self.only(parts, *MODES, "ftz")
        return self._finish(o[0], f"div{kind[1:]}({a}, {b}, {self._mode(parts)!r})", kind, parts)

    def _approximate(self, name, expression, parts, o):
        """expression: of {}, in float64"""
        assert parts[-1] == "f32" and "approx" in parts
        self.only(parts, "approx", "ftz")
        (a,) = self._inputs(o[1:2], "f32", parts)
        exact = expression.format(f"({a}).astype(f64)")
        self.assign(o[0], f"E.approximate({name!r}, {exact}, {'ftz' in parts})", "f32")

    def op_ex2(self, parts, o):
        self._approximate("ex2", "np.exp2({})", parts, o)

    def op_rsqrt(self, parts, o):
        self._approximate("rsqrt", "1 / np.sqrt({})", parts, o)

    def op_sqrt(self, parts, o):
        if "approx" in parts:
            return self._approximate("sqrt", "np.sqrt({})", parts, o)
        self.only(parts, *MODES, "ftz")
        (a,) = self._inputs(o[1:2], parts[-1], parts)
        return self._finish(
            o[0], f"sqrt{parts[-1][1:]}({a}, {self._mode(parts)!r})", parts[-1], parts
        )

    def op_rcp(self, parts, o):
        if "approx" in parts:
            return self._approximate("rcp", "1 / {}", parts, o)
        self.only(parts, *MODES, "ftz")
        kind = parts[-1]
        (a,) = self._inputs(o[1:2], kind, parts)
        return self._finish(
            o[0], f"div{kind[1:]}({name_of(kind)}(1), {a}, {self._mode(parts)!r})", kind, parts
        )

    # ---- signs, the least and the greatest

    def _signs(self, parts, o, of_bits, of_numbers):
        """of_bits: of 16-bit floats, {0}, and the mask of their signs, {1}"""
        kind = parts[-1]
        if "16" in kind and kind != "s16":
            plain = "b32" if kind.endswith("x2") else "b16"
            mask = self.constant(u32(0x80008000) if plain == "b32" else u16(0x8000))
            self.only(parts)
            return self.assign(o[0], of_bits.format(self.operand(o[1], plain), mask), plain)
        self.only(parts, "ftz")
        (a,) = self._inputs(o[1:2], kind, parts)
        return self.assign(o[0], of_numbers.format(a), kind)

    def op_abs(self, parts, o):
        self._signs(parts, o, "{0} & ~{1}", "np.abs({})")

    def op_neg(self, parts, o):
        self._signs(parts, o, "{0} ^ {1}", "-{}")

    def _extreme(self, parts, o, name, integers):
        kind = parts[-1]
        assert len(o) == 3
        if kind[0] in "us":
            self.only(parts)
            a, b = (self.operand(v, kind) for v in o[1:3])
            return self.assign(o[0], f"{integers}({a}, {b})", kind)
        self.only(parts, "NaN", "ftz")
        nan = "NaN" in parts
        if kind in ("f32", "f64"):
            a, b = self._inputs(o[1:3], kind, parts)
            return self.assign(o[0], f"{name}({a}, {b}, {nan}, u{kind[1:]})", f"b{kind[1:]}")
        assert kind.removesuffix("x2") in FLOATS
        half = f"{name}16({kind.removesuffix('x2')!r}, {{0}}, {{1}}, {nan})"
        if not kind.endswith("x2"):
            return self.assign(o[0], half.format(*(self.operand(v, "b16") for v in o[1:3])), "b16")
        self.lines.append(
            "h = [" + ", ".join(f"halves({self.operand(v, 'b32')})" for v in o[1:3]) + "]"
        )
        low, high = (half.format(f"h[0][{side}]", f"h[1][{side}]") for side in (0, 1))
        return self.assign(o[0], f"packed({low}, {high})")

    def op_min(self, parts, o):
        self._extreme(parts, o, "float_min", "np.minimum")

    def op_max(self, parts, o):
        self._extreme(parts, o, "float_max", "np.maximum")
