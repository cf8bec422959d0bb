"""The PTX interpreter's ldmatrix, stmatrix, mma and wgmma against NumPy's products, in the layouts
of the PTX manual."""

import numpy as np
import pytest
from ptx import Memory, Module, PTXError

LANE = np.arange(32)


def halves(shape, kind):
    """Random numbers that 16 bits hold, as float64 and as bits"""
    values = np.random.default_rng(0).integers(-64, 64, shape).astype(np.float32) / 8
    if kind == "f16":
        return values.astype(float), values.astype(np.float16).view(np.uint16)
    return values.astype(float), (values.view(np.uint32) >> 16).astype(np.uint16)


def run(body, arrays, threads=32, shared=0):
    """A kernel of pointers to arrays, which it may write; %i: the thread, %q0 ..: the pointers"""
    memory, names = Memory(), [f"a{i}" for i in range(len(arrays))]
    addresses = [memory.add(array) for array in arrays]
    params = ", ".join(f".param .u64 {name}" for name in names)
    loads = " ".join(f"ld.param.u64 %q{i}, [{name}];" for i, name in enumerate(names))
    text = (
        f".entry k({params}) {{ .reg .pred %p<4>; .reg .b32 %i, %r<99>; .reg .b64 %q<9>, %d<9>; "
        f".shared .align 1024 .b8 s[{max(shared, 16)}]; mov.u32 %i, %tid.x; {loads} {body} ret; }}"
    )
    Module(text).kernels["k"].run(
        (1,), (threads,), np.array(addresses, np.uint64).tobytes(), memory
    )
    memory.copy_back()


def registers(count, first, pointer, op):
    """Loads or stores `count` registers a thread, from %r<first>, at [pointer + 4 (count thread +
    register)]"""
    lines = [f"mad.wide.u32 %d0, %i, {4 * count}, {pointer};"]
    for j in range(count):
        operands = f"%r{first + j}", f"[%d0+{4 * j}]"
        lines.append(f"{op}.global.b32 {', '.join(operands if op == 'ld' else operands[::-1])};")
    return " ".join(lines)


def names(first, count):
    return "{" + ", ".join(f"%r{first + j}" for j in range(count)) + "}"


def fragments(matrix, pairs):
    """Words of two neighbours, [lanes, registers]; pairs: (row, column) of each register's first
    element, by lane"""
    words = matrix.astype(np.uint32)
    return np.stack([words[row, col] | words[row, col + 1] << 16 for row, col in pairs], 1)


GROUP, WITHIN = LANE // 4, LANE % 4
C_PLACES = [(GROUP + 8 * (i >> 1), 2 * WITHIN + (i & 1)) for i in range(4)]
A_PLACES = [(GROUP + 8 * (i & 1), 2 * WITHIN + 8 * (i >> 1)) for i in range(4)]


def mma(shape, kind, a_words, b_words, c_words):
    body = registers(4, 0, "%q0", "ld") + registers(2, 4, "%q1", "ld")
    body += registers(4, 8, "%q2", "ld")
    body += f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {names(8, 4)}, "
    body += f"{names(0, 4)}, {names(4, 2)}, {names(8, 4)};" + registers(4, 8, "%q2", "st")
    run(body, [a_words, b_words, c_words])


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_mma_of_16_bit_data(kind):
    (a, a_bits), (b, b_bits) = halves((16, 16), kind), halves((8, 16), kind)  # b: [columns, depth]
    c = np.random.default_rng(1).standard_normal((16, 8)).astype(np.float32)
    b_words = fragments(b_bits, [(GROUP, 2 * WITHIN), (GROUP, 2 * WITHIN + 8)])
    c_words = np.stack([c[row, col] for row, col in C_PLACES], 1)
    mma("m16n8k16", kind, fragments(a_bits, A_PLACES), b_words, c_words)
    want = (a @ b.T + c).astype(np.float32)
    assert (c_words == np.stack([want[row, col] for row, col in C_PLACES], 1)).all()


