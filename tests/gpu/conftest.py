"""Tests that need a CUDA device. `make gpu-check` runs them; elsewhere they are skipped with the
reason."""

from pathlib import Path

import pytest
import torch
from gpucheck.child import every_kernel_compiles


def why_not():
    if torch.version.cuda is None:
        return "needs a GPU: this torch is built without CUDA"
    return None if torch.cuda.is_available() else "needs a GPU: torch finds no CUDA device"


def pytest_collection_modifyitems(items):
    if reason := why_not():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def kernels_compile():
    with every_kernel_compiles():
        yield
