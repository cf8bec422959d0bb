"""The build: what it says, what it honours, and that a machine without a compiler still gets a package that works."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NO_COMPILER = {"CXX": "no-such-compiler", "NVCC": "no-such-nvcc", "DIPKERNELS_CPU": "", "DIPKERNELS_CUDA": ""}


def setup_py(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("environment, expected", [
    (dict(DIPKERNELS_CUDA="yes"), "DIPKERNELS_CUDA: expected 0, 1 or nothing, got 'yes'"),
    (dict(DIPKERNELS_CUDA="1", NVCC="no-such-nvcc"), "there is no nvcc"),
    (dict(DIPKERNELS_CPU="1", CXX="no-such-compiler"), "there is no C++ compiler"),
])  # fmt: skip
def test_build_refuses_what_it_cannot_do(environment, expected):
    status, output = setup_py("--version", **environment)
    assert status != 0 and expected in output


@pytest.mark.parametrize("environment, expected", [
    (dict(DIPKERNELS_CUDA="0"), ["CUDA kernels: no (DIPKERNELS_CUDA)", "CPU kernels: yes"]),
    (dict(DIPKERNELS_CPU="0", DIPKERNELS_CUDA="0"), ["CPU kernels: no (DIPKERNELS_CPU=0)"]),
    (dict(DIPKERNELS_CUDA=""), ["CUDA kernels:", "DIPKERNELS_CUDA=0|1 decides"]),
    (NO_COMPILER, ["no C++ compiler", "pure Python install"]),
])  # fmt: skip
def test_build_says_what_it_builds_and_why(environment, expected):
    status, output = setup_py("--version", **environment)
    assert status == 0 and all(text in output for text in expected)


def test_build_without_a_compiler_gives_a_package_that_works(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--target", tmp_path, ROOT],
        env={**os.environ, **NO_COMPILER}, check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert not list(tmp_path.glob("dipkernels/_C*"))
    code = """
import warnings, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import dipkernels as dip
    assert dip.__file__.startswith(FOLDER), dip.__file__
    layer = dip.DIPLinear(8, 4)
    for _ in range(3):
        layer(torch.ones(2, 8)).sum().backward()
assert sum("reference path" in str(w.message) for w in caught) == 1, caught
assert layer.log_variance.grad is not None
print(dip.env_report())
""".replace("FOLDER", repr(str(tmp_path)))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "no compiled library" in done.stdout


SOURCE_TREE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]  # as if never installed
import dipkernels, dipkernels.triton_kernels.mixtures as mixtures
print(dipkernels.__file__, mixtures.__file__)
"""


def test_the_source_tree_works_where_it_was_never_installed(tmp_path):
    """As `make gpu-check` runs it."""
    done = subprocess.run(
        [sys.executable, "-c", SOURCE_TREE],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        str(ROOT / "dipkernels" / "__init__.py"),
        str(ROOT / "triton_kernels" / "mixtures.py"),
    ]


def test_library_has_no_python_symbols_and_needs_torch_cpu_alone():
    library = ROOT / "dipkernels" / "_C.so"
    needed = subprocess.run(["readelf", "-d", library], check=True, capture_output=True, text=True).stdout
    names = {line.split("[")[1].rstrip("]") for line in needed.splitlines() if "NEEDED" in line}
    assert {name for name in names if "torch" in name or "cuda" in name or "python" in name} == {"libtorch_cpu.so"}
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True
    ).stdout
    assert not [line for line in symbols.splitlines() if line.split()[-1].startswith(("Py", "_Py"))]


def test_cuda_sources_see_no_torch():
    for path in [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*"), *(ROOT / "csrc" / "cpu").glob("*")]:
        assert "torch/" not in path.read_text(), path
