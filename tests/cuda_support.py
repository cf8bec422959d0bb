"""What the CUDA tests share: nvcc, the disassembler, and counting instructions in a kernel's inner
loop."""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from program_support import find_tool, printed, ran
from source_support import ROOT

SOURCE = ROOT / "csrc" / "cuda" / "perturb.cu"
ARCHS = (80, 86, 89, 90, 100, 120)
FLAGS = (
    "-std=c++17",
    "-O3",
    "-Xcompiler",
    "-fPIC",
    "-Xcompiler",
    "-fvisibility=hidden",
    "-fmad=false",
    "--expt-relaxed-constexpr",
)


@dataclass(frozen=True)
class Kernel:
    """One kernel of a cubin."""

    name: str  # demangled, without the namespaces
    registers: int
    stack: int  # bytes: spills lie there
    sass: str

    @property
    def loop(self) -> Counter:
        """Instructions, by opcode, of the longest loop that does not contain a barrier."""
        _, loops = read_sass(self.sass)
        loops = [loop for loop in loops if not any(op.startswith("BAR") for op in loop)]
        return counted(max(loops, key=len, default=[]))


_INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Z0-9_.]+)?)(.*?);"
)


def read_sass(sass: str) -> tuple[list[str], list[list[str]]]:
    """The opcodes of a kernel in order, and those of each loop."""
    opcodes, labels, loops = [], {}, []
    for line in sass.splitlines():
        if label := re.match(r"^\s*(\.L_\w+):", line):
            labels[label[1]] = len(opcodes)
        elif instruction := _INSTRUCTION.match(line):
            opcode, target = instruction[1], re.search(r"\.L_\w+", instruction[2])
            start = labels.get(target[0]) if target and opcode.startswith("BRA") else None
            # the one that pads a kernel branches to itself
            is_loop = start is not None and start < len(opcodes)
            opcodes.append(opcode)
            if is_loop:
                loops.append(opcodes[start:])
    return opcodes, loops


def counted(opcodes: list[str]) -> Counter:
    return Counter(op for op in opcodes if op != "NOP")


def compile_cubin(arch: int, cubin: Path) -> None:
    options = "-cubin", f"-arch=sm_{arch}"
    result = ran(find_tool("nvcc"), *FLAGS, *options, SOURCE, "-o", cubin)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr, result.stderr


def read_kernels(cubin: Path) -> list[Kernel]:
    usage = printed(find_tool("cuobjdump"), "-res-usage", cubin, stderr=subprocess.STDOUT)
    code = printed(find_tool("nvdisasm"), "-c", cubin)
    sections = dict(
        re.findall(
            r"^\s*\.section\s+\.text\.(\w+),.*?\n(.*?)(?=^\s*\.section|\Z)", code, re.M | re.S
        )
    )
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", usage)
    names = printed("c++filt", input="\n".join(f[0] for f in found))
    kernels = []
    for (mangled, registers, stack), name in zip(found, names.splitlines(), strict=True):
        name = (
            name.replace("dip::(anonymous namespace)::", "")
            .replace("dip::", "")
            .removeprefix("void ")
            .split(">(")[0]
        )
        kernels.append(Kernel(name, int(registers), int(stack), sections[mangled]))
    return kernels


def check_last_rows(u, seed, first, standard_normal):
    """u, made of zeros and of ones as sigma by the launch's last blocks alone, is z in the last
    rows that they wrote, from the column `first` on."""
    inner = u.shape[2] if u.dim() == 3 else 1
    written = u[:, first:].ne(0).any(1).nonzero()
    assert u.numel() > 2**31 and written[-1][0] == u.shape[0] - 1
    for at in written[-3:].tolist():
        row = at[0] * inner + (at[1] if inner > 1 else 0)
        got = u[at[0], first:] if inner == 1 else u[at[0], first:, at[1]]
        want = standard_normal(seed, 1, u.shape[1] - first, row, first)[0]
        assert ((got.double() - want).abs() - 2.0**-8 * want.abs()).max() <= 4e-6