def test_mma_of_tf32_reads_10_bits_of_mantissa():
    r = np.random.default_rng(2)
    a, b = (r.standard_normal((rows, 8)).astype(np.float32) for rows in (16, 8))
    a_words = np.stack([a[GROUP + 8 * (i & 1), WITHIN + 4 * (i >> 1)] for i in range(4)], 1)
    b_words = np.stack([b[WITHIN + 4 * i, GROUP] for i in range(2)], 1)
    c_words = np.zeros((32, 4), np.float32)
    mma("m16n8k8", "tf32", a_words, b_words, c_words)
    cut = [
        (v.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(float) for v in (a, b)
    ]
    want = (cut[0] @ cut[1]).astype(np.float32)
    assert (c_words == np.stack([want[row, col] for row, col in C_PLACES], 1)).all()


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrices_go_to_registers_and_back(trans):
    matrices = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    words, back = np.zeros((32, 4), np.uint32), np.zeros((32, 4), np.uint32)
    copy = (
        "mov.u32 %r50, s; mad.lo.u32 %r51, %i, 16, %r50; mad.wide.u32 %d1, %i, 16, %q0; "
        "ld.global.v4.b32 {%r60, %r61, %r62, %r63}, [%d1]; st.shared.v4.b32 [%r51], {%r60, %r61, "
        "%r62, %r63}; bar.sync 0; "
    )
    load = f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {names(0, 4)}, [%r51]; "
    store = (
        f"add.u32 %r52, %r51, 512; stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r52], "
        f"{names(0, 4)}; bar.sync 0; ld.shared.v4.b32 {{%r60, %r61, %r62, %r63}}, [%r52]; "
        "mad.wide.u32 %d1, %i, 16, %q2; st.global.v4.b32 [%d1], {%r60, %r61, %r62, %r63}; "
    )
    run(copy + load + registers(4, 0, "%q1", "st") + store, [matrices, words, back], shared=1024)
    of = matrices.transpose(0, 2, 1) if trans else matrices
    want = np.concatenate([fragments(each, [(GROUP, 2 * WITHIN)]) for each in of], 1)
    assert (words == want).all()
    assert (back.view(np.uint16).reshape(4, 8, 8) == matrices).all()


def wgmma(
    kind,
    *,
    in_registers,
    fence="bar.sync 0;",
    wait="wgmma.wait_group.sync.aligned 0;",
    after="",
    threads=128,
):
    """D [64, 8] = A [64, 16] B [16, 8]^T of matrices without swizzle, and what it should be"""
    (a, a_bits), (b, b_bits) = halves((64, 16), kind), halves((8, 16), kind)
    # Core matrices of 8 rows by 16 bytes, one after the other along the depth, then along the rows.
    pieces = [bits.reshape(-1, 8, 2, 8).transpose(0, 2, 1, 3) for bits in (a_bits, b_bits)]
    memory = np.ascontiguousarray(np.concatenate([p.reshape(-1) for p in pieces]))
    lane = np.arange(128)
    warp, group, within = lane // 32, lane % 32 // 4, lane % 4
    a_words = fragments(
        a_bits, [(16 * warp + group + 8 * (i & 1), 2 * within + 8 * (i >> 1)) for i in range(4)]
    )
    d_words = np.zeros((128, 4), np.float32)
    copy = (
        "mov.u32 %r50, s; mad.lo.u32 %r51, %i, 4, %r50; mad.wide.u32 %d1, %i, 4, %q0; mov.u32 "
        "%r53, 0; L: ld.global.b32 %r52, [%d1]; st.shared.b32 [%r51], %r52; add.u32 %r51, %r51, "
        "512; add.u64 %d1, %d1, 512; add.u32 %r53, %r53, 1; setp.lt.u32 %p1, %r53, 4; @%p1 bra L; "
        "setp.ge.u32 %p2, %i, 64; @%p2 bra M; ld.global.b32 %r52, [%d1]; st.shared.b32 [%r51], "
        f"%r52; M: {fence} "
    )
    describe = lambda at: at >> 4 | (128 >> 4) << 16 | (256 >> 4) << 32  # noqa: E731
    zeros = " ".join(f"mov.b32 %r{8 + j}, 0;" for j in range(4))
    left = names(0, 4) if in_registers else "%d2"
    transposed = "0" if in_registers else "0, 0"
    product = (
        registers(4, 0, "%q1", "ld")
        + zeros
        + f"mov.b64 %d2, {describe(0)}; mov.b64 %d3, {describe(2048)}; setp.eq.u32 %p3, %i, %i; "
        f"wgmma.fence.sync.aligned; wgmma.mma_async.sync.aligned.m64n8k16.f32.{kind}.{kind} "
        f"{names(8, 4)}, {left}, %d3, %p3, 1, 1, {transposed}; wgmma.commit_group.sync.aligned; "
        f"{after} {wait} "
    )
    body = copy + product + registers(4, 8, "%q2", "st")
    run(body, [memory, a_words, d_words], threads=threads, shared=2304)
    want = (a @ b.T).astype(np.float32)
    places = [(16 * warp + group + 8 * (i >> 1), 2 * within + (i & 1)) for i in range(4)]
    return d_words, np.stack([want[row, col] for row, col in places], 1)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("in_registers", [False, True])
def test_wgmma(kind, in_registers):
    got, want = wgmma(kind, in_registers=in_registers)
    assert (got == want).all()


def test_wgmma_of_memory_that_is_not_ready_is_refused():
    with pytest.raises(PTXError, match="race: wgmma"):
        wgmma("f16", in_registers=False, fence="")
    with pytest.raises(PTXError, match="a wgmma still reads"):
        wgmma("f16", in_registers=False, after="st.shared.b32 [s], 1;", wait="")
    with pytest.raises(PTXError, match="race"):
        wgmma(
            "f16",
            in_registers=False,
            wait="wgmma.wait_group.sync.aligned 0; setp.eq.u32 %p1, %i, 9; @%p1 st.shared.b32 [s], 1;",
        )
