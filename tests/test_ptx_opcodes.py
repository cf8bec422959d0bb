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
from ptx.writer import IGNORED, Writer

THREADS = 64
MODES = ("rn", "rz", "rm", "rp")
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


def rounded(exact, bits, lowest, how="rn"):
    """A Fraction to `bits` of mantissa and no finer than 2^lowest"""
    if exact == 0:
        return 0.0
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent += (Fraction(2) ** exponent <= size) - 1
    exponent += Fraction(2) ** (exponent + 1) <= size
    unit = Fraction(2) ** max(exponent - bits + 1, lowest)
    steps = exact / unit
    whole = {"rn": round, "rz": math.trunc, "rm": math.floor, "rp": math.ceil}[how](steps)
    return math.copysign(float(whole * unit), exact)  # of what became 0 the sign stays


FORMATS = {
    "f32": (24, -149, 2.0**128),
    "f64": (53, -1074, INF),
    "f16": (11, -24, 65520.0),
    "bf16": (8, -133, INF),
}
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
    bits = FORMATS[kind][0]
    spread = {"f32": 30, "f64": 40, "f16": 6, "bf16": 20}[kind]
    r = rng()
    result = []
    for _ in range(count):
        mantissa = r.integers(-(2**bits) + 1, 2**bits, n).astype(float)
        mantissa[: n // 2] = r.integers(-8, 9, n // 2)
        values = mantissa * 2.0 ** (
            r.integers(-spread, spread, n) - bits + (0 if kind != "f16" else 2)
        )
        if kind == "f32":
            values[: n // 8] = r.integers(-99, 99, n // 8) * 2.0**-149
        if kind == "f16":
            values[: n // 8] = r.integers(-99, 99, n // 8) * 2.0**-24
        result.append(values)
    return result


def check(got, want, kind):
    bits = {"f32": np.uint32, "f64": np.uint64, "f16": np.uint16, "bf16": np.uint16}[kind]
    with np.errstate(over="ignore"):
        want = as_bits(want, kind)
    differ = np.flatnonzero(np.asarray(got).view(bits) != want.view(bits))
    assert not len(differ), (as_floats(got, kind)[differ[0]], as_floats(want, kind)[differ[0]])


def doubled(pairs):
    """Each operand twice, in both halves of a word."""
    return [(f"{kind}x2", np.repeat(v.view(np.uint16), 2).view(np.uint32)) for kind, v in pairs]


def halves(words):
    return words.view(np.uint16).reshape(-1, 2)


def signed_zeros(exact, values, how, opposite):
    """IEEE 754's sign of an exact zero: down it is -0 where the terms are opposite"""
    return [
        v if x else (-0.0 if how == "rm" else 0.0) if mixed else v
        for x, v, mixed in zip(exact, values, opposite)
    ]


# ---- sums and products


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_add_sub_and_mul_round_once(kind, how):
    bits, lowest, _ = FORMATS[kind]
    a, b = operands(kind, 2)
    b[:4] = -a[:4]
    pairs = (kind, as_bits(a, kind)), (kind, as_bits(b, kind))
    fa, fb = [Fraction(x) for x in a], [Fraction(x) for x in b]
    for name, sign in (("add", 1), ("sub", -1)):
        exact = [x + sign * y for x, y in zip(fa, fb)]
        want = [rounded(x, bits, lowest, how) for x in exact]
        opposite = [math.copysign(1, x) != math.copysign(1, sign * y) for x, y in zip(a, b)]
        zeros = [x if x == 0 and y == 0 else 0.0 for x, y in zip(a, b)]
        want = [w if e else z for w, e, z in zip(want, exact, zeros)]
        want = signed_zeros(exact, want, how, opposite)
        check(evaluate(f"{name}.{how}.{kind}", kind, *pairs), want, kind)
    exact = [x * y for x, y in zip(fa, fb)]
    want = [
        math.copysign(rounded(x, bits, lowest, how), math.copysign(1, p) * math.copysign(1, q))
        for x, p, q in zip(exact, a, b)
    ]
    check(evaluate(f"mul.{how}.{kind}", kind, *pairs), want, kind)


@pytest.mark.parametrize("how", MODES)
def test_fma_of_float32_rounds_once(how):
    a, b, c = operands("f32", 3)
    c[512:768] = -(a[512:768].astype(np.float32) * b[512:768].astype(np.float32)).astype(float)
    exact = [Fraction(x) * Fraction(y) + Fraction(z) for x, y, z in zip(a, b, c)]
    keep = np.array([x != 0 for x in exact])
    want = np.array([rounded(x, 24, -149, how) for x in exact])
    got = evaluate(f"fma.{how}.f32", "f32", *(("f32", as_bits(v, "f32")) for v in (a, b, c)))
    check(got[keep], want[keep], "f32")
    assert (got[~keep] == 0).all()


def test_fma_of_float64_rounds_once():
    a, b, c = operands("f64", 3)
    c[:512] = -(a[:512] * b[:512])  # nothing is left but the product's error
    got = evaluate("fma.rn.f64", "f64", *(("f64", v) for v in (a, b, c)))
    assert got.tolist() == [
        rounded(Fraction(x) * Fraction(y) + Fraction(z), 53, -1074) for x, y, z in zip(a, b, c)
    ]
    with pytest.raises(PTXError, match="not implemented"):
        evaluate("fma.rz.f64", "f64", *(("f64", v) for v in (a, b, c)))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_16_bit_floats_round_once(kind):
    bits, lowest, over = FORMATS[kind]
    a, b, c = operands(kind, 3)
    arrays = [as_bits(v, kind) for v in (a, b, c)]
    pairs = [(kind, v) for v in arrays]
    a, b, c = (as_floats(v, kind) for v in arrays)
    exact = {
        "add.rn": [Fraction(x) + Fraction(y) for x, y in zip(a, b)],
        "sub.rn": [Fraction(x) - Fraction(y) for x, y in zip(a, b)],
        "mul.rn": [Fraction(x) * Fraction(y) for x, y in zip(a, b)],
        "fma.rn": [Fraction(x) * Fraction(y) + Fraction(z) for x, y, z in zip(a, b, c)],
    }
    for name, values in exact.items():
        used = pairs[: 3 if name == "fma.rn" else 2]
        got = evaluate(f"{name}.{kind}", kind, *used)
        want = np.array(
            [math.copysign(INF, x) if abs(x) >= over else rounded(x, bits, lowest) for x in values]
        )
        keep = np.array([x != 0 for x in values])
        check(got[keep], want[keep], kind)
        both = halves(evaluate(f"{name}.{kind}x2", f"{kind}x2", *doubled(used)))
        assert (both == got.view(np.uint16)[:, None]).all()


def test_flushing_and_saturation():
    tiny = np.array([1e-40, -1e-40, 1.5, -2.0] * 16, np.float32)
    one = np.ones_like(tiny)
    pair = ("f32", tiny), ("f32", one)
    assert evaluate("mul.rn.f32", "f32", *pair).tolist() == tiny.tolist()
    flushed = evaluate("mul.ftz.f32", "f32", *pair)
    assert flushed.tolist() == [0, 0, 1.5, -2] * 16 and np.signbit(flushed[1])
    assert evaluate("fma.rn.ftz.f32", "f32", *pair, ("f32", tiny)).tolist() == [0, 0, 3, -4] * 16
    small = ("f32", np.full(64, 1.2e-38, np.float32)), ("f32", np.full(64, 0.5, np.float32))
    assert evaluate("mul.ftz.f32", "f32", *small).tolist() == [0] * 64  # the result is flushed too
    assert evaluate("add.sat.f32", "f32", *pair).tolist() == [1, 1, 1, 0] * 16
    nan = np.full(64, NAN, np.float32)
    assert evaluate("add.sat.f32", "f32", ("f32", nan), pair[1]).tolist() == [0] * 64


# ---- quotients, roots, approximations


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_quotients_and_roots_round_once(kind, how):
    bits, lowest, _ = FORMATS[kind]
    a, b = operands(kind, 2)
    a[a == 0], b[b == 0] = 1.0, 3.0
    a, b = a[128:], b[128:]  # quotients far from the ends of the range
    pairs = [(kind, as_bits(v, kind)) for v in (a, b)]
    ratios = [rounded(Fraction(x) / Fraction(y), bits, lowest, how) for x, y in zip(a, b)]
    check(evaluate(f"div.{how}.{kind}", kind, *pairs), ratios, kind)
    inverses = [rounded(1 / Fraction(y), bits, lowest, how) for y in b]
    check(evaluate(f"rcp.{how}.{kind}", kind, pairs[1]), inverses, kind)
    roots = evaluate(f"sqrt.{how}.{kind}", kind, (kind, as_bits(abs(a), kind)))
    for x, root in zip(as_floats(as_bits(abs(a), kind), kind), roots):
        beside = [Fraction(float(np.nextafter(root, type(root)(to)))) for to in (0, INF)]
        x, r = Fraction(x), Fraction(float(root))
        if how == "rn":
            assert ((beside[0] + r) / 2) ** 2 <= x <= ((beside[1] + r) / 2) ** 2
        elif how == "rp":
            assert beside[0] ** 2 < x <= r**2
        else:
            assert r**2 <= x < beside[1] ** 2


SPECIAL = [0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, 1e-40, -1e-40, 3e38, 1.2e-38, 0.5, 2.0, -2.5]
SPECIAL = np.array([*SPECIAL, 7.25, 1e-30] * 4, np.float32)
# Every two of these
EXTREMES = [0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, 2.0]
TWO_EXTREMES = [np.array(v) for v in zip(*itertools.product(EXTREMES, EXTREMES))]
WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
APPROXIMATE = {
    "ex2": np.exp2,
    "rcp": lambda x: 1 / x,
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
    pair = ("f32", a), ("f32", b)
    full = evaluate("div.full.f32", "f32", *pair)
    assert full[:3].tolist() == [0.5, 2.0**-127, INF] and np.isinf(full[3])
    assert evaluate("div.full.ftz.f32", "f32", *pair)[:2].tolist() == [0.5, 0.0]
    approximate = evaluate("div.approx.f32", "f32", *pair)
    assert approximate[:2].tolist() == [0.5, 0.0] and np.isnan(approximate[2])


# ---- signs, the least and the greatest


@pytest.mark.parametrize("kind", ["f32", "f64", "f16", "bf16"])
def test_signs_and_extremes_of_floats(kind):
    a, b = TWO_EXTREMES
    pair = (kind, as_bits(a, kind)), (kind, as_bits(b, kind))
    for name, least in (("min", True), ("max", False)):
        for nan in ("", ".NaN"):
            got = as_floats(evaluate(f"{name}{nan}.{kind}", kind, *pair), kind)
            for x, y, z in zip(a, b, got):
                numbers = [v for v in (x, y) if not math.isnan(v)]
                if not numbers or (nan and len(numbers) < 2):
                    assert math.isnan(z)
                else:
                    key = lambda v: (v, math.copysign(1, v))  # noqa: E731
                    want = (min if least else max)(numbers, key=key)
                    assert z == want and math.copysign(1, z) == math.copysign(1, want)
            if kind in ("f16", "bf16"):
                both = halves(evaluate(f"{name}{nan}.{kind}x2", f"{kind}x2", *doubled(pair)))
                assert (both[:, 0] == both[:, 1]).all()
    for name, function in (("abs", abs), ("neg", lambda v: -v)):
        got = as_floats(evaluate(f"{name}.{kind}", kind, pair[0]), kind)
        for x, z in zip(a, got):
            if math.isnan(x):
                assert math.isnan(z)
            else:
                assert z == function(x) and math.copysign(1, z) == math.copysign(1, function(x))


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
        "mul.hi": [p * q >> bits for p, q in zip(x, y)],
        "min": [min(p, q) for p, q in zip(x, y)],
        "max": [max(p, q) for p, q in zip(x, y)],
        "div": [-1 if q == 0 else int(Fraction(p, q)) for p, q in zip(x, y)],
    }
    for name, values in want.items():
        got = evaluate(f"{name}.{kind}", kind, *pairs[:2])
        assert np.array_equal(got, wrapped(values, kind)), name
    for name, values in (("mad.lo", want["mul.lo"]), ("mad.hi", want["mul.hi"])):
        got = evaluate(f"{name}.{kind}", kind, *pairs)
        assert np.array_equal(got, wrapped([v + r for v, r in zip(values, z)], kind))
    if bits < 64:
        wide = f"{kind[0]}{2 * bits}"
        exact = [p * q for p, q in zip(x, y)]
        assert evaluate(f"mul.wide.{kind}", wide, *pairs[:2]).tolist() == exact
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
    a = a[: len(a) // 64 * 64]
    finite = np.isfinite(a)
    pair = ("f32", a)
    for how in MODES:
        got = evaluate(f"cvt.{how}.f16.f32", "f16", pair)
        for v, g in zip(a[finite], got[finite]):
            want = rounded(Fraction(float(v)), 11, -24, how)
            if abs(want) > 65504:
                want = math.copysign(
                    INF if how == "rn" or ((how == "rp") == (v > 0) and how != "rz") else 65504, v
                )
            assert float(g) == want
    for how in ("rn", "rz"):
        got = as_floats(evaluate(f"cvt.{how}.bf16.f32", "bf16", pair), "bf16")
        for v, g in zip(a[finite], np.array(got)[finite]):
            want = rounded(Fraction(float(v)), 8, -133, how)
            assert g == want or (abs(want) > 3.4e38 and np.isinf(g))
        for kind in ("f16", "bf16"):
            one = evaluate(f"cvt.{how}.{kind}.f32", kind, pair).view(np.uint16)
            two = evaluate(f"cvt.{how}.{kind}x2.f32", "b32", pair, ("f32", np.roll(a, 1)))
            assert ((two >> 16) == one).all() and ((two & 0xFFFF) == np.roll(one, 1)).all()
    assert np.isnan(as_floats(evaluate("cvt.rn.bf16.f32", "bf16", pair), "bf16"))[np.isnan(a)].all()
    half = np.arange(65536, dtype=np.uint16).view(np.float16)
    got = evaluate("cvt.f32.f16", "f32", ("f16", half))
    assert np.array_equal(got, half.astype(np.float32), equal_nan=True)
    brain = np.arange(65536, dtype=np.uint16)
    want = (brain.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(evaluate("cvt.f32.bf16", "f32", ("bf16", brain)), want, equal_nan=True)
    wide = operands("f64", 1)[0]
    for how in MODES:
        got = evaluate(f"cvt.{how}.f32.f64", "f32", ("f64", wide))
        check(got[wide != 0], [rounded(Fraction(v), 24, -149, how) for v in wide[wide != 0]], "f32")
    assert np.array_equal(evaluate("cvt.f64.f32", "f64", pair), a.astype(float), equal_nan=True)
    got = evaluate("cvt.rna.tf32.f32", "b32", pair).view(np.float32)
    for v, g in zip(a[finite], got[finite]):
        unit = Fraction(2) ** (math.frexp(v)[1] - 11) if abs(v) >= 1.2e-38 else Fraction(2) ** -136
        steps = Fraction(float(v)) / unit
        assert g == float(int(abs(steps) + Fraction(1, 2)) * unit * (1 if v > 0 else -1))
    for name, function in WHOLE.items():
        got = evaluate(f"cvt.{name}.f32.f32", "f32", pair)
        assert np.array_equal(got, function(a), equal_nan=True)
    assert evaluate("cvt.sat.f32.f32", "f32", pair).max() == 1
    tiny = ("f32", np.full(64, 1e-40, np.float32))
    assert evaluate("cvt.ftz.f64.f32", "f64", tiny).tolist() == [0] * 64


@pytest.mark.parametrize("kind", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
def test_conversions_of_integers(kind):
    info = np.iinfo(KINDS[kind])
    a = np.concatenate(
        [*operands("f32", 1), SPECIAL.astype(float), [127.5, -128.5, 3e9, -3e9] * 16]
    )
    a = a.astype(np.float32)
    # a register has 16 bits at least
    holder = "s16" if kind == "s8" else "u16" if kind == "u8" else kind
    for name, function in WHOLE.items():
        got = evaluate(f"cvt.{name}.{kind}.f32", holder, ("f32", a))
        for v, g in zip(function(a.astype(float)), got):
            assert int(g) == (0 if math.isnan(v) else min(max(v, info.min), info.max))
    b = integers(kind, 1)[0]
    source = (holder, b.astype(KINDS[holder]))
    for other in ("u16", "s32", "s64", "u64"):
        got = evaluate(f"cvt.{other}.{kind}", other, source)
        assert np.array_equal(got, wrapped(b, other))
        limits = np.iinfo(KINDS[other])
        got = evaluate(f"cvt.sat.{other}.{kind}", other, source)
        assert got.tolist() == [min(max(int(v), limits.min), limits.max) for v in b]
    exact = [Fraction(int(v)) for v in b]
    want = [rounded(v, 53, -1074) for v in exact]
    check(evaluate(f"cvt.rn.f64.{kind}", "f64", source), want, "f64")
    for how in MODES if width_of(kind) < 8 else ("rn",):
        want = [rounded(v, 24, -149, how) for v in exact]
        check(evaluate(f"cvt.{how}.f32.{kind}", "f32", source), want, "f32")


# ---- comparisons


def _predicate(opcode, kind, a, b, more=""):
    out, memory = np.zeros(len(a), np.uint32), Memory()
    at = [
        memory.add(v)
        for v in (out, a.view(UNSIGNED[width_of(kind)]), b.view(UNSIGNED[width_of(kind)]))
    ]
    r, w = register(kind), width_of(kind)
    text = (
        ".entry k(.param .u64 o, .param .u64 a, .param .u64 b) { .reg .b32 %i, %d; .reg .b64 %q; "
        f".reg .pred %p, %t, %f; .reg {r} %a, %b; mov.u32 %i, %tid.x; setp.lt.u32 %p, %i, 32; "
        f"ld.param.u64 %q, [a]; mad.wide.u32 %q, %i, {w}, %q; ld.global{r} %a, [%q]; ld.param.u64 "
        f"%q, [b]; mad.wide.u32 %q, %i, {w}, %q; ld.global{r} %b, [%q]; {opcode} %t|%f, %a, "
        f"%b{more}; selp.u32 %d, 1, 0, %t; @%f add.u32 %d, %d, 2; ld.param.u64 %q, [o]; "
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
    for name, wanted in (("num", False), ("nan", True)):
        got = _predicate(f"setp.{name}.{kind}", kind, *bits)
        assert got.tolist() == [1 if nan == wanted else 2 for nan in nans]


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
    first = np.arange(64) < 32
    for name, function in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        want = function(a == b, first) + 2 * function(a != b, first)
        assert np.array_equal(_predicate(f"setp.eq.{name}.{kind}", kind, a, b, ", %p"), want)
        want = function(a == b, ~first) + 2 * function(a != b, ~first)
        assert np.array_equal(_predicate(f"setp.eq.{name}.{kind}", kind, a, b, ", !%p"), want)


def test_comparisons_flush_where_told():
    a, b = np.array([[1e-40] * 64, [0.0] * 64], np.float32)
    assert (_predicate("setp.eq.f32", "f32", a, b) == 2).all()
    assert (_predicate("setp.eq.ftz.f32", "f32", a, b) == 1).all()


# ---- what is missing is an error


@pytest.mark.parametrize(
    "opcode, kinds",
    [
        ("dp4a.u32.u32", ("u32", "u32", "u32")),
        ("add.rn.ftz.f16", ("f16", "f16")),
        ("fma.rn.relu.f16", ("f16", "f16", "f16")),
        ("add.cc.u32", ("u32", "u32")),
        ("add.sat.s32", ("s32", "s32")),
        ("min.xorsign.abs.f32", ("f32", "f32")),
        ("mul.f16x4", ("u64", "u64")),
        ("mad.lo.cc.u32", ("u32", "u32", "u32")),
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
    assert not known & IGNORED
