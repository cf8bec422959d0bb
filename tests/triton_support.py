"""What the Triton tests share: loading the kernels, and compiling a launch for a GPU that is not
there."""

import contextlib
import functools
import importlib
import importlib.util
import re
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from cuda_support import counted, read_sass
from program_support import printed
from source_support import ROOT

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1: there is nothing to compile", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

triton.knobs.compilation.disable_line_info = True  # nothing here reads it, and it takes time
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


class _Recorder:
    """Stands in for a kernel and keeps its launches."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


@contextlib.contextmanager
def standing_in(modules, of_kernel, arch, multiprocessors):
    """Inside, of_kernel(kernel) in place of each kernel of the modules, which are told of a GPU of
    this kind."""
    stubs = {
        "on_device": lambda tensor: contextlib.nullcontext(),
        "_architecture": lambda device: arch,
        "num_multiprocessors": lambda device: multiprocessors,
    }
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            for name, value in list(vars(module).items()):
                if isinstance(value, triton.runtime.JITFunction) and name.endswith("_kernel"):
                    patch.setattr(module, name, of_kernel(value))
                elif name in stubs:
                    patch.setattr(module, name, stubs[name])
        yield


@contextlib.contextmanager
def recorded_launches(*modules, arch=80):
    """The launches that host code makes inside, as (kernel, args, kwargs); nothing runs. Give it
    meta tensors."""
    launches = []
    with standing_in(modules, lambda kernel: _Recorder(kernel, launches), arch, 132):
        yield launches


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
        """Instructions by opcode: of the longest loop where there is one, else of the whole
        kernel."""
        opcodes, loops = read_sass(self.sass)
        if "EXIT" in opcodes:
            # What follows the last EXIT is the trap that pads the kernel.
            opcodes = opcodes[: len(opcodes) - opcodes[::-1].index("EXIT")]
        return counted(max(loops, key=len, default=opcodes))


def _run(tool: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return printed(path, *arguments)


@functools.cache
def _disassemble(cubin: bytes) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = _run("nvdisasm", "--no-dataflow", "-c", file.name)  # its analysis doubles the time
        return _run("cuobjdump", "-res-usage", file.name), sass


def specialised(kernel, args, kwargs, arch: int):
    """A launch as Triton's own launcher binds and specialises it: the bound arguments, their types,
    what tells two compiled kernels apart, and a function that compiles it."""
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    kwargs = {"debug": False, **kwargs}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **kwargs)
    key = (kernel, arch, str(specialization), str(options))
    options, signature, constexprs, attrs = kernel._pack_args(
        backend, kwargs, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constexprs, attrs)
    compiles = functools.partial(triton.compile, source, target=target, options=options.__dict__)
    return bound, signature, key, compiles


def compile_launch(launch, arch: int) -> Compiled:
    kernel, args, kwargs = launch
    compiled = specialised(kernel, args, kwargs, arch)[-1]()
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
