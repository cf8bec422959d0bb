"""What nvcc makes of csrc/cuda: it compiles for every architecture, spills nothing, and keeps to
its issue slots."""

import re

import cuda_support
import gpu_expectation
import pytest
import torch
from program_support import PYTHON, find_tool, needs, printed

pytestmark = needs("nvcc")
needs_disassembler = needs("cuobjdump", "nvdisasm")  # of the CUDA toolkit or the triton package
NARROW = "Exactly<BFloat16, BFloat16, BFloat16, 8>"


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    cubin = tmp_path_factory.mktemp("cubin") / "perturb.cubin"
    cuda_support.compile_cubin(90, cubin)
    return cuda_support.read_kernels(cubin)


def find(kernels, *parts):
    (kernel,) = [k for k in kernels if all(part in k.name for part in parts)]
    return kernel


# Two rows of eight columns a turn.
@needs_disassembler
@pytest.mark.slow
@pytest.mark.parametrize(
    "form, mode", [("P", "true, false"), ("Q", "false, true"), ("PQ", "true, true")]
)
def test_cuda_rows_issue_slots(kernels, form, mode):
    loop = find(kernels, "perturb_rows_kernel", NARROW, f"8>, {mode}").loop
    slots = sum(loop.values()) / 16
    print(f"{form}: {slots:.1f} issue slots per element")
    # More would be slower than docs/measured_gpu_expectation.md says; many fewer mean that the
    # wrong loop was read.
    assert abs(slots - gpu_expectation.SLOTS[form, "CUDA"]) <= 2
    assert loop["IMAD.WIDE.U32"] in range(36, 44)


@needs_disassembler
@pytest.mark.slow
def test_cuda_rows_move_sixteen_bytes(kernels):
    loop = find(kernels, "perturb_rows_kernel", NARROW, "8>, true, false").loop
    assert (
        sum(n for op, n in loop.items() if op.startswith("LDG"))
        == sum(n for op, n in loop.items() if op.startswith("LDG.E.128"))
        == 2
    )
    assert (
        sum(n for op, n in loop.items() if op.startswith("STG"))
        == sum(n for op, n in loop.items() if op.startswith("STG.E.128"))
        == 2
    )


@needs_disassembler
@pytest.mark.slow
def test_cuda_takes_one_special_function_for_two_elements(kernels):
    """The reciprocal root, which is corrected; no approximate logarithm, sine or cosine is in the
    loop."""
    loop = find(kernels, "perturb_rows_kernel", NARROW, "8>, true, false").loop
    assert {op: n for op, n in loop.items() if op.startswith("MUFU")} == {"MUFU.RSQ": 8}


@needs_disassembler
@pytest.mark.slow
@pytest.mark.parametrize("arch", cuda_support.ARCHS)
def test_cuda_compiles_and_spills_nothing_for(arch, tmp_path):
    cuda_support.compile_cubin(arch, tmp_path / "perturb.cubin")
    kernels = cuda_support.read_kernels(tmp_path / "perturb.cubin")
    assert len(kernels) >= 40
    spilled = {k.name: k.stack for k in kernels if k.stack or re.search(r"\b(STL|LDL)\b", k.sass)}
    assert not spilled


@pytest.mark.slow
def test_cuda_library_loads_on_any_torch(tmp_path):
    """All architectures and PTX, linked with static cudart as setup.py does: nothing is left
    undefined."""
    gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in cuda_support.ARCHS]
    gencode.append(
        f"-gencode=arch=compute_{cuda_support.ARCHS[-1]},code=compute_{cuda_support.ARCHS[-1]}"
    )
    library = tmp_path / "libperturb.so"
    shared = ["-shared", "-cudart", "static", "-Xlinker", "-z,defs"]
    nvcc = [find_tool("nvcc"), *cuda_support.FLAGS, *gencode, *shared]
    glue = tmp_path / "glue.cu"
    glue.write_text(
        f'#include "{cuda_support.SOURCE}"\nextern "C" __attribute__((visibility("default"))) '
        "const char* problem() { return dip::describe(cudaFree(nullptr)); }\n"
    )
    printed(*nvcc, glue, "-o", library)
    code = f"import torch, ctypes; f = ctypes.CDLL({str(library)!r}).problem; f.restype = ctypes.c_char_p; print(f())"
    answer = printed(PYTHON, "-c", code)
    assert torch.cuda.is_available() or "driver" in answer
    assert library.stat().st_size < 64 * 2**20
