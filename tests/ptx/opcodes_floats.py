"""Arithmetic of integers and floats: add to max."""

from .kinds import name_of, u16, u32


class FloatOpcodes:
    """Part of a Writer."""

    def _inputs(self, o, kind, parts):
        values = [self.operand(v, kind) for v in o]
        return [f"ftz({v})" for v in values] if "ftz" in parts else values

    # ---- sums and products

    def _arithmetic(self, parts, o, symbol):
        kind = parts[-1]
        a, b = (self.operand(v, kind) for v in o[1:3])
        if kind[0] != "f":
            self.only(parts, "lo") if symbol == "*" else self.only(parts)
            return self.assign(o[0], f"{a} {symbol} {b}", kind)
        self.only(parts, "rn")
        assert kind in ("f32", "f64")
        self.products.pop(o[0], None)
        if self.contract and len(parts) == 2 and self._fuse(o, kind, symbol, a, b):
            return None
        return self.assign(o[0], f"{a} {symbol} {b}", kind)

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
            high = f"({self._wide(kind, o)}) >> {name_of(self._doubled(kind))}({kind[1:]})"
            return self.assign(o[0], f"({high}).astype({name_of(kind)})", kind)
        return self._arithmetic(parts, o, "*")

    def _doubled(self, kind):
        return f"{kind[0]}{2 * int(kind[1:])}"

    def _wide(self, kind, o):
        to = name_of(self._doubled(kind))
        return " * ".join(f"{self.operand(v, kind)}.astype({to})" for v in o[1:3])

    def op_mad(self, parts, o):
        kind = parts[-1]
        if parts[1] == "wide":
            wide = self._doubled(kind)
            return self.assign(o[0], f"{self._wide(kind, o)} + {self.operand(o[3], wide)}", wide)
        self.only(parts, "lo")
        assert kind[0] in "us"
        a, b, c = (self.operand(v, kind) for v in o[1:4])
        return self.assign(o[0], f"{a} * {b} + {c}", kind)

    def op_fma(self, parts, o):
        kind, how = parts[-1], parts[1]
        self.only(parts, how, "ftz")
        assert (kind, how) in (("f32", "rn"), ("f32", "rm"), ("f64", "rn"))
        a, b, c = self._inputs(o[1:4], kind, parts)
        result = f"fma{kind[1:]}({a}, {b}, {c}{', down=True' if how == 'rm' else ''})"
        self.assign(o[0], f"ftz({result})" if "ftz" in parts else result, kind)

    # ---- quotients, roots, powers

    def op_div(self, parts, o):
        kind = parts[-1]
        a, b = (self.operand(v, kind) for v in o[1:3])
        if kind[0] in "us":
            self.only(parts)
            return self.assign(o[0], f"quotient({a}, {b})", kind)
        if parts == ["div", "full", "f32"]:
            exact = f"({a}).astype(f64) / ({b}).astype(f64)"
            return self.assign(o[0], f"E.approximate('div', {exact}, False)", kind)
        self.only(parts, "rn")
        return self.assign(o[0], f"{a} / {b}", kind)

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
        self.only(parts, "rn")
        return self.assign(o[0], f"np.sqrt({self.operand(o[1], parts[-1])})", parts[-1])

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
        self.only(parts, "NaN")
        nan, bits = "NaN" in parts, f"b{8 * self.width(kind)}"
        a, b = (self.operand(v, kind) for v in o[1:3])
        if kind == "bf16":
            wide = f"{name}(bf16_to_f32({a}), bf16_to_f32({b}), {nan}, u32)"
            return self.assign(o[0], f"f32_to_bf16({wide}.view(f32))", bits)
        assert kind in ("f32", "f64")
        return self.assign(o[0], f"{name}({a}, {b}, {nan}, u{kind[1:]})", bits)

    def op_min(self, parts, o):
        self._extreme(parts, o, "float_min", "np.minimum")

    def op_max(self, parts, o):
        self._extreme(parts, o, "float_max", "np.maximum")
