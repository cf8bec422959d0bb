"""Every opcode of the PTX interpreter against exact rationals, Python's integers or NumPy: no GPU,
no kernel of ours."""

import itertools
import math
import operator
from fractions import Fraction

import numpy as np
import pytest
from ptx import Memory, Module, PTXError
from ptx.approximations import BOUNDS
from ptx.kinds import KINDS, UNSIGNED, width_of
from ptx.writer import Writer

THREADS = 64
INF, NAN = math.inf, math.nan
SEEN: set[str] = set()
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def rng():
    return np.random.default_rng(0)


def register(kind):
    return f".b{8 * width_of(kind)}"


def evaluate(opcode, out, *inputs, immediates=(), errors=0):
    """The opcode on arrays, one element a thread.

    Args:
        opcode: With its types.
        out: The result's type.
        inputs: (type, array) of each register operand.
        immediates: Operands after them, as text.
    """
    SEEN.add(opcode.split(".")[0])
    count = len(inputs[0][1])
    lines, operands, memory = [], [], Memory()
    result = np.zeros(count, UNSIGNED[width_of(out)])
    addresses = [memory.add(result)]
    for i, (kind, array) in enumerate(inputs):
        addresses.append(memory.add(np.ascontiguousarray(array).view(UNSIGNED[width_of(kind)])))
        lines.append(f".reg {register(kind)} %a{i}; ld.param.u64 %q, [p+{8 * i + 8}];")
        lines.append(
            f"mad.wide.u32 %q, %i, {width_of(kind)}, %q; ld.global{register(kind)} %a{i}, [%q];"
        )
        operands.append(f"%a{i}")
    lines.append(f".reg {register(out)} %d; {opcode} {', '.join(['%d', *operands, *immediates])};")
    lines.append(
        f"ld.param.u64 %q, [p]; mad.wide.u32 %q, %i, {width_of(out)}, %q; st.global{register(out)} "
        "[%q], %d;"
    )
    size = 8 * len(addresses)
    text = (
        f".entry k(.param .align 8 .b8 p[{size}]) {{ .reg .b32 %i, %c, %n; .reg .b64 %q; "
        "mov.u32 %c, %ctaid.x; mov.u32 %n, %ntid.x; mov.u32 %i, %tid.x; mad.lo.s32 %i, %c, %n, %i; "
        f"{' '.join(lines)} ret; }}"
    )
    block = min(count, THREADS)
    assert count % block == 0
    params = np.array(addresses, np.uint64).tobytes()
    Module(text).kernels["k"].run((count // block,), (block,), params, memory, errors=errors)
    memory.copy_back()
    return result.view(KINDS[out])


def rounded(exact, bits, lowest, whole=round):
    """A Fraction to `bits` of mantissa and no finer than 2^lowest; whole: how"""
    if exact == 0:
        return 0.0
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent += (Fraction(2) ** exponent <= size) - 1
    exponent += Fraction(2) ** (exponent + 1) <= size
    unit = Fraction(2) ** max(exponent - bits + 1, lowest)
    return math.copysign(
        float(whole(exact / unit) * unit), exact
    )  # of what became 0 the sign stays


FORMATS = {"f32": (24, -149), "f64": (53, -1074)}
WIDE = {"f32": np.float32, "f64": np.float64, "f16": np.float16}


def as_bits(values, kind):
    """Floats that the type holds exactly, as an array of it; of bfloat16 the bits"""
    if kind == "bf16":
        return (np.array(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return np.array(values, WIDE[kind])


def as_floats(array, kind):
    if kind == "bf16":
        return (array.astype(np.uint32) << 16).view(np.float32).astype(float).tolist()
    return array.astype(float).tolist()


def operands(kind, count, n=1024):
    """Numbers of every size that the type holds, many of them close to halfway cases and some
    subnormal"""
    bits, spread, r = FORMATS[kind][0], {"f32": 30, "f64": 40}[kind], rng()
    result = []
    for _ in range(count):
        mantissa = r.integers(-(2**bits) + 1, 2**bits, n).astype(float)
        mantissa[: n // 2] = r.integers(-8, 9, n // 2)
        values = mantissa * 2.0 ** (r.integers(-spread, spread, n) - bits)
        if kind == "f32":
            values[: n // 8] = r.integers(-99, 99, n // 8) * 2.0**-149
        result.append(values)
    return result


def check(got, exact, kind, whole=round):
    """The exact values rounded once; the sign of a zero is the least and the greatest's to test"""
    want = np.array([rounded(v, *FORMATS[kind], whole) for v in exact])
    differ = np.flatnonzero(got != want)
    assert not len(differ), (got[differ[0]], want[differ[0]])


def halves(words):
    return words.view(np.uint16).reshape(-1, 2)


# ---- sums and products


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_add_sub_and_mul_round_once(kind):
    a, b = operands(kind, 2)
    b[:4] = -a[:4]
    pairs = [(kind, as_bits(v, kind)) for v in (a, b)]
    for name in ("add", "sub", "mul"):
        exact = [getattr(operator, name)(Fraction(x), Fraction(y)) for x, y in zip(a, b)]
        for how in ("", ".rn"):
            check(evaluate(f"{name}{how}.{kind}", kind, *pairs), exact, kind)


@pytest.mark.parametrize("how, whole", [("rn", round), ("rm", math.floor)])
def test_fma_of_float32_rounds_once(how, whole):
    a, b, c = operands("f32", 3)
    c[512:768] = -(a[512:768].astype(np.float32) * b[512:768].astype(np.float32)).astype(float)
    a[768:] = b[768:] = 1 + 2.0**-12  # their product lies halfway, and the least decides
    c[768:] = np.array([2.0**-100, -(2.0**-100)] * 128)
    exact = [Fraction(x) * Fraction(y) + Fraction(z) for x, y, z in zip(a, b, c)]
    got = evaluate(f"fma.{how}.f32", "f32", *(("f32", as_bits(v, "f32")) for v in (a, b, c)))
    check(got, exact, "f32", whole)
    one = np.ones(64, np.float32)
    zero = evaluate(f"fma.{how}.f32", "f32", ("f32", one), ("f32", one), ("f32", -one))
    assert (np.signbit(zero) == (how == "rm")).all()


def test_fma_of_float64_rounds_once():
    a, b, c = operands("f64", 3)
    c[:512] = -(a[:512] * b[:512])  # nothing is left but the product's error
    got = evaluate("fma.rn.f64", "f64", *(("f64", v) for v in (a, b, c)))
    check(got, [Fraction(x) * Fraction(y) + Fraction(z) for x, y, z in zip(a, b, c)], "f64")


def test_flushing_and_saturation():
    tiny = np.array([1e-40, -1e-40, 1.5, -2.0] * 16, np.float32)
    one = np.ones_like(tiny)
    pair = ("f32", tiny), ("f32", one)
    assert evaluate("mul.rn.f32", "f32", *pair).tolist() == tiny.tolist()
    assert evaluate("fma.rn.ftz.f32", "f32", *pair, ("f32", tiny)).tolist() == [0, 0, 3, -4] * 16
    flushed = evaluate("fma.rn.ftz.f32", "f32", *pair, ("f32", one * 0))
    assert flushed.tolist() == [0, 0, 1.5, -2] * 16
    small = ("f32", np.full(64, 1.2e-38, np.float32)), ("f32", np.full(64, 0.5, np.float32))
    got = evaluate("fma.rn.ftz.f32", "f32", *small, ("f32", one * 0))
    assert got.tolist() == [0] * 64  # the result is flushed too
    flushed = evaluate("abs.ftz.f32", "f32", pair[0])
    assert flushed.tolist() == [0, 0, 1.5, 2] * 16
    unit = ("f32", np.array([0.5, -1.0, 7.0, NAN] * 16, np.float32))
    assert evaluate("cvt.sat.f32.f32", "f32", unit).tolist() == [0.5, 0, 1, 0] * 16


# ---- quotients, roots, approximations


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_roots_and_quotients_round_once(kind):
    a, b = operands(kind, 2)
    a, b = as_bits(abs(a), kind), as_bits(np.where(b == 0, 3.0, b), kind)
    if kind == "f64":
        exact = [Fraction(x) / Fraction(y) for x, y in zip(a, b)]
        check(evaluate("div.rn.f64", kind, (kind, a), (kind, b)), exact, kind)
    for x, root in zip(a.tolist(), evaluate(f"sqrt.rn.{kind}", kind, (kind, a))):
        low, high = (Fraction(float(np.nextafter(root, type(root)(to)))) for to in (0, INF))
        r = Fraction(float(root))
        assert ((low + r) / 2) ** 2 <= Fraction(x) <= ((high + r) / 2) ** 2


SPECIAL = [0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, 1e-40, -1e-40, 3e38, 1.2e-38, 0.5, 2.0, -2.5]
SPECIAL = np.array([*SPECIAL, -130.0, 1e-30] * 4, np.float32)
# Every two of these
EXTREMES = [0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, 2.0]
TWO_EXTREMES = [np.array(v) for v in zip(*itertools.product(EXTREMES, EXTREMES))]
APPROXIMATE = {
    "ex2": np.exp2,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
}


@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximations_stay_within_the_manuals_bounds(name):
    x = (rng().random(4096) * 6 + 0.01).astype(np.float32)
    exact = APPROXIMATE[name](x.astype(float))
    size = BOUNDS[name]
    scale = np.abs(exact)
    nearest = evaluate(f"{name}.approx.ftz.f32", "f32", ("f32", x))
    assert (nearest == exact.astype(np.float32)).all()
    worst = 0.0
    for errors in (1, 2):
        got = evaluate(f"{name}.approx.ftz.f32", "f32", ("f32", x), errors=errors)
        assert (got == evaluate(f"{name}.approx.ftz.f32", "f32", ("f32", x), errors=errors)).all()
        error = np.abs(got - exact) / (size * scale)
        assert error.max() <= 1 + 2.0**-24 * np.abs(exact / (size * scale)).max()
        worst = max(worst, error.max())
    assert worst > 0.9  # it errs, and nearly as much as it may
    with np.errstate(all="ignore"):
        for flush in ("", ".ftz"):
            small = np.where(
                np.abs(SPECIAL) < 1.17549435e-38, np.copysign(np.float32(0), SPECIAL), SPECIAL
            )
            want = APPROXIMATE[name]((small if flush else SPECIAL).astype(float)).astype(np.float32)
            if flush:
                want = np.where(
                    np.abs(want) < 1.17549435e-38, np.copysign(np.float32(0), want), want
                )
            got = evaluate(f"{name}.approx{flush}.f32", "f32", ("f32", SPECIAL))
            assert np.array_equal(got, want, equal_nan=True)
            assert (np.signbit(got) == np.signbit(want))[~np.isnan(want)].all()


def test_fast_quotients():
    a, b = np.array([[1.0, 1.0, INF, 3.0] * 16, [2.0, 2.0**127, 2.0**127, 1e-40] * 16], np.float32)
    full = evaluate("div.full.f32", "f32", ("f32", a), ("f32", b))
    assert full.tolist() == [0.5, 2.0**-127, INF, INF] * 16


# ---- signs, the least and the greatest


@pytest.mark.parametrize("kind", ["f32", "f64", "f16", "bf16"])
def test_signs_and_extremes_of_floats(kind):
    a, b = TWO_EXTREMES
    pair = (kind, as_bits(a, kind)), (kind, as_bits(b, kind))
    forms = {"f16": (), "bf16": (".NaN",)}.get(kind, ("", ".NaN"))
    for (name, of), nan in itertools.product((("min", min), ("max", max)), forms):
        got = as_floats(evaluate(f"{name}{nan}.{kind}", kind, *pair), kind)
        for x, y, z in zip(a, b, got):
            numbers = [v for v in (x, y) if not math.isnan(v)]
            if not numbers or (nan and len(numbers) < 2):
                assert math.isnan(z)
            else:
                want = of(numbers, key=lambda v: (v, math.copysign(1, v)))
                assert z == want and math.copysign(1, z) == math.copysign(1, want)
    for name, function in (("abs", abs), ("neg", operator.neg)):
        got = as_floats(evaluate(f"{name}.{kind}", kind, pair[0]), kind)
        for x, z in zip(a, got):
            if math.isnan(x):
                assert math.isnan(z)
            else:
                assert z == function(x) and math.copysign(1, z) == math.copysign(1, function(x))
        if kind in ("f16", "bf16"):  # two in a word
            both = np.repeat(pair[0][1].view(np.uint16), 2).view(np.uint32)
            both = halves(evaluate(f"{name}.{kind}x2", f"{kind}x2", (f"{kind}x2", both)))
            assert (both == as_bits(got, kind).view(np.uint16)[:, None])[~np.isnan(a)].all()


# ---- integers


def integers(kind, count, n=512):
    info = np.iinfo(KINDS[kind])
    r = rng()
    arrays = [r.integers(info.min, info.max, n, KINDS[kind], endpoint=True) for _ in range(count)]
    for i, array in enumerate(arrays):
        array[:64] = np.roll(np.array([0, 1, info.min, info.max] * 16, KINDS[kind]), i)
    return arrays


def wrapped(values, kind):
    bits = 8 * width_of(kind)
    words = np.array([int(v) % 2**bits for v in values], np.uint64)
    return words.astype(UNSIGNED[bits // 8]).view(KINDS[kind])


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_integer_arithmetic(kind):
    a, b, c = integers(kind, 3)
    x, y, z = ([int(v) for v in array] for array in (a, b, c))
    bits, pairs = 8 * width_of(kind), [(kind, a), (kind, b), (kind, c)]
    want = {
        "add": [p + q for p, q in zip(x, y)],
        "sub": [p - q for p, q in zip(x, y)],
        "mul.lo": [p * q for p, q in zip(x, y)],
        "min": [min(p, q) for p, q in zip(x, y)],
        "max": [max(p, q) for p, q in zip(x, y)],
        "div": [-1 if q == 0 else int(Fraction(p, q)) for p, q in zip(x, y)],
    }
    for name, values in want.items():
        got = evaluate(f"{name}.{kind}", kind, *pairs[:2])
        assert np.array_equal(got, wrapped(values, kind)), name
    got = evaluate(f"mad.lo.{kind}", kind, *pairs)
    assert np.array_equal(got, wrapped([v + r for v, r in zip(want["mul.lo"], z)], kind))
    if bits < 64:
        wide = f"{kind[0]}{2 * bits}"
        exact = [p * q for p, q in zip(x, y)]
        assert evaluate(f"mul.wide.{kind}", wide, *pairs[:2]).tolist() == exact
        high = evaluate(f"mul.hi.{kind}", kind, *pairs[:2])
        assert high.tolist() == [v >> bits for v in exact]
        d = integers(wide, 1)[0]
        got = evaluate(f"mad.wide.{kind}", wide, *pairs[:2], (wide, d))
        assert np.array_equal(got, wrapped([v + int(r) for v, r in zip(exact, d)], wide))
    for name, function in (("abs", abs), ("neg", operator.neg)) if kind[0] == "s" else ():
        got = evaluate(f"{name}.{kind}", kind, pairs[0])
        assert np.array_equal(got, wrapped(map(function, x), kind))


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic_and_shifts(bits):
    kind, signed = f"b{bits}", f"s{bits}"
    a, b = integers(f"u{bits}", 2)
    x, y = [int(v) for v in a], [int(v) for v in b]
    n = (np.arange(512) % 80).astype(np.uint32)
    pair = (kind, a), (kind, b)
    for name, function in (("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)):
        assert evaluate(f"{name}.{kind}", kind, *pair).tolist() == list(map(function, x, y))
    assert evaluate(f"not.{kind}", kind, pair[0]).tolist() == [2**bits - 1 - p for p in x]
    left = evaluate(f"shl.{kind}", kind, pair[0], ("u32", n))
    assert left.tolist() == [(p << int(k)) % 2**bits for p, k in zip(x, n)]
    right = evaluate(f"shr.u{bits}", kind, pair[0], ("u32", n))
    assert right.tolist() == [p >> int(k) for p, k in zip(x, n)]
    want = [int(v) >> int(k) for v, k in zip(a.view(KINDS[signed]), n)]
    assert evaluate(f"shr.{signed}", signed, (signed, a), ("u32", n)).tolist() == want
    assert evaluate(f"shl.{kind}", kind, pair[0], immediates=("3",)).tolist() == [
        (p << 3) % 2**bits for p in x
    ]


def test_fields_and_bytes():
    a, b, c = integers("u32", 3)
    x, y, z = ([int(v) for v in array] for array in (a, b, c))
    n = (np.arange(512) % 45).astype(np.uint32)
    length = np.roll(n, 7)
    wide = [q << 32 | p for p, q in zip(x, y)]
    pair = ("b32", a), ("b32", b)
    for kind in ("u32", "s32"):
        got = evaluate(f"bfe.{kind}", "u32", ("u32", a), ("u32", n), ("u32", length))
        for v, p, k, g in zip(x, n, length, got):
            top = v >> min(int(p) + int(k) - 1, 31) & 1 if kind == "s32" and k else 0
            bits = [(v >> p + i & 1) if i < k and p + i < 32 else top for i in range(32)]
            assert int(g) == sum(int(bit) << i for i, bit in enumerate(bits))
    got = evaluate("prmt.b32", "b32", *pair, ("u32", c))
    for w, s, g in zip(wide, z, got):
        parts = []
        for i in range(4):
            nibble = s >> 4 * i & 15
            byte = w >> 8 * (nibble & 7) & 255
            parts.append((255 if byte & 128 else 0) if nibble & 8 else byte)
        assert int(g) == sum(byte << 8 * i for i, byte in enumerate(parts))


# ---- conversions


def test_conversions_between_floats():
    a = np.concatenate([*operands("f32", 1), SPECIAL.astype(float)]).astype(np.float32)
    finite = np.isfinite(a)
    pair = ("f32", a)
    for kind, bits, lowest, most in (("f16", 11, -24, 65504), ("bf16", 8, -133, 3.4e38)):
        one = evaluate(f"cvt.rn.{kind}.f32", kind, pair)
        got = np.array(as_floats(one, kind))
        for v, g in zip(a[finite], got[finite]):
            want = rounded(Fraction(float(v)), bits, lowest)
            assert g == want or (abs(want) > most and g == math.copysign(INF, v))
        assert (np.isnan(got) == np.isnan(a)).all()
        two = evaluate(f"cvt.rn.{kind}x2.f32", "b32", pair, ("f32", np.roll(a, 1)))
        one = one.view(np.uint16)
        assert ((two >> 16) == one).all() and ((two & 0xFFFF) == np.roll(one, 1)).all()
    bits = np.arange(65536, dtype=np.uint16)
    half, brain = bits.view(np.float16), (bits.astype(np.uint32) << 16).view(np.float32)
    for to, wide in (("f32", np.float32), ("f64", np.float64)):
        for kind, given, values in (("f16", half, half), ("bf16", bits, brain)):
            got = evaluate(f"cvt.{to}.{kind}", to, (kind, given))
            assert np.array_equal(got, values.astype(wide), equal_nan=True)
    wide = operands("f64", 1)[0]
    check(evaluate("cvt.rn.f32.f64", "f32", ("f64", wide)), [Fraction(v) for v in wide], "f32")
    narrow = evaluate("cvt.rn.f16.f64", "f16", ("f64", wide))
    for v, g in zip(wide, narrow):
        want = rounded(Fraction(v), 11, -24)
        assert float(g) == (want if abs(want) < 65520 else math.copysign(INF, v))
    assert np.array_equal(evaluate("cvt.f64.f32", "f64", pair), a.astype(float), equal_nan=True)
    assert np.array_equal(evaluate("cvt.rni.f32.f32", "f32", pair), np.rint(a), equal_nan=True)


@pytest.mark.parametrize("kind", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
def test_conversions_of_integers(kind):
    b = integers(kind, 1)[0]
    # a register has 16 bits at least
    holder = "s16" if kind == "s8" else "u16" if kind == "u8" else kind
    source = (holder, b.astype(KINDS[holder]))
    for other in ("u16", "s32", "s64", "u64"):
        assert np.array_equal(evaluate(f"cvt.{other}.{kind}", other, source), wrapped(b, other))
    exact = [Fraction(int(v)) for v in b]
    for to in ("f32", "f64"):
        check(evaluate(f"cvt.rn.{to}.{kind}", to, source), exact, to)


# ---- comparisons


def _predicate(opcode, kind, a, b):
    out, memory = np.zeros(len(a), np.uint32), Memory()
    at = [
        memory.add(v)
        for v in (out, a.view(UNSIGNED[width_of(kind)]), b.view(UNSIGNED[width_of(kind)]))
    ]
    r, w = register(kind), width_of(kind)
    text = (
        ".entry k(.param .u64 o, .param .u64 a, .param .u64 b) { .reg .b32 %i, %d; .reg .b64 %q; "
        f".reg .pred %t, %f; .reg {r} %a, %b; mov.u32 %i, %tid.x; "
        f"ld.param.u64 %q, [a]; mad.wide.u32 %q, %i, {w}, %q; ld.global{r} %a, [%q]; ld.param.u64 "
        f"%q, [b]; mad.wide.u32 %q, %i, {w}, %q; ld.global{r} %b, [%q]; {opcode} %t|%f, %a, "
        f"%b; selp.u32 %d, 1, 0, %t; @%f add.u32 %d, %d, 2; ld.param.u64 %q, [o]; "
        "mad.wide.u32 %q, %i, 4, %q; st.global.u32 [%q], %d; ret; }"
    )
    SEEN.update(("setp", "selp"))
    Module(text).kernels["k"].run((1,), (len(a),), np.array(at, np.uint64).tobytes(), memory)
    memory.copy_back()
    return out


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "f64"])
def test_comparisons_of_floats(kind):
    a, b = TWO_EXTREMES
    bits, nans = (as_bits(a, kind), as_bits(b, kind)), np.isnan(a) | np.isnan(b)
    tests = {name: getattr(operator, name) for name in ("eq", "lt", "le", "gt", "ge")}
    tests["ne"] = lambda x, y: x < y or x > y
    for name, test in tests.items():
        for unordered in ("", "u"):
            want = [test(x, y) or bool(unordered and nan) for x, y, nan in zip(a, b, nans)]
            got = _predicate(f"setp.{name}{unordered}.{kind}", kind, *bits)
            assert got.tolist() == [1 if w else 2 for w in want]
    assert np.array_equal(_predicate(f"setp.nan.{kind}", kind, *bits), np.where(nans, 1, 2))


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_comparisons_of_pairs_of_floats(kind):
    """Two destinations: of the low halves and of the high ones, not one and its opposite"""
    one = kind.removesuffix("x2")
    low, high = TWO_EXTREMES

    def pair(low, high):
        low, high = (as_bits(v, one).view(np.uint16).astype(np.uint32) for v in (low, high))
        return low | high << 16

    other = np.roll(low, 5)
    a, b = pair(low, high), pair(high, other)
    for name, test in (("le", np.less_equal), ("gt", np.greater), ("eq", np.equal)):
        for unordered in ("", "u"):
            first, second = (
                test(x, y) | ((np.isnan(x) | np.isnan(y)) & bool(unordered))
                for x, y in ((low, high), (high, other))
            )
            got = _predicate(f"setp.{name}{unordered}.{kind}", kind, a, b)
            assert np.array_equal(got, first + 2 * second)


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64", "b32"])
def test_comparisons_of_integers(kind):
    a, b = (v[:64] for v in integers(kind, 2))
    b[32:] = a[32:]
    for name in ("eq", "ne") if kind[0] == "b" else ("eq", "ne", "lt", "le", "gt", "ge"):
        want = getattr(operator, name)(a, b)
        assert np.array_equal(_predicate(f"setp.{name}.{kind}", kind, a, b), np.where(want, 1, 2))


# ---- what is missing is an error


@pytest.mark.parametrize(
    "opcode, kinds",
    [
        ("dp4a.u32.u32", ("u32", "u32", "u32")),
        ("add.rn.f16", ("f16", "f16")),
        ("add.rz.f32", ("f32", "f32")),
        ("fma.rp.f32", ("f32", "f32", "f32")),
        ("add.cc.u32", ("u32", "u32")),
        ("add.sat.s32", ("s32", "s32")),
        ("min.xorsign.abs.f32", ("f32", "f32")),
        ("mul.f16x4", ("u64", "u64")),
        ("mad.lo.cc.u32", ("u32", "u32", "u32")),
        ("mul.hi.u64", ("u64", "u64")),
        ("cvt.rn.satfinite.e4m3x2.f32", ("f32", "f32")),
        ("cvt.rn.relu.f16.f32", ("f32",)),
        ("ex2.approx.f16", ("f16",)),
    ],
)
def test_an_opcode_or_modifier_that_is_not_known_is_an_error(opcode, kinds):
    inputs = [(kind, np.ones(64, UNSIGNED[width_of(kind)])) for kind in kinds]
    with pytest.raises(PTXError, match="not implemented"):
        evaluate(opcode, kinds[0], *inputs)


def test_every_opcode_is_tested_here_or_beside(request):
    """Last, after the others have noted what they ran; test_ptx_checks.py runs the rest."""
    from test_ptx_checks import RUN_THERE

    here = [item for item in request.session.items if item.path == request.path]
    if here[-1] is not request.node:
        pytest.skip("the order is shuffled: others have not noted yet what they run")

    known = {name.removeprefix("op_") for name in dir(Writer) if name.startswith("op_")}
    if len(SEEN) > 20:  # the whole file ran
        assert known - SEEN - RUN_THERE == set()
