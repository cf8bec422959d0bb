"""Runs the interpreted_*.py files, and what gpu_check runs of Triton on small shapes, so that it
does not rot where there is no GPU.

TRITON_INTERPRET must be set before triton is imported, hence one process a file.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent


def run(path, *options):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "seeding",
        "-c",
        os.devnull,
    ]
    paths = os.pathsep.join((str(HERE.parent), str(HERE)))
    # NumPy's products are small here: threads would only wait for each other.
    environment = {
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [*command, "--noconftest", str(HERE / path), *options],
        env={**os.environ, **environment},
        cwd=(HERE / path).parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


# What tests/test_ptx_triton.py and tests/test_ptx_producers.py run as compiled code is slow here, a
# second proof.
# A class each, so that `pytest --dist loadscope` runs them beside each other.


@pytest.mark.slow
class TestPerturb:
    def test_under_the_interpreter(self):
        run("interpreted_perturb.py")


class TestLinear:
    def test_under_the_interpreter(self):
        run("interpreted_linear.py")


@pytest.mark.slow
class TestActivation:
    def test_under_the_interpreter(self):
        run("interpreted_expectation.py")


@pytest.mark.slow
class TestProducers:
    def test_under_the_interpreter(self):
        run("interpreted_producers.py")


class TestWhatAGpuRuns:
    def test_under_the_interpreter(self):
        """Of the fused linear's activations some; interpreted_linear.py has all."""
        run("gpu/test_gpu_triton.py", "-k", "not fused_linear or identity or relu")

    @pytest.mark.slow
    def test_whole_under_the_interpreter(self):
        run("gpu/test_gpu_triton.py")


def test_no_file_is_left_out():
    text = Path(__file__).read_text()
    assert all(f'run("{path.name}")' in text for path in HERE.glob("interpreted_*.py"))
