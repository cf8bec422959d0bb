"""tools/verify/sanitize_cuda.cu as nvcc compiles it, on tests/ptx: it reaches every kernel, and
finds what is planted. On a GPU: gpu_check.py."""

import pytest
from program_support import PYTHON, find_tool, needs, printed, ran
from ptx_cuda_host import build
from ptx_cuda_program import ERROR_CODE, PROGRAM, SOURCES

pytestmark = needs("nvcc", "g++")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sanitize")
    build(folder, 80, SOURCES)
    return folder


def run(program, *arguments):
    done = ran(PYTHON, "tests/ptx_cuda_program.py", program, *arguments)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_every_kernel_is_launched(program):
    """As many as there are: a new one that the program does not launch fails here. A plant, for
    nothing is looked at."""
    code, said = run(program, "--record", "exact", "uninitialised")
    (line,) = (line for line in said.splitlines() if line.startswith("kernels launched"))
    launched, of = (int(word) for word in line.split()[2::2])
    assert code == 0 and launched == of >= 40, said


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["exact", "guards"])
def test_every_kernel_stays_inside(program, mode):
    code, said = run(program, mode)
    assert code == 0 and "calls" in said, said


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, code, says",
    [
        (["exact", "overrun"], ERROR_CODE, "outside: byte"),
        (["guards", "overrun"], 1, "written outside of the tensor"),
        (["exact", "race"], ERROR_CODE, "race"),
    ],
)
def test_what_is_planted_is_found(program, arguments, code, says):
    got, said = run(program, *arguments)
    assert got == code and says in said, said


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["nothing"], ["exact", "nothing"]])
def test_wrong_arguments_are_refused(program, arguments):
    code, said = run(program, *arguments)
    assert code == 2 and "usage" in said


def test_the_program_compiles_for_a_gpu(tmp_path):  # by default too: a GPU's time is short
    options = ["-std=c++17", "-arch=sm_90", "-Werror", "all-warnings", "-Xcompiler", "-Wall"]
    printed(find_tool("nvcc"), *options, "-c", PROGRAM, "-o", tmp_path / "out.o")
