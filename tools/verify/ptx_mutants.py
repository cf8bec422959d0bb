"""Plants faults in the code that nvcc and Triton generated, and sees whether executing it finds
them.  docs/reliability.md.

    python tools/verify/ptx_mutants.py  # two faults in each CUDA kernel, four in each Triton kernel
    python tools/verify/ptx_mutants.py --only activation  # of kernels whose name says so
    python tools/verify/ptx_mutants.py --record  # and writes the figures into docs/reliability.md

A fault is one changed instruction among those that the kernel's case executes, drawn by a fixed
seed. It is found where the checks of tests/test_ptx_cuda.py, tests/test_ptx_triton.py or
tests/test_ptx_producers.py fail or tests/ptx refuses to go on. Needs nvcc, no GPU.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from mutations import found_table, in_turns
from reliability import ROOT, command_line, record

sys.path.insert(0, str(ROOT / "tests"))
import test_ptx_cuda as cuda
import test_ptx_producers as producers
import test_ptx_triton as triton
from ptx.kernel import Kernel
from ptx.parser import Instruction
from ptx_cuda_host import build
from ptx_cuda_support import Library

_COMPARISONS = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}
_COMPARISONS |= {"ltu": "geu", "gtu": "leu", "leu": "gtu", "geu": "ltu", "equ": "neu", "neu": "equ"}
_PAIRS = (("add", "sub"), ("and", "or"), ("shl", "shr"), ("min", "max"))
_OPCODES = {old: new for a, b in _PAIRS for old, new in ((a, b), (b, a))}
_ORDERS = ("bar", "barrier")
FOUND, SAME, NEAR = "found", "no bit of any result changed", "results changed, within the tolerance"


class Fault(NamedTuple):
    kernel: str
    block: int
    index: int
    kind: str
    before: Instruction
    after: Instruction | None  # None: removed

    @property
    def place(self) -> str:
        return f"{self.kernel}:{self.block}.{self.index}:{self.kind}"

    @property
    def text(self) -> str:
        return f"{written(self.before)} -> {written(self.after) if self.after else 'nothing'}"


def written(ins: Instruction) -> str:
    guard = f"@{'!' * ins.negated}{ins.guard} " if ins.guard else ""
    return f"{guard}{ins.opcode} {', '.join(ins.operands)}"


def with_opcode(ins: Instruction, old: str, new: str) -> Instruction:
    opcode = re.sub(rf"(^|\.){old}(\.|$)", rf"\g<1>{new}\g<2>", ins.opcode, count=1)
    return dataclasses.replace(
        ins, opcode=opcode, parts=[new if p == old else p for p in ins.parts]
    )


def with_operand(ins: Instruction, index: int, text: str) -> Instruction:
    return dataclasses.replace(
        ins, operands=[*ins.operands[:index], text, *ins.operands[index + 1 :]]
    )


def faults_in(ins: Instruction) -> Iterator[tuple[str, Instruction | None]]:
    """(kind, changed instruction) of every fault that fits"""
    op = ins.parts[0]
    if ins.guard:
        yield "predicate", dataclasses.replace(ins, negated=not ins.negated)
        if op != "bra":
            yield "predicate", dataclasses.replace(ins, guard=None, negated=False)
    if op in _ORDERS or ins.parts[:3] == ["cp", "async", "wait_group"]:
        yield "barrier", None
    if op in ("ld", "st", "atom", "red", "cp", "ldmatrix", "stmatrix") and "param" not in ins.parts:
        for i, operand in enumerate(ins.operands):
            if operand.startswith("["):
                inner = operand.strip("[] ")
                base, _, offset = inner.partition("+")
                step = 8 if ins.parts[-1].endswith("64") else 4
                if op in ("ldmatrix", "stmatrix", "cp"):
                    step = 16
                yield "address", with_operand(ins, i, f"[{base}+{int(offset or 0) + step}]")
    if op == "setp" and ins.parts[1] in _COMPARISONS:
        yield "comparison", with_opcode(ins, ins.parts[1], _COMPARISONS[ins.parts[1]])
    if op in _OPCODES and not (op in ("min", "max") and "NaN" in ins.parts and len(ins.parts) > 4):
        changed = with_opcode(ins, op, _OPCODES[op])
        if op == "shl":  # .b32 to .u32
            changed = with_opcode(changed, ins.parts[-1], ins.parts[-1].replace("b", "u"))
        elif op == "shr":
            changed = with_opcode(changed, ins.parts[-1], "b" + ins.parts[-1][1:])
        yield "opcode", changed
    if op == "selp":
        swapped = [ins.operands[i] for i in (0, 2, 1, 3)]
        if swapped != ins.operands:
            yield "opcode", dataclasses.replace(ins, operands=swapped)
    if op == "shfl":
        lane = ins.operands[2]
        yield "mask", with_operand(ins, 2, "1" if lane[0] == "%" else str(int(lane, 0) // 2 or 2))
    if op in ("and", "add", "mul", "mad", "bfe", "mov", "xor", "or"):
        for i, operand in enumerate(ins.operands[1:], 1):
            if re.fullmatch(r"-?\d+", operand):
                number = int(operand)
                changed = number + 1 if abs(number) < 4096 else number ^ 0xFF00
                kind = "mask" if op in ("and", "or", "xor") else "constant"
                yield kind, with_operand(ins, i, str(changed))


def planted(kernel: Kernel, fault: Fault) -> Kernel:
    mutant, body = copy.copy(kernel), copy.copy(kernel.body)
    body.blocks = list(body.blocks)
    block = copy.copy(body.blocks[fault.block])
    after = [] if fault.after is None else [fault.after]
    block.instructions = list(block.instructions)
    block.instructions[fault.index : fault.index + 1] = after
    body.blocks[fault.block], mutant.body = block, body
    mutant.functions = {key: f for key, f in kernel.functions.items() if key[0] != fault.block}
    return mutant


def drawn(name: str, kernel: Kernel, count: int, seed: int) -> list[Fault]:
    """`count` faults of as many kinds as there are, in blocks that were executed"""
    r = random.Random(f"{seed}:{name}")
    by_kind: dict[str, list[Fault]] = {}
    for block in sorted({key[0] for key in kernel.functions}):
        for index, ins in enumerate(kernel.body.blocks[block].instructions):
            for kind, after in faults_in(ins):
                by_kind.setdefault(kind, []).append(Fault(name, block, index, kind, ins, after))
    for faults in by_kind.values():
        r.shuffle(faults)
    kinds = sorted(by_kind)
    r.shuffle(kinds)
    return in_turns(by_kind, kinds, count)


class Memories:
    """Digests of all global memory after each launch: whether a fault that was not found changed
    anything at all"""

    def __init__(self) -> None:
        self.digests: list[str] = []
        run = Kernel.run

        def watched(kernel, grid, block, params, memory, *args, **kwargs):
            count = run(kernel, grid, block, params, memory, *args, **kwargs)
            # Of each tensor, for where they lie differs from run to run.
            parts = []
            for array, place, low in zip(memory.arrays, memory.places, memory.low, strict=True):
                held = memory.arena[place + low : place + low + array.nbytes]
                parts.append(hashlib.sha256(held.tobytes()).hexdigest())
            self.digests.append(" ".join(sorted(parts)))
            return count

        Kernel.run = watched

    def of(self, case: Callable[[], None]) -> list[str]:
        self.digests = []
        torch.manual_seed(0)
        case()
        return self.digests


def outcome(case: Callable[[], None], memories: Memories, right: list[str]) -> str:
    try:
        return SAME if memories.of(case) == right else NEAR
    except Exception:  # whatever it was, somebody would have seen it
        return FOUND


# ---- CUDA


def cuda_cases(library: Library) -> Iterator[tuple[str, Callable[[], None]]]:
    """Small launches that together reach every kernel"""
    dtypes = [(cuda.F32,) * 3, (cuda.F16,) * 3, (cuda.BF16,) * 3, (cuda.F64,) * 3]
    dtypes += [(cuda.F32, cuda.BF16, cuda.BF16), (cuda.F32, cuda.F16, cuda.F16)]
    shapes = [(70, 40), (9, 16, 12), (41, 31), (5, 13, 7)]
    for shape, kinds, mode in itertools.product(shapes, dtypes, cuda.MODES):
        x, u, du, sigma = cuda.tensors(*shape, dtypes=kinds)
        taken = cuda.take(mode, x, u, du)

        def case(taken=taken, sigma=sigma):
            for count in (1, 8):  # a thread has many rows; many partial sums
                cuda.check(library, **taken, sigma=sigma, multiprocessors=count, row0=2**32 - 3)

        yield f"{shape} {kinds} {mode}", case


def of_cuda(count: int, seed: int, only: str, folder: Path) -> Iterator[tuple[str, Fault, str]]:
    build(folder, 80)
    library = Library(folder)
    library.options = {"errors": 1, "steps": 20_000}
    kernels, seen, memories = library.module.kernels, set(), Memories()
    for _, case in cuda_cases(library):
        library.launches.clear()
        right = memories.of(case)
        for name in sorted({name for name, *_ in library.launches} - seen):
            seen.add(name)
            if only not in name:
                continue
            kernel = kernels[name]
            for fault in drawn(name, kernel, count, seed):
                kernels[name] = planted(kernel, fault)
                yield cuda_group(name), fault, outcome(case, memories, right)
            kernels[name] = kernel
    assert only or seen == set(kernels), "a kernel that no case reaches"


def cuda_group(name: str) -> str:
    return "CUDA: " + re.search(r"(perturb_rows|perturb_channels|column_sum)_kernel", name)[0]


# ---- Triton


def triton_cases() -> Iterator[tuple[str, int, Callable]]:
    """(name, architecture, test) that together reach every kernel"""
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    perturb = triton.test_compiled_perturb_matches_reference
    linear = triton.test_compiled_linear_and_its_gradients_match_reference
    activation = triton.test_compiled_activation_matches_reference
    variance = triton.test_compiled_activation_variance_matches_reference
    gates = producers.test_compiled_activations_and_gates_match_reference
    for case in ("many rows", "odd", "nchw odd"):
        yield f"perturb {case}", 80, partial(perturb, case, f32, 80)
    yield "linear", 90, partial(linear, "square", bf16, bf16, "high", 90)
    yield "linear odd", 80, partial(linear, "odd", f16, f16, "high", 80)
    yield "linear tanh", 80, partial(linear, "tanh", f32, f32, "highest", 80)
    for name in ("relu", "gelu", "tanh"):
        yield f"activation {name}", 80, partial(activation, name, f32, 80)
    yield "variance", 80, partial(variance, f32, f32, True, 80)
    for case, name in (("odd", "silu"), ("nchw odd", "gelu"), ("many rows", "tanh")):
        yield f"gate {case} {name}", 80, partial(gates, case, name, f32, 80)
    for case, kind in (("odd", "layer"), ("split", "layer"), ("many rows", "rms")):
        yield f"norm {case} {kind}", 80, partial(norm, case, kind)


def norm(case: str, kind: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        producers.test_compiled_norm_and_its_gradients_match_reference(
            case, kind, "both", torch.float32, 80, patch
        )


def of_triton(count: int, seed: int, only: str) -> Iterator[tuple[str, Fault, str]]:
    torch.use_deterministic_algorithms(True)  # new memory is NaN
    compiled = triton.compiled
    state: dict = {"seen": {}, "kernel": None, "mutant": None, "multiprocessors": 4}
    memories = Memories()

    def swap(name, kernel):
        state["seen"].setdefault((name, id(kernel)), kernel)
        return state["mutant"] if kernel is state["kernel"] else kernel

    def watched(*modules, **options):
        options["multiprocessors"] = state["multiprocessors"]
        context = compiled(*modules, **options, steps=50_000)

        class Context:
            def __enter__(self):
                launches = context.__enter__()
                launches.mutate = swap
                return launches

            def __exit__(self, *error):
                return context.__exit__(*error)

        return Context()

    triton.compiled, done = watched, set()
    for case_name, arch, test in triton_cases():

        def case(test=test, both="perturb" in case_name):
            # Few programs, which have many rows each; many, which leave many partial sums.
            for state["multiprocessors"] in (1, 132) if both else (1,):
                test()

        state.update(seen={}, kernel=None)
        right = memories.of(case)
        for (name, identity), kernel in list(state["seen"].items()):
            if identity in done or only not in name:
                continue
            done.add(identity)
            for fault in drawn(f"{name} sm_{arch} {case_name}", kernel, count, seed):
                state.update(kernel=kernel, mutant=planted(kernel, fault))
                yield f"Triton: {name}", fault, outcome(case, memories, right)
            state["kernel"] = None
    triton.compiled = compiled


# ---- report


def report(results: list[tuple[str, Fault, str]], seed: int) -> str:
    count = Counter(how for *_, how in results)
    lines = [
        f"Seed {seed}: {len(results)} faults planted, {count[FOUND]} found. Of the others "
        f"{count[SAME]} changed no bit of any result of their case, and {count[NEAR]} changed "
        "results within the tolerance of the checks."
    ]
    for title, of in (
        ("kernels", lambda row: row[0]),
        ("what was changed", lambda row: row[1].kind),
    ):
        lines += ["", *found_table(title, results, of, lambda row: row[2] == FOUND)]
    near = [
        f"- {group}, {fault.kind}: `{fault.text}`: {how}"
        for group, fault, how in results
        if how == NEAR
    ]
    return "\n".join([*lines, "", *near]).rstrip()


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cuda", type=int, default=2, help="faults in each CUDA kernel (2)")
    parser.add_argument(
        "--triton",
        type=int,
        default=4,
        help="faults in each Triton kernel as a case compiles it (4)",
    )
    parser.add_argument("--only", default="", help="part of a kernel's name")
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="stop after this long; the report says so"
    )
    args = parser.parse_args()
    results, start, stopped = [], time.monotonic(), ""
    with tempfile.TemporaryDirectory(prefix="ptx_mutants") as folder:
        runs = [of_cuda(args.cuda, args.seed, args.only, Path(folder))] if args.cuda else []
        runs += [of_triton(args.triton, args.seed, args.only)] if args.triton else []
        for group, fault, how in itertools.chain(*runs):
            results.append((group, fault, how))
            if how != FOUND:
                print(f"not found: {fault.place}: {fault.text}: {how}", flush=True)
            if time.monotonic() - start > 60 * args.minutes:
                stopped = f" Stopped after {args.minutes:g} minutes, at {group}."
                break
    text = (
        f"At most {args.cuda} in each CUDA kernel, {args.triton} in each Triton kernel.{stopped} "
        f"{report(results, args.seed)}"
    )
    print(text)
    if args.record:
        record("ptx mutants", text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
