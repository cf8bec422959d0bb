"""What threads do together in the PTX interpreter: the right kernels run, and each check meets the
least kernel it must refuse."""

import numpy as np
import pytest
from ptx import Memory, Module, PTXError

HEADER = """.version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 out) {
.reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<39>; .reg .b64 %rd<19>;
.shared .align 16 .b8 s[512];
mov.u32 %r1, %tid.x; ld.param.u64 %rd1, [out]; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2; shl.b32 %r2, %r1, 2;
mov.u32 %r3, s; add.s32 %r4, %r3, %r2; xor.b32 %r5, %r4, 4; setp.lt.u32 %p1, %r1, 32; setp.eq.u32 %p2, %r1, 5;
"""
# Opcodes that test_ptx_opcodes.py leaves to this file and to the products of matrices in
# test_ptx_matrices.py.
RUN_THERE = {"ld", "st", "mov", "cvta", "atom", "cp", "bar", "fence", "shfl", "ldmatrix"}
RUN_THERE |= {"stmatrix", "mma", "wgmma"}
NEIGHBOUR = "st.shared.u32 [%r4], %r1; {} ld.shared.u32 %r6, [%r5]; st.global.u32 [%rd3], %r6;"
STORE = "st.global.u32 [%rd3], %r8;"


def run(
    body,
    *,
    size=256,
    threads=64,
    ctas=1,
    start=0,
    writable=True,
    together=16384,
    order=None,
    **options,
):
    """Memory as words after a kernel that begins as HEADER; %r1: the thread, %rd3: its word, %r4:
    its word of shared memory"""
    out, memory = np.full(size, start, np.uint8), Memory()
    address = memory.add(out, writable=writable)
    kernel = Module(HEADER + body + "ret; }").kernels["k"]
    params = address.to_bytes(8, "little")
    kernel.run((ctas,), (threads,), params, memory, threads=together, ctas=order, **options)
    memory.copy_back()
    return out.view(np.uint32)


THREAD = np.arange(64)


def expect(body, want, **options):
    """want: of each of the 64 threads"""
    assert run(body, **options).tolist() == [want(i) for i in range(64)]


# ---- control


def test_threads_that_part_meet_again():
    expect(NEIGHBOUR.format("bar.sync 0;"), lambda i: i ^ 1, ctas=3)
    loop = (
        "mov.u32 %r8, 0; L: add.s32 %r8, %r8, 1; setp.lt.u32 %p3, %r8, %r1; @%p3 bra L; bar.sync 0;"
    )
    expect(loop + STORE, lambda i: max(1, i))
    branches = "@%p1 bra A; mov.u32 %r7, 9; bra.uni B; A: mov.u32 %r7, 7; B: shfl.sync.bfly.b32 %r8, %r7, 1, 31, -1;"
    expect(branches + STORE, lambda i: 7 if i < 32 else 9)
    expect(f"@%p2 ret; mov.u32 %r8, 3; {STORE}", lambda i: 0 if i == 5 else 3)
    guarded = "mov.u32 %r8, 1; @%p2 mov.u32 %r8, 4; @!%p1 add.u32 %r8, %r8, 1;"
    expect(guarded + STORE, lambda i: 4 if i == 5 else 1 + (i >= 32))


def test_moves_take_words_apart():
    body = "mov.b32 {%h1, %h2}, %r1; mov.b32 %r8, {%h2, %h1}; mov.b64 %rd4, {%r8, %r1}; mov.b64 {%r9, %r10}, %rd4;"
    expect(body + "add.u32 %r8, %r9, %r10;" + STORE, lambda i: i << 16 | i)


def test_loads_and_stores():
    for load in ("ld.global.u32", "ld.global.nc.u32", "ld.u32"):
        expect(
            f"{load} %r8, [%rd3]; add.u32 %r8, %r8, %r1; {STORE}", lambda i: 0x01010101 + i, start=1
        )
    signed = "ld.global.s8 %r8, [%rd3]; st.u32 [%rd3], %r8;"
    expect(signed, lambda i: 0xFFFFFF80, start=0x80)
    vector = "and.b32 %r7, %r1, 60; mul.wide.u32 %rd5, %r7, 4; add.u64 %rd5, %rd1, %rd5; ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%rd5];"
    expect(f"st.global.u32 [%rd3], %r1; {vector} mov.u32 %r8, %r13; {STORE}", lambda i: i | 3)
    body = "cvta.global.u64 %rd4, %rd3; cvta.to.global.u64 %rd4, %rd4; st.global.u32 [%rd4], 7;"
    expect(body, lambda i: 7)


