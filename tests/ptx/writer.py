"""From a basic block's instructions to a Python function of NumPy statements: operands,
assignments, the loop over them."""

from __future__ import annotations

import re

import numpy as np

from . import approximations, integers, kinds, rounding
from .kinds import KINDS, NAMES, UNSIGNED, PTXError, f32, f64, u32, u64, width_of
from .opcodes_bits import BitOpcodes
from .opcodes_floats import FloatOpcodes
from .opcodes_memory import MemoryOpcodes
from .parser import LEAVES, Block, Instruction, split_operands

SPECIAL = {f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"}
SPECIAL |= {"%laneid", "%warpid", "%nwarpid"} | {
    f"%lanemask_{how}" for how in ("eq", "lt", "le", "gt", "ge")
}
# Without effect here: blocks run in lockstep or one after the other, and see each other's writes at
# once.
IGNORED = {"fence", "membar", "prefetch", "griddepcontrol", "nanosleep", "discard", "applypriority"}
_LIBRARY = {**vars(kinds), **vars(rounding), **vars(integers), **vars(approximations), "np": np}


def select(mask, new, old):
    """A register after an instruction that only the threads in `mask` executed"""
    return new if old is None else np.where(mask, new, old)


class Writer(MemoryOpcodes, FloatOpcodes, BitOpcodes):
    """Writes a block as a function f(E, R, m): the run, its registers, the mask (None: all).

    A new opcode is one method op_<name>(parts of the opcode, operands), mostly of one line.
    """

    def __init__(self, kernel, masked: bool, contract: bool):
        self.kernel, self.masked, self.contract = kernel, masked, contract
        self.registers, self.symbols = kernel.body.registers, kernel.body.symbols
        self.products: dict[
            str, tuple[str, str]
        ] = {}  # registers of the block that hold a product which may be fused
        self.lines: list[str] = []
        self.constants: dict[str, object] = {}
        self.cached: dict[tuple, str] = {}

    def block(self, index: int, block: Block):
        ended = False
        for instruction in block.instructions:
            try:
                ended = self._instruction(instruction, block)
            except (KeyError, IndexError, ValueError, NotImplementedError, AssertionError) as error:
                what = f"{instruction.opcode} {', '.join(instruction.operands)}"
                raise PTXError(
                    f"{self.kernel.name}: {what} is not implemented ({error!r})"
                ) from error
        if not ended:
            self.lines.append(f"return {block.next[0]}")
        source = "def function(E, R, m):\n" + "".join(f"    {line}\n" for line in self.lines)
        space = {**_LIBRARY, "select": select, **self.constants}
        exec(compile(source, f"<{self.kernel.name[-40:]}, block {index}>", "exec"), space)
        return space["function"]

    def _instruction(self, ins: Instruction, block: Block) -> bool:
        """Whether it ends the block"""
        op, parts, o = ins.parts[0], ins.parts, ins.operands
        self.current = o[0] if op == "mul" else None
        self.mask = "m" if self.masked else "None"
        if ins.guard:
            guard = self.operand(ins.guard, "pred")
            guard = f"~{guard}" if ins.negated else guard
            if op in LEAVES:
                self.lines.append(f"return {guard}, {block.next[0]}, {block.next[1]}")
                return True
            self.lines.append(f"q = {'m & ' if self.masked else ''}({guard})")
            self.mask = "q"
        if op in LEAVES:
            if op == "bra" and parts[1:] not in ([], ["uni"]):
                raise PTXError(f"{ins.opcode} is not implemented")
            self.lines.append(f"return {block.next[0]}")
            return True
        if op == "trap":
            self.lines.append(f"E.trap({self.mask})")
        elif op not in IGNORED:
            method = getattr(self, f"op_{op}", None)
            if method is None:
                raise PTXError(f"{self.kernel.name}: opcode {ins.opcode} is not implemented")
            method(parts, o)
        return False

    # ---- operands

    def constant(self, value) -> str:
        key = (type(value), value.tobytes())
        if key not in self.cached:
            self.cached[key] = f"K{len(self.cached)}"
            self.constants[self.cached[key]] = value
        return self.cached[key]

    def operand(self, text: str, kind: str) -> str:
        """An expression of the operand's value, as NumPy's type for `kind` ("pred" for truths)"""
        if text in self.registers:
            index, width = self.registers[text]
            if kind == "pred":
                return f"R[{index}]"
            wanted = KINDS[kind]
            size = np.dtype(wanted).itemsize
            expression = f"R[{index}]"
            if width < size:
                raise ValueError(f"{text} is narrower than .{kind}")
            if width > size:
                expression = f"{expression}.astype({NAMES[UNSIGNED[size]]})"
            return expression if wanted is UNSIGNED[size] else f"{expression}.view({NAMES[wanted]})"
        if text in SPECIAL:
            value = f"E.special[{text!r}]"
            return value if KINDS[kind] is u32 else f"{value}.astype({NAMES[KINDS[kind]]})"
        return self.constant(self._immediate(text, kind))

    def _immediate(self, text: str, kind: str):
        if kind == "pred":
            return np.bool_(int(text) != 0)
        wanted = KINDS[kind]
        if re.match(r"^0[fF][0-9a-fA-F]{8}$", text):
            bits = u32(int(text[2:], 16))
            if wanted is f64:
                return f64(bits.view(f32))
            return bits.view(f32) if wanted is f32 else bits.astype(wanted)
        if re.match(r"^0[dD][0-9a-fA-F]{16}$", text):
            bits = u64(int(text[2:], 16))
            return bits.view(f64) if wanted is f64 else bits
        if text in self.symbols:
            return wanted(self.symbols[text][0])
        number = int(text.rstrip("U"), 0)
        size = np.dtype(wanted).itemsize
        return UNSIGNED[size](number & ((1 << 8 * size) - 1)).view(wanted)

    def vector(self, text: str) -> list[str]:
        return split_operands(text.strip("{} ")) if text.startswith("{") else [text]

    def listed(self, text: str, kind: str = "b32") -> str:
        """A list of a vector's operands"""
        return "[" + ", ".join(self.operand(r, kind) for r in self.vector(text)) + "]"

    def address(self, text: str) -> str:
        """[register + offset], [symbol + offset] as uint64"""
        inner = text.strip("[] ")
        base, offset = inner, 0
        if match := re.match(r"^(.*?)\s*\+\s*(-?\w+)$", inner):
            base, offset = match[1].strip(), int(match[2], 0)
        if base in self.registers:
            index, width = self.registers[base]
            expression = f"R[{index}]" if width == 8 else f"R[{index}].astype(u64)"
            if offset == 0:
                return expression
            return f"({expression} + {self.constant(u64(offset & (2**64 - 1)))})"
        value = self.symbols[base][0] if base in self.symbols else int(base, 0)
        return self.constant(u64(value + offset))

    # ---- results

    def assign(self, name: str, expression: str, kind=None):
        """register = expression, for the threads that execute it.

        Args:
            name: The register.
            expression: Its new value.
            kind: What the expression's NumPy type is, if not that of the register's bits.
        """
        if name == "_":
            return
        index, width = self.registers[name]
        # one whose factors change, or that is overwritten, is no product any more
        if self.products:
            self.products = {
                k: v
                for k, v in self.products.items()
                if k == self.current or (k != name and f"R[{index}]" not in v[0] + v[1])
            }
        if width and kind is not None:
            expression = self._fitted(expression, kind, width)
        if self.mask != "None":
            expression = f"select({self.mask}, {expression}, R[{index}])"
        self.lines.append(f"R[{index}] = {expression}")

    def _fitted(self, expression: str, kind: str, width: int) -> str:
        """The bits of a value of a type, sign or zero extended into a wider register"""
        wanted, size = KINDS[kind], np.dtype(KINDS[kind]).itemsize
        if size < width and kind.startswith("s"):
            return f"({expression}).astype(i{8 * width}).view(u{8 * width})"
        if wanted is not UNSIGNED[size]:
            expression = f"({expression}).view({NAMES[UNSIGNED[size]]})"
        return expression if size == width else f"({expression}).astype(u{8 * width})"

    def assign_all(self, targets: list[str]) -> None:
        """From v, in order"""
        for i, target in enumerate(targets):
            self.assign(target, f"v[{i}]")

    def only(self, parts: list[str], *allowed: str) -> None:
        """Raises for a modifier between name and type that is not known to do nothing else."""
        strange = [p for p in parts[1:-1] if p not in allowed]
        if strange:
            raise PTXError(f"{'.'.join(parts)} is not implemented (.{strange[0]})")

    def width(self, kind: str) -> int:
        return width_of(kind)
