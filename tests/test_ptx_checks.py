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
.local .align 8 .b8 depot[16];
mov.u32 %r1, %tid.x; ld.param.u64 %rd1, [out]; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2; shl.b32 %r2, %r1, 2;
mov.u32 %r3, s; add.s32 %r4, %r3, %r2; xor.b32 %r5, %r4, 4; setp.lt.u32 %p1, %r1, 32; setp.eq.u32 %p2, %r1, 5;
"""
# Opcodes that test_ptx_opcodes.py leaves to this file and to the products of matrices in
# test_ptx_matrices.py.
RUN_THERE = {"ld", "st", "mov", "cvta", "atom", "red", "cp", "bar", "barrier", "shfl"}
RUN_THERE |= {"ldmatrix", "stmatrix", "mma", "wgmma"}
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


@pytest.mark.parametrize(
    "load", ["ld.global.u32", "ld.volatile.global.u32", "ld.relaxed.gpu.global.u32"]
)
def test_loads_and_stores(load):
    expect(f"{load} %r8, [%rd3]; add.u32 %r8, %r8, %r1; {STORE}", lambda i: 0x01010101 + i, start=1)
    signed = "ld.global.s8 %r8, [%rd3]; st.global.u32 [%rd3], %r8;"
    expect(signed, lambda i: 0xFFFFFF80, start=0x80)
    vector = "and.b32 %r7, %r1, 60; mul.wide.u32 %rd5, %r7, 4; add.u64 %rd5, %rd1, %rd5; ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%rd5];"
    expect(f"st.global.u32 [%rd3], %r1; {vector} mov.u32 %r8, %r13; {STORE}", lambda i: i | 3)


def test_local_memory_is_each_threads_own():
    direct = "st.local.u32 [depot+4], %r1; ld.local.u32 %r8, [depot+4];"
    assert run(direct + STORE).tolist() == THREAD.tolist()
    generic = (
        "mov.u64 %rd4, depot; cvta.local.u64 %rd5, %rd4; st.u32 [%rd5], %r1; ld.u32 %r8, [%rd5];"
    )
    assert run(generic + STORE).tolist() == THREAD.tolist()


def test_generic_addresses_reach_shared_memory():
    body = "cvt.u64.u32 %rd4, %r4; cvta.shared.u64 %rd5, %rd4; st.u32 [%rd5], %r1; cvta.to.shared.u64 %rd6, %rd5;"
    assert run(f"{body} ld.shared.u32 %r8, [%rd6]; {STORE}").tolist() == THREAD.tolist()
    body = "cvta.global.u64 %rd4, %rd3; cvta.to.global.u64 %rd4, %rd4; st.global.u32 [%rd4], 7;"
    expect(body, lambda i: 7)


def test_variables_of_a_module_outlive_a_launch():
    text = (
        ".visible .global .align 4 .b8 counters[64]; .entry k() { .reg .b64 %a; .reg .b32 %r; "
        "mov.u64 %a, counters; cvta.global.u64 %a, %a; atom.global.inc.u32 %r, [%a+8], 100; "
        "red.global.add.u32 [counters+12], 2; ret; }"
    )
    module = Module(text)
    for _ in range(2):
        module.kernels["k"].run((2,), (3,), b"", Memory())
    assert module.variables.view(np.uint32)[:5].tolist() == [0, 0, 12, 24, 0]
    with pytest.raises(PTXError, match="outside of the module's variables"):
        Module(text.replace("[%a+8]", "[%a+64]")).kernels["k"].run((1,), (1,), b"", Memory())


# ---- warps and blocks


def test_shuffles():
    for how, b, c, want in (
        ("bfly", "3", "31", lambda i: i ^ 3),
        ("up", "2", "0", lambda i: i - 2 if i % 32 >= 2 else i),
        ("down", "2", "31", lambda i: i + 2 if i % 32 < 30 else i),
        ("idx", "5", "31", lambda i: i // 32 * 32 + 5),
        ("idx", "5", f"{24 << 8 | 31}", lambda i: i // 8 * 8 + 5),  # segments of eight lanes
        ("down", "4", f"{24 << 8 | 31}", lambda i: i + 4 if i % 8 < 4 else i),
    ):
        body = f"shfl.sync.{how}.b32 %r8|%p3, %r1, {b}, {c}, -1; @!%p3 add.u32 %r8, %r8, 1000;"
        got = run(body + STORE).tolist()
        assert got == [
            want(i) + 1000 * (want(i) == i and how in ("up", "down")) for i in range(64)
        ], how


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


def test_reductions_at_a_barrier():
    assert run("bar.red.popc.u32 %r8, 0, %p1;" + STORE, ctas=2).tolist() == [32] * 64
    for how, want in (("or", 1), ("and", 0)):
        body = f"barrier.cta.red.{how}.pred %p3, 0, %p2; selp.u32 %r8, 1, 0, %p3;"
        assert run(body + STORE).tolist() == [want] * 64


# ---- atomic operations


@pytest.mark.parametrize("errors", [0, 1, 2])
@pytest.mark.parametrize(
    "operation, start, want",
    [
        ("add.u32 {d}[%rd1], %r1;", 0, sum(range(64))),
        ("add.s32 {d}[%rd1], -1;", 0, 2**32 - 64),
        ("max.u32 {d}[%rd1], %r1;", 0, 63),
        ("min.s32 {d}[%rd1], %r1;", 127, 0),
        ("min.u32 {d}[%rd1], %r1;", 255, 0),
        ("or.b32 {d}[%rd1], %r1;", 0, 63),
        ("and.b32 {d}[%rd1], 6;", 255, 6),
        ("xor.b32 {d}[%rd1], %r1;", 0, 0),
        ("inc.u32 {d}[%rd1], 9;", 0, 64 % 10),
        ("dec.u32 {d}[%rd1], 9;", 0, 6),
    ],
)
def test_atomic_operations_meet_in_one_word(operation, start, want, errors):
    for name in ("red.global", "atom.global", "atom.relaxed.gpu.global"):
        target = "" if name.startswith("red") else "%r8, "
        got = run(f"{name}.{operation.format(d=target)}", start=start, errors=errors)
        assert got[0] == want and (got[1:] == start * 0x01010101).all()


def test_atomic_operations_return_what_was_there():
    ticket = "atom.global.inc.u32 %r8, [%rd1+256], 63; " + STORE
    assert run(ticket, size=512)[:64].tolist() == list(range(64))
    assert sorted(run(ticket, size=512, errors=1)[:64].tolist()) == list(range(64))
    assert run(ticket, size=512, errors=1)[:64].tolist() != list(range(64))
    swap = "atom.global.exch.b32 %r8, [%rd1+256], %r1; " + STORE
    assert run(swap, size=512)[:64].tolist() == [0, *range(63)]
    compare = "atom.global.cas.b32 %r8, [%rd1+256], %r1, %r9; " + STORE
    got = run("add.u32 %r9, %r1, 1; " + compare, size=512)
    assert got[:64].tolist() == list(range(64)) and got[64] == 64


def test_atomic_sums_of_floats_are_rounded_one_by_one():
    body = "cvt.rn.f32.u32 %r8, %r1; mul.f32 %r8, %r8, 0f3DCCCCCD; red.global.add.f32 [%rd1], %r8;"
    total = np.float32(0)
    for i in range(64):
        total += np.float32(i) * np.float32(0.1)
    assert run(body).view(np.float32)[0] == total
    sums = {float(run(body, errors=n).view(np.float32)[0]) for n in range(1, 6)}
    assert len(sums) > 1 and all(abs(v - total) < 1e-4 for v in sums)
    body = "cvt.rn.f64.u32 %rd5, %r1; red.global.add.f64 [%rd1], %rd5;"
    assert run(body).view(np.float64)[0] == sum(range(64))


def test_atomic_operations_of_shared_memory():
    body = "setp.eq.u32 %p3, %r1, 0; @%p3 st.shared.u32 [s], 0; bar.sync 0; {} bar.sync 0; ld.shared.u32 %r8, [s];"
    assert run(body.format("red.shared.add.u32 [s], 2;") + STORE, ctas=2).tolist() == [128] * 64
    with pytest.raises(PTXError, match="race"):
        run(body.replace("bar.sync 0; ld", "ld").format("red.shared.add.u32 [s], 2;") + STORE)
    with pytest.raises(PTXError, match="nobody wrote"):
        run("red.shared.add.u32 [s], 2;")


def test_the_last_block_sums_what_the_others_left():
    """A column sum in one launch: each block leaves a partial sum and takes a ticket; the last one
    adds them up."""
    body = (
        "mov.u32 %r20, %ctaid.x; mul.wide.u32 %rd5, %r20, 4; add.u64 %rd5, %rd1, %rd5; add.u32 "
        "%r21, %r20, 1; setp.ne.u32 %p3, %r1, 0; @%p3 bra E; st.global.u32 [%rd5], %r21; "
        "membar.gl; atom.global.inc.u32 %r22, [%rd1+252], 9; setp.ne.u32 %p4, %r22, 9; @%p4 bra "
        "E; fence.acq_rel.gpu; mov.u32 %r8, 0; mov.u32 %r23, 0; mov.u64 %rd6, %rd1; L: "
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
        ("atom.global.add.u32 %r6, [%rd3+4], 1;", "byte 256 of tensor 0"),
        (
            "cvt.u64.u32 %rd4, %r4; cvta.shared.u64 %rd5, %rd4; ld.global.u32 %r6, [%rd5];",
            "an address of shared memory",
        ),
        ("ld.local.u32 %r6, [depot+16];", "outside of 16 of local memory"),
        ("st.global.u32 [%rd1], %r1;", "different values"),
        ("st.shared.u32 [%r3], %r1;", "different values"),
        ("@%p2 bra A; bar.sync 0; A: bar.sync 0;", "never arrive"),
        ("@%p2 bra A; bar.red.popc.u32 %r8, 0, %p1; A: bar.sync 0;", "never arrive"),
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
        ("trap;", "trap"),
        ("L: bra L;", "did not end"),
        ("mov.u32 %r6, %clock;", "not implemented"),
        ("ld.const.u32 %r6, [s];", "not implemented"),
        ("bar.sync 1;", "not implemented"),
        ("vote.ballot.b32 %r6, %p1;", "not implemented"),
        ("atom.global.add.noftz.f16 %h1, [%rd3], %h2;", "not implemented"),
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


def test_a_trap_that_no_thread_meets_is_none():
    run("setp.gt.u32 %p3, %r1, 99; @%p3 trap;")


def test_copies_arrive_with_their_group():
    body = "cp.async.ca.shared.global [%r4], [%rd3], 4; cp.async.commit_group; {} bar.sync 0; ld.shared.u32 %r8, [%r5]; bar.sync 0;"
    zeros = body.replace("[%rd3], 4;", "[%rd3], 4, 0;", 1)
    for copy, wait, want in (
        (body, "cp.async.wait_group 0;", lambda i: i ^ 1),
        (body, "cp.async.wait_all;", lambda i: i ^ 1),
        (zeros, "cp.async.wait_all;", lambda i: 0),
    ):
        expect("st.global.u32 [%rd3], %r1;" + copy.format(wait) + STORE, want)


def test_a_tensor_that_is_read_only_stays_so():
    for store in ("st.global.u32", "red.global.add.u32"):
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
