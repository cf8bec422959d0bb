"""Runs the interpreted_*.py files, and what gpu_check runs of Triton on small shapes, so that it
does not rot where there is no GPU.

TRITON_INTERPRET must be set before triton is imported, hence processes of their own.
"""

from pathlib import Path

import fresh_support
import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
PYTEST = """
import os, sys
import pytest
os.chdir({folder!r})
sys.path[:0] = {paths!r}
sys.exit(pytest.main({arguments!r}))
"""


def run(tmp_path, *arguments):
    plain = ["-q", "-p", "no:cacheprovider", "-p", "seeding", "-c", "/dev/null", "--noconftest"]
    code = PYTEST.format(
        folder=str(HERE), paths=[str(HERE), str(HERE.parent)], arguments=[*plain, *arguments]
    )
    # NumPy's products are small here: threads would only wait for each other.
    environment = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    status, output = fresh_support.run(code, tmp_path / "output", **environment)
    assert status == 0, output[-8000:]


# What tests/test_ptx_triton.py and tests/test_ptx_producers.py run as compiled code is slow here, a
# second proof.
# A class each, so that `pytest --dist loadscope` runs them beside each other.


@pytest.mark.slow
class TestPerturb:
    def test_under_the_interpreter(self, tmp_path):
        run(tmp_path, "interpreted_perturb.py")


class TestLinear:
    def test_under_the_interpreter(self, tmp_path):
        run(tmp_path, "interpreted_linear.py")


@pytest.mark.slow
class TestActivation:
    def test_under_the_interpreter(self, tmp_path):
        run(tmp_path, "interpreted_expectation.py")


@pytest.mark.slow
class TestProducers:
    def test_under_the_interpreter(self, tmp_path):
        run(tmp_path, "interpreted_producers.py")


class TestWhatAGpuRuns:
    def test_under_the_interpreter(self, tmp_path):
        """Every test, for some of the activations; the interpreted_*.py files have all."""
        some = "identity or relu or variances or (silu and not fused_linear)"
        run(tmp_path, "gpu/test_gpu_triton.py", "-k", some)

    @pytest.mark.slow
    def test_whole_under_the_interpreter(self, tmp_path):
        run(tmp_path, "gpu/test_gpu_triton.py")


def test_no_file_is_left_out():
    text = Path(__file__).read_text()
    assert all(f'"{path.name}")' in text for path in HERE.glob("interpreted_*.py"))
