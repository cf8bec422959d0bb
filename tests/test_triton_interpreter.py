"""Runs what gpu_check runs of Triton on small shapes in Triton's interpreter, so that it does not rot
where there is no GPU.

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


def run(tmp_path, *options):
    plain = ["-q", "-p", "no:cacheprovider", "-p", "seeding", "-c", "/dev/null", "--noconftest"]
    arguments = [*plain, "gpu/test_gpu_triton.py", *options]
    code = PYTEST.format(folder=str(HERE), paths=[str(HERE), str(HERE.parent)], arguments=arguments)
    # NumPy's products are small here: threads would only wait for each other.
    environment = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    status, output = fresh_support.run(code, tmp_path / "output", **environment)
    assert status == 0, output[-8000:]


def test_what_a_gpu_runs_is_right_for_some_activations(tmp_path):
    run(tmp_path, "-k", "identity or relu or variances or (silu and not fused_linear)")


@pytest.mark.slow
def test_what_a_gpu_runs_is_right(tmp_path):
    run(tmp_path)
