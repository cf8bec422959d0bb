"""What the Triton tests share: loading the kernels, and compiling a launch for a GPU that is not
there."""

import contextlib
import functools
import importlib
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

ROOT = Path(__file__).resolve().parent.parent
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may use


def load_kernels(*names: str):
    """Modules of triton_kernels, from the source tree: they need neither an installed nor a built
    package."""
    package = "triton_kernels_under_test"
    if package not in sys.modules:
        folder = ROOT / "triton_kernels"
        spec = importlib.util.spec_from_file_location(
            package, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules[package] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[package])
    return [importlib.import_module(f"{package}.{name}") for name in names]


def load_reference():
    spec = importlib.util.spec_from_file_location(
        "reference_under_test", ROOT / "dipkernels" / "reference.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Recorder:
    """Stands in for a kernel and keeps its launches."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


@contextlib.contextmanager
def recorded_launches(*modules):
    """The launches that host code makes inside, as (kernel, args, kwargs); nothing runs. Give it
    meta tensors."""
    launches, replaced = [], []
    for module in modules:
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.runtime.JITFunction) and name.endswith("_kernel"):
                replaced.append((module, name, value))
                setattr(module, name, _Recorder(value, launches))
            elif name == "on_device":
                replaced.append((module, name, value))
                setattr(module, name, lambda tensor: contextlib.nullcontext())
    try:
        yield launches
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch."""

    name: str
    ptx: str
    sass: str
    shared: int  # bytes
    registers: int
    spills: int  # bytes of spill stores and loads
    stack: int  # bytes
    num_warps: int

    def count(self) -> Counter:
        """Instructions by opcode: of the hottest loop where there is one, else of the whole
        kernel."""
        return count_instructions(self.sass)


def _run(tool: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


@functools.cache
def _disassemble(cubin: bytes) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = _run("nvdisasm", "--no-dataflow", "-c", file.name)  # its analysis doubles the time
        return _run("cuobjdump", "-res-usage", file.name), sass


def compile_launch(launch, arch: int) -> Compiled:
    kernel, args, kwargs = launch
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    kwargs = {"debug": False, **kwargs}
    bound, specialization, options = create_function_from_signature(
        kernel.signature, kernel.params, backend
    )(*args, **kwargs)
    options, signature, constexprs, attrs = kernel._pack_args(
        backend, kwargs, bound, specialization, options
    )
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs, attrs), target=target, options=options.__dict__
    )
    usage, sass = _disassemble(compiled.asm["cubin"])
    resources = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    spills = sum(4 for _ in re.finditer(r"\b(?:STL|LDL)\b", sass))
    return Compiled(
        kernel.__name__,
        compiled.asm["ptx"],
        sass,
        compiled.metadata.shared,
        resources["REG"],
        spills,
        resources["STACK"] + resources["LOCAL"],
        compiled.metadata.num_warps,
    )


_INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Z0-9_.]+)?)(.*?);"
)


def count_instructions(sass: str) -> Counter:
    lines, labels, loops = [], {}, []
    for line in sass.splitlines():
        if label := re.match(r"^\s*(\.L_\w+):", line):
            labels[label[1]] = len(lines)
        elif instruction := _INSTRUCTION.match(line):
            opcode, rest = instruction[1], instruction[2]
            target = re.search(r"\(?(\.L_\w+)\)?", rest)
            if (
                opcode.startswith("BRA")
                and target
                and target[1] in labels
                and labels[target[1]] < len(lines)
            ):
                loops.append((labels[target[1]], len(lines) + 1))
            lines.append(opcode)
    if loops:
        start, end = max(loops, key=lambda loop: loop[1] - loop[0])
        lines = lines[start:end]
    elif "EXIT" in lines:
        # What follows the last EXIT is the trap that pads the kernel.
        lines = lines[: len(lines) - lines[::-1].index("EXIT")]
    return Counter(op for op in lines if op != "NOP")
