"""benchmarks/gpucheck/forms.py: what it sets, it takes back; CUDA's part is stood in for."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from dipkernels import backends
from dipkernels.ops import registry

pytest.importorskip("triton")
PATH = Path(__file__).resolve().parent.parent / "benchmarks" / "gpucheck" / "forms.py"


def load():
    spec = importlib.util.spec_from_file_location("gpucheck_forms", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _choices():
    """What a test chose for another installation is forgotten."""
    yield
    registry.choose_all()


def test_forms_reach_the_kernels_and_are_taken_back(monkeypatch):
    from dipkernels.triton_kernels import perturb

    forms, state = load(), [1]
    functions = SimpleNamespace(
        dip_set_cuda_forms=lambda bits: state.__setitem__(0, bits), dip_cuda_forms=lambda: state[0]
    )
    library = backends.Library("none", cpu_capabilities=("portable",), cuda_archs=("90",))
    monkeypatch.setattr(backends, "library", lambda: library)
    monkeypatch.setattr(backends, "c_functions", lambda path: functions)
    found = {}

    def now():
        return state[0], perturb.P_FROM_END, perturb.SUMS_FROM_END, perturb.ONE_LAUNCH

    settings = (forms.walk(), forms.column_sum(), forms.triton_column_sum())
    for name, context in (item for each in settings for item in each.items()):
        with context():
            found[name] = now()
            assert backends.forced == ("triton" if name.startswith("Triton") else None)
    assert found == {
        "from the start": (0, False, False, False),
        "P from the end": (1, True, False, False),
        "from the end": (3, True, True, False),
        "two launches": (1, True, False, False),
        "last block": (5, True, False, True),
        "Triton, two launches": (0, False, False, False),
        "Triton, last program": (4, False, False, True),
    }
    assert now() == (1, False, False, False) and backends.forced is None
