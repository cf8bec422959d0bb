"""tools/verify/sanitize_cuda.cu as nvcc compiles it, on tests/ptx: it reaches every kernel, and
finds what is planted. On a GPU: gpu_check.py."""

import shutil
import subprocess
import sys
from pathlib import Path

import cuda_support
import pytest
from ptx_cuda_host import build
from ptx_cuda_program import ERROR_CODE, PROGRAM, SOURCES

missing = next(
    (name for name in ("nvcc", "g++") if not (cuda_support.find_tool(name) or shutil.which(name))),
    None,
)
pytestmark = pytest.mark.skipif(missing is not None, reason=f"needs {missing}")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sanitize")
    build(folder, 80, SOURCES)
    return folder


def run(program, *arguments):
    command = [
        sys.executable,
        str(Path(__file__).with_name("ptx_cuda_program.py")),
        str(program),
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
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
    command = [
        cuda_support.find_tool("nvcc"),
        "-std=c++17",
        "-arch=sm_90",
        "-Werror",
        "all-warnings",
        "-Xcompiler",
        "-Wall",
    ]
    done = subprocess.run(
        [*command, "-c", str(PROGRAM), "-o", str(tmp_path / "out.o")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
