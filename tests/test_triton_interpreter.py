"""Runs the interpreted_*.py files, and what gpu_check runs of Triton on small shapes, so that it does not rot where there is no GPU.

TRITON_INTERPRET must be set before triton is imported, hence one process a file.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
FILES = [*sorted(HERE.glob("interpreted_*.py")), HERE / "gpu" / "test_gpu_triton.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_triton_under_the_interpreter(path):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--noconftest", str(path)],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(HERE.parent)},
        cwd=path.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
