"""PTX text to kernels: parameters, registers, shared and local variables, basic blocks and where
their threads meet again."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .kinds import WINDOWS, PTXError, width_of

_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(")
_LABEL = re.compile(r"^([\w$]+):\s*")
_INSTRUCTION = re.compile(r"^(?:@(!?)\s*([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.S)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+"
    r"(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?([\w$]+)(?:\[(\d+)\])?"
)
_VARIABLE = re.compile(
    r"\.(shared|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?"
)
_DYNAMIC = re.compile(r"\.extern\s+\.shared\s+(?:\.align\s+\d+\s+)?\.b8\s+([\w$]+)\s*\[\s*\]")
_MODULE_VARIABLE = re.compile(
    r"\.global\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?\s*(=)?"
)
_LAUNCH_BOUND = re.compile(r"\.(?:max|req)ntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?")
LEAVES = ("bra", "ret", "exit")


@dataclass
class Instruction:
    opcode: str
    parts: list[str]  # of the opcode
    operands: list[str]
    guard: str | None  # predicate
    negated: bool


@dataclass
class Block:
    instructions: list[Instruction] = field(default_factory=list)
    next: tuple[int, ...] = ()


def split_operands(text: str) -> list[str]:
    parts, depth, current = [], 0, ""
    for char in text:
        depth += (char in "{[(") - (char in "}])")
        if char == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += char
    return [*parts, current.strip()] if current.strip() else parts


def _closing(text: str, start: int, opening: str, closing: str) -> int:
    depth = 0
    for match in re.compile(f"[{re.escape(opening + closing)}]").finditer(text, start):
        depth += 1 if match[0] == opening else -1
        if depth == 0:
            return match.start()
    raise PTXError("unbalanced brackets")


def split_module(text: str):
    """(what the kernels share, (name, parameters, directives, body) of every kernel)"""
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.S)
    text = re.sub(
        r'//[^\n]*|^[ \t]*\.(?:loc|file)\b[^\n]*|\.pragma\s+"[^"]*"\s*;', "", text, flags=re.M
    )
    text = re.sub(r"\.section\s[^{]*\{[^}]*\}", "", text)
    kernels, outside, position = [], "", 0
    while match := _ENTRY.search(text, position):
        close = _closing(text, match.end() - 1, "(", ")")
        start = text.index("{", close)
        end = _closing(text, start, "{", "}")
        kernels.append(
            (match[1], text[match.end() : close], text[close + 1 : start], text[start + 1 : end])
        )
        outside += text[position : match.start()]
        position = end + 1
    return Outside(outside + text[position:]), kernels


class Outside:
    """Between the kernels: the names of dynamic shared memory, and variables of the module, which
    begin as zeros.

    A variable with an initial value is left out: who reads it meets an unknown name.
    """

    def __init__(self, text: str):
        self.dynamic = _DYNAMIC.findall(text)
        self.variables: dict[str, int] = {}  # offsets
        end = 0
        for align, kind, name, count, value in _MODULE_VARIABLE.findall(text):
            if not value:
                end = -(-end // int(align or 16)) * int(align or 16)
                self.variables[name] = end
                end += width_of(kind) * int(count or 1)
        self.variable_bytes = end


def read_parameters(text: str) -> list[tuple[str, int, int]]:
    """(name, offset, bytes) of each"""
    parameters, offset = [], 0
    for one in split_operands(text):
        match = _PARAMETER.match(one)
        if not match:
            raise PTXError(f"parameter not understood: {one}")
        width = width_of(match[2])
        size, align = width * int(match[4] or 1), max(int(match[1] or 1), width)
        offset = -(-offset // align) * align
        parameters.append((match[3], offset, size))
        offset += size
    return parameters


def most_threads(directives: str) -> int | None:
    match = _LAUNCH_BOUND.search(directives)
    return match and int(match[1]) * int(match[2] or 1) * int(match[3] or 1)


class Body:
    """The blocks of a kernel; block number len(blocks) is its end."""

    def __init__(self, text: str, outside: Outside, parameters):
        self.symbols = {name: (offset, "param") for name, offset, _ in parameters}
        window = WINDOWS["variable"]
        self.symbols |= {
            name: (window + offset, "global") for name, offset in outside.variables.items()
        }
        self.registers: dict[str, tuple[int, int]] = {}  # name: (index, bytes; 0: predicate)
        self.shared_bytes = self.local_bytes = 0
        self.blocks, labels = [Block()], {}
        for statement in text.split(";"):
            statement = self._take_labels(statement.strip(), labels)
            if not statement:
                continue
            if statement[0] == ".":
                self._declare(statement)
                continue
            match = _INSTRUCTION.match(statement)
            if not match:
                raise PTXError(f"instruction not understood: {statement}")
            parts = match[3].replace("::", ".").split(".")
            instruction = Instruction(
                match[3], parts, split_operands(match[4]), match[2], match[1] == "!"
            )
            self.blocks[-1].instructions.append(instruction)
            if parts[0] in (*LEAVES, "trap"):
                self.blocks.append(Block())
        self.exit = len(self.blocks)
        self._link(labels)
        # Dynamic shared memory follows the static one, at a multiple of 128: kernels may count on
        # more than its declared alignment.
        if outside.dynamic:
            self.shared_bytes = -(-self.shared_bytes // 128) * 128
            self.symbols.update((name, (self.shared_bytes, "shared")) for name in outside.dynamic)

    def _take_labels(self, text: str, labels: dict[str, int]) -> str:
        """Without its labels and the braces of scopes"""
        while text:
            if text[0] in "{}":
                text = text[1:].lstrip()
            elif match := _LABEL.match(text):
                if self.blocks[-1].instructions:
                    self.blocks.append(Block())
                labels[match[1]] = len(self.blocks) - 1
                text = text[match.end() :]
            else:
                break
        return text

    def _declare(self, text: str) -> None:
        if match := re.match(r"\.reg\s+\.(\w+)\s+(.*)$", text, re.S):
            for name in split_operands(match[2]):
                ranged = re.match(r"([%\w$]+)<(\d+)>", name)
                names = [f"{ranged[1]}{i}" for i in range(int(ranged[2]))] if ranged else [name]
                for one in names:
                    known = self.registers.setdefault(
                        one, (len(self.registers), width_of(match[1]))
                    )
                    if known[1] != width_of(match[1]):
                        raise PTXError(
                            f"two scopes declare {one} with different types, which is not "
                            "implemented"
                        )
        elif match := _VARIABLE.match(text):
            align, size = int(match[2] or 1), width_of(match[3]) * int(match[5] or 1)
            counter = f"{match[1]}_bytes"
            start = -(-getattr(self, counter) // align) * align
            self.symbols[match[4]] = (start, match[1])
            setattr(self, counter, start + size)
        elif not re.match(r"\.(pragma|branchtargets)", text):
            raise PTXError(f"directive not implemented: {text[:60]}")

    def _link(self, labels: dict[str, int]) -> None:
        for i, block in enumerate(self.blocks):
            block.next = (i + 1,)
            last = block.instructions[-1] if block.instructions else None
            if last and last.parts[0] in LEAVES:
                target = labels[last.operands[0]] if last.parts[0] == "bra" else self.exit
                block.next = (target, i + 1) if last.guard else (target,)

    def meeting_points(self) -> list[int]:
        """The immediate post-dominator of every block: where its divergent threads meet."""
        n = self.exit + 1
        every = (1 << n) - 1
        of = [every] * n
        of[self.exit] = 1 << self.exit
        changed = True
        while changed:
            changed = False
            for i in range(n - 2, -1, -1):
                common = every
                for j in self.blocks[i].next:
                    common &= of[j]
                new = common | (1 << i)
                if new != of[i]:
                    of[i], changed = new, True
        sizes = [v.bit_count() for v in of]
        result = []
        for i in range(n - 1):
            strict = of[i] & ~(1 << i)
            # The nearest one is post-dominated by all the others.
            after = (j for j in range(n) if strict >> j & 1)
            result.append(max(after, key=lambda j: sizes[j], default=self.exit))
        return result

    def least_shared_access(self) -> int:
        """Bytes of the least access of shared memory, at most 4"""
        sizes = [4]
        for block in self.blocks:
            for instruction in block.instructions:
                op, parts = instruction.parts[0], instruction.parts
                if op in ("ldmatrix", "stmatrix", "wgmma"):
                    sizes.append(2)
                elif op in ("ld", "st") and "param" not in parts and "global" not in parts:
                    sizes.append(width_of(parts[-1]))
        return min(sizes)