def test_variables_of_a_module_outlive_a_launch():
    text = (
        ".visible .global .align 4 .b8 counters[64]; .entry k() { .reg .b64 %a; .reg .b32 %r; "
        "mov.u64 %a, counters; cvta.global.u64 %a, %a; atom.acq_rel.gpu.global.inc.u32 %r, [%a+8], "
        "100; ld.global.u32 %r, [counters+8]; st.global.u32 [%a], 7; ret; }"
    )
    module = Module(text)
    for _ in range(2):
        module.kernels["k"].run((2,), (3,), b"", Memory())
    assert module.variables.view(np.uint32)[:5].tolist() == [7, 0, 12, 0, 0]
    with pytest.raises(PTXError, match="outside of the module's variables"):
        Module(text.replace("[%a+8]", "[%a+64]")).kernels["k"].run((1,), (1,), b"", Memory())


# ---- warps and blocks


def test_shuffles():
    for how, b, c, want in (
        ("bfly", "3", "31", lambda i: i ^ 3),
        ("down", "2", "31", lambda i: i + 2 if i % 32 < 30 else i),
        ("idx", "5", "31", lambda i: i // 32 * 32 + 5),
        ("idx", "5", f"{24 << 8 | 31}", lambda i: i // 8 * 8 + 5),  # segments of eight lanes
        ("down", "4", f"{24 << 8 | 31}", lambda i: i + 4 if i % 8 < 4 else i),
    ):
        body = f"shfl.sync.{how}.b32 %r8|%p3, %r1, {b}, {c}, -1; @!%p3 add.u32 %r8, %r8, 1000;"
        got = run(body + STORE).tolist()
        assert got == [want(i) + 1000 * (want(i) == i and how == "down") for i in range(64)], how


def test_shuffles_of_a_part_of_a_warp():
    part = "setp.lt.u32 %p4, %r1, 8; mov.u32 %r8, 99; @!%p4 bra A; {} A: " + STORE
    body = part.format("shfl.sync.idx.b32 %r8, %r1, 3, 31, 255;")
    assert run(body).tolist() == [3] * 8 + [99] * 56
    with pytest.raises(PTXError, match="not the one it names"):
        run(part.format("shfl.sync.idx.b32 %r8, %r1, 3, 31, 511;"))
    with pytest.raises(PTXError, match="does not take part"):
        run(part.format("shfl.sync.idx.b32 %r8, %r1, 9, 31, 255;"))
    # The block's own end is no part: a warp of eight threads names all of itself with -1.
    body = "shfl.sync.idx.b32 %r8, %r1, 3, 31, -1;" + STORE
    assert run(body, threads=8, size=32).tolist() == [3] * 8


# ---- tickets


def test_tickets_are_taken_one_by_one_in_any_order():
    ticket = "atom.acq_rel.gpu.global.inc.u32 %r8, [%rd1+256], {}; " + STORE
    assert run(ticket.format(63), size=512)[:65].tolist() == [*range(64), 0]
    got = run(ticket.format(63), size=512, errors=1)[:64].tolist()
    assert sorted(got) == list(range(64)) != got
    assert run(ticket.format(9), size=512)[64] == 64 % 10  # 0 again after the last


def test_the_last_block_sums_what_the_others_left():
    """A column sum in one launch: each block leaves a partial sum and takes a ticket; the last one
    adds them up."""
    body = (
        "mov.u32 %r20, %ctaid.x; mul.wide.u32 %rd5, %r20, 4; add.u64 %rd5, %rd1, %rd5; add.u32 "
        "%r21, %r20, 1; setp.ne.u32 %p3, %r1, 0; @%p3 bra E; st.global.u32 [%rd5], %r21; "
        "atom.acq_rel.gpu.global.inc.u32 %r22, [%rd1+252], 9; setp.ne.u32 %p4, %r22, 9; @%p4 bra "
        "E; fence.proxy.async; mov.u32 %r8, 0; mov.u32 %r23, 0; mov.u64 %rd6, %rd1; L: "
        "ld.global.u32 %r24, [%rd6]; add.u32 %r8, %r8, %r24; add.u64 %rd6, %rd6, 4; add.u32 %r23, "
        "%r23, 1; setp.lt.u32 %p5, %r23, 10; @%p5 bra L; st.global.u32 [%rd1+240], %r8; E: "
    )
    orders = (None, lambda grid: [(x, 0, 0) for x in reversed(range(grid[0]))])
    for threads in (64, 256, 16384):  # one block after the other, four together, all
        for order in orders:
            got = run(body, ctas=10, order=order, together=threads)
            assert got[60] == 55 and got[63] == 0


def test_two_nans_are_one_value():
    """A GPU's have one form; here two threads that add the same numbers may get two."""
    body = "and.b32 %r20, %r1, 1; or.b32 %r20, %r20, {}; st.global.u32 [%rd1], %r20;"
    assert np.isnan(run(body.format(0x7FC00000)).view("f4")[0])
    with pytest.raises(PTXError, match="different values"):
        run(body.format(0x3F800000))


# ---- what is refused


@pytest.mark.parametrize(
    "body, message",
    [
        (NEIGHBOUR.format(""), "race"),
        ("ld.shared.u32 %r6, [%r4];", "nobody wrote"),
        ("ld.shared.u32 %r6, [%r4+256];", "nobody wrote"),
        ("ld.shared.u32 %r6, [%r4+260];", "of shared memory"),
        ("ld.shared.u32 %r6, [%r4+2];", "misaligned"),
        ("st.global.u32 [%rd3+4], %r1;", "byte 256 of tensor 0, which has 256"),
        ("ld.global.u32 %r6, [%rd3+-4];", "byte -4 of tensor 0"),
        ("ld.global.v2.u32 {%r6, %r7}, [%rd3];", "misaligned"),
        ("ld.global.u32 %r6, [%rd2];", "no memory"),
        ("atom.acq_rel.gpu.global.inc.u32 %r6, [%rd3+4], 1;", "byte 256 of tensor 0"),
        ("st.global.u32 [%rd1], %r1;", "different values"),
        ("st.shared.u32 [%r3], %r1;", "different values"),
        ("@%p2 bra A; bar.sync 0; A: bar.sync 0;", "never arrive"),
        (
            "@%p2 bra A; shfl.sync.bfly.b32 %r8, %r1, 1, 31, -1; A: bar.sync 0;",
            "not the one it names",
        ),
        ("@%p2 bra A; bar.warp.sync -1; A: bar.sync 0;", "not the one it names"),
        (
            "@%p2 bra A; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r8}, [%r3]; A: bar.sync 0;",
            "part of a warp",
        ),
        (
            "cp.async.ca.shared.global [%r4], [%rd3], 4; cp.async.commit_group; bar.sync 0; ld.shared.u32 %r6, [%r4];",
            "cp.async has arrived",
        ),
        (
            "cp.async.ca.shared.global [%r4], [%rd3], 4; cp.async.commit_group; cp.async.wait_group 0; ld.shared.u32 %r6, [%r5];",
            "race",
        ),
        ("L: bra L;", "did not end"),
        ("mov.u32 %r6, %clock;", "not implemented"),
        ("ld.const.u32 %r6, [s];", "not implemented"),
        ("bar.sync 1;", "not implemented"),
        ("vote.ballot.b32 %r6, %p1;", "not implemented"),
        ("atom.global.add.u32 %r6, [%rd3], 1;", "not implemented"),
        ("trap;", "not implemented"),
        (
            "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%rd4}, {%rd5}, {%rd6}, {%rd7};",
            "not implemented",
        ),
        ("call.uni f, (%r1);", "not implemented"),
    ],
)
def test_a_kernel_that_is_wrong_is_refused(body, message):
    with pytest.raises(PTXError, match=message):
        run(body)


def test_copies_arrive_with_their_group():
    body = "cp.async.ca.shared.global [%r4], [%rd3], 4; cp.async.commit_group; {} bar.sync 0; ld.shared.u32 %r8, [%r5]; bar.sync 0;"
    zeros = body.replace("[%rd3], 4;", "[%rd3], 4, 0;", 1)
    for copy, wait, want in (
        (body, "cp.async.wait_group 0;", lambda i: i ^ 1),
        (zeros, "cp.async.wait_group 0;", lambda i: 0),
    ):
        expect("st.global.u32 [%rd3], %r1;" + copy.format(wait) + STORE, want)


def test_a_tensor_that_is_read_only_stays_so():
    for store in ("st.global.u32", "atom.acq_rel.gpu.global.inc.u32 %r8,"):
        with pytest.raises(PTXError, match="read only"):
            run(f"{store} [%rd3], %r1;", writable=False)


def test_launches_that_no_gpu_takes_are_refused():
    for threads, ctas in ((1025, 1), (0, 1), (32, 0)):
        with pytest.raises(PTXError, match="no GPU launches"):
            run("", threads=threads, ctas=ctas)


def test_parameters_of_the_wrong_size_and_blocks_too_large_are_refused():
    text = ".entry k(.param .u64 a, .param .u32 b) .maxntid 64 { ret; }"
    kernel = Module(text).kernels["k"]
    kernel.run((1,), (64,), bytes(12), Memory())
    with pytest.raises(PTXError, match="16 bytes of parameters"):
        kernel.run((1,), (64,), bytes(16), Memory())
    with pytest.raises(PTXError, match="a block of 96 threads"):
        kernel.run((1,), (96,), bytes(12), Memory())
