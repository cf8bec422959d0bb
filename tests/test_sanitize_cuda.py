"""scripts/sanitize_cuda.cu on the emulator: it reaches every kernel, and finds what is planted. On a GPU: gpu_check.py."""

import re
import shutil
import subprocess
from pathlib import Path

import cuda_support
import pytest

FOLDER = Path(__file__).parent / "cuda_emulator"
KERNEL = re.compile(r"^\S+ [tTwW] void dip::.*_kernel<.*>\(\S.*Params\)$", re.MULTILINE)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """With the address sanitizer where there is one: then `exact` sees each access outside, as compute-sanitizer does."""
    out = tmp_path_factory.mktemp("sanitize") / "sanitize_cuda"
    flags = ["-std=c++20", "-O0", "-ffp-contract=off", "-Wno-unknown-pragmas", "-DDIP_EMULATOR", "-fsanitize=address"]
    command = ["g++", *flags, f"-I{FOLDER}", str(FOLDER / "run_sanitize.cpp"), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in done.stderr and "san" in done.stderr:
        pytest.skip("needs g++'s address sanitizer")
    assert done.returncode == 0, done.stderr
    return out


def run(program, *arguments):
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_every_kernel_runs_and_stays_inside(program):
    """As many kernels as the object has: a new one that the program does not launch fails here."""
    symbols = subprocess.run(["nm", "-C", str(program)], capture_output=True, text=True, check=True).stdout
    kernels = set(KERNEL.findall(symbols))
    code, said = run(program, "exact")
    assert code == 0 and "calls" in said, said
    assert len(kernels) >= 40 and f"kernels launched: {len(kernels)}\n" in said


def test_a_planted_overrun_is_found(program):
    code, said = run(program, "exact", "overrun")
    assert code and "heap-buffer-overflow" in said
    code, said = run(program, "guards", "overrun")
    assert code == 1 and "written outside of the tensor" in said


@pytest.mark.slow
def test_patterns_around_every_tensor_stay(program):
    code, said = run(program, "guards")
    assert code == 0 and "calls" in said, said


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["exact", "nothing"]])
def test_wrong_arguments_are_refused(program, arguments):
    code, said = run(program, *arguments)
    assert code == 2 and "usage" in said


@pytest.mark.skipif(cuda_support.find_tool("nvcc") is None, reason="needs nvcc")
def test_the_program_compiles_for_a_gpu(tmp_path):
    command = [
        cuda_support.find_tool("nvcc"),
        "-std=c++17",
        "-arch=sm_90",
        "-Werror",
        "all-warnings",
        "-Xcompiler",
        "-Wall",
    ]
    source = FOLDER.parent.parent / "scripts" / "sanitize_cuda.cu"
    done = subprocess.run([*command, "-c", str(source), "-o", str(tmp_path / "out.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
