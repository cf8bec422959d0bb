"""Runs the interpreted_*.py files. TRITON_INTERPRET must be set before triton is imported, hence one process a file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
FILES = sorted(Path(__file__).parent.glob("interpreted_*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_triton_under_the_interpreter(path):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--noconftest", str(path)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=path.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
